"""How long is a step of quantization-aware training, next to a float32 step and to Qwix's?

    python benchmarks/qat.py [--width 1024] [--batch 512] [--repeats 7] [--json PATH]

An MLP of 8 layers, `width` and `4 width` in turn, ReLU between; int8 weights per output and int8
activations per token, ranges found in each call. A step is loss, gradients and SGD, jitted and
donated. Reports medians over interleaved repeats, and the median of each repeat's ratio, by the
wall's clock and by the process's (which a busy machine disturbs less). Qwix (`pip install qwix`)
is left out where it is not installed.
"""

import argparse
import importlib.util
import json
import pathlib
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcompress import adapters, numerics, quantize

LAYERS = 8


class Mlp(nn.Module):
    """8 dense layers without biases, of `width` and `4 width` in turn."""

    width: int

    @nn.compact
    def __call__(self, x):
        """Run the layers."""
        for i in range(LAYERS):
            x = nn.Dense(self.width * (1 if i % 2 else 4), use_bias=False, name=f"layer_{i}")(x)
            x = nn.relu(x) if i < LAYERS - 1 else x
        return x


def qwix_functions(module, x):
    """Build Qwix's training mode (integer forward pass), on the same variables."""
    if importlib.util.find_spec("qwix") is None:
        return {}
    import qwix

    rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8")
    model = qwix.quantize_model(module, qwix.QtProvider([rule]))
    return {"qwix": model.apply}


def make_step(fn):
    """Compile loss, gradients and SGD, params donated."""

    def step(params, x, y):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((fn(p, x) - y) ** 2))(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), loss

    return jax.jit(step, donate_argnums=0)


def measure(steps, params, x, y, repeats):
    """Time each step `repeats` times, taking turns, after two warm-up calls each."""
    state = {name: jax.tree.map(jnp.copy, params) for name in steps}
    seconds = {name: [] for name in steps}
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter(), time.process_time()
            state[name], _ = jax.block_until_ready(step(state[name], x, y))
            end = time.perf_counter(), time.process_time()
            if repeat >= 2:
                seconds[name].append([b - a for a, b in zip(start, end, strict=True)])
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()

    module = Mlp(args.width)
    x, y = jax.random.normal(jax.random.key(0), (2, args.batch, args.width))
    fn, params = adapters.from_linen(module, module.init(jax.random.key(1), x))
    int8 = numerics.int8
    rule = quantize.Rule(
        weights=numerics.Format(int8, numerics.PerChannel()),
        activations=numerics.Format(int8, numerics.PerToken()),
    )
    functions = {
        "float32": fn,
        "jaxcompress": quantize.train(fn, quantize.Policy((rule,))),
        "jaxcompress, integers": quantize.train(fn, quantize.Policy((rule,)), integers=True),
        **qwix_functions(module, x),
    }
    exact = fn(params, x)
    errors = {
        name: float(jnp.linalg.norm(jax.jit(f)(params, x) - exact) / jnp.linalg.norm(exact))
        for name, f in functions.items()
    }
    steps = {name: make_step(f) for name, f in functions.items()}
    seconds = measure(steps, params, x, y, args.repeats)

    def ratio(name, peer, clock):
        pairs = zip(seconds[name], seconds[peer], strict=True)
        return round(statistics.median(a[clock] / b[clock] for a, b in pairs), 3)

    def results(name):
        times = seconds[name]
        entry = {"output_error": round(errors[name], 5)}
        for clock, label in enumerate(("wall", "processor")):
            entry[f"{label}_ms"] = round(1e3 * statistics.median(t[clock] for t in times), 1)
            for peer in {"float32", "qwix"} & set(seconds):
                entry[f"{label}_ratio_to_{peer}"] = ratio(name, peer, clock)
        return entry

    report = {
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "results": {name: results(name) for name in seconds},
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
