"""Numbers and tables as text."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.table


def write_scaled(value: float, unit: str) -> str:
    """Write a number with a prefix (powers of 1000) and three significant digits.

    Args:
        value: The number, not negative.
        unit: Its unit.

    Returns:
        Text such as `16.1 GB`.

    Example:
        >>> [write_scaled(*pair) for pair in ((16_060_522_496, "B"), (1.83e-4, "s"), (0, "FLOP"))]
        ['16.1 GB', '183 µs', '0 FLOP']
    """
    if value == 0:
        return f"0 {unit}".strip()
    prefixes = ["n", "µ", "m", "", "k", "M", "G", "T", "P"]
    power = 3
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    while abs(value) < 0.9995 and power > 0 and unit == "s":
        value, power = value * 1000, power - 1
    digits = 0 if abs(value) >= 99.95 or (power == 3 and unit != "s") else 1
    digits = 2 if digits and abs(value) < 9.995 else digits
    return f"{value:,.{digits}f} {prefixes[power]}{unit}".strip()


def grid(left: Sequence[str], right: Sequence[str]) -> "rich.table.Table":
    """Make an empty table in the house style.

    Args:
        left: Titles of the columns of text, which are aligned left and may be folded.
        right: Titles of the columns after them, aligned right.

    Returns:
        The table.
    """
    import rich.box
    import rich.table

    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in left:
        table.add_column(title, overflow="fold")
    for title in right:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def render_plain(renderable: Any) -> str:
    """Render without colour, as wide as it needs to be.

    Args:
        renderable: Anything that rich renders.

    Returns:
        Lines without trailing blanks.
    """
    import rich.console

    console = rich.console.Console(
        file=io.StringIO(), width=10_000, color_system=None, markup=False
    )
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())
