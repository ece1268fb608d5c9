"""Train a small Llama on characters, quantize it in every way, and compare in pairs.

    python examples/quantize_lm.py            # trains once (kept in --out), then the whole table
    python examples/quantize_lm.py --quick    # a tiny model and a few formats, two minutes

Reads `tinyshakespeare.txt` from `$JAXCOMPRESS_DATA`, by default `../shared/data` from the
project's root; its last tenth is held out.
"""

import itertools
import os
import pathlib
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from models.llama import Llama, LlamaConfig
from side_by_side import SideBySide, remarks

from jaxcompress import adapters, export, quantize, report, train, tree
from jaxcompress.numerics import MSE, AbsMax, Format, PerChannel, PerGroup, int3, int4
from jaxcompress.quantize import GPTQ, ClipSearch, Policy, RoundToNearest, Rule, presets
from jaxcompress.train import metrics

ROOT = pathlib.Path(__file__).parents[1]
CONTEXT = 128
WARM = 32
"""Characters at the start of each held-out window that are read, but not counted."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to run.

    Attributes:
        quick: A tiny model, a few steps and formats, to see that everything works.
        steps: Steps of training.
        tuning_steps: Steps of quantization-aware training, from the trained model.
        batch_size: Windows of 128 characters per step.
        calibration: Windows of the training text that methods see.
        seed: Seeds the params, the order of the windows and the bootstrap.
        out: Where to keep the trained model, the packed files and the report.
        data: The folder with the text.
    """

    quick: bool = False
    steps: int = 700
    tuning_steps: int = 200
    batch_size: int = 16
    calibration: int = 128
    seed: int = 0
    out: pathlib.Path = pathlib.Path("quantize-lm")
    data: pathlib.Path = field(
        default_factory=lambda: pathlib.Path(
            os.environ.get("JAXCOMPRESS_DATA", ROOT.parent / "shared" / "data")
        )
    )


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text as ids.

    Attributes:
        vocab: How many characters there are.
        learned: The first nine tenths, uint8.
        held_out: The last tenth.
    """

    vocab: int
    learned: np.ndarray
    held_out: np.ndarray

    def windows(self) -> np.ndarray:
        """All windows of the training text that start at a multiple of 16."""
        return np.lib.stride_tricks.sliding_window_view(self.learned, CONTEXT + 1)[::16]


def read_text(path: pathlib.Path) -> Text:
    text = path.read_text()
    characters = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = np.array([characters[character] for character in text], np.uint8)
    cut = len(ids) - len(ids) // 10
    return Text(vocab=len(characters), learned=ids[:cut], held_out=ids[cut:])


def spread(ids: np.ndarray, count: int) -> np.ndarray:
    """Take windows at even distances, (count, CONTEXT + 1)."""
    starts = np.linspace(0, len(ids) - CONTEXT - 1, count).astype(int)
    return np.stack([ids[start : start + CONTEXT + 1] for start in starts])


def fit(fn: Any, params: Any, text: Text, config: Config, *, steps: int, rate: float) -> Any:
    """Train params of `fn(params, characters) -> logits` to predict the next character."""

    def loss(params: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
        del key
        logits = fn(params, batch[:, :-1])  # (batch, time, vocab)
        losses = metrics.cross_entropy(logits.reshape(-1, text.vocab), batch[:, 1:].ravel())
        return losses.reshape(len(batch), -1).mean(axis=1)

    warmup = steps // 20
    share = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps + warmup, 0.05)
    schedule = lambda step: rate * share(step)
    tx = train.optimizer("adamw", learning_rate=schedule, weight_decay=0.1, clip_norm=1.0)
    data = train.Batches(text.windows(), batch_size=config.batch_size, seed=config.seed)
    state = train.init(params, tx, key=jax.random.key(config.seed))
    show = lambda state, row: print(
        f"step {row['step']:5}  {row['loss'] / np.log(2):.3f} bits", flush=True
    )
    state, _ = train.fit(
        state,
        train.make_step(loss, tx),
        data,
        steps=steps,
        report_every=max(1, steps // 10),
        callbacks=[show],
    )
    return state.params


def trained(fn: Any, model: Llama, text: Text, config: Config) -> Any:
    """Give the trained params: those in `--out`, or else train and keep them."""
    path = config.out / f"trained-{config.steps}.safetensors"
    if path.exists():
        return export.load(path).params
    params = model.init(jax.random.key(config.seed), jnp.zeros((1, CONTEXT), jnp.int32))
    print(f"{tree.count(params):,} params, {config.steps} steps")
    params = fit(fn, params, text, config, steps=config.steps, rate=3e-3)
    export.save(path, params)
    return params


def policies() -> dict[str, Policy]:
    """Name the policies of the table; each quantizes the whole model, embedding and head too."""
    named = {
        "int8": presets.int8,
        "int8 static": presets.int8_static,
        "int8 weights": presets.int8_weights,
        "float8": presets.float8,
        "mxfp8": presets.mxfp8,
        "mxfp4": presets.mxfp4,
        "nvfp4": presets.nvfp4,
        "nf4 g64": presets.nf4,
    }
    methods = {
        "RTN": (AbsMax(), RoundToNearest()),
        "clip": (MSE(), ClipSearch()),
        "GPTQ": (MSE(), GPTQ()),
    }
    spans = {"per channel": PerChannel(), "g128": PerGroup(128), "g32": PerGroup(32)}
    for qtype in (int4, int3):
        for (span, granularity), (name, (range, method)) in itertools.product(
            spans.items(), methods.items()
        ):
            rule = Rule(weights=Format(qtype, granularity, range=range), method=method)
            named[f"{qtype.name} {span} {name}"] = Policy((rule,))
    return named


QUICK = ("int8", "int8 static", "int4 per channel RTN", "int4 per channel GPTQ", "mxfp4")

TUNING = Policy(
    (
        Rule(
            where=["**/embed/*", "**/attention/[qkv]/*", "**/layers/**/kernel", "**/head/*"],
            weights=Format(int4, PerChannel(), range=MSE()),
        ),
    )
)


def main(config: Config) -> None:
    if config.quick:
        config = replace(config, steps=30, tuning_steps=5, calibration=16, out=config.out / "quick")
    text = read_text(config.data / "tinyshakespeare.txt")
    sizes = LlamaConfig(
        vocab=text.vocab,
        dim=128,
        layers=1 if config.quick else 5,
        heads=4,
        kv_heads=2,
        head_dim=32,
        hidden=384,
        theta=10_000.0,
    )
    fn, _ = adapters.from_linen(Llama(sizes), {})
    params = trained(fn, Llama(sizes), text, config)

    held_out = spread(text.held_out, 32 if config.quick else 128)

    def predict(fn: Any) -> Any:
        # (windows, time, vocab) -> (characters that count, vocab)
        return lambda params, x: fn(params, x)[:, WARM:].reshape(-1, text.vocab)

    table = SideBySide(
        fn=predict(fn),
        batches=np.split(held_out[:, :-1], len(held_out) // 32),
        labels=held_out[:, 1 + WARM :].ravel().astype(np.int32),
        folder=config.out,
        bits=True,
        seed=config.seed,
    )
    table.add("float32", params)
    halved, _ = adapters.from_linen(Llama(replace(sizes, dtype=jnp.bfloat16)), {})
    table.add(
        "bfloat16", jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), fn=predict(halved)
    )
    seen = spread(text.learned, config.calibration)[:, :-1]
    for name, policy in policies().items():
        if not config.quick or name in QUICK:
            result = quantize.ptq(fn, params, np.split(seen, len(seen) // 16), policy)
            table.add(name, result.params, note=remarks(result))
    # The model has not converged: more steps help by themselves, so float32 gets them as well.
    qat = quantize.train(fn, TUNING)
    tuning = {"steps": config.tuning_steps, "rate": 5e-4}
    table.add("float32, trained on", fit(fn, params, text, config, **tuning))
    trained_on = fit(qat, params, text, config, **tuning)
    table.add("int4 per channel QAT", qat.convert(trained_on, seen))

    title = f"A Llama of {tree.count(params):,} params, {table.labels.size:,} held-out characters"
    rows = table.table(title)
    rows.to_json(config.out / "results.json")
    page = report.page(
        config.out / "report.html",
        [report.Section(title="Result", parts=(rows,))],
        title="A small language model, quantized",
        summary="Bits per character, with 95 % paired bootstrap intervals of the difference to "
        "float32 over the same characters; latency is that of 32 windows of 128.",
    )
    print(f"\n{rows.text(width=120)}\n\nReport: {page}")


if __name__ == "__main__":
    main(tyro.cli(Config))
