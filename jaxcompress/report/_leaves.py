"""Every leaf accounted for: its shape, what is kept of it, and what it takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcompress import tree
from jaxcompress.report._table import Column, Table, table


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """What one leaf is and takes; also the sum over all of them.

    Attributes:
        path: The leaf's path, or `total`, or what else takes bytes in a file, such as `(header)`.
        shape: Its shape; `None` if it is not a leaf.
        stored: The dtype or qtype of what is stored; empty if it is not a leaf.
        entries: How many entries it has.
        kept: How many of them the mask keeps; all if there is no mask.
        bytes: Bytes in memory, scales and zero points included.
        file_bytes: Bytes in the file, where known.
    """

    path: str
    shape: tuple[int, ...] | None
    stored: str
    entries: int
    kept: int
    bytes: int
    file_bytes: int | None = None

    @property
    def sparsity(self) -> float:
        """The fraction of entries that are pruned; 0 for a leaf without entries."""
        return 1 - self.kept / self.entries if self.entries else 0.0

    @property
    def bits(self) -> float:
        """Bits per entry: in the file where that is known, else in memory."""
        taken = self.bytes if self.file_bytes is None else self.file_bytes
        return 8 * taken / self.entries if self.entries else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Give the attributes, sparsity and bits by name."""
        return vars(self) | {"sparsity": self.sparsity, "bits": self.bits}


@dataclass(frozen=True, kw_only=True)
class Leaves:
    """All leaves of params, and their total.

    Attributes:
        rows: One per leaf, in traversal order, and one for whatever else takes bytes in the file.
        total: Their sum.
    """

    rows: tuple[Leaf, ...]
    total: Leaf

    def table(self, *, title: str = "") -> Table:
        """Lay it out as a table, the total last.

        Args:
            title: A heading.

        Returns:
            The table.
        """
        rows = [leaf.as_dict() for leaf in (*self.rows, self.total)]
        in_file = self.total.file_bytes is not None
        columns = [
            *("path", "shape", "stored", "entries", "kept", "sparsity"),
            Column(key="bits", title="bits/entry"),
            *(["bytes", "file_bytes"] if in_file else ["bytes"]),
        ]
        made = table(rows, columns=columns, title=title)
        return Table(columns=made.columns, rows=made.rows, title=title, total=True)


def leaves(
    params: tree.Params,
    *,
    mask: tree.Params | None = None,
    file_bytes: Mapping[str, int] | None = None,
) -> Leaves:
    """List every leaf of params with its entries, sparsity and bytes.

    Args:
        params: Any pytree of arrays, QArrays among them.
        mask: What pruning keeps, mirroring params, `None` for untouched leaves.
        file_bytes: Bytes per path in a file, as `export.save` reports them in `leaves`; what is
            not the path of a leaf (the header) gets a row of its own, so that they add up.

    Returns:
        The leaves and their total.

    Raises:
        StructureError: If the mask does not mirror params.

    Example:
        >>> params = {"bias": np.zeros(4, "f4"), "kernel": np.ones((4, 8), "f4")}
        >>> print(leaves(params, mask={"bias": None, "kernel": np.arange(32).reshape(4, 8) < 8})
        ...       .table().text(width=80))
                                               sparsity              bytes
        path    shape  stored   entries  kept       [%]  bits/entry    [B]
        ──────────────────────────────────────────────────────────────────
        bias    4      float32        4     4       0.0       32.00     16
        kernel  4×8    float32       32     8      75.0       32.00    128
        ──────────────────────────────────────────────────────────────────
        total   –                    36    12      66.7       32.00    144
    """
    masks = tree.flatten_like(params, mask, name="mask") if mask is not None else []
    masks = masks or [None] * len(tree.leaves(params))
    rows = [
        Leaf(
            path=path,
            shape=tuple(np.shape(leaf)),
            stored=_describe_stored(leaf),
            entries=math.prod(np.shape(leaf)),
            kept=math.prod(np.shape(leaf)) if kept is None else int(np.sum(np.asarray(kept))),
            bytes=tree.nbytes(leaf) if hasattr(leaf, "dtype") else 0,
            file_bytes=None if file_bytes is None else file_bytes.get(path, 0),
        )
        for (path, leaf), kept in zip(tree.items(params), masks, strict=True)
    ]
    known = {row.path for row in rows}
    rows += [
        Leaf(path=path, shape=None, stored="", entries=0, kept=0, bytes=0, file_bytes=count)
        for path, count in (file_bytes or {}).items()
        if path not in known
    ]
    total = Leaf(
        path="total",
        shape=None,
        stored="",
        entries=sum(row.entries for row in rows),
        kept=sum(row.kept for row in rows),
        bytes=sum(row.bytes for row in rows),
        file_bytes=None if file_bytes is None else sum(file_bytes.values()),
    )
    return Leaves(rows=tuple(rows), total=total)


def _describe_stored(leaf: Any) -> str:
    qtype = getattr(getattr(leaf, "format", None), "qtype", None)
    return str(getattr(qtype, "name", getattr(leaf, "dtype", type(leaf).__name__)))
