"""How fast are quantized matmuls on the attached accelerator, next to XLA's bfloat16?

    pip install 'jaxcompress[cuda12]'
    python benchmarks/execute_gpu.py [--width 8192] [--repeats 30] [--json PATH]

`x @ w` with w `(width, width)`: int8 weights and activations (per token, dynamic) for 4,096 rows,
int8 and int4 weights, per channel and in groups of 128, for 8. Medians over interleaved repeats,
each of ten calls in flight; `times_bf16` is bfloat16's median over the contender's.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from jaxcompress import quantize
from jaxcompress.numerics import Format, PerChannel, PerGroup, PerToken, int4, int8

BF16, CALLS = jnp.bfloat16, 10
INT8 = Format(int8, PerChannel(), scale_dtype=BF16)
RULES = {
    "few": {
        "int8 weights": quantize.Rule(weights=INT8),
        "int4 weights": quantize.Rule(weights=Format(int4, PerChannel(), scale_dtype=BF16)),
        "int4 g128 weights": quantize.Rule(weights=Format(int4, PerGroup(128), scale_dtype=BF16)),
    },
    "many": {
        "int8 x int8": quantize.Rule(weights=INT8, activations=Format(int8, PerToken())),
        "int8 weights": quantize.Rule(weights=INT8),
    },
}


def matmul(params, x):
    return x @ params["kernel"]


def contenders(rows: int, width: int, rules):
    """Build `{name: function of nothing that starts a call}`."""
    x = jax.random.normal(jax.random.key(0), (rows, width), BF16)
    params = {"kernel": jax.random.normal(jax.random.key(1), (width, width), BF16)}
    found = {"bf16": (jax.jit(matmul), params)}
    for name, rule in rules.items():
        q = quantize.ptq(matmul, params, [x[:8]], quantize.Policy((rule,))).params
        found[name] = (jax.jit(quantize.execute(matmul)), q)
    return {name: lambda f=f, p=p: f(p, x) for name, (f, p) in found.items()}


def measure(calls, repeats: int):
    """Time each contender, taking turns, after a warm-up."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready([call() for _ in range(CALLS)])
            seconds[name].append((time.perf_counter() - start) / CALLS)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        name: {"us": round(1e6 * m, 1), "times_bf16": round(medians["bf16"] / m, 2)}
        for name, m in medians.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    report = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "width": args.width,
        "8 rows": measure(contenders(8, args.width, RULES["few"]), args.repeats),
        "4096 rows": measure(contenders(4096, args.width, RULES["many"]), args.repeats),
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
