"""Rows of figures as a table: for the terminal, for JSON and for HTML."""

import dataclasses
import io
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text

from jaxcompress import files
from jaxcompress.errors import ArgumentError, ArgumentTypeError
from jaxcompress.report._units import (
    BYTES,
    MILLISECONDS,
    PERCENT,
    PLAIN,
    TIMES,
    Unit,
    is_number,
    number_of,
    settle_unit,
    show,
    show_signed,
)

# A rule below the header and before a total; columns apart by blanks.
_BOX = rich.box.Box("    \n    \n ── \n    \n ── \n ── \n    \n    \n")
_NARROW = 12
"""Text columns keep at least so many characters."""

Row: TypeAlias = Any
"""A mapping, a dataclass instance or a NamedTuple."""

KNOWN_UNITS = {
    "accuracy": PERCENT,
    "agreement": PERCENT,
    "sparsity": PERCENT,
    "bytes": BYTES,
    "file_bytes": BYTES,
    "latency": MILLISECONDS,
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table.

    Attributes:
        key: The rows' key or field.
        title: The header; the key with spaces for underscores if empty.
        unit: How to show numbers; `None` takes the one that goes with the key (`accuracy`,
            `agreement`, `sparsity`: percent; `bytes`: bytes; `latency`: milliseconds).
        versus: Add a column beside it that says how each number stands to the first row's: the
            `"difference"`, or the `"ratio"` first / this, so that 8 times smaller reads `8.0×`.
    """

    key: str
    title: str = ""
    unit: Unit | None = None
    versus: Literal["difference", "ratio"] | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of figures, and how to show them. Print it with `print` or `rich.print`.

    Attributes:
        columns: The columns, in order.
        rows: One mapping per row, of plain values.
        title: A heading, or empty.
        total: Whether the last row is a sum, and set apart.
    """

    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]
    title: str = ""
    total: bool = False

    def cells(self) -> tuple[list[str], list[list[str]], list[bool]]:
        """Write everything as text.

        Returns:
            Headers with their units, rows of cells, and for each column whether it is numeric.
        """
        headers, columns, numeric = [], [], []
        for column in self.columns:
            values = [row.get(column.key) for row in self.rows]
            unit = settle_unit(column.unit or KNOWN_UNITS.get(column.key, PLAIN), values)
            title = column.title or column.key.replace("_", " ")
            headers.append(f"{title} [{unit.symbol}]" if unit.symbol else title)
            columns.append([show(unit, value) for value in values])
            numeric.append(any(map(is_number, values)))
            if column.versus is not None:
                headers.append("Δ" if column.versus == "difference" else "ratio")
                columns.append([_versus(column, unit, values[0], value) for value in values])
                numeric.append(True)
        return headers, [list(row) for row in zip(*columns, strict=True)], numeric

    def __rich__(self) -> rich.table.Table:
        headers, rows, numeric = self.cells()
        drawn = rich.table.Table(
            title=self.title or None,
            title_justify="left",
            title_style="bold",
            box=_BOX,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for i, (header, is_numeric) in enumerate(zip(headers, numeric, strict=True)):
            # Long text folds in a narrow terminal; numbers and short text are never broken.
            widest = max([len(row[i]) for row in rows], default=0)
            lines = textwrap.wrap(header, max(8, widest), break_long_words=False)
            widest = max(widest, *map(len, lines))
            drawn.add_column(
                rich.text.Text("\n".join(lines)),
                justify="right" if is_numeric else "left",
                no_wrap=is_numeric or widest <= _NARROW,
                min_width=widest if is_numeric else min(widest, _NARROW),
                overflow="fold",
            )
        for i, row in enumerate(rows):
            if self.total and i == len(rows) - 1:
                drawn.add_section()
            drawn.add_row(*map(rich.text.Text, row))
        return drawn

    def text(self, *, width: int = 100) -> str:
        """Draw the table as plain text.

        Args:
            width: Characters per line; more are used if the numbers alone need more.

        Returns:
            Lines, without colours or trailing blanks.
        """
        drawn = self.__rich__()
        needed = sum((column.min_width or 0) + 2 for column in drawn.columns)
        console = rich.console.Console(
            file=io.StringIO(), width=max(width, needed), color_system=None, force_terminal=False
        )
        with console.capture() as capture:
            console.print(drawn)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())

    def __str__(self) -> str:
        return self.text()

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Write the rows as JSON, unrounded and in base units (fractions, bytes, seconds).

        Args:
            path: A file to write too, beside and renamed, or `None`.

        Returns:
            The JSON.
        """
        rows = [{c.key: row.get(c.key) for c in self.columns} for row in self.rows]
        text = json.dumps({"title": self.title, "rows": rows}, default=to_plain, indent=1)
        if path is not None:
            files.write(path, text + "\n")
        return text


def table(
    rows: Sequence[Row], *, columns: Sequence[str | Column] | None = None, title: str = ""
) -> Table:
    """Make a table of rows.

    Args:
        rows: Mappings, dataclass instances or NamedTuples.
        columns: Which keys to show, and how; all keys of the rows if `None`.
        title: A heading.

    Returns:
        The table.

    Raises:
        ArgumentTypeError: If a row is none of these.
        ArgumentError: If a column's key is in no row.

    Example:
        >>> rows = [{"model": "dense", "accuracy": 0.981, "bytes": 161_416},
        ...         {"model": "int4", "accuracy": 0.975, "bytes": 12_904}]
        >>> print(table(rows, columns=["model", "accuracy", Column(key="bytes", versus="ratio")]))
               accuracy  bytes
        model       [%]   [kB]  ratio
        ─────────────────────────────
        dense      98.1  161.4   1.0×
        int4       97.5   12.9  12.5×
    """
    plain_rows = tuple(_as_mapping(row) for row in rows)
    keys = list(dict.fromkeys(key for row in plain_rows for key in row))
    chosen = [Column(key=c) if isinstance(c, str) else c for c in columns or keys]
    for column in chosen:
        if plain_rows and column.key not in keys:
            raise ArgumentError(
                "columns",
                got=repr(column.key),
                expected=f"keys of the rows ({', '.join(map(repr, keys))})",
                fix="Drop the column, or add it to the rows.",
            )
    return Table(columns=tuple(chosen), rows=plain_rows, title=title)


def _as_mapping(row: Row) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return dict(row)
    if dataclasses.is_dataclass(row) and not isinstance(row, type):
        return {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    if isinstance(row, tuple) and hasattr(row, "_fields"):
        return row._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    raise ArgumentTypeError(
        "rows",
        got=type(row).__name__,
        expected="mappings, dataclass instances or NamedTuples",
        fix='For example {"model": "dense", "accuracy": 0.98}.',
    )


def _versus(column: Column, unit: Unit, first: Any, value: Any) -> str:
    if not (is_number(first) and is_number(value)):
        return ""
    first, value = number_of(first), number_of(value)
    if column.versus == "difference":
        return show_signed((value - first) * unit.scale, unit.digits or 0)
    return f"{first / value:,.1f}{TIMES}" if value else ""


def to_plain(value: Any) -> Any:
    """Turn what JSON does not know into what it does: NumPy and JAX scalars, dataclasses, sets.

    Args:
        value: The value.

    Returns:
        A number, list, mapping or text.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _as_mapping(value)
    if hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    return str(value)
