"""Metrics on disk, one row per report, and the progress bar."""

import contextlib
import csv
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
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


@contextlib.contextmanager
def open_log(
    path: str | os.PathLike[str] | None, rows: Sequence[Row]
) -> Iterator[Callable[[Row], None]]:
    """Open a CSV or JSONL file of rows, flushed row by row.

    The rows known so far replace whatever the file held: after a resume that is everything up to
    the checkpoint, so no row appears twice.

    Args:
        path: The file, by its ending; `None` for none.
        rows: The rows known so far.

    Yields:
        What appends a row; every row has the names of the first.

    Raises:
        ArgumentError: If the path has another ending.
    """
    if path is None:
        yield lambda row: None
        return
    path = pathlib.Path(path)
    if path.suffix not in (".csv", ".jsonl"):
        raise ArgumentError(
            "log",
            got=str(path),
            expected="a path that ends in .csv or .jsonl",
            fix="The ending chooses the format.",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        columns = csv.DictWriter(file, [], extrasaction="ignore", lineterminator="\n")

        def write(row: Row) -> None:
            if path.suffix == ".jsonl":
                # JSON has no NaN or infinity.
                finite = {name: x if math.isfinite(x) else None for name, x in row.items()}
                file.write(json.dumps(finite) + "\n")
            else:
                if not columns.fieldnames:
                    columns.fieldnames = list(row)
                    columns.writeheader()
                columns.writerow(row)
            file.flush()

        for row in rows:
            write(row)
        yield write


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
