"""Number types: what one stored entry may hold, and how a real number is rounded to it.

A `QType` turns a slice's numbers and scale into stored values and back. Almost every type is
`Scaled`: it works on normalised numbers, `t = x / scale`, and is written as two pure functions,
`encode` (round `t` to a code) and `decode` (the number a code stands for). A new type is an
instance of a class here, or a subclass.
"""

import abc
import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.errors import ArgumentError

Limits = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class QType(abc.ABC):
    """A number type: the base class of them all.

    Attributes:
        name: What reports and files call it.
        bits: Information per entry, in bits.
    """

    name: str
    bits: int

    @property
    @abc.abstractmethod
    def storage(self) -> Any:
        """The dtype of stored values; XLA packs `int4` two and `int2` four to a byte."""

    @abc.abstractmethod
    def to_values(
        self,
        x: Array,
        scale: Array,
        zero: Array | None,
        *,
        limits: Limits | None,
        noise: Array | None = None,
    ) -> Array:
        """Round numbers to stored values.

        Args:
            x: float32 numbers.
            scale: float32 scale of each slice, broadcastable to x.
            zero: float32 zero point of each slice, or `None`.
            limits: The smallest and the largest code to use, of a `Scaled` type.
            noise: Uniform on [0, 1), one per number, for stochastic rounding; `None` rounds to
                the nearest.

        Returns:
            Values of the dtype `storage`.
        """

    @abc.abstractmethod
    def to_numbers(self, values: Array, scale: Array, zero: Array | None) -> Array:
        """Give the numbers that stored values stand for.

        Args:
            values: What `to_values` gave.
            scale: The same scale.
            zero: The same zero point.

        Returns:
            float32 numbers.
        """

    def round_trip(
        self, x: Array, scale: Array, zero: Array | None, *, limits: Limits | None
    ) -> Array:
        """Round numbers to what their stored values stand for, by way of the values or without.

        Args:
            x: float32 numbers.
            scale: As in `to_values`.
            zero: As in `to_values`.
            limits: As in `to_values`.

        Returns:
            float32 numbers, equal to `to_numbers(to_values(...))`.
        """
        return self.to_numbers(self.to_values(x, scale, zero, limits=limits), scale, zero)

    @abc.abstractmethod
    def inside(self, x: Array, scale: Array, zero: Array | None, *, limits: Limits | None) -> Array:
        """Tell which numbers are rounded rather than clipped: where a gradient passes.

        Args:
            x: float32 numbers.
            scale: As in `to_values`.
            zero: As in `to_values`.
            limits: As in `to_values`.

        Returns:
            Booleans of x's shape.
        """


@dataclass(frozen=True, kw_only=True)
class Scaled(QType):
    """A type that rounds `t = x / scale`: the base class of `Int`, `Float` and `Codebook`.

    Subclasses give `limits`, `margins`, `encode` and `decode`.

    Attributes:
        name: What reports and files call it.
        bits: Information per entry, in bits.
    """

    @property
    @abc.abstractmethod
    def limits(self) -> Limits:
        """The smallest and the largest number that the type holds, at scale 1."""

    @property
    @abc.abstractmethod
    def margins(self) -> Limits:
        """How far past each limit a number may lie and still be rounded rather than clipped."""

    @abc.abstractmethod
    def encode(self, t: Array, *, noise: Array | None = None) -> Array:
        """Round normalised numbers to codes.

        Args:
            t: float32 numbers inside the limits.
            noise: Uniform on [0, 1), one per number, or `None`.

        Returns:
            Codes, ready to be cast to `storage`.
        """

    def decode(self, values: Array) -> Array:
        """Give the normalised numbers that codes stand for.

        Args:
            values: Codes in the dtype `storage`.

        Returns:
            float32 numbers.
        """
        return values.astype(jnp.float32)

    def to_values(
        self,
        x: Array,
        scale: Array,
        zero: Array | None,
        *,
        limits: Limits | None,
        noise: Array | None = None,
    ) -> Array:
        """Clip `x / scale` to the limits and round it; see `QType.to_values`."""
        low, high = limits or self.limits
        # A product with the reciprocal: XLA rewrites a quotient into one where the divisor is
        # known at compile time, and then eager and compiled code would differ in the last bit.
        t = x * (1 / scale)
        if zero is None:
            return self.encode(jnp.clip(t, low, high), noise=noise).astype(self.storage)
        t = jnp.clip(t, low - zero, high - zero)
        return (self.encode(t, noise=noise) + zero).astype(self.storage)

    def to_numbers(self, values: Array, scale: Array, zero: Array | None) -> Array:
        """Decode and multiply by the scale; see `QType.to_numbers`."""
        t = self.decode(values)
        return (t if zero is None else t - zero) * scale

    def round_trip(
        self, x: Array, scale: Array, zero: Array | None, *, limits: Limits | None
    ) -> Array:
        """Clip, snap to the grid and scale back; see `QType.round_trip`."""
        low, high = limits or self.limits
        shift = 0.0 if zero is None else zero
        return self.snap(jnp.clip(x * (1 / scale), low - shift, high - shift)) * scale

    def snap(self, t: Array) -> Array:
        """Round normalised numbers to the nearest that have a code.

        Args:
            t: float32 numbers inside the limits.

        Returns:
            float32 numbers.
        """
        return self.decode(self.encode(t).astype(self.storage))

    def inside(self, x: Array, scale: Array, zero: Array | None, *, limits: Limits | None) -> Array:
        """Compare with the limits and margins; see `QType.inside`."""
        (low, high), (below, above) = limits or self.limits, self.margins
        t = x * (1 / scale) if zero is None else x * (1 / scale) + zero
        return (t >= low - below) & (t <= high + above)


def _round(t: Array, noise: Array | None) -> Array:
    if noise is None:
        return jnp.round(t)
    lower = jnp.floor(t)
    # Not floor(t + noise), which can round the sum up past the last code.
    return lower + (noise < t - lower).astype(t.dtype)


@dataclass(frozen=True, kw_only=True)
class Int(Scaled):
    """Integers of 2 to 8 bits, ties rounded to even.

    Widths without an XLA type of their own are stored in the next wider one: 3 bits in 4, and
    5 to 7 in 8.

    Attributes:
        name: What reports and files call it.
        bits: Width, 2 to 8.
        signed: Two's complement if true, else 0 to `2**bits - 1`.

    Raises:
        ArgumentError: If `bits` is not in 2 to 8.

    Example:
        >>> Int(name="int3", bits=3).limits
        (-4.0, 3.0)
    """

    signed: bool = True

    def __post_init__(self):
        if self.bits not in range(2, 9):
            raise ArgumentError(
                "bits",
                got=self.bits,
                expected="an integer width from 2 to 8",
                fix="One bit is `binary`; above 8 bits use a floating-point dtype.",
            )

    @property
    def storage(self) -> Any:
        """The narrowest XLA integer that holds the codes."""
        sign = "" if self.signed else "u"
        return jnp.dtype(f"{sign}int{packed_width(self.bits)}")

    @property
    def limits(self) -> Limits:
        """The smallest and the largest integer."""
        if not self.signed:
            return 0.0, 2.0**self.bits - 1
        return -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1

    @property
    def margins(self) -> Limits:
        """Half a step on each side."""
        return 0.5, 0.5

    def encode(self, t: Array, *, noise: Array | None = None) -> Array:
        """Round to an integer."""
        return _round(t, noise)

    def snap(self, t: Array) -> Array:
        """Round to an integer; XLA on CPU is slow at casts to 8 bits and back."""
        return self.encode(t)


@dataclass(frozen=True, kw_only=True)
class Float(Scaled):
    """Floating point of few bits, with subnormals, ties to even, saturating at the largest number.

    Attributes:
        name: What reports and files call it, and the name of the dtype in JAX.
        bits: Width.
    """

    @property
    def storage(self) -> Any:
        """The dtype of that name."""
        return jnp.dtype(self.name)

    @property
    def limits(self) -> Limits:
        """The finite range."""
        largest = float(jnp.finfo(self.storage).max)
        return -largest, largest

    @property
    def margins(self) -> Limits:
        """Half the spacing at the largest number."""
        info = jnp.finfo(self.storage)
        half = 2.0 ** (math.floor(math.log2(float(info.max))) - info.nmant - 1)
        return half, half

    def encode(self, t: Array, *, noise: Array | None = None) -> Array:
        """Round on the grid of each number's own binade, by float32 arithmetic that is exact.

        A pair of casts would do, but XLA may drop it as excess precision.
        """
        info = jnp.finfo(self.storage)
        exponent = jax.lax.bitcast_convert_type(t, jnp.int32) & 0x7F80_0000
        binade = jax.lax.bitcast_convert_type(exponent, jnp.float32)  # 2**floor(log2|t|)
        binade = jnp.maximum(binade, jnp.float32(info.smallest_normal))
        ticks = _round(t * (2.0**info.nmant / binade), noise)
        return ticks * (binade * 2.0**-info.nmant)

    def snap(self, t: Array) -> Array:
        """Round; codes are the numbers themselves."""
        return self.encode(t)


@dataclass(frozen=True, kw_only=True)
class Codebook(Scaled):
    """Any sorted list of at most 256 numbers; an entry stores the index of the nearest.

    A number half-way between two levels goes to the lower one.

    Attributes:
        name: What reports and files call it.
        bits: Information per entry, in bits.
        levels: The numbers at scale 1, ascending, on both sides of zero.

    Raises:
        ArgumentError: If the levels are not ascending, or too many for `bits`.

    Example:
        >>> ends = Codebook(name="ends", bits=2, levels=(-1.0, -0.25, 0.25, 1.0))
        >>> ends.encode(jnp.asarray([-0.5, 0.1, 0.9])).tolist()
        [1, 2, 3]
    """

    levels: tuple[float, ...]

    def __post_init__(self):
        most = 2 ** min(self.bits, 8)
        ascending = all(a < b for a, b in itertools.pairwise(self.levels))
        fits = 2 <= len(self.levels) <= most
        if not (ascending and fits and self.levels[0] < 0 < self.levels[-1]):
            raise ArgumentError(
                "levels",
                got=self.levels,
                expected=f"2 to {most} ascending numbers on both sides of zero",
                fix="Sort them, drop repeats, or raise `bits`.",
            )

    @property
    def storage(self) -> Any:
        """The narrowest XLA unsigned integer that holds an index."""
        return jnp.dtype(f"uint{packed_width((len(self.levels) - 1).bit_length())}")

    @property
    def limits(self) -> Limits:
        """The first and the last level."""
        return self.levels[0], self.levels[-1]

    @property
    def margins(self) -> Limits:
        """Half the first and half the last gap."""
        levels = self.levels
        return (levels[1] - levels[0]) / 2, (levels[-1] - levels[-2]) / 2

    def encode(self, t: Array, *, noise: Array | None = None) -> Array:
        """Find the nearest level, or one of the two neighbours with odds that keep the mean."""
        levels = np.asarray(self.levels, np.float32)
        if noise is None:
            return _count_below(t, (levels[1:] + levels[:-1]) / 2)
        lower = _count_below(t, levels[1:-1])
        start, gap = _look_up(lower, levels[:-1]), _look_up(lower, np.diff(levels))
        return lower + (noise * gap < t - start).astype(lower.dtype)

    def decode(self, values: Array) -> Array:
        """Look the indices up."""
        return _look_up(values.astype(jnp.int32), np.asarray(self.levels, np.float32))


def packed_width(bits: int) -> int:
    """Give the narrowest of XLA's packed integer widths that holds `bits` bits."""
    return next(width for width in (2, 4, 8) if bits <= width)


def _count_below(t: Array, thresholds: np.ndarray) -> Array:
    """Count the thresholds below each number, by comparisons, which fuse and shard as t does."""
    counts = jnp.zeros(t.shape, jnp.int32)
    for threshold in thresholds:
        counts += (t > threshold).astype(jnp.int32)
    return counts


def _look_up(indices: Array, table: np.ndarray) -> Array:
    """Index a table by selects, which fuse into what follows and shard as the indices do."""
    found = jnp.full(indices.shape, table[0], jnp.float32)
    for i, entry in enumerate(table[1:], start=1):
        found = jnp.where(indices == i, jnp.float32(entry), found)
    return found
