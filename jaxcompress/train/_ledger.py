"""The host's side of a run: running means, rows, and early stopping; all of it fits in JSON."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxcompress.errors import ArgumentError, require_at_least, require_one_of
from jaxcompress.train._log import Row


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Stop when a metric has not improved for a while.

    Attributes:
        metric: A name in the rows, such as `validation/loss`.
        mode: Whether lower or higher is better.
        patience: Reports without improvement before stopping.
        min_delta: How much better than the best counts as an improvement.
        restore_best: Return the state of the best report rather than the last one: params, and
            the masks and optimizer state that go with them. A copy of it is kept on the device
            and in the checkpoints.
        after: Only reports after this step count, neither as the best nor as waiting. With a
            growing sparsity, the step at which it is reached: earlier models are not pruned yet.
    """

    metric: str = "validation/loss"
    mode: Literal["min", "max"] = "min"
    patience: int = 5
    min_delta: float = 0.0
    restore_best: bool = True
    after: int = 0

    def __post_init__(self):
        require_at_least("patience", self.patience, 1, fix="Raise it.")
        require_at_least("min_delta", self.min_delta, 0, fix="Raise it.")
        require_one_of("mode", self.mode, ("min", "max"), fix='A loss has mode="min".')

    def improves(self, value: float, best: float | None) -> bool:
        """Tell whether a value is an improvement.

        Args:
            value: The metric now; NaN never improves.
            best: The best so far, if any.

        Returns:
            Whether it is.
        """
        if math.isnan(value) or best is None:
            return not math.isnan(value)
        gain = best - value if self.mode == "min" else value - best
        return gain > self.min_delta


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What `fit` remembers beside the state.

    Attributes:
        rows: The reports so far.
        sums: Sums of the metrics of the steps since the last report, skipped steps aside.
        count: How many steps those are.
        skipped: How many were skipped.
        latest: The loss of the latest step that was not skipped.
        best: The best value of the early-stopping metric.
        waited: Reports since then.
    """

    rows: tuple[Row, ...] = ()
    sums: Mapping[str, float] = field(default_factory=dict)
    count: int = 0
    skipped: int = 0
    latest: float | None = None
    best: float | None = None
    waited: int = 0

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Ledger":
        """Read it back.

        Args:
            record: What `to_json` gave.

        Returns:
            The ledger.
        """
        return cls(**{**record, "rows": tuple(record["rows"])})

    def to_json(self) -> dict[str, Any]:
        """Write it down; floats survive JSON exactly.

        Returns:
            A JSON object.
        """
        return dataclasses.asdict(self)

    def add(self, metrics: Mapping[str, float]) -> "Ledger":
        """Take in the metrics of one step.

        Args:
            metrics: Scalars.

        Returns:
            The new ledger.
        """
        values = {name: float(value) for name, value in metrics.items()}
        if values.pop("skipped", 0.0):
            sums = dict.fromkeys(values, 0.0) | dict(self.sums)  # so that the names are known
            return dataclasses.replace(self, sums=sums, skipped=self.skipped + 1)
        sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        latest = values.get("loss", self.latest)
        return dataclasses.replace(self, sums=sums, count=self.count + 1, latest=latest)

    def means(self) -> dict[str, float]:
        """Average the metrics since the last report.

        Returns:
            `{name: mean}`, NaN if every step was skipped, and the number of skipped steps.
        """
        means = {
            name: total / self.count if self.count else math.nan
            for name, total in self.sums.items()
        }
        return {**means, "skipped": self.skipped}

    def report(self, row: Row, stopping: EarlyStopping | None) -> tuple["Ledger", bool]:
        """Close a report.

        Args:
            row: Its metrics.
            stopping: The early-stopping rule, if any.

        Returns:
            The new ledger, and whether this is the best report so far.

        Raises:
            ArgumentError: If the row lacks the early-stopping metric.
        """
        fresh = dataclasses.replace(self, rows=(*self.rows, row), sums={}, count=0, skipped=0)
        if stopping is None or row["step"] <= stopping.after:
            return fresh, False
        if stopping.metric not in row:
            raise ArgumentError(
                "early_stopping.metric",
                got=repr(stopping.metric),
                expected=f"one of {sorted(row)}",
                fix="Let evaluate return it.",
            )
        if stopping.improves(row[stopping.metric], self.best):
            return dataclasses.replace(fresh, best=row[stopping.metric], waited=0), True
        return dataclasses.replace(fresh, waited=self.waited + 1), False

    def stops(self, stopping: EarlyStopping | None) -> bool:
        """Tell whether early stopping ends the run here.

        Args:
            stopping: The early-stopping rule, if any.

        Returns:
            Whether its patience is at an end.
        """
        return stopping is not None and self.waited >= stopping.patience
