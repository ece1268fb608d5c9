"""What do quantized weights cost in one matmul, by the compilers of TPUs and of an H200?

    pip install 'jaxcompress[tpu]' qwix    # and 'jaxcompress[cuda12]' for the h200
    python benchmarks/execute_aot.py [--rows 8] [--width 8192] [--targets tpu-v5e ...] [--json PATH]

Compiles `x @ w`, bfloat16 activations `(rows, width)`, ahead of time for devices that are not
attached. TPU: the compiler's own estimate (no measurement) and bytes accessed, as ratios to
bfloat16 weights and to Qwix's matmul on the same format. H200: its compiler estimates nothing, so
the temporaries of the program, which show whether dequantized weights are written out. Qwix is
left out where it is not installed.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from jaxcompress import graph, quantize
from jaxcompress.errors import MissingExtraError
from jaxcompress.numerics import Activation, Format, PerChannel, PerGroup, PerToken, int4, int8

BF16 = jnp.bfloat16
FORMATS = {
    "int8": Format(int8, PerChannel(), scale_dtype=BF16),
    "int4": Format(int4, PerChannel(), scale_dtype=BF16),
    "int4 g128": Format(int4, PerGroup(128), scale_dtype=BF16),
}


def matmul(params, x):
    return x @ params["kernel"]


def programs(rows: int, width: int):
    """List `(name, function of the backend, params, x)`, all abstract."""
    x = jax.ShapeDtypeStruct((rows, width), BF16)
    dense = {"kernel": jax.ShapeDtypeStruct((width, width), BF16)}
    yield "bf16", lambda backend: matmul, dense, x
    for name, format in FORMATS.items():
        policy = quantize.Policy((quantize.Rule(weights=format),))
        packed = jax.eval_shape(lambda p, policy=policy: quantize.pack(p, policy), dense)
        yield name, lambda backend: quantize.execute(matmul, backend=backend), packed, x
    activations = Activation(format=Format(int8, PerToken()))
    policy = quantize.Policy((quantize.Rule(weights=FORMATS["int8"]),))
    packed = jax.eval_shape(lambda p: quantize.pack(p, policy), dense)
    w8a8 = {"kernel": dataclasses.replace(packed["kernel"], activation=activations)}
    yield "int8 x int8", lambda backend: quantize.execute(matmul, backend=backend), w8a8, x
    yield from _qwix(x, width)


def _qwix(x, width: int):
    """Qwix's matmul of weights alone, on its own arrays."""
    if importlib.util.find_spec("qwix") is None:
        return
    import qwix

    for name, qtype, tiles in (("int8", "int8", {}), ("int4 g128", "int4", {0: 128})):

        def weights(qtype=qtype, tiles=tiles):
            array = jnp.zeros((width, width), BF16)
            return qwix.quantize(array, qtype, channelwise_axes=(1,), tiled_axes=tiles)

        abstract = {"kernel": jax.eval_shape(weights)}
        yield (
            f"qwix {name}",
            lambda backend: lambda params, x: qwix.dot(x, params["kernel"]),
            abstract,
            x,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--targets", nargs="+", default=["tpu-v5e", "tpu-v6e", "h200"])
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    report = {"jax": jax.__version__, "rows": args.rows, "width": args.width, "targets": {}}
    for target in args.targets:
        backend = "tpu" if target.startswith("tpu") else "gpu"
        found = {}
        try:
            for name, fn, params, x in programs(args.rows, args.width):
                compiled = graph.cost(fn(backend), params, x, target=target).compiled
                found[name] = _figures(compiled)
        except MissingExtraError as error:
            print(f"{target}: {error}")
            continue
        for row in found.values():
            for key in ("us", "bytes_accessed"):
                if row.get(key) and found["bf16"].get(key):
                    row[f"{key}_of_bf16"] = round(row[key] / found["bf16"][key], 3)
        report["targets"][target] = found
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def _figures(compiled):
    """Take what the compiler says; an estimate that is not positive is none."""
    figures = {"temporary_bytes": int(compiled.memory.temporaries.value)}
    if compiled.seconds is not None and compiled.seconds.origin == "TPU compiler estimate":
        figures["us"] = round(float(compiled.seconds) * 1e6, 2)
        figures["bytes_accessed"] = int(compiled.bytes.value)
    return figures


if __name__ == "__main__":
    main()
