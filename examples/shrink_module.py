"""Shrink a Flax model, and have its own class again, at smaller widths.

    python examples/shrink_module.py            # half a minute on two cores
    python examples/shrink_module.py --quick    # the same path with a few steps

`structured.shrink` gives a smaller function. Where a class says its widths in its fields, as this
one does, `structured.to_module` says what they have become: the result is an ordinary Flax module
with ordinary params, which trains, is saved and is served without jaxcompress. Its RMSNorms divide
by the new width where the function divides by the old one; scales and epsilon make up for that. The
data are scikit-learn's digits (`pip install 'jaxcompress[demo]'`).
"""

import pathlib
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from side_by_side import SideBySide
from sklearn.datasets import load_digits

from jaxcompress import adapters, distill, export, structured, train
from jaxcompress.train import metrics


class ResidualMLP(nn.Module):
    """Residual blocks with RMSNorm; every width is a field.

    Attributes:
        width: Of the residual stream.
        hidden: Units in each block.
        blocks: How many there are.
        epsilon: Of the norms.
    """

    width: int = 64
    hidden: int = 128
    blocks: int = 3
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, 64) to logits (batch, 10)."""
        x = nn.Dense(self.width, name="embed")(x)
        for i in range(self.blocks):
            y = nn.RMSNorm(epsilon=self.epsilon, name=f"norm_{i}")(x)
            y = nn.gelu(nn.Dense(self.hidden, name=f"up_{i}")(y))
            x = x + nn.Dense(self.width, name=f"down_{i}")(y)
        return nn.Dense(10, name="head")(nn.RMSNorm(epsilon=self.epsilon, name="norm")(x))


FIELDS = ("width", "hidden", "blocks", "epsilon")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to run.

    Attributes:
        quick: A few steps, to see that everything works.
        keep: How many units of the stream and of each block stay, as a fraction.
        steps: Steps of training; half as many of distillation.
        learning_rate: AdamW's first; it falls to 0 by a cosine.
        seed: Seeds the first weights, the split and the order of the data.
        out: Where to write the files and the result.
    """

    quick: bool = False
    keep: float = 0.5
    steps: int = 600
    learning_rate: float = 3e-3
    seed: int = 0
    out: pathlib.Path = pathlib.Path("shrink-module")


def read_digits(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Split the digits into 1,297 to train on and 500 to test on."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = (pixels[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    return {"x": x[500:], "y": y[500:]}, {"x": x[:500], "y": y[:500]}


def fit(loss: Any, params: Any, data: dict[str, np.ndarray], steps: int, config: Config) -> Any:
    """Train params for a loss of (params, batch, key)."""
    schedule = optax.cosine_decay_schedule(config.learning_rate, steps)
    tx = train.optimizer("adamw", learning_rate=schedule, weight_decay=1e-2, clip_norm=1.0)
    state = train.init(params, tx, key=jax.random.key(config.seed))
    batches = train.Batches(data, batch_size=128, seed=config.seed)
    return train.fit(state, train.make_step(loss, tx), batches, steps=steps)[0].params


def choose(fn: Any, params: Any, data: dict[str, np.ndarray], keep: float) -> structured.Keep:
    """Keep as many units in each block, those whose removal moves the loss most."""

    def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return metrics.cross_entropy(fn(params, batch["x"]), batch["y"])

    groups = structured.groups(fn, params, data["x"][:1])
    scores = structured.importance(
        groups,
        params,
        method=structured.Taylor(),
        loss=loss,
        batches=train.Batches(data, batch_size=256),
    )
    best = {name: np.argsort(-np.asarray(score)) for name, score in scores.items()}
    return structured.keep(groups, {n: np.sort(o[: int(keep * len(o))]) for n, o in best.items()})


def main(config: Config) -> None:
    if config.quick:
        config = replace(config, steps=20)
    data, test = read_digits(config.seed)
    x = jnp.asarray(test["x"])
    module = ResidualMLP()
    fn, params = adapters.from_linen(module, module.init(jax.random.key(config.seed), x))
    task = lambda params, batch, key: metrics.cross_entropy(fn(params, batch["x"]), batch["y"])
    params = fit(task, params, data, config.steps, config)
    table = SideBySide(fn=fn, batches=[x], labels=test["y"], folder=config.out, seed=config.seed)
    table.add("dense", params)

    keep = choose(fn, params, data, config.keep)
    shrunk_fn, shrunk, certificate = structured.shrink(fn, params, keep, x)
    print(certificate)
    table.add("shrunk", shrunk, fn=shrunk_fn)

    # The class again: what its fields are, what was folded, and how far it is from the function.
    small = structured.to_module(module, params, keep, x)
    print(small)
    np.testing.assert_allclose(small.module.apply(small.params, x), shrunk_fn(shrunk, x), atol=1e-4)
    table.add("shrunk, as a module", small.params, fn=small.module.apply)

    def imitate(small_params: Any, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        del key
        return distill.kl(small.module.apply(small_params, batch["x"]), fn(params, batch["x"]))

    trained = fit(imitate, small.params, data, config.steps // 2, config)
    table.add("shrunk, distilled", trained, fn=small.module.apply)

    # Saved with its fields, the model needs nothing else to be made again.
    fields = {name: getattr(small.module, name) for name in FIELDS}
    file = export.save(config.out / "model.safetensors", trained, metadata={"fields": fields}).path
    loaded = export.load(file)
    again = ResidualMLP(**loaded.metadata["fields"])
    np.testing.assert_array_equal(again.apply(loaded.params, x), small.module.apply(trained, x))

    rows = table.table(f"Digits, 500 test images: width {module.width} to {again.width}")
    rows.to_json(config.out / "results.json")
    print(f"\n{rows.text(width=120)}")


if __name__ == "__main__":
    main(tyro.cli(Config))
