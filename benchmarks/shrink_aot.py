"""What does a Llama with half of its MLP units cost, by the compiler of a TPU?

    pip install 'jaxcompress[tpu]'
    python benchmarks/shrink_aot.py [--layers 16] [--targets tpu-v5e ...] [--json PATH]

Shapes of Llama 3.2 1B (scanned layers, bfloat16), one token for each of 8 sequences, as a decoding
step without its cache: memory-bound. Every layer keeps half of its hidden units, chosen and shrunk
on shapes. Compiled ahead of time for targets that are not attached; times are the compiler's own
estimates, none is a measurement. `of_bytes` is the fall in time over the fall in bytes of params.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from models.llama import LLAMA_1B, Llama

from jaxcompress import adapters, graph, structured


def shrunk(fn, params, tokens):
    """Keep half of the hidden units of every layer, on shapes."""
    groups = structured.groups(fn, params, tokens)
    hidden = [group for group in groups.values() if group.role == "hidden"]
    keep = structured.keep(groups, {g.name: np.arange(g.size // 2) for g in hidden})
    small, fewer, certificate = structured.shrink(fn, params, keep, tokens)
    return small, fewer, certificate, {g.name: (g.size, g.layers) for g in hidden}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LLAMA_1B.layers)
    parser.add_argument("--targets", nargs="+", default=["tpu-v5e", "tpu-v6e"])
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    module = Llama(dataclasses.replace(LLAMA_1B, layers=args.layers))
    tokens = jax.ShapeDtypeStruct((8, 1), jnp.int32)
    fn, params = adapters.from_linen(module, jax.eval_shape(module.init, jax.random.key(0), tokens))
    small, fewer, certificate, hidden = shrunk(fn, params, tokens)
    before, after = certificate.before.bytes, certificate.after.bytes
    report = {
        "jax": jax.__version__,
        "layers": args.layers,
        "groups": {name: f"{size} in each of {layers}" for name, (size, layers) in hidden.items()},
        "bytes": [before, after],
        "bytes_fall": round(1 - after / before, 4),
        "targets": {},
    }
    for target in args.targets:
        dense, cut = (
            graph.cost(f, p, tokens, target=target).compiled
            for f, p in ((fn, params), (small, fewer))
        )
        times = [1e6 * float(cost.seconds) for cost in (dense, cut)]
        falls = 1 - times[1] / times[0]
        report["targets"][target] = {
            "origin": dense.seconds.origin,
            "us": [round(t, 1) for t in times],
            "bytes_accessed": [int(cost.bytes.value) for cost in (dense, cut)],
            "time_fall": round(falls, 4),
            "of_bytes": round(falls / (1 - after / before), 3),
        }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
