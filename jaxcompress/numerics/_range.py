"""Range methods: from a slice's entries to its scale (and zero point)."""

import abc
import enum
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.errors import ArgumentError
from jaxcompress.numerics._basis import Basis

if TYPE_CHECKING:
    from jaxcompress.numerics._format import Format

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


@dataclass(frozen=True)
class Range(abc.ABC):
    """How a slice's scale is found: the base class of the methods below."""

    @abc.abstractmethod
    def fit(self, x: Array, *, shared: tuple[int, ...], format: "Format") -> Fit:
        """Find the scale and zero point of every slice.

        Args:
            x: float32 numbers, blocked.
            shared: The axes that make up a slice.
            format: The format that the range is for.

        Returns:
            `(scale, zero)`, float32 numbers that `scale_dtype` can hold; x's shape with 1 for
            the shared axes. `zero` is `None` for a symmetric format.
        """


@dataclass(frozen=True)
class AbsMax(Range):
    """The whole range: no entry is clipped (but see `Convention.HALF`)."""

    def fit(self, x: Array, *, shared: tuple[int, ...], format: "Format") -> Fit:
        """Take the smallest and largest entries."""
        return _from_range(*_extremes(x, shared, format), format)


@dataclass(frozen=True)
class Percentile(Range):
    """Clip at a percentile of the magnitudes: an outlier shall not cost all others precision.

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

    def fit(self, x: Array, *, shared: tuple[int, ...], format: "Format") -> Fit:
        """Cut the range of each slice at its percentile."""
        low, high = _extremes(x, shared, format)
        cut = self._cut(jnp.abs(x), shared)
        cut = jnp.where(cut > 0, cut, jnp.inf)
        return _from_range(jnp.maximum(low, -cut), jnp.minimum(high, cut), format)

    def _cut(self, sizes: Array, shared: tuple[int, ...]) -> Array:
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

    def fit(self, x: Array, *, shared: tuple[int, ...], format: "Format") -> Fit:
        """Try every fraction, and keep each slice's best."""
        low, high = _extremes(x, shared, format)
        peak = _peak(low, high)
        unit, unit_low, unit_high = x / peak, low / peak, high / peak  # squares must not overflow

        def attempt(best: tuple[Array, Array], fraction: Array) -> tuple[tuple[Array, Array], None]:
            scale, zero = _from_range(unit_low * fraction, unit_high * fraction, format)
            off = jnp.abs(_round_trip(unit, scale, zero, format) - unit)
            off = jnp.square(off) if self.norm == 2 else off**self.norm
            error = off.sum(shared, keepdims=True)
            better = error < best[0]
            return (jnp.where(better, error, best[0]), jnp.where(better, fraction, best[1])), None

        fractions = np.linspace(1, self.lowest, self.points, dtype=np.float32)
        start = (jnp.full_like(peak, jnp.inf), jnp.ones_like(peak))
        (_, fraction), _ = jax.lax.scan(attempt, start, jnp.asarray(fractions))
        return _from_range(low * fraction, high * fraction, format)


@dataclass(frozen=True)
class Entropy(Range):
    """Clip where the distribution of the codes diverges least from that of the numbers.

    For static ranges of activations: `quantize.ptq` finds it from a histogram over all batches
    (`stats.Histogram.entropy_range`). A single array has too few entries for it.
    """

    def fit(self, x: Array, *, shared: tuple[int, ...], format: "Format") -> Fit:
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
        if self.iterations < 1:
            raise ArgumentError(
                "iterations", got=self.iterations, expected="at least 1", fix="Try 10."
            )

    def fit(self, x: Array, *, shared: tuple[int, ...], format: "Format") -> Fit:
        """Refine the scale of each slice."""
        peak = _peak(x.min(shared, keepdims=True), x.max(shared, keepdims=True))
        if isinstance(format.qtype, Basis):
            unit = format.qtype.fit(x / peak, shared=shared, iterations=self.iterations)
            largest = float(jnp.finfo(format.scale_dtype).max)
            return rounded(jnp.clip(unit * peak[..., None], -largest, largest), format), None
        scale, zero = MSE().fit(x, shared=shared, format=format)
        unit = x / peak

        def refine(_: int, scale: Array) -> Array:
            values = format.qtype.to_values(unit, scale, zero, limits=format.limits)
            codes = format.qtype.to_numbers(values, jnp.ones_like(scale), zero)
            power = jnp.square(codes).sum(shared, keepdims=True)
            refit = (unit * codes).sum(shared, keepdims=True) / jnp.where(power > 0, power, 1)
            return jnp.where(refit == 0, scale, refit)

        unit_scale = jax.lax.fori_loop(0, self.iterations, refine, scale / peak)
        return _settle(unit_scale * peak, format), zero


def _extremes(x: Array, shared: tuple[int, ...], format: "Format") -> tuple[Array, Array]:
    """Find each slice's range, made to include 0, and to be centred where that is what counts."""
    low_limit, high_limit = format.limits or (-1.0, 1.0)
    if (format.symmetric and -low_limit == high_limit) or format.convention is Convention.HALF:
        peak = jnp.abs(x).max(shared, keepdims=True)
        return -peak, peak
    low, high = x.min(shared, keepdims=True), x.max(shared, keepdims=True)
    return jnp.minimum(low, 0), jnp.maximum(high, 0)


def _peak(low: Array, high: Array) -> Array:
    peak = jnp.maximum(-low, high)
    return jnp.where(peak == 0, 1, jnp.maximum(peak, jnp.finfo(jnp.float32).smallest_normal))


def _from_range(low: Array, high: Array, format: "Format") -> Fit:
    """Turn a range `low <= 0 <= high` into a scale and zero point.

    Products with reciprocal constants and nothing that could be contracted to a fused
    multiply-add: the same bits in eager and in compiled code.
    """
    assert format.limits is not None
    least, most = format.limits
    if not format.symmetric:
        scale = _settle((high * 0.5 - low * 0.5) * np.float32(2 / (most - least)), format)
        zero = jnp.round(-low * (1 / scale)) + least
        return scale, jnp.clip(zero, least, most)
    if format.convention is Convention.HALF:
        return _settle(high * np.float32(2 / (most - least)), format), None
    if format.convention is Convention.SIGNED:
        extreme = jnp.where(-low >= high, low, high)
        return _settle(extreme * np.float32(1 / least), format), None
    scale = high * np.float32(1 / most)
    if least < 0:
        scale = jnp.maximum(scale, low * np.float32(1 / least))
    return _settle(scale, format), None


def _settle(scale: Array, format: "Format") -> Array:
    """Bring a scale to what `scale_dtype` holds and what has a reciprocal; 1 for an empty range."""
    info = jnp.finfo(format.scale_dtype)
    # The selects also keep XLA on CPU from fusing the slice's reduction with the rounding that
    # follows, which would write a float32 temporary and take four times as long.
    size = jnp.clip(jnp.abs(scale), float(info.smallest_normal), min(float(info.max), 2.0**126))
    return rounded(jnp.where(scale == 0, 1, jnp.where(scale < 0, -size, size)), format)


def rounded(scale: Array, format: "Format") -> Array:
    if format.scale_dtype == jnp.float32:
        return scale
    info = jnp.finfo(format.scale_dtype)
    # Not a pair of casts, which XLA may drop as excess precision.
    return jax.lax.reduce_precision(scale, info.nexp, info.nmant)


def _round_trip(x: Array, scale: Array, zero: Array | None, format: "Format") -> Array:
    return format.qtype.round_trip(x, scale, zero, limits=format.limits)
