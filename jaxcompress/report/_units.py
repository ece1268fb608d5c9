"""Units, and how a column of numbers is written in one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxcompress import text
from jaxcompress.report._latency import Latency


@dataclass(frozen=True, kw_only=True)
class Unit:
    """How numbers are shown: multiplied by `scale`, with `digits` decimals, under `symbol`.

    Attributes:
        symbol: What stands in the header, such as `ms`; empty for a plain number.
        scale: What to multiply a stored value by.
        digits: Decimals to show; `None` shows four significant digits of the largest.
        prefixes: Whether to take k, M, G, ... (powers of 1000) to suit the column.
    """

    symbol: str = ""
    scale: float = 1.0
    digits: int | None = None
    prefixes: bool = False


PERCENT = Unit(symbol="%", scale=100.0, digits=1)
"""A fraction, shown in percent."""
SECONDS = Unit(symbol="s")
"""Seconds."""
MILLISECONDS = Unit(symbol="ms", scale=1e3)
"""Seconds, shown in milliseconds."""
BYTES = Unit(symbol="B", prefixes=True)
"""Bytes, shown in B, kB (1000 bytes), MB or GB, one for the whole column."""
MINUS, TIMES, DASH = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"

PLAIN = Unit()
"""A number without a unit."""


def is_number(value: Any) -> bool:
    """Tell whether a cell holds a number.

    Args:
        value: The cell.

    Returns:
        `True` for int, float, NumPy and JAX scalars and `Latency`; `False` for text, bool, None.
    """
    if isinstance(value, Latency):
        return True
    return not isinstance(value, bool | str) and hasattr(value, "__float__")


def number_of(value: Any) -> float:
    """Read a cell's number.

    Args:
        value: A cell for which `is_number` holds.

    Returns:
        The number; a latency's median.
    """
    return float(value.median if isinstance(value, Latency) else value)


def settle_unit(unit: Unit, values: Sequence[Any]) -> Unit:
    """Settle prefix and decimals of a unit for a whole column, so that its numbers align.

    Args:
        unit: The unit.
        values: The column's cells; those that are no numbers are skipped.

    Returns:
        A unit without `prefixes` and with `digits`.
    """
    numbers = [abs(number_of(v)) for v in values if is_number(v)]
    numbers = [x * unit.scale for x in numbers if math.isfinite(x) and x > 0]
    symbol, scale, digits = unit.symbol, unit.scale, unit.digits
    if unit.prefixes and numbers:
        # The smallest decides, so that no entry is shown as 0.0.
        power = max(0, min(4, math.floor(math.log10(min(numbers)) / 3)))
        symbol, scale = ["", "k", "M", "G", "T"][power] + symbol, scale / 1000**power
        digits = (1 if power else 0) if digits is None else digits
    elif digits is None and numbers:
        whole = unit.scale == 1 and all(isinstance(v, int) or not is_number(v) for v in values)
        digits = 0 if whole else max(0, min(6, 3 - math.floor(math.log10(max(numbers)))))
    return Unit(symbol=symbol, scale=scale, digits=digits or 0)


def abbreviate(count: float, unit: str) -> str:
    """Write a count with a prefix, to three significant digits.

    Args:
        count: The count.
        unit: Its unit; one that begins with a blank stays apart from the prefix.

    Returns:
        For example `20 kB`.
    """
    number, _, rest = text.write_scaled(count, unit).partition(" ")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number} {rest.lstrip()}"


def show(unit: Unit, value: Any) -> str:
    """Write one cell.

    Args:
        unit: A settled unit.
        value: The cell: a number, text, a bool or `None`.

    Returns:
        Text; a latency as median ± half its interquartile range, `None` as a dash.
    """
    if value is None:
        return DASH
    if isinstance(value, Latency):
        half = f"{value.spread / 2 * unit.scale:,.{unit.digits}f}"
        return f"{value.median * unit.scale:,.{unit.digits}f} ± {half}"
    if is_number(value):
        return f"{float(value) * unit.scale:,.{unit.digits}f}".replace("-", MINUS)
    if isinstance(value, tuple):
        return TIMES.join(map(str, value)) or "scalar"
    return str(value)


def show_signed(value: float, digits: int) -> str:
    """Write a difference, with its sign.

    Args:
        value: The difference.
        digits: Decimals.

    Returns:
        Text; a difference that rounds to zero has no sign.
    """
    number = f"{value:+,.{digits}f}".replace("-", MINUS)
    return number if any(c in number for c in "123456789") else number[1:]
