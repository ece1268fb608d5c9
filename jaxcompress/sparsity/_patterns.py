"""Patterns: which entries of a leaf live and die together.

A pattern cuts a leaf into *units*. Scores are averaged over each unit, units are chosen, and the
choice is spread over their entries again. `contraction` is always the sorted tuple of the leaf's
axes that are summed over when it is used; the others are output axes.
"""

import abc
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike

from jaxcompress import linalg
from jaxcompress.errors import ArgumentError
from jaxcompress.sparsity.schedules import check_fraction

Axes = tuple[int, ...]


class Pattern(abc.ABC):
    """Base class of patterns: pure functions between a leaf and its units.

    Derive from it to add a pattern; give `obstacle`, `unit_size`, `mean` and `expand`.
    """

    @abc.abstractmethod
    def obstacle(self, shape: Axes, contraction: Axes) -> str | None:
        """Say why a leaf of this shape cannot be cut into units; `None` if it can."""

    @abc.abstractmethod
    def unit_size(self, shape: Axes, contraction: Axes) -> int:
        """Count the entries of one unit."""

    @abc.abstractmethod
    def mean(self, entries: jax.Array, contraction: Axes) -> jax.Array:
        """Average an array like the leaf over each unit."""

    @abc.abstractmethod
    def expand(self, units: jax.Array, shape: Axes, contraction: Axes) -> jax.Array:
        """Give each entry of the leaf its unit's value."""

    def choose(
        self, scores: jax.Array, contraction: Axes, *, sparsity: ArrayLike | None
    ) -> jax.Array:
        """Mark the units of one leaf to keep, given their scores and the fraction to prune."""
        assert sparsity is not None, "make_mask asks for an amount"
        return linalg.top_k_mask(scores, keep_count(scores.size, sparsity))


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every entry is a unit of its own."""

    def obstacle(self, shape: Axes, contraction: Axes) -> str | None:
        """Say why a leaf cannot be cut into units: any can."""

    def unit_size(self, shape: Axes, contraction: Axes) -> int:
        """Count the entries of one unit: 1."""
        return 1

    def mean(self, entries: jax.Array, contraction: Axes) -> jax.Array:
        """Average over each unit: nothing to do."""
        return entries

    def expand(self, units: jax.Array, shape: Axes, contraction: Axes) -> jax.Array:
        """Give each entry its unit's value: nothing to do."""
        return units


@dataclass(frozen=True)
class NM(Unstructured):
    """Keep n of every m neighbours along the contraction: `NM(2, 4)` is hardware's 2:4.

    Groups run along the *last* contraction axis, the input features or channels in the Flax
    convention, because that is the direction in which hardware reads them. The pattern itself
    says the sparsity, 1 - n/m; where a smaller one is asked for (a schedule on its way up), each
    group prunes round(sparsity * m) entries, at most m - n.

    Attributes:
        n: Entries kept per group, from 1 to m - 1.
        m: Entries per group.
    """

    n: int
    m: int

    def __post_init__(self):
        if not 1 <= self.n < self.m:
            raise ArgumentError(
                "NM", got=f"n={self.n}, m={self.m}", expected="1 <= n < m", fix="2:4 is NM(2, 4)."
            )

    @property
    def sparsity(self) -> float:
        """The fraction pruned, 1 - n/m."""
        return 1 - self.n / self.m

    def obstacle(self, shape: Axes, contraction: Axes) -> str | None:
        """Say why a leaf cannot be cut into groups of m."""
        if not contraction:
            return "has no contraction axis to run groups along"
        if shape[contraction[-1]] % self.m:
            return f"has {shape[contraction[-1]]} inputs, which groups of {self.m} do not divide"
        return None

    def choose(
        self, scores: jax.Array, contraction: Axes, *, sparsity: ArrayLike | None
    ) -> jax.Array:
        """Mark the entries to keep, the same number in every group."""
        wanted = self.sparsity if sparsity is None else sparsity
        kept = keep_count(self.m, wanted)
        kept = jnp.maximum(kept, self.n) if isinstance(kept, Tracer) else max(kept, self.n)
        return linalg.top_k_in_groups(scores, kept, axis=contraction[-1], size=self.m)


@dataclass(frozen=True)
class Block(Pattern):
    """Rectangular blocks: `Block((4, 4))` cuts a kernel into tiles of 4 inputs by 4 outputs.

    Attributes:
        shape: Block sizes along the last axes of the leaf; 1 along the others.
    """

    shape: tuple[int, ...]

    def __post_init__(self):
        if not self.shape or any(size < 1 for size in self.shape):
            raise ArgumentError(
                "Block", got=f"{self.shape}", expected="positive sizes", fix="Try Block((4, 4))."
            )

    def obstacle(self, shape: Axes, contraction: Axes) -> str | None:
        """Say why a leaf cannot be cut into such blocks."""
        if len(shape) < len(self.shape):
            return f"has {len(shape)} axes, fewer than a block's {len(self.shape)}"
        tail = shape[len(shape) - len(self.shape) :]
        if any(n % size for n, size in zip(tail, self.shape, strict=True)):
            return f"has shape {shape}, which blocks of {self.shape} do not divide"
        return None

    def unit_size(self, shape: Axes, contraction: Axes) -> int:
        """Count the entries of one block."""
        return math.prod(self.shape)

    def mean(self, entries: jax.Array, contraction: Axes) -> jax.Array:
        """Average over each block."""
        counts, sizes = self._grid(entries.shape)
        split = [n for pair in zip(counts, sizes, strict=True) for n in pair]

        def block_means(x: jax.Array) -> jax.Array:  # (n0, b0, n1, b1, ...) -> (n0, n1, ...)
            return _mean(x.reshape(split), tuple(range(1, 2 * x.ndim, 2)))

        return linalg.without_explicit_axes(block_means, entries, shape=counts)

    def expand(self, units: jax.Array, shape: Axes, contraction: Axes) -> jax.Array:
        """Give each entry its block's value."""
        counts, sizes = self._grid(shape)
        split = [n for pair in zip(counts, sizes, strict=True) for n in pair]

        def repeat(x: jax.Array) -> jax.Array:  # (n0, n1, ...) -> (n0, b0, n1, b1, ...) -> shape
            return jnp.broadcast_to(
                jnp.expand_dims(x, tuple(range(1, 2 * x.ndim, 2))), split
            ).reshape(shape)

        return linalg.without_explicit_axes(repeat, units, shape=shape)

    def _grid(self, shape: Axes) -> tuple[Axes, Axes]:
        sizes = (1,) * (len(shape) - len(self.shape)) + self.shape
        return tuple(n // size for n, size in zip(shape, sizes, strict=True)), sizes


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole neurons or filters: all that one output index is computed from.

    A unit spans every contraction axis, so masking it silences one output, up to its bias, which is
    not masked. To remove outputs with their biases, see `structured`.
    """

    def obstacle(self, shape: Axes, contraction: Axes) -> str | None:
        """Say why a leaf has no neurons."""
        if not contraction:
            return "has no contraction axis, so no neurons"
        if len(contraction) == len(shape):
            return "has no output axis, so no neurons"
        return None

    def unit_size(self, shape: Axes, contraction: Axes) -> int:
        """Count the entries that feed one neuron."""
        return math.prod(shape[axis] for axis in contraction)

    def mean(self, entries: jax.Array, contraction: Axes) -> jax.Array:
        """Average over each neuron's inputs; the contraction axes stay, at size 1."""
        return jnp.expand_dims(_mean(entries, contraction), contraction)

    def expand(self, units: jax.Array, shape: Axes, contraction: Axes) -> jax.Array:
        """Give each entry its neuron's value."""
        return jnp.broadcast_to(units, shape)


def keep_count(entries: int, sparsity: ArrayLike) -> Any:
    """Count what is kept: entries - round(sparsity * entries), halves rounded to even.

    Args:
        entries: How many there are.
        sparsity: The fraction to prune. If traced, the product is taken in float32, which from
            2**23 entries on can be off by a few parts in 2**24, and is clipped to [0, 1].

    Returns:
        An integer; traced if the sparsity is.

    Raises:
        ArgumentError: If a concrete sparsity lies outside [0, 1].

    Example:
        >>> keep_count(10, 0.75), keep_count(4, 0.5)
        (2, 2)
    """
    if not isinstance(sparsity, Tracer):
        fraction = float(np.asarray(sparsity))
        check_fraction("sparsity", fraction)
        return entries - round(fraction * entries)
    fraction = jnp.clip(sparsity.astype(jnp.float32), 0, 1)
    pruned = jnp.round(fraction * jnp.float32(entries)).astype(jnp.int32)
    return entries - jnp.minimum(pruned, entries)


def _mean(x: jax.Array, axes: Axes) -> jax.Array:
    return jnp.mean(linalg.widen(x), axis=axes)
