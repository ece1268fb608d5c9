"""Range methods: from a slice's entries to its scale (and zero point)."""

import abc
import enum
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxcompress.errors import ArgumentError, require_at_least
from jaxcompress.numerics._basis import Basis
from jaxcompress.numerics._qtypes import Limits, QType
from jaxcompress.numerics._scales import (
    POWERS,
    microscale,
    multiply_scales,
    require_global_scale,
    round_scale,
    scale_bounds,
    settle_scale,
)

Axes = tuple[int, ...]
Fit = tuple[Array, Array | None]  # float32 scale and zero point


class Convention(enum.Enum):
    """How a symmetric integer scale follows from the range: four are in use, all are here.

    With b bits, `m = 2**(b-1)`, and a slice's smallest and largest entries `lo <= 0 <= hi`:

    * `NARROW`: `max(-lo, hi) / (m - 1)`, codes from `1 - m`, so that -x has exactly the codes -q.
      The default here.
    * `HALF`: `max(-lo, hi) / (m - 1/2)`, all codes; the positive extreme is clipped by half a
      step.
    * `TIGHT`: `max(-lo / m, hi / (m - 1))`, all codes, nothing clipped.
    * `SIGNED`: the entry of largest magnitude gets the code `-m`, so the scale may be negative.
    """

    NARROW = "narrow"
    HALF = "half"
    TIGHT = "tight"
    SIGNED = "signed"


class RangeTarget(Protocol):
    """What ranges read of a `Format`; see there."""

    @property
    def qtype(self) -> QType: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def scale_dtype(self) -> Any: ...
    @property
    def convention(self) -> Convention | None: ...
    @property
    def global_scale(self) -> bool: ...
    @property
    def limits(self) -> Limits | None: ...


@dataclass(frozen=True)
class Range(abc.ABC):
    """How a slice's scale is found: the base class of the methods below."""

    @abc.abstractmethod
    def fit(
        self, x: Array, *, shared: Axes, format: RangeTarget, global_scale: Array | None = None
    ) -> Fit:
        """Find the scale and zero point of every slice.

        Args:
            x: float32 numbers, blocked.
            shared: The axes that make up a slice.
            format: The format that the range is for.
            global_scale: The array's global scale, float32, of one entry along every axis; given
                exactly if the format has one.

        Returns:
            `(scale, zero)`, float32 numbers that `scale_dtype` can hold; x's shape with 1 for
            the shared axes. `zero` is `None` for a symmetric format. The global scale is divided
            out of `scale`.
        """


@dataclass(frozen=True)
class AbsMax(Range):
    """The whole range: no entry is clipped (but see `Convention.HALF`)."""

    def fit(
        self, x: Array, *, shared: Axes, format: RangeTarget, global_scale: Array | None = None
    ) -> Fit:
        """Take the smallest and largest entries."""
        require_global_scale(global_scale, wanted=format.global_scale)
        return _from_range(*_extremes(x, shared, format), format, global_scale)


@dataclass(frozen=True)
class Percentile(Range):
    """Clip at a percentile of the magnitudes: an outlier then does not cost others their precision.

    The cut is the smallest magnitude that at least `percent` per cent of the slice's entries do
    not exceed. A cut of zero (most entries are zero) would lose the slice, so the whole range is
    taken there.

    Attributes:
        percent: In (0, 100].

    Raises:
        ArgumentError: If `percent` is out of range.
    """

    percent: float

    def __post_init__(self):
        if not 0 < self.percent <= 100:
            raise ArgumentError(
                "percent", got=self.percent, expected="a number in (0, 100]", fix="Try 99.9."
            )

    def fit(
        self, x: Array, *, shared: Axes, format: RangeTarget, global_scale: Array | None = None
    ) -> Fit:
        """Cut the range of each slice at its percentile."""
        require_global_scale(global_scale, wanted=format.global_scale)
        low, high = _extremes(x, shared, format)
        cut = self._cut(jnp.abs(x), shared)
        cut = jnp.where(cut > 0, cut, jnp.inf)
        return _from_range(jnp.maximum(low, -cut), jnp.minimum(high, cut), format, global_scale)

    def _cut(self, sizes: Array, shared: Axes) -> Array:
        """Bisect the bit pattern, which orders like the number: no sort, nothing gathered."""
        needed = math.ceil(
            # As a fraction: 99.9 / 100 * 1000 is above 999.
            Fraction(str(self.percent)) * math.prod(sizes.shape[axis] for axis in shared) / 100
        )
        bits = jax.lax.bitcast_convert_type(sizes, jnp.int32)

        def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = low + (high - low) // 2
            enough = (bits <= middle).sum(shared, keepdims=True, dtype=jnp.int32) >= needed
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        high = bits.max(shared, keepdims=True)
        _, cut = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
        return jax.lax.bitcast_convert_type(cut, jnp.float32)


@dataclass(frozen=True)
class MSE(Range):
    """Clip where the rounding error is least, on a grid of fractions of the whole range.

    Where scales are powers of two (`float8_e8m0fnu`), these are the fractions: 2, since the
    scale of the whole range may clip there, 1, and halves down to `lowest`.

    Attributes:
        lowest: The smallest fraction, in (0, 1].
        points: Fractions tried, evenly from `lowest` to 1.
        norm: The error is `sum |x - x_hat|**norm`; above 2, outliers count for more.

    Raises:
        ArgumentError: If an attribute is out of range.
    """

    lowest: float = 0.2
    points: int = 41
    norm: float = 2.0

    def __post_init__(self):
        if not (0 < self.lowest <= 1 and self.points >= 2 and self.norm > 0):
            raise ArgumentError(
                "lowest, points, norm",
                got=(self.lowest, self.points, self.norm),
                expected="a fraction in (0, 1], at least 2 points, and a positive norm",
                fix="Try MSE().",
            )

    def fit(
        self,
        x: Array,
        *,
        shared: Axes,
        format: RangeTarget,
        global_scale: Array | None = None,
        weights: Array | None = None,
    ) -> Fit:
        """Try every fraction, and keep each slice's best.

        Args:
            x: As in `Range.fit`.
            shared: As in `Range.fit`.
            format: As in `Range.fit`.
            global_scale: As in `Range.fit`.
            weights: What each entry's error counts, non-negative, at most about 1, broadcastable
                to x; all alike by default.
        """
        require_global_scale(global_scale, wanted=format.global_scale)
        low, high = _extremes(x, shared, format)
        peak = _power_below(_find_peak(low, high))  # dividing by it is exact
        unit = x / peak  # squares must not overflow

        def attempt(best: tuple[Array, Array], fraction: Array) -> tuple[tuple[Array, Array], None]:
            scale, zero = _from_fraction(low, high, fraction, format, global_scale)
            # In a slice far below the global scale this is infinite, and the error NaN: no better.
            scale = multiply_scales(scale, global_scale) / peak
            hat = format.qtype.round_trip(unit, scale, zero, limits=format.limits)
            off = jnp.abs(hat - unit)
            off = jnp.square(off) if self.norm == 2 else off**self.norm
            off = off if weights is None else off * weights
            error = off.sum(shared, keepdims=True)
            better = error < best[0]
            return (jnp.where(better, error, best[0]), jnp.where(better, fraction, best[1])), None

        start = (jnp.full_like(peak, jnp.inf), jnp.ones_like(peak))
        (_, fraction), _ = jax.lax.scan(attempt, start, jnp.asarray(self._fractions(format)))
        return _from_fraction(low, high, fraction, format, global_scale)

    def _fractions(self, format: RangeTarget) -> np.ndarray:
        if format.scale_dtype != POWERS:
            return np.linspace(1, self.lowest, self.points, dtype=np.float32)
        least = math.ceil(math.log2(self.lowest))
        return np.exp2([0, 1, *range(-1, least - 1, -1)]).astype(np.float32)  # on ties: the range


@dataclass(frozen=True)
class Entropy(Range):
    """Clip where the distribution of the codes diverges least from that of the numbers.

    For static ranges of activations: `quantize.ptq` finds it from a histogram over all batches
    (`stats.Histogram.entropy_range`). A single array has too few entries for it.
    """

    def fit(
        self, x: Array, *, shared: Axes, format: RangeTarget, global_scale: Array | None = None
    ) -> Fit:
        """Refuse.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(
            "range",
            got="Entropy() where the range of one array is looked for",
            expected="a range method for single arrays",
            fix="Use it for activations, with Rule(static=True), or take MSE().",
        )


@dataclass(frozen=True)
class LeastSquares(Range):
    r"""Choose codes and scale in turn, each the best for the other (Lloyd's iteration).

    $s = \langle x, c \rangle / \langle c, c \rangle$ for the codes c of a slice. It starts from
    `MSE()`; a `Basis` from its greedy fit. For `binary`, one round gives the mean magnitude, the
    scale of Rastegari et al., "XNOR-Net" (arXiv:1603.05279), equation 6.

    Attributes:
        iterations: Rounds, at least 1.

    Raises:
        ArgumentError: If `iterations` is less than 1.
    """

    iterations: int = 10

    def __post_init__(self):
        require_at_least("iterations", self.iterations, 1, fix="Try 10.")

    def fit(
        self, x: Array, *, shared: Axes, format: RangeTarget, global_scale: Array | None = None
    ) -> Fit:
        """Refine the scale of each slice."""
        require_global_scale(global_scale, wanted=format.global_scale)
        peak = _find_peak(x.min(shared, keepdims=True), x.max(shared, keepdims=True))
        if isinstance(format.qtype, Basis):
            unit = format.qtype.fit(x / peak, shared=shared, iterations=self.iterations)
            alphas = unit * peak[..., None]
            if global_scale is not None:
                alphas = alphas * (1 / global_scale)
            largest = float(jnp.finfo(format.scale_dtype).max)
            return round_scale(jnp.clip(alphas, -largest, largest), format.scale_dtype), None
        start, zero = MSE().fit(x, shared=shared, format=format, global_scale=global_scale)
        unit = x / peak

        def refine(_: int, scale: Array) -> Array:
            values = format.qtype.to_values(unit, scale, zero, limits=format.limits)
            codes = format.qtype.to_numbers(values, jnp.ones_like(scale), zero)
            power = jnp.square(codes).sum(shared, keepdims=True)
            refit = (unit * codes).sum(shared, keepdims=True) / jnp.where(power > 0, power, 1)
            return jnp.where(refit == 0, scale, refit)

        start = multiply_scales(start, global_scale) / peak
        unit_scale = jax.lax.fori_loop(0, self.iterations, refine, start)
        return settle_scale(unit_scale * peak, format.scale_dtype, global_scale), zero


def scale_of_range(low: ArrayLike, high: ArrayLike, format: RangeTarget) -> Fit:
    """Give the scale (and zero point) of a known range: a static one, say.

    Args:
        low: Lower ends, float32; the range is made to include 0.
        high: Upper ends, likewise.
        format: The format that the range is for.

    Returns:
        `(scale, zero)`, float32, of the shape of the ends; `zero` is `None` for a symmetric
        format. 1 for an empty range.

    Example:
        >>> from jaxcompress.numerics import Format, int8
        >>> scale, _ = scale_of_range(-1.0, 254.0, Format(int8))
        >>> float(scale)
        2.0
    """
    low = jnp.minimum(jnp.asarray(low, jnp.float32), 0)
    high = jnp.maximum(jnp.asarray(high, jnp.float32), 0)
    if _is_centred(format):
        high = jnp.maximum(-low, high)
        low = -high
    return _from_range(low, high, format, None)


def _is_centred(format: RangeTarget) -> bool:
    """Tell whether a range counts as far below zero as above."""
    low, high = format.limits or (-1.0, 1.0)
    return (format.symmetric and -low == high) or format.convention is Convention.HALF


def _extremes(x: Array, shared: Axes, format: RangeTarget) -> tuple[Array, Array]:
    """Find each slice's range, made to include 0, and to be centred where that is what counts."""
    if _is_centred(format):
        peak = jnp.abs(x).max(shared, keepdims=True)
        return -peak, peak
    low, high = x.min(shared, keepdims=True), x.max(shared, keepdims=True)
    return jnp.minimum(low, 0), jnp.maximum(high, 0)


def _find_peak(low: Array, high: Array) -> Array:
    peak = jnp.maximum(-low, high)
    return jnp.where(peak == 0, 1, jnp.maximum(peak, jnp.finfo(jnp.float32).smallest_normal))


def _power_below(x: Array) -> Array:
    """Clear the mantissa of positive normal numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type(bits & 0x7F80_0000, jnp.float32)


def _from_range(low: Array, high: Array, format: RangeTarget, global_scale: Array | None) -> Fit:
    """Turn a range `low <= 0 <= high` into a scale and zero point.

    Products with reciprocal constants and nothing that could be contracted to a fused
    multiply-add: the same bits in eager and in compiled code.
    """
    assert format.limits is not None
    least, most = format.limits
    settle = lambda scale: settle_scale(scale, format.scale_dtype, global_scale)
    if format.scale_dtype == POWERS:
        return microscale(low, high, (least, most)), None
    if not format.symmetric:
        scale = (high * 0.5 - low * 0.5) * np.float32(2 / (most - least))
        scale = settle(scale)
        zero = jnp.round(-low * (1 / multiply_scales(scale, global_scale))) + least
        return scale, jnp.clip(zero, least, most)
    if format.convention is Convention.HALF:
        return settle(high * np.float32(2 / (most - least))), None
    if format.convention is Convention.SIGNED:
        extreme = jnp.where(-low >= high, low, high)
        return settle(extreme * np.float32(1 / least)), None
    scale = high * np.float32(1 / most)
    if least < 0:
        scale = jnp.maximum(scale, low * np.float32(1 / least))
    return settle(scale), None


def _from_fraction(
    low: Array, high: Array, fraction: Array, format: RangeTarget, global_scale: Array | None
) -> Fit:
    """Turn a fraction of a range into a scale and zero point."""
    if format.scale_dtype == POWERS:  # twice the range may be past float32
        scale, _ = _from_range(low, high, format, global_scale)
        return jnp.clip(scale * fraction, *scale_bounds(POWERS)), None
    return _from_range(low * fraction, high * fraction, format, global_scale)
