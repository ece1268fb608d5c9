"""Metrics on disk, one row per report, and the progress bar."""

import csv
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, TypeAlias

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from jaxcompress.errors import ArgumentError

Row: TypeAlias = dict[str, float]
"""The metrics of one report: `step`, `epoch`, means over the steps since the last, evaluations."""


class Log:
    """A CSV or JSONL file of rows, flushed row by row.

    Opening it writes the rows known so far in place of whatever the file held: after a resume
    that is everything up to the checkpoint, so no row appears twice.
    """

    def __init__(self, path: str | os.PathLike[str] | None, rows: Sequence[Row]):
        self._path = None if path is None else pathlib.Path(path)
        self._rows = rows
        self._columns: list[str] | None = None

    def __enter__(self) -> "Log":
        """Open the file and write the rows known so far."""
        if self._path is not None:
            if self._path.suffix not in (".csv", ".jsonl"):
                raise ArgumentError(
                    "log",
                    got=str(self._path),
                    expected="a path that ends in .csv or .jsonl",
                    fix="The ending chooses the format.",
                )
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", newline="")
            for row in self._rows:
                self.write(row)
        return self

    def __exit__(self, *details: Any) -> None:
        """Close the file."""
        if self._path is not None:
            self._file.close()

    def write(self, row: Row) -> None:
        """Append a row.

        Args:
            row: The metrics; every row has the names of the first.
        """
        if self._path is None:
            return
        if self._path.suffix == ".jsonl":
            # JSON has no NaN or infinity.
            finite = {name: x if math.isfinite(x) else None for name, x in row.items()}
            self._file.write(json.dumps(finite) + "\n")
        else:
            self._write_csv(row)
        self._file.flush()

    def _write_csv(self, row: Row) -> None:
        columns = csv.writer(self._file, lineterminator="\n")
        if self._columns is None:
            self._columns = list(row)
            columns.writerow(self._columns)
        columns.writerow([row.get(name) for name in self._columns])


class _Rate(ProgressColumn):
    """Steps per second, over rich's recent window."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} steps/s", style="progress.data.speed")


class Bar:
    """A progress bar with the latest loss and the rate; silent where there is no terminal."""

    def __init__(self, *, start: int, total: int, enabled: bool):
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[loss]}"),
            _Rate(),
            TimeRemainingColumn(),
        )
        self._progress.disable = not (enabled and self._progress.console.is_terminal)
        self._task = self._progress.add_task("step", total=total, completed=start, loss="")

    def __enter__(self) -> "Bar":
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(self, *details: Any) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()

    def update(self, done: int, *, loss: float | None) -> None:
        """Move the bar.

        Args:
            done: Steps taken.
            loss: The latest loss that has arrived from the device.
        """
        text = "" if loss is None else f"loss {loss:.4f}"
        self._progress.update(self._task, completed=done, loss=text)
