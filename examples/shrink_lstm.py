"""Shrink a pretrained character LSTM by a third, and distil it on its text.

    python examples/shrink_lstm.py            # some ten minutes on two cores
    python examples/shrink_lstm.py --quick    # the same path with a few steps, a minute

Every width that can shrink does: the states of both layers and the embedding, 128 to 85 units. What
is left of the network then learns to answer as the whole one does, on the text that it was trained
on. Reads `charrnn_shakespeare.safetensors` with its vocabulary and `tinyshakespeare.txt` from
`$JAXCOMPRESS_DATA`, by default `../shared/data` from the project's root.
"""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from cifar import data_folder
from shakespeare import WARM, WINDOW, counted, load_model, read_text, spread
from side_by_side import SideBySide, certified

from jaxcompress import distill, report, structured, train


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to run.

    Attributes:
        quick: A few steps and windows, to see that everything works.
        keep: How many units of each group stay, as a fraction.
        steps: Steps of distillation.
        batch_size: Windows of 256 characters per step.
        learning_rate: Adam's first; it falls to 0 by a cosine.
        seed: Seeds the order of the windows and the bootstrap.
        out: Where to write the files and the report.
        data: The folder with the text and the pretrained network.
    """

    quick: bool = False
    keep: float = 2 / 3
    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 6e-3
    seed: int = 0
    out: pathlib.Path = pathlib.Path("shrink-lstm")
    data: pathlib.Path = field(default_factory=data_folder)


def choose(fn: Callable[..., Any], params: Any, windows: np.ndarray, keep: float) -> Any:
    """Keep a fraction of each group, by the norms of all weights that go with a unit."""
    groups = structured.groups(fn, params, windows)
    for group in groups.values():
        print(f"{group.size:4} {group.description}")
    scores = structured.importance(groups, params)
    order = {name: np.argsort(-np.asarray(score)) for name, score in scores.items()}
    return structured.keep(groups, {n: o[: int(keep * len(o))] for n, o in order.items()})


def distil(
    teacher: tuple[Callable[..., Any], Any],
    fn: Callable[..., Any],
    params: Any,
    ids: np.ndarray,
    config: Config,
) -> Any:
    """Train params to answer as the teacher does, in windows of the training text."""
    starts = np.arange(0, len(ids) - WINDOW, WINDOW // 2)
    windows = np.stack([ids[start : start + WINDOW] for start in starts])
    data = train.Batches({"x": windows}, batch_size=config.batch_size, seed=config.seed)
    whole, dense = teacher

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        target = whole(dense, batch["x"])
        return distill.kl(fn(params, batch["x"]), target).mean(-1)  # (windows, time) -> (windows,)

    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    tx = train.optimizer("adam", learning_rate=schedule, clip_norm=1.0)
    state = train.init(params, tx, key=jax.random.key(config.seed))
    state, _ = train.fit(state, train.make_step(loss, tx), data, steps=config.steps)
    return state.params


def main(config: Config) -> None:
    if config.quick:
        config = replace(config, steps=5, batch_size=8)
    ids, held = read_text(config.data, windows=16 if config.quick else 64)
    fn, params = load_model(config.data)
    table = SideBySide(
        fn=counted(fn),
        batches=np.split(held[:, :-1], len(held) // 16),
        labels=held[:, 1 + WARM :].ravel(),
        folder=config.out,
        bits=True,
        repeats=15,
        seed=config.seed,
    )
    table.add("dense", params)

    few = spread(ids, 8)[:, :-1]
    keep = choose(fn, params, few, config.keep)
    small, fewer, certificate = structured.shrink(fn, params, keep, jnp.asarray(few))
    print(certificate)
    table.add("shrunk", fewer, fn=counted(small))
    keep.save(config.out / "keep.json")

    trained = distil((fn, params), small, fewer, ids, config)
    # The files are enough: what is served is fn again with what was kept, and smaller arrays.
    again = structured.rebuild(fn, structured.Keep.load(config.out / "keep.json"))
    table.add("shrunk, distilled", trained, fn=counted(again))

    rows = table.table(f"Character LSTM, {len(table.labels):,} held-out characters")
    rows.to_json(config.out / "results.json")
    page = report.page(
        config.out / "report.html",
        [
            report.Section(title="Result", parts=(replace(rows, title=""),)),
            certified(certificate),
        ],
        title="A pretrained LSTM, a third narrower",
        summary="Bits per character; intervals are 95 % paired bootstrap intervals of the "
        "difference to the dense network on the same characters.",
    )
    print(f"\n{rows.text(width=120)}\n\nReport: {page}")


if __name__ == "__main__":
    main(tyro.cli(Config))
