"""What is kept of the axes at one equation: what a rule needs to run it on smaller operands."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

Mask: TypeAlias = np.ndarray | None
"""Which indices of an axis are kept: (size,) bool, (layers, size) where layers differ, or `None`
for all."""


class Kept:
    """The masks of an equation's operands and results.

    Args:
        eqn: The equation, at full size.
        operands: A mask for each axis of each operand.
        results: A mask for each axis of each result.
    """

    def __init__(
        self, eqn: Any, operands: Sequence[Sequence[Mask]], results: Sequence[Sequence[Mask]]
    ):
        self.eqn, self._operands, self._results = eqn, operands, results

    def operand(self, number: int) -> Sequence[Mask]:
        """Give the masks of an operand's axes."""
        return self._operands[number]

    def result(self, number: int = 0) -> Sequence[Mask]:
        """Give the masks of a result's axes."""
        return self._results[number]

    @property
    def changes(self) -> bool:
        """Whether any axis here is smaller."""
        return any(
            mask is not None for masks in (*self._operands, *self._results) for mask in masks
        )

    def count(self, mask: np.ndarray) -> int:
        """Count what is kept; all layers keep the same number."""
        counts = np.unique(mask.sum(axis=-1))
        assert len(counts) == 1, "layers keep different numbers of a part of an axis"
        return int(counts[0])

    def shape(self, number: int = 0) -> tuple[Any, ...]:
        """Give the new shape of a result; symbolic dimensions stay symbolic."""
        return resized(self.eqn.outvars[number].aval.shape, self._results[number], self.count)

    def take(self, x: Any, number: int = 0) -> Any:
        """Take the kept indices of a result that was made at full size."""
        return taken(x, self._results[number])

    def index(self, number: int, axis: int, positions: np.ndarray) -> np.ndarray:
        """Renumber positions along an operand's axis, leaving out those that are gone."""
        mask = self._operands[number][axis]
        if mask is None:
            return positions
        assert mask.ndim == 1, "positions are the same in all layers"
        return (np.cumsum(mask) - 1)[positions[mask[positions]]]


def resized(shape: Sequence[Any], masks: Sequence[Mask], count: Any) -> tuple[Any, ...]:
    """Give a shape with masked axes shrunk; a symbolic one by the fraction that is kept."""
    new = []
    for n, mask in zip(shape, masks, strict=True):
        if mask is None:
            new.append(n)
        elif isinstance(n, int):
            new.append(count(mask))
        else:  # so many, for each index of a symbolic axis
            new.append(n * count(mask) // mask.shape[-1])
    return tuple(new)


def taken(x: Any, masks: Sequence[Mask]) -> Any:
    """Take the kept indices along each axis."""
    for k, mask in enumerate(masks):
        if mask is not None:
            assert mask.ndim == 1, "what is made in a scan is the same in all layers"
            x = jnp.take(x, np.flatnonzero(mask), axis=k)
    return x
