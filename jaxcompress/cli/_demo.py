"""The main job end to end on real data: train, prune, distil, quantize, pack, verify, report."""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax
import rich.console

from jaxcompress import adapters, distill, export, quantize, report, sparsity, train, tree
from jaxcompress.cli._commands import Demo
from jaxcompress.cli._models import MODELS, Split, load_digits
from jaxcompress.errors import ArgumentError, JaxCompressError
from jaxcompress.quantize import presets
from jaxcompress.train import metrics
from jaxcompress.tree import Params

_BATCH = 128
_TEMPERATURE = 4.0
_DISTIL_WEIGHT = 0.9


class DemoError(JaxCompressError):
    """A packed file did not come back as what was saved."""


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One line of the demo's table.

    Attributes:
        model: What was done, cumulatively.
        accuracy: On the 500 test images, a fraction.
        cross_entropy: On the same, in nats.
        agreement: The fraction of test images that get the dense model's label.
        nonzero: Parameters that are not zero.
        bytes: The file's size.
        latency: Seconds per batch of 128, unpacking included.
    """

    model: str
    accuracy: float
    cross_entropy: float
    agreement: float
    nonzero: int
    bytes: int
    latency: report.Latency


def run_demo(demo: Demo) -> list[DemoRow]:
    """Run the demo, print its table and write its files.

    Args:
        demo: What to run.

    Returns:
        The table's rows.

    Raises:
        ArgumentError: If a number is out of range.
        DemoError: If a packed file does not come back bit for bit.
    """
    _check_demo(demo)
    console = rich.console.Console()
    stages = _Stages(demo, console)
    steps, half = demo.steps, demo.steps // 2
    gradual = sparsity.schedules.cubic(demo.sparsity, begin=0, end=half * 2 // 3)

    dense, _ = stages.train("training the dense teacher", stages.initial, steps=steps)
    stages.teacher = dense
    stages.add("dense", dense)
    pruned, mask = stages.train(
        f"pruning to {demo.sparsity:.0%}", dense, steps=half, schedule=gradual
    )
    stages.add("pruned", pruned, mask=mask)
    student, mask = stages.train(
        "distilling", pruned, steps=half, schedule=demo.sparsity, within=mask, distilled=True
    )
    stages.add("+ distilled", student, mask=mask)
    for name, policy in (("int8", presets.int8_weights), ("int4", presets.int4)):
        student, mask = stages.train(
            f"training at {name}",
            student,
            steps=half,
            schedule=demo.sparsity,
            within=mask,
            distilled=True,
            policy=policy,
        )
        stages.add(f"+ {name}", quantize.pack(student, policy), mask=mask)

    return stages.finish()


def _check_demo(demo: Demo) -> None:
    """Refuse numbers that would fail later, under another name."""
    for name, holds, expected, fix in (
        ("steps", demo.steps >= 4, "4 or more", "Try --steps 800."),
        ("seed", 0 <= demo.seed < 2**32, "0 or more, below 2**32", "Try --seed 0."),
        ("sparsity", 0 <= demo.sparsity < 1, "a fraction in [0, 1)", "Try --sparsity 0.8."),
    ):
        if not holds:
            raise ArgumentError(f"--{name}", got=getattr(demo, name), expected=expected, fix=fix)


@dataclass
class _Stages:
    """The stages' common ground: data, model, teacher, and the rows so far."""

    demo: Demo
    console: rich.console.Console
    rows: list[DemoRow] = field(default_factory=list)
    leaves: list[report.Leaves] = field(default_factory=list)
    teacher: Params = None

    def __post_init__(self):
        training, self.test = load_digits(self.demo.seed)
        self.data = train.Batches(training, batch_size=_BATCH, seed=self.demo.seed)
        module = MODELS[self.demo.model]()
        variables = module.init(jax.random.key(self.demo.seed), training.images[:1])
        self.fn, self.initial = adapters.from_linen(module, variables)
        # Packed params go in as they are stored, and are unpacked inside the compiled program.
        self.predict = jax.jit(lambda params, x: self.fn(quantize.unpack(params), x))

    def train(
        self,
        doing: str,
        params: Params,
        *,
        steps: int,
        schedule: float | Callable[..., Any] | None = None,
        within: Params = None,
        distilled: bool = False,
        policy: quantize.Policy | None = None,
    ) -> tuple[Params, Params]:
        """Train params on the digits; give them and the mask that `schedule` led to."""
        fn, teacher = self.fn, self.teacher

        def loss(params: Params, batch: Split, key: jax.Array) -> Any:
            rounded = params if policy is None else quantize.fake_quant(params, policy)
            logits = fn(rounded, batch.images)
            task = metrics.cross_entropy(logits, batch.labels)
            if not distilled:
                return task
            soft = distill.kl(logits, fn(teacher, batch.images), temperature=_TEMPERATURE)
            return distill.mix(task, soft, weight=_DISTIL_WEIGHT)

        rate = optax.cosine_decay_schedule(2e-3, steps)
        tx = train.optimizer("adamw", learning_rate=rate, weight_decay=1e-2, clip_norm=1.0)
        if schedule is not None:
            every = max(1, steps // 40)
            tx = sparsity.sparsify(tx, schedule=schedule, every=every, within=within)
        state = train.init(params, tx, key=jax.random.key(self.demo.seed))
        with self.console.status(f"{doing}, {steps} steps"):
            state, _ = train.fit(
                state, train.make_step(loss, tx), self.data, steps=steps, progress=False
            )
        if schedule is None:
            return state.params, None
        sparsity.check(state.params, state.opt_state)
        return state.params, sparsity.get_mask(state.opt_state)

    def add(self, name: str, params: Params, *, mask: Params = None) -> None:
        """Save a model, reload it, verify that nothing changed, and measure what was reloaded."""
        file = self.demo.out / "models" / f"{name.removeprefix('+ ')}.safetensors"
        saved = export.save(file, params, mask=mask, metadata={"stage": name})
        loaded = export.load(file)
        verify(params, loaded.params, file)
        logits = self.predict(loaded.params, self.test.images)
        if not np.array_equal(logits, self.predict(params, self.test.images)):
            raise DemoError(f"{file}: the reloaded model answers differently")
        if not self.rows:
            self.reference = logits
        floats = quantize.unpack(loaded.params)
        row = DemoRow(
            model=name,
            accuracy=float(metrics.accuracy(logits, self.test.labels)),
            cross_entropy=float(metrics.cross_entropy(logits, self.test.labels).mean()),
            agreement=float(metrics.accuracy(logits, self.reference.argmax(-1))),
            nonzero=sum(int((leaf != 0).sum()) for leaf in tree.leaves(floats)),
            bytes=saved.bytes,
            latency=report.latency(self.predict, loaded.params, self.test.images[:_BATCH]),
        )
        self.rows.append(row)
        self.leaves.append(report.leaves(loaded.params, mask=loaded.mask, file_bytes=saved.leaves))

    def finish(self) -> list[DemoRow]:
        """Print the table and write report, plots and results."""
        columns = [
            "model",
            "accuracy",
            report.Column(key="cross_entropy", title="cross-entropy"),
            "agreement",
            report.Column(key="nonzero", title="non-zero params"),
            report.Column(key="bytes", title="on disk", versus="ratio"),
            report.Column(key="latency", title="per batch"),
        ]
        table = report.table(self.rows, columns=columns, title="Digits, 500 test images")
        out = self.demo.out
        table.to_json(out / "results.json")
        points = [
            report.Point(label=row.model, bytes=row.bytes, accuracy=row.accuracy)
            for row in self.rows
        ]
        tradeoff = report.plot_tradeoff(points)
        tradeoff.save(out / "plots" / "tradeoff.png")
        sections = [report.Section(title="Result", parts=(table, tradeoff))]
        for row, leaves in zip(self.rows, self.leaves, strict=True):
            plot = report.plot_leaves(leaves, title=f"Sparsity and bits per leaf: {row.model}")
            plot.save(out / "plots" / f"{row.model.removeprefix('+ ')}.png")
            sections.append(report.Section(title=row.model, parts=(leaves.table(), plot)))
        page = report.page(
            out / "report.html",
            sections,
            title="jaxcompress demo",
            summary=_SUMMARY.format(demo=self.demo),
        )
        print(table.text(width=self.console.width))
        self.console.print("\nEvery file was reloaded and equals the model in memory, bit for bit.")
        self.console.print(f"Report: {page}")
        return self.rows


_SUMMARY = (
    "A {demo.model} teacher of scikit-learn's digits, pruned to {demo.sparsity:.0%}, distilled "
    "from itself, and trained at int8, then int4 (seed {demo.seed}). Each line goes on from the "
    "one above. With 500 test images, differences of a point are noise. Latency is the median ± "
    "half the interquartile range, and includes unpacking: these formats make files and memory "
    "smaller; on a CPU they do not make a dense program faster."
)


def verify(saved: Params, loaded: Params, file: pathlib.Path) -> None:
    """Check that reloaded params equal those in memory, bit for bit, stored parts included.

    Args:
        saved: What was saved.
        loaded: What came back.
        file: From where, for the message.

    Raises:
        DemoError: If anything differs.
    """
    if jax.tree.structure(saved) != jax.tree.structure(loaded):
        raise DemoError(f"{file}: reloaded params have another structure")
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(loaded), strict=True):
        if a.dtype != b.dtype or np.asarray(a).tobytes() != np.asarray(b).tobytes():
            raise DemoError(f"{file}: reloaded params differ from those in memory")
