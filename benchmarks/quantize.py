"""How fast is a tree of float32 weights quantized, next to copying it?

    python benchmarks/quantize.py [--megabytes 512] [--repeats 7] [--json PATH]

Reports GB/s of float32 read, as medians over interleaved repeats, and each median's ratio to
`jnp.copy` of the same tree in the same run. Every contender is jitted over the whole tree.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from jaxcompress import numerics, quantize, tree
from jaxcompress.quantize import presets

WIDTH = 4096
int8_g128, int4_g128 = (
    quantize.Policy((quantize.Rule(weights=numerics.Format(qtype, numerics.PerGroup(128))),))
    for qtype in (numerics.int8, numerics.int4)
)
CONTENDERS = {
    "copy": lambda params: jax.tree.map(jnp.copy, params),
    "int8 per channel": lambda params: quantize.pack(params, presets.int8_weights),
    "int8 g128": lambda params: quantize.pack(params, int8_g128),
    "int4 g128, packed": lambda params: quantize.pack(params, int4_g128),
}


def make_params(megabytes: int):
    """Make kernels of 64 MiB, `(in, out) = (4096, 4096)`."""
    keys = jax.random.split(jax.random.key(0), max(1, megabytes * 2**20 // (4 * WIDTH**2)))
    return {
        f"layer_{i}": {"kernel": jax.random.normal(key, (WIDTH, WIDTH))}
        for i, key in enumerate(keys)
    }


def measure(contenders, params, repeats: int) -> dict[str, list[float]]:
    """Time each contender `repeats` times, taking turns, after one warm-up call each."""
    for function in contenders.values():
        jax.block_until_ready(function(params))
    seconds = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, function in contenders.items():
            start = time.perf_counter()
            result = jax.block_until_ready(function(params))
            seconds[name].append(time.perf_counter() - start)
            del result
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()

    params = make_params(args.megabytes)
    jitted = {name: jax.jit(function) for name, function in CONTENDERS.items()}
    read = tree.nbytes(params)
    medians = {
        name: statistics.median(times)
        for name, times in measure(jitted, params, args.repeats).items()
    }
    report = {
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "bytes_read": read,
        "results": {
            name: {
                "gb_per_s": round(read / median / 1e9, 2),
                "ratio_to_copy": round(medians["copy"] / median, 2),
                "bytes_written": tree.nbytes(jax.eval_shape(CONTENDERS[name], params)),
            }
            for name, median in medians.items()
        },
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
