"""What do shrunk models gain on this CPU, and how long does it take to find and shrink them?

    python benchmarks/shrink_cpu.py [--repeats 15] [--json PATH]

A ResNet-20 (batch 64) shrunk to 2.1 times fewer multiply-adds, with any numbers of channels and
with multiples of 8 inside of blocks, and an MLP (1024 to 4096 and back, batch 256) at half its
multiply-adds: the least wall clock of interleaved calls, and the least processor time, which other
work on the machine disturbs less. `of_macs` is the speed-up over the ratio of multiply-adds.

Then the processor time of `structured.groups`, `choose` and `shrink` on shapes, beyond that of
`jax.make_jaxpr` of the same: ResNet-20, and Llama-style transformers of 24 layers and width 4096,
unrolled and scanned, whose MLPs shrink so that 70 % of the params stay.
"""

import argparse
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


def speed(model, budget, repeats, *, bounds=None, round_to=1):
    """Time a model beside what is left of it within a budget."""
    fn, params, x = model
    groups = structured.groups(fn, params, x, round_to=round_to)
    scores = structured.importance(groups, params)
    keep = structured.choose(groups, scores, budget=budget, scope="local", bounds=bounds)
    small, fewer = structured.rebuild(fn, keep), structured.slice_params(params, keep)
    sizes = [graph.trace(f, p, x).flops for f, p in ((fn, params), (small, fewer))]
    calls = [(jax.jit(fn), params), (jax.jit(small), fewer)]
    dense, cut = interleaved(
        [lambda c=c, p=p: c(p, x).block_until_ready() for c, p in calls], repeats
    )
    macs = sizes[0] / sizes[1]
    return {
        "macs": round(macs, 2),
        **{
            clock: {
                "ms": [round(1e3 * dense[clock], 2), round(1e3 * cut[clock], 2)],
                "speed_up": round(dense[clock] / cut[clock], 2),
                "of_macs": round(dense[clock] / cut[clock] / macs, 2),
            }
            for clock in CLOCKS
        },
    }


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
    macs = structured.Flops(1 / 2.1)
    report = {
        "jax": jax.__version__,
        "analysis [s]": {
            "ResNet-20": analysis(*resnet20(), by_position(macs)),
            "24 layers, scanned": analysis(*llama(True), by_position(structured.Params(0.7))),
            "24 layers, unrolled": analysis(*llama(False), by_position(structured.Params(0.7))),
        },
        "speed": {
            "ResNet-20": speed(resnet20(), macs, args.repeats),
            "ResNet-20, multiples of 8 inside of blocks": speed(
                resnet20(), macs, args.repeats, bounds={"residual": (1.0, 1.0)}, round_to=8
            ),
            "MLP": speed(mlp(), structured.Flops(0.5), args.repeats),
            "MLP, multiples of 64": speed(mlp(), structured.Flops(0.5), args.repeats, round_to=64),
        },
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
