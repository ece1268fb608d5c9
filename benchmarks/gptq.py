"""How close are GPTQ's outputs, and how long does it take, next to llm-compressor and Qwix?

    python benchmarks/gptq.py [--spectrum 0.5] [--large] [--peer-python PATH] [--json PATH]

Weights of 512 outputs and 1,024 inputs, 4,096 correlated samples (covariance with randomly
rotated eigenvalues 1 / k**(2 * spectrum)), symmetric int4 in groups of 128. Errors are those of
the outputs, squared, over that of rounding to nearest with the largest magnitude as the range.
`--large` also times 4096 x 4096. Peers run on the same arrays, each in a process of its own of
`--peer-python` (this Python by default), which needs `llmcompressor` and `qwix`; Qwix gets the
first 256 x 256 weights only, for it compiles for minutes. What is not installed is left out, and
said so.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

OUT, IN, SAMPLES, GROUP, SMALL = 512, 1024, 4096, 128, 256


def make_data(n_in: int, n_out: int, samples: int, spectrum: float):
    """Make weights `(in, out)` and the second moment `(in, in)` of correlated inputs."""
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.standard_normal((n_in, n_in)))
    sizes = np.arange(1, n_in + 1) ** -spectrum
    x = (rng.standard_normal((samples, n_in)) * sizes) @ rotation.T
    w = rng.standard_normal((n_in, n_out)) / np.sqrt(n_in)
    return w.astype(np.float32), (x.T @ x / samples).astype(np.float32)


def error(w, w_hat, hessian) -> float:
    """Sum the squared errors of the outputs, per sample, in float64."""
    off = w.astype(np.float64) - w_hat
    return float(np.sum(off * (hessian.astype(np.float64) @ off)))


def timed(function, repeats: int):
    """Call once, and then `repeats` times: the result, the first time, the median of the others."""
    times = []
    result = None
    for _ in range(1 + repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return result, times[0], statistics.median(times[1:] or times)


# --- Ours -------------------------------------------------------------------------------------


def ours(w, hessian, repeats: int, **options):
    """Run `quantize.gptq` as the preset does; arrays are on the device already."""
    import jax
    import jax.numpy as jnp

    from jaxcompress import numerics, quantize

    format = quantize.presets.int4_gptq_g128.rules[0].weights
    w, hessian = jnp.asarray(w), jnp.asarray(hessian)

    def run():
        return jax.block_until_ready(quantize.gptq(w, hessian, format, **options))

    (q, _), first, later = timed(run, repeats)
    return np.asarray(numerics.dequantize(q)), first, later


def rounded(w, format=None):
    """Round to nearest: by the largest magnitude, if no format is given."""
    from jaxcompress import numerics

    format = format or numerics.Format(numerics.int4, numerics.PerGroup(GROUP))
    return np.asarray(numerics.dequantize(numerics.quantize(w, format)))


# --- Peers, each in a process of its own ------------------------------------------------------


def llm_compressor(w, hessian, repeats: int, observer: str):
    """Run its `quantize_weight` as its modifier does: scales observed, activations ordered."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import Observer

    args = QuantizationArgs(
        num_bits=4, symmetric=True, strategy="group", group_size=GROUP, actorder="static"
    )
    weights = torch.from_numpy(np.ascontiguousarray(w.T))
    second = torch.from_numpy(hessian)

    def run():
        observe = Observer.load_from_registry(observer, base_name="weight", args=args)
        fitted = observe(weights).get_qparams()
        with torch.no_grad():
            return quantize_weight(
                weights[None].clone(),
                2 * second[None],
                fitted["scale"][None],
                fitted["zero_point"][None],
                None,
                args,
            )[0][0]

    result, first, later = timed(run, repeats)
    return result.numpy().T, first, later


def qwix(w, hessian):
    """Run its `quantize_weight` once; it is not meant to be jitted."""
    import jax
    import jax.numpy as jnp
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core

    how = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,), tiled_axes={1: GROUP})
    weights, hessian = jnp.asarray(w.T), jnp.asarray(hessian)

    def run():
        return jax.block_until_ready(gptq_core.quantize_weight(weights, hessian, how))

    (q, _), first, later = timed(run, 1)
    return np.asarray(qarray.dequantize(q)).T, first, later


PEERS = {
    "llm-compressor, minmax": lambda w, h, n: llm_compressor(w, h, n, "memoryless_minmax"),
    "llm-compressor, mse": lambda w, h, n: llm_compressor(w, h, n, "memoryless_mse"),
    "qwix": lambda w, h, n: qwix(w, h),
}


def ask_peer(python: str, name: str, w, hessian, repeats: int):
    """Run one peer; returns what it found, or the last line of what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        np.savez(path / "in.npz", w=w, hessian=hessian)
        command = [python, __file__, "--peer", name, folder, "--repeats", str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"not run: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        with np.load(path / "out.npz") as out:
            return out["w_hat"], float(out["first"]), float(out["later"])


def answer(name: str, folder: str, repeats: int) -> None:
    """Be a peer: read the arrays, quantize, write the result."""
    path = pathlib.Path(folder)
    with np.load(path / "in.npz") as arrays:
        w_hat, first, later = PEERS[name](arrays["w"], arrays["hessian"], repeats)
    np.savez(path / "out.npz", w_hat=w_hat, first=first, later=later)


# --- The report -------------------------------------------------------------------------------


def row(found, w, hessian, base: float) -> dict | str:
    """Turn `(w_hat, first, later)` into figures."""
    if isinstance(found, str):
        return found
    w_hat, first, later = found
    ratio = error(w, w_hat, hessian) / base
    return {
        "error_over_rtn": round(ratio, 4),
        "first_s": round(first, 3),
        "later_s": round(later, 4),
    }


def compare(w, hessian, names, python: str, repeats: int) -> dict:
    """Measure ours and the named peers on one matrix."""
    from jaxcompress.quantize import presets

    base = error(w, rounded(w), hessian)
    found = {
        "ours": ours(w, hessian, repeats),
        "ours, refine=0": ours(w, hessian, repeats, refine=0),
    }
    found |= {name: ask_peer(python, name, w, hessian, repeats) for name in names}
    rows = {name: row(one, w, hessian, base) for name, one in found.items()}
    clipped = error(w, rounded(w, presets.int4_g128.rules[0].weights), hessian) / base
    return {"round to nearest, ours, clipped": {"error_over_rtn": round(clipped, 4)}} | rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spectrum", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--large", action="store_true", help="also 4096 x 4096")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        answer(*args.peer, args.repeats)
        return

    import jax

    w, hessian = make_data(IN, OUT, SAMPLES, args.spectrum)
    small = np.ascontiguousarray(w[:SMALL, :SMALL]), np.ascontiguousarray(hessian[:SMALL, :SMALL])
    *compressors, last = PEERS
    report = {
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "spectrum": args.spectrum,
        f"{OUT} x {IN}": compare(w, hessian, compressors, args.peer_python, args.repeats),
        f"{SMALL} x {SMALL}": compare(*small, [last], args.peer_python, args.repeats),
    }
    if args.large:
        w, hessian = make_data(4096, 4096, 2 * 4096, args.spectrum)
        base = error(w, rounded(w), hessian)
        report["4096 x 4096"] = {"ours": row(ours(w, hessian, 1), w, hessian, base)}
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
