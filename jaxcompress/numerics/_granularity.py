"""Granularity: which entries of an array share one scale.

A granularity may split an axis into blocks. Scales keep every axis of the blocked array, with
length 1 where entries share, so that they broadcast; they ride along under `vmap` and `scan`.
"""

import abc
import math
from dataclasses import dataclass

from jax import Array

from jaxcompress.errors import ArgumentError, require_at_least


@dataclass(frozen=True)
class Granularity(abc.ABC):
    """Which entries share one scale: the base class of `PerTensor`, `PerChannel`, `PerGroup`."""

    def obstacle(self, shape: tuple[int, ...]) -> str | None:
        """Say why an array of this shape cannot be split so.

        Args:
            shape: The array's shape.

        Returns:
            The reason, which continues a sentence about the array; `None` if it can.
        """
        return None

    @abc.abstractmethod
    def shared(self, ndim: int) -> tuple[int, ...]:
        """List the axes of the blocked array along which one scale is shared.

        Args:
            ndim: Axes of the array before blocking.

        Returns:
            Axes, non-negative.
        """

    def block(self, x: Array) -> Array:
        """Split the array's axes into blocks, if the granularity has any.

        Args:
            x: The array.

        Returns:
            The array, blocked.
        """
        return x

    def unblock(self, blocked: Array) -> Array:
        """Undo `block`; leading axes that were added since (by `vmap`, say) stay.

        Args:
            blocked: A blocked array.

        Returns:
            The array as it was.
        """
        return blocked.reshape(self.unblocked_shape(blocked.shape))

    def unblocked_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Give the shape of `unblock`'s result.

        Args:
            shape: A blocked shape.

        Returns:
            The shape before blocking.
        """
        return tuple(shape)


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole array, stacked layers and all."""

    def shared(self, ndim: int) -> tuple[int, ...]:
        """All axes."""
        return tuple(range(ndim))


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale per vector of features: for activations, `(..., features)`.

    At a site the features are the axes that are contracted, wherever they stand, so that each
    row of the contraction has its own scale; at a convolution, whose windows overlap, each
    example of the batch has one.
    """

    def obstacle(self, shape: tuple[int, ...]) -> str | None:
        """Have no axis at all."""
        return None if shape else "is a scalar"

    def shared(self, ndim: int) -> tuple[int, ...]:
        """The last axis."""
        return (ndim - 1,)


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale per index of the given axes.

    The default is one per output in the Flax kernel convention, `(in, out)` and
    `(height, width, in, out)`: the last axis. For a stack of layers or experts `(L, in, out)`
    say `PerChannel((0, -1))`, or all L share an output's scale.

    Attributes:
        axes: The axes that keep a scale of their own.

    Raises:
        ArgumentError: If no axis is given, or one twice.
    """

    axes: tuple[int, ...] = (-1,)

    def __post_init__(self):
        if not self.axes or len(set(self.axes)) < len(self.axes):
            raise ArgumentError(
                "axes",
                got=self.axes,
                expected="one or more different axes",
                fix="Use PerTensor() for a single scale, PerChannel((-1,)) for one per output.",
            )

    def obstacle(self, shape: tuple[int, ...]) -> str | None:
        """Miss an axis."""
        absent = [axis for axis in self.axes if not -len(shape) <= axis < len(shape)]
        return f"has shape {shape}, without axis {absent[0]}" if absent else None

    def shared(self, ndim: int) -> tuple[int, ...]:
        """All axes but `axes`."""
        kept = {axis % ndim for axis in self.axes}
        return tuple(axis for axis in range(ndim) if axis not in kept)


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale per run of `size` entries along one axis, apart for every index of the others.

    A blocked array is `(..., groups, size, ...)`: a kernel `(in, out)` is stored as
    `(in / size, size, out)`, which a matmul contracts over two axes at once.

    Attributes:
        size: Entries that share a scale.
        axis: The axis that is split, by default -2, the contraction axis of a Flax kernel. Count
            from the end, so that leading axes can come and go.

    Raises:
        ArgumentError: If `size` is not positive.
    """

    size: int
    axis: int = -2

    def __post_init__(self):
        require_at_least("size", self.size, 1, fix="64 and 128 are usual.")

    def obstacle(self, shape: tuple[int, ...]) -> str | None:
        """Miss the axis, or have a length that does not divide."""
        if not -len(shape) <= self.axis < len(shape):
            return f"has shape {shape}, without axis {self.axis}"
        if shape[self.axis] % self.size:
            return (
                f"has {shape[self.axis]} entries along axis {self.axis}, which do not divide into "
                f"groups of {self.size}"
            )
        return None

    def shared(self, ndim: int) -> tuple[int, ...]:
        """The axis inside the groups."""
        return (self.axis % ndim + 1,)

    def block(self, x: Array) -> Array:
        """Split the axis into `(groups, size)`."""
        axis = self.axis % x.ndim
        groups = x.shape[axis] // self.size
        return x.reshape(*x.shape[:axis], groups, self.size, *x.shape[axis + 1 :])

    def unblocked_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Merge `(groups, size)`."""
        axis = self.axis % (len(shape) - 1)
        return (*shape[:axis], math.prod(shape[axis : axis + 2]), *shape[axis + 2 :])
