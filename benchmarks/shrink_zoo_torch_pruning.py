"""Small models that are hard to shrink: ours, and Torch-Pruning without hints.

    python -m venv peer && peer/bin/pip install torch torch-pruning
    python benchmarks/shrink_zoo_torch_pruning.py --peer peer/bin/python [--json PATH]

Functional weights, a chunked gate, grouped queries, a tied embedding: JAX functions and their twins
in PyTorch, with the same weights, of which every other unit does nothing. Half of the units can go
without any effect, and both sides are asked to remove half: `params` must fall by that and
`differs_by`, the largest difference of outputs to the dense model, be rounding. Torch-Pruning is
told which layers make the outputs, where there are such layers, as its documentation asks.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import structured, tree


def functional(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]


def chunked_gate(p, x):
    value, gate = jnp.split(x @ p["up"], 2, axis=-1)
    return (value * jax.nn.sigmoid(gate)) @ p["down"]


def grouped_queries(p, x):
    b, t, _ = x.shape
    q, k, v = ((x @ p[name]).reshape(b, t, -1, 8) for name in "qkv")
    k, v = (jnp.repeat(y, q.shape[2] // k.shape[2], axis=2) for y in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return out.reshape(b, t, -1) @ p["o"]


def tied(p, ids):
    x = p["embed"][ids]
    return (x + jax.nn.relu(x @ p["up"]) @ p["down"]) @ p["embed"].T


FUNCTIONS = {
    "functional weights": functional,
    "chunked gate": chunked_gate,
    "grouped queries": grouped_queries,
    "tied embedding": tied,
}


def weights():
    """Draw all weights, (in, out), and inputs; every other unit does nothing."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    live = lambda n: (np.arange(n) % 2 == 0).astype(np.float32)
    heads = np.repeat([1.0, 0.0], 16).astype(np.float32)  # the second key head, and its queries
    x = draw(3, 16)
    return {
        "functional weights": {
            "up": draw(16, 64) * live(64),
            "down": draw(64, 10) * live(64)[:, None],
            "x": x,
        },
        "chunked gate": {
            # (in, values and gates): a unit without a value is zero, whatever its gate
            "up": draw(16, 64) * np.concatenate([live(32), np.ones(32, np.float32)]),
            "down": draw(32, 10) * live(32)[:, None],
            "x": x,
        },
        "grouped queries": {
            "q": draw(16, 32) * heads,
            "k": draw(16, 16) * heads[::2],
            "v": draw(16, 16) * heads[::2],
            "o": draw(32, 16) * heads[:, None],
            "x": draw(2, 5, 16),
        },
        "tied embedding": {
            "embed": draw(20, 16) * live(16),
            "up": draw(16, 64) * live(16)[:, None] * live(64),
            "down": draw(64, 16) * live(64)[:, None] * live(16),
            "x": rng.integers(0, 20, (2, 5)),
        },
    }


def ours(fn, arrays):
    """Keep the larger half of each group."""
    params = {k: jnp.asarray(v) for k, v in arrays.items() if k != "x"}
    x = jnp.asarray(arrays["x"])
    groups = structured.groups(fn, params, x)
    scores = structured.importance(groups, params)
    order = {name: np.argsort(-np.asarray(score)) for name, score in scores.items()}
    keep = structured.keep(groups, {n: o[: len(o) // 2] for n, o in order.items()})
    small, fewer, certificate = structured.shrink(fn, params, keep, x)
    return {
        "params": [certificate.before.params, certificate.after.params],
        "shapes": {path: list(leaf.shape) for path, leaf in tree.items(fewer)},
        "differs_by": float(jnp.abs(small(fewer, x) - fn(params, x)).max()),
        "certificate_holds": certificate.holds,
        "groups": {g.name: g.description for g in groups.values()},
    }


def peer(python, drawn):
    """Run Torch-Pruning in its interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(pathlib.Path(folder) / name) for name in ("weights.npz", "result.json")]
        flat = {f"{name}/{k}": v for name, arrays in drawn.items() for k, v in arrays.items()}
        np.savez(paths[0], **flat)
        script = pathlib.Path(__file__).with_name("torch_pruning_zoo.py")
        subprocess.run([python, str(script), *paths], check=True)
        return json.loads(pathlib.Path(paths[1]).read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=sys.executable, help="Python with torch-pruning")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    drawn = weights()
    theirs = peer(args.peer, drawn)
    report = {"jax": jax.__version__, "torch_pruning": theirs.pop("version")}
    for name, fn in FUNCTIONS.items():
        report[name] = {"ours": ours(fn, drawn[name]), "torch-pruning": theirs[name]}
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
