"""Reading a compiled program's text: which quantized weights it expands to whole float arrays."""

import math
import re
from collections.abc import Iterator, Sequence

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?[\w.\-]+ = (f64|f32|bf16|f16)\[([\d,]*)\](?:\{[^}]*\})? ([\w\-]+)\("
)
_INSIDE = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_NO_BUFFER = {"parameter", "get-tuple-element", "bitcast", "constant"}
_WIDTH = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2}


def float_arrays(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """List the float arrays that a program writes to memory: results outside of fusions.

    Args:
        text: An optimised HLO module.

    Yields:
        Type and shape of each.
    """
    inside = set(_INSIDE.findall(text))
    skipped = False
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header is not None:
            skipped = header.group(1) in inside
        elif not skipped:
            found = _INSTRUCTION.match(line)
            if found is not None and found.group(3) not in _NO_BUFFER:
                kind, sizes, _ = found.groups()
                yield kind, tuple(int(n) for n in sizes.split(",") if n)


def is_matrix(shape: Sequence[int], rows: int, columns: int) -> bool:
    """Tell whether a shape is a matrix with each side perhaps split, either side first.

    Args:
        shape: A shape.
        rows: Entries of one side.
        columns: Entries of the other.

    Returns:
        Whether some cut of the shape has `rows` before and `columns` behind, or the reverse.

    Example:
        >>> is_matrix((32, 128, 512), 4096, 512), is_matrix((1, 512, 4096), 4096, 512)
        (True, True)
        >>> is_matrix((64, 64, 512), 128, 16384)
        False
    """
    if math.prod(shape) != rows * columns:
        return False
    heads = {math.prod(shape[:k]) for k in range(len(shape) + 1)}
    return rows in heads or columns in heads


def count_expanded_bytes(text: str, rows: int, columns: int) -> int:
    """Give the bytes of the largest float array in memory that holds a whole such matrix.

    Args:
        text: An optimised HLO module.
        rows: Entries that a quantized weight contracts.
        columns: Its other entries.

    Returns:
        Bytes, 0 if the program never writes one.
    """
    sizes = (
        math.prod(shape) * _WIDTH[kind]
        for kind, shape in float_arrays(text)
        if is_matrix(shape, rows, columns)
    )
    return max(sizes, default=0)
