"""What is kept of the axes at one equation: what a rule needs to run it on smaller operands."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.meshes import find_explicit_mesh

Mask: TypeAlias = np.ndarray | None
"""Which indices of an axis are kept: (size,) bool, (layers, size) where layers differ, or `None`
for all."""


@dataclass(frozen=True, eq=False)
class Kept:
    """The masks of an equation's operands and results.

    Attributes:
        eqn: The equation, at full size.
        operands: A mask for each axis of each operand.
        results: A mask for each axis of each result.
        rows: For masks of results that differ between layers, `{(result, axis): (indices, layer
            axis)}`: those of this layer, (K,), and `None`; or those of all layers, (L, K), and the
            axis of the result that counts them.
    """

    eqn: Any
    operands: Sequence[Sequence[Mask]]
    results: Sequence[Sequence[Mask]]
    rows: Mapping[tuple[int, int], tuple[Any, int | None]] = field(default_factory=dict)

    def operand(self, number: int) -> Sequence[Mask]:
        """Give the masks of an operand's axes."""
        return self.operands[number]

    def result(self, number: int = 0) -> Sequence[Mask]:
        """Give the masks of a result's axes."""
        return self.results[number]

    @property
    def changes(self) -> bool:
        """Whether any axis here is smaller."""
        return any(mask is not None for masks in (*self.operands, *self.results) for mask in masks)

    def count(self, mask: np.ndarray) -> int:
        """Count what is kept; all layers keep the same number."""
        counts = np.unique(mask.sum(axis=-1))
        assert len(counts) == 1, "layers keep different numbers of a part of an axis"
        return int(counts[0])

    def shape(self, number: int = 0) -> tuple[Any, ...]:
        """Give the new shape of a result; a symbolic dimension by the fraction that is kept."""
        new = []
        shape = self.eqn.outvars[number].aval.shape
        for n, mask in zip(shape, self.results[number], strict=True):
            if mask is None:
                new.append(n)
            elif isinstance(n, int):
                new.append(self.count(mask))
            else:  # so many, for each index of a symbolic axis
                new.append(n * self.count(mask) // mask.shape[-1])
        return tuple(new)

    def take(self, x: Any, number: int = 0) -> Any:
        """Take the kept indices of a result that was made at full size."""
        mine = {k: rows for (result, k), rows in self.rows.items() if result == number}
        for k, (rows, layer) in mine.items():
            x = jnp.take(x, rows, axis=k) if layer is None else take_by_layer(x, rows, k, layer)
        masks = self.results[number]
        return take_kept(x, [None if k in mine else mask for k, mask in enumerate(masks)])

    def index(self, number: int, axis: int, positions: np.ndarray) -> np.ndarray:
        """Renumber positions along an operand's axis, leaving out those that are gone."""
        mask = self.operands[number][axis]
        if mask is None:
            return positions
        assert mask.ndim == 1, "positions are the same in all layers"
        return (np.cumsum(mask) - 1)[positions[mask[positions]]]


def take_kept(x: Any, masks: Sequence[Mask]) -> Any:
    """Take the kept indices along each axis."""
    for k, mask in enumerate(masks):
        if mask is not None:
            assert mask.ndim == 1, "what is made in a scan is the same in all layers"
            x = take(x, np.flatnonzero(mask), k)
    return x


def take(x: Any, indices: np.ndarray, axis: int) -> Any:
    """Take indices along an axis, which stays sharded as it is if their number can be divided.

    Args:
        x: Any array, on explicit meshes too.
        indices: (K,) integers.
        axis: The axis, counted from 0.

    Returns:
        The array with K entries along the axis.

    Example:
        >>> take(jnp.arange(6).reshape(2, 3), np.array([0, 2]), 1).tolist()
        [[0, 2], [3, 5]]
    """
    mesh, spec = find_explicit_mesh(x), list(jax.typeof(x).sharding.spec)
    if mesh is None or all(name is None for name in spec):
        return jnp.take(x, indices, axis=axis)
    names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
    parts = math.prod(mesh.shape[name] for name in names if name is not None)
    if len(indices) % parts:
        spec[axis] = None
    where = (*(slice(None) for _ in range(axis)), indices)
    return x.at[where].get(out_sharding=PartitionSpec(*spec))


def take_by_layer(x: Any, indices: np.ndarray, axis: int, layer: int) -> Any:
    """Take indices along an axis, others in each layer.

    Args:
        x: Any array.
        indices: (L, K) integers.
        axis: The axis that they are of, counted from 0.
        layer: The axis of size L that counts layers.

    Returns:
        The array with K entries along the axis.

    Example:
        >>> take_by_layer(jnp.arange(6).reshape(2, 3), np.array([[0, 2], [1, 2]]), 1, 0).tolist()
        [[0, 2], [4, 5]]
    """
    shape = [1] * x.ndim
    shape[axis], shape[layer] = indices.shape[1], indices.shape[0]
    rows = indices if layer < axis else indices.T
    return jnp.take_along_axis(x, jnp.asarray(rows.reshape(shape)), axis=axis)
