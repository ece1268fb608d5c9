"""Pools: the few flat tensors of a file, each a run of entries of all leaves in order.

A tensor per leaf would cost some 80 bytes of header each, which a small model notices.
"""

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

BITS = "bits"
"""The pool of bitmaps and packed codes: bytes, each leaf starting on a new one."""

# dtype of a pool -> the safetensors dtype it is declared as. What safetensors lacks is declared
# as what has the same bytes.
DECLARED = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "complex64": "U64",
    "complex128": "U8",
    BITS: "U8",
}
_RARE_FLOATS = ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")
DECLARED |= {f"float8_{name}": "U8" for name in _RARE_FLOATS}
ITEMSIZE = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "U16": 2, "I16": 2}
ITEMSIZE |= {"F32": 4, "U32": 4, "I32": 4, "F64": 8, "U64": 8, "I64": 8}


class Writer:
    """Gathers the entries of leaves into pools."""

    def __init__(self):
        self.chunks: dict[str, list[np.ndarray]] = {}
        self.written = 0

    def put(self, pool: str, entries: np.ndarray) -> None:
        """Append entries to a pool, in row-major order."""
        if entries.dtype.byteorder == ">":
            entries = entries.astype(entries.dtype.newbyteorder("<"))
        flat = np.ascontiguousarray(entries).reshape(-1).view(np.uint8)
        if flat.size:
            self.chunks.setdefault(pool, []).append(flat)
            self.written += flat.size

    def pools(self) -> list[tuple[str, list[np.ndarray]]]:
        """List the pools in the file's order: wide entries first, so that each is aligned."""
        order = {name: (-ITEMSIZE[DECLARED[name]], name) for name in self.chunks}
        return [(name, self.chunks[name]) for name in sorted(self.chunks, key=order.__getitem__)]


class Reader:
    """Hands the entries of leaves out of pools, in the order they were put in."""

    def __init__(self, pools: Mapping[str, np.ndarray]):
        self.pools = pools
        self.position = dict.fromkeys(pools, 0)
        self.read = 0

    def take(self, pool: str, count: int) -> np.ndarray:
        """Take the next entries of a pool, as an array of one axis that must not be written to."""
        dtype = np.dtype(np.uint8) if pool == BITS else jnp.dtype(pool)
        size = count * dtype.itemsize
        if not size:
            return np.zeros(0, dtype)
        start = self.position.get(pool, 0)
        if pool not in self.pools or start + size > self.pools[pool].size:
            raise ValueError(f"its pool {pool!r} ends too early")
        self.position[pool] = start + size
        self.read += size
        return self.pools[pool][start : start + size].view(dtype)

    def finish(self) -> None:
        """Check that nothing is left over."""
        left = [name for name, pool in self.pools.items() if self.position[name] != pool.size]
        if left:
            raise ValueError(f"its pools {left} hold more than its leaves")


def entries_in(shape: tuple[int, ...]) -> int:
    """Count the entries of a shape read from a file.

    Args:
        shape: The shape.

    Returns:
        The count.

    Raises:
        ValueError: If it is no shape.
    """
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"it gives a leaf the shape {shape}")
    return math.prod(shape)
