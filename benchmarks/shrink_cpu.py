"""What do shrunk models gain on this CPU, and how long does it take to find and shrink them?

    python benchmarks/shrink_cpu.py [--repeats 15] [--json PATH]

A ResNet-20 (batch 64) shrunk to 2.1 times fewer multiply-adds: any numbers of channels, multiples
of 8 inside of blocks, and multiples of 8 or 16 inside of what is left without three blocks, those
that `examples/shrink_resnet.py --drop 3` finds to matter least. An MLP (1024 to 4096 and back,
batch 256) at half its multiply-adds. The least wall clock of interleaved calls, and the least
processor time, which other work on the machine disturbs less. `of_macs` is the speed-up over the
ratio of multiply-adds. `convolutions` has why channels alone gain little: the speed-up of bare
3 x 3 convolutions of fewer channels beside that of their multiply-adds.

Then the processor time of `structured.groups`, `choose` and `shrink` on shapes, beyond that of
`jax.make_jaxpr` of the same: ResNet-20, and Llama-style transformers of 24 layers and width 4096,
unrolled and scanned, whose MLPs shrink so that 70 % of the params stay.
"""

import argparse
import functools
import json
import pathlib
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from models.llama import Llama, LlamaConfig
from models.resnet import CifarResNet

from jaxcompress import adapters, graph, structured

WIDTHS = (4096, 1024) * 3
BLOCKS = ("params/layer1_0", "params/layer1_1", "params/layer2_1")
WHOLE = {"residual": (1.0, 1.0)}
CHANNELS = {  # by size of the image: in and out of the network's convolution, then fewer
    32: ((16, 16), (11, 11), (16, 8), (8, 16), (8, 8)),
    16: ((32, 32), (23, 23), (32, 16), (16, 32), (16, 16)),
    8: ((64, 64), (45, 45), (64, 32), (32, 64), (32, 32)),
}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
WIDE = LlamaConfig(
    vocab=32_000,
    dim=4096,
    layers=24,
    heads=32,
    kv_heads=8,
    head_dim=128,
    hidden=14_336,
    dtype=jnp.bfloat16,
)


class Mlp(nn.Module):
    """6 dense layers, ReLU between."""

    @nn.compact
    def __call__(self, x):
        """Run the layers."""
        for i, width in enumerate(WIDTHS):
            x = nn.Dense(width, name=f"layer_{i}")(x)
            x = nn.relu(x) if i < len(WIDTHS) - 1 else x
        return x


def resnet20():
    """Give fn, params and a batch of images."""
    module = CifarResNet(blocks=3)
    x = jax.random.normal(jax.random.key(0), (64, 32, 32, 3))
    return *adapters.from_linen(module, module.init(jax.random.key(1), x), train=False), x


def mlp():
    """Give fn, params and a batch."""
    x = jax.random.normal(jax.random.key(0), (256, 1024))
    return *adapters.from_linen(Mlp(), Mlp().init(jax.random.key(1), x)), x


def speed(model, budget, repeats, *, drop=(), bounds=None, round_to=1):
    """Time a model beside what is left of it within a budget."""
    fn, params, x = model
    total = graph.trace(fn, params, x).flops
    small, fewer = fn, params
    if drop:
        small, fewer, _ = structured.drop_layers(fn, params, drop, x)
    groups = structured.groups(small, fewer, x, round_to=round_to)
    keep = structured.choose(
        groups,
        structured.importance(groups, fewer),
        budget=structured.Flops(int(budget * total)),
        scope="local",
        bounds=bounds,
    )
    small, fewer = structured.rebuild(small, keep), structured.slice_params(fewer, keep)
    return compared(
        (jax.jit(fn), params),
        (jax.jit(small), fewer),
        x,
        total / graph.trace(small, fewer, x).flops,
        repeats,
    )


def compared(dense, cut, x, macs, repeats):
    """Time two calls in turns, and compare their ratio with that of their multiply-adds."""
    times = interleaved(
        [lambda f=f, p=p: f(p, x).block_until_ready() for f, p in (dense, cut)], repeats
    )
    row = {"macs": round(macs, 2)}
    for clock in CLOCKS:
        before, after = (one[clock] for one in times)
        row[clock] = {
            "ms": [round(1e3 * before, 2), round(1e3 * after, 2)],
            "speed_up": round(before / after, 2),
            "of_macs": round(before / after / macs, 2),
        }
    return row


def convolutions(repeats):
    """Time bare convolutions of fewer channels than those of a ResNet-20."""
    rows = {}
    for size, (dense, *fewer) in CHANNELS.items():
        for channels in fewer:
            calls = []
            for n_in, n_out in (dense, channels):
                x, w = jnp.ones((64, size, size, n_in)), jnp.ones((3, 3, n_in, n_out))
                calls.append(functools.partial(_convolved, x, w))
            before, after = (one["wall"] for one in interleaved(calls, repeats))
            name = f"{size} x {size}, {dense[0]} -> {dense[1]} to {channels[0]} -> {channels[1]}"
            macs = dense[0] * dense[1] / (channels[0] * channels[1])
            rows[name] = {"macs": round(macs, 2), "speed_up": round(before / after, 2)}
    return rows


@jax.jit
def _convolution(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _convolved(x, w):
    _convolution(x, w).block_until_ready()


def interleaved(calls, repeats):
    """Give each call's least times, taking turns, after two warm-up calls."""
    for call in calls * 2:
        call()
    seconds = [{clock: [] for clock in CLOCKS} for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, seconds, strict=True):
            start = {clock: read() for clock, read in CLOCKS.items()}
            call()
            for clock, read in CLOCKS.items():
                taken[clock].append(read() - start[clock])
    return [{clock: min(times) for clock, times in taken.items()} for taken in seconds]


def analysis(fn, params, x, choose):
    """Time finding, choosing and shrinking on shapes."""
    params, x = jax.eval_shape(lambda: (params, x)) if _concrete(params) else (params, x)
    trace, _ = timed(lambda: jax.make_jaxpr(fn)(params, x))
    jax.clear_caches()
    find, groups = timed(lambda: structured.groups(fn, params, x))
    pick, keep = timed(lambda: choose(groups))
    cut, _ = timed(lambda: structured.shrink(fn, params, keep, x))
    parts = {"make_jaxpr": trace, "groups": find, "choose": pick, "shrink": cut}
    parts["beyond_tracing"] = find + pick + cut - trace
    return {name: round(seconds, 2) for name, seconds in parts.items()}


def _concrete(params):
    return not isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)


def timed(call):
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def by_position(budget):
    """Choose with scores that need no weights, of all groups that are MLPs' or channels."""

    def choose(groups):
        scores = {
            name: np.tile(np.arange(group.size, dtype=float), (*group.layers, 1))
            for name, group in groups.items()
            if group.role in ("hidden", "channels")
        }
        return structured.choose(groups, scores, budget=budget, scope="local")

    return choose


def llama(scan):
    """Give the wide transformer as shapes."""
    module = Llama(LlamaConfig(**{**vars(WIDE), "scan": scan}))
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), tokens)
    return *adapters.from_linen(module, variables), tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    resnet, less = resnet20(), 1 / 2.1
    macs = structured.Flops(less)
    report = {
        "jax": jax.__version__,
        "analysis [s]": {
            "ResNet-20": analysis(*resnet, by_position(macs)),
            "24 layers, scanned": analysis(*llama(True), by_position(structured.Params(0.7))),
            "24 layers, unrolled": analysis(*llama(False), by_position(structured.Params(0.7))),
        },
        "speed": {
            "ResNet-20": speed(resnet, less, args.repeats),
            "ResNet-20, multiples of 8 inside of blocks": speed(
                resnet, less, args.repeats, bounds=WHOLE, round_to=8
            ),
            **{
                f"ResNet-20, without 3 blocks, multiples of {n} inside of others": speed(
                    resnet, less, args.repeats, drop=BLOCKS, bounds=WHOLE, round_to=n
                )
                for n in (8, 16)
            },
            "MLP": speed(mlp(), 0.5, args.repeats),
            "MLP, multiples of 64": speed(mlp(), 0.5, args.repeats, round_to=64),
        },
        "convolutions": convolutions(args.repeats),
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
