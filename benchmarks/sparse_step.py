"""What does `sparsify` add to a training step?

A jitted, donated step of the same optimizer with and without it: between two mask updates, and
averaged over the hundred steps of which one updates the mask. ResNet-20 at batch 64 on 32x32x3
with SGD and momentum, and a 4-layer MLP of width 2048 at batch 256 with Adam. The peer is the
dense step, timed in turns with the sparse ones. To reach: a ratio of at most 1.05.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxcompress import sparsity

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
from models.resnet import CifarResNet

EVERY = 100


class Mlp(nn.Module):
    """Four square layers and a head."""

    width: int

    @nn.compact
    def __call__(self, x, *, train):
        """Compute logits."""
        del train
        for _ in range(4):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def problem(name):
    """Build `(model, batch, optimizer)`."""
    if name == "resnet20":
        return CifarResNet(), jnp.ones((64, 32, 32, 3)), optax.sgd(0.1, momentum=0.9)
    return Mlp(2048), jax.random.normal(jax.random.key(1), (256, 2048)), optax.adam(1e-3)


def stepper(model, tx):
    def loss(params, stats, x, labels):
        # The new batch statistics are dropped: both steps compute them, neither keeps them.
        logits, _ = model.apply({"params": params, **stats}, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, *batch):
        updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    return step


def measure(name, repeats, steps):
    model, x, tx = problem(name)
    labels = jnp.arange(len(x)) % 10
    stats = model.init(jax.random.key(0), x, train=True)
    params = stats.pop("params")
    sparse = sparsity.sparsify(tx, schedule=0.8, every=EVERY)
    runs = {}
    for kind, t in {"dense": tx, "between": sparse, "update": sparse}.items():
        carry = jax.tree.map(jnp.copy, (params, t.init(params)))
        runs[kind] = [stepper(model, t), carry]

    def once(kind):
        step, (params, state) = runs[kind]
        if kind != "dense":
            state = state._replace(step=jnp.int32(EVERY if kind == "update" else 1))
        start = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state, stats, x, labels))
        runs[kind][1] = (params, state)
        return time.perf_counter() - start

    for kind in runs:
        once(kind), once(kind)
    times = {kind: [] for kind in runs}
    for _ in range(repeats * steps):  # in turns, so that all meet the same noise
        for kind in runs:
            times[kind].append(once(kind))
    ms = {kind: 1e3 * statistics.median(ts) for kind, ts in times.items()}
    averaged = ((EVERY - 1) * ms["between"] + ms["update"]) / EVERY
    return {
        **{f"{kind}_ms": round(t, 3) for kind, t in ms.items()},
        "between_over_dense": round(ms["between"] / ms["dense"], 4),
        "averaged_over_dense": round(averaged / ms["dense"], 4),
        "paired_between_over_dense": round(
            statistics.median(b / d for b, d in zip(times["between"], times["dense"], strict=True)),
            4,
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", choices=("resnet20", "mlp"))
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else ["resnet20", "mlp"]
    result = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "target": 1.05}
    for name in names:
        result[name] = measure(name, arguments.repeats, arguments.steps)
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
