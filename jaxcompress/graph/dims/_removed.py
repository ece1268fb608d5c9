"""Which labels are gone, by the indices of leaves that are kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from jaxcompress.errors import ArgumentError
from jaxcompress.graph.dims._found import Dims
from jaxcompress.graph.dims._kept import Kept, Mask
from jaxcompress.graph.dims._labels import Axis
from jaxcompress.graph.dims._rule import Axes
from jaxcompress.graph.program import Literal

KeepIndices: TypeAlias = Mapping[str, Mapping[int, np.ndarray]]
"""`{path: {axis: indices to keep}}`, (K,), or (L, K) where L stacked layers differ."""


@dataclass(frozen=True, kw_only=True)
class Removed:
    """Which labels are gone.

    Attributes:
        dims: The labels.
        everywhere: (labels,) bool: gone from all layers.
        by_layer: `{level: (L, labels) bool}`: gone from some layers of a scan.
    """

    dims: Dims
    everywhere: np.ndarray
    by_layer: Mapping[int, np.ndarray]
    _masks: dict[int, tuple[Axis, Mask]] = field(default_factory=dict, repr=False)

    def mask(self, axis: Axis) -> Mask:
        """Say which indices of an axis are kept; `None` if all are."""
        known = self._masks.get(id(axis))
        if known is None:
            known = self._masks[id(axis)] = axis, self._mask(axis)
        return known[1]

    def _mask(self, axis: Axis) -> Mask:
        rows = self.dims.labels.rows(axis)
        real = rows >= 0
        gone = (self.everywhere[rows] & real).any(axis=1)
        for flags in self.by_layer.values():
            inside = (flags[:, rows] & real).any(axis=2)
            if inside.any():
                return np.logical_not(inside | gone)
        return np.logical_not(gone) if gone.any() else None

    def level_of(self, axis: Axis) -> int:
        """Find the scan between whose layers an axis keeps different indices."""
        labels = self.dims.labels.members(axis)
        (level,) = (k for k, flags in self.by_layer.items() if flags[:, labels].any())
        return level

    def place_layers(
        self, x: np.ndarray, axes: Axes, k: int, scans: Sequence[int]
    ) -> tuple[np.ndarray, int | None]:
        """Put what differs between layers along axis `k` of a variable, (L, n), beside these.

        Returns:
            It with an axis for each of the scans around, which slice it, and `None`; or itself,
            and the axis of the variable that counts layers.
        """
        level = self.level_of(axes[k])
        if level in scans:
            return self._spread(x, scans, level), None
        layer = self.dims.layer_axis(axes, level)
        assert layer is not None, "masks that differ stand beside their layers"
        return x, layer

    def _spread(self, x: np.ndarray, scans: Sequence[int], level: int) -> np.ndarray:
        lengths = [self.dims.levels[k].length for k in scans]
        shape = [n if k == level else 1 for k, n in zip(scans, lengths, strict=True)]
        return np.broadcast_to(x.reshape((*shape, x.shape[1])), (*lengths, x.shape[1]))

    def masks(self, axes: Axes) -> tuple[Mask, ...]:
        """Say it for all axes of a variable."""
        return tuple(self.mask(axis) for axis in axes)

    def kept_at(self, eqn: Any, env: Mapping[Any, Axes]) -> Kept:
        """Say it for the operands and results of an equation; of literals nothing is removed."""
        masks = lambda atom: () if isinstance(atom, Literal) else self.masks(env[atom])
        return Kept(eqn, [*map(masks, eqn.invars)], [*map(masks, eqn.outvars)])


def removed_by(dims: Dims, keep: KeepIndices) -> Removed:
    """Find the labels that indices to keep leave out, and check that nothing else goes.

    Raises:
        ArgumentError: If an index that goes is tied to one that stays, or may not go.
    """
    everywhere, by_layer = np.zeros(len(dims.labels), bool), dict[int, np.ndarray]()
    for path, axes in keep.items():
        for k, indices in axes.items():
            rows = dims.labels.rows(dims.leaves[path][k])
            for layer, kept in enumerate(np.atleast_2d(indices)):
                gone = _absent(rows, kept)
                if np.ndim(indices) == 1:
                    everywhere[gone] = True
                else:
                    _add_layer(dims, by_layer, gone, layer, len(indices), path)
    removed = Removed(dims=dims, everywhere=everywhere, by_layer=by_layer)
    _check_frozen(dims, removed, keep)
    return removed


def _absent(rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """List the labels of an axis that no kept index has."""
    there = np.unique(rows[kept])
    return np.setdiff1d(np.unique(rows[rows >= 0]), there)


def _add_layer(
    dims: Dims, by_layer: dict[int, np.ndarray], gone: Axis, layer: int, count: int, path: str
) -> None:
    for level in np.unique(dims.layers[gone]):
        if level == 0 or dims.levels[level - 1].length != count:
            raise ArgumentError(
                "keep",
                got=f"indices of its own for each of {count} layers of {path!r}",
                expected="one set of indices, as the layers share this axis",
                fix="Give indices of shape (K,).",
            )
        flags = by_layer.setdefault(int(level) - 1, np.zeros((count, len(dims.labels)), bool))
        flags[layer, gone[dims.layers[gone] == level]] = True


def _check_frozen(dims: Dims, removed: Removed, keep: KeepIndices) -> None:
    gone = removed.everywhere.copy()
    for flags in removed.by_layer.values():
        gone |= flags.any(axis=0)
    held = gone & (dims.reasons != "")
    for path, axes in dims.leaves.items():
        for k, axis in enumerate(axes):
            rows = dims.labels.rows(axis)
            if len(frozen := rows[(rows >= 0) & held[rows]]):
                raise ArgumentError(
                    "keep",
                    got=f"fewer than all indices along axis {k} of {path!r}",
                    expected=f"all of them: {dims.reasons[frozen[0]]}",
                    fix="Keep the whole of a frozen axis; `structured.groups` says which are.",
                )
            have, want = removed.mask(axis), keep.get(path, {}).get(k)
            have = mask_of(None, len(axis)) if have is None else have
            _check_tied(path, k, have, mask_of(want, len(axis)))


def _check_tied(path: str, axis: int, have: np.ndarray, want: np.ndarray) -> None:
    """Check that what the other leaves leave of an axis is what is to be kept of it."""
    # One set of indices stands for all layers that share it.
    of_layers = np.broadcast_to(have, want.shape) if have.ndim < want.ndim else have
    if not np.array_equal(of_layers, want):
        raise ArgumentError(
            "keep",
            got=f"{want.sum(-1)} of {want.shape[-1]} indices along axis {axis} of {path!r}",
            expected=f"{have.sum(-1)}, which go with what is kept of the other leaves",
            fix="Take `keep` from `structured.choose`, or from groups, of this function.",
        )


def mask_of(indices: np.ndarray | None, size: int) -> np.ndarray:
    """Flag the indices that are kept, of each layer where they differ; `None` keeps all."""
    if indices is None:
        return np.ones(size, bool)
    mask = np.zeros((*indices.shape[:-1], size), bool)
    np.put_along_axis(mask, indices, True, axis=-1)
    return mask
