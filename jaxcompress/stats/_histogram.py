"""A histogram that streams: a range that grows by powers of two, so that no entry moves.

Bin j of B covers `[(j - B/2) w, (j + 1 - B/2) w)` with a width w that is a power of two. When an
entry lies beyond, w doubles until it does not, and each bin of the wider grid is a whole number
of old ones: the result does not depend on how the data were cut into batches, and one pass is
enough. The price is up to half of the bins at the ends.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxcompress.errors import ArgumentError
from jaxcompress.stats import _calibration
from jaxcompress.stats._statistic import (
    Counter,
    Statistic,
    add_count,
    add_counters,
    as_float32,
    counter,
    read_count,
)

_LEAST_EXPONENT = -100
"""The range starts at ±2**-100; entries that are smaller still share the two middle bins."""


class Histogram(NamedTuple):
    """How often values occurred, in bins of equal width, as many below zero as above.

    Of a site with leading axes (scan iterations, experts) every field has them, and so has
    everything that the methods return. Non-finite entries were left out.

    Invariants: `width` is a power of two, and every entry lies inside the bins.

    Attributes:
        counts: Entries per bin, `(bins,)`, float32; see `edges`.
        width: Width of a bin, float32.
        zeros: How many of the entries are exactly 0 (they are in `counts` as well).
        low: The smallest entry, 0 if there is none.
        high: The largest entry, likewise.
    """

    counts: Array
    width: Array
    zeros: Array
    low: Array
    high: Array

    @property
    def edges(self) -> Array:
        """The edges of the bins, `(bins + 1,)`; bin j covers `[edges[j], edges[j + 1])`."""
        bins = self.counts.shape[-1]
        return (jnp.arange(bins + 1, dtype=jnp.float32) - bins // 2) * self.width[..., None]

    def percentile(self, q: float) -> Array:
        """Find the value that q per cent of the entries do not exceed.

        Args:
            q: In [0, 100]; 0 and 100 give the exact extremes.

        Returns:
            The percentile, float32, interpolated inside a bin: right to one `width`.

        Raises:
            ArgumentError: If q is out of range.

        Example:
            >>> h = histogram(bins=16)
            >>> result = h.finalize(h.update(h.init(1), jnp.arange(100.0)[:, None]))
            >>> float(result.percentile(75)), float(result.percentile(100))
            (75.0, 99.0)
        """
        return _calibration.percentile(self.counts, self.width, self.low, self.high, q)

    def percentile_range(self, q: float, *, symmetric: bool = True) -> tuple[Array, Array]:
        """Cut off outliers by a percentile.

        Args:
            q: Per cent of the entries to keep, in (0, 100].
            symmetric: Cut at the q-th percentile of the magnitudes, on both sides. Otherwise
                cut `(100 - q) / 2` per cent at each end; the range then includes 0.

        Returns:
            `(low, high)` with `low <= 0 <= high`; `low == -high` if symmetric.

        Raises:
            ArgumentError: If q is out of range.
        """
        return _calibration.percentile_range(
            self.counts, self.width, self.low, self.high, q, symmetric=symmetric
        )

    def mse_range(
        self, bits: int = 8, *, symmetric: bool = True, points: int | None = None
    ) -> tuple[Array, Array]:
        """Choose the range whose quantization has the least mean squared error.

        The error of rounding and clipping, entries standing at the middles of their bins and
        zeros being exact, on a grid of fractions of the whole range. Symmetric: codes `-m` to
        `m`, `m = 2**(bits-1) - 1`. Asymmetric: `2**bits` codes, both ends searched together.

        Args:
            bits: Width of the integers, at least 2; `4 * 2**bits` may not exceed the bins.
            symmetric: Search ranges `(-c, c)` rather than any that include 0.
            points: Fractions tried per end; by default 100, and 32 where there are two ends.

        Returns:
            `(low, high)`, as `percentile_range`.

        Raises:
            ArgumentError: If the bins are too few for `bits`, or `points` is below 1.
        """
        return _calibration.mse_range(*self, bits=bits, symmetric=symmetric, points=points)

    def entropy_range(self, bits: int = 8, *, symmetric: bool = True) -> tuple[Array, Array]:
        """Choose the range that loses least information: TensorRT's calibration.

        For every cut c at an edge of a bin, the histogram P of the magnitudes, with what lies
        beyond c added to its last bin, is compared to its quantization Q (of the bins before c
        alone) to `2**(bits-1)` levels, each spread evenly over its non-empty bins; the cut with
        the least KL(P ‖ Q) wins. Exact zeros are left out: they are exact in every candidate.

        Args:
            bits: Width of the integers, at least 2; `4 * 2**bits` may not exceed the bins.
            symmetric: Give `(-c, c)`. Otherwise give what of `(-c, c)` lies inside the data's
                range; data on one side of zero then have all `2**bits` levels.

        Returns:
            `(low, high)`, as `percentile_range`.

        Raises:
            ArgumentError: If the bins are too few for `bits`.

        Reference:
            Migacz, 8-bit Inference with TensorRT, GTC 2017. A Q that is empty where P is not
            counts as infinitely far.
        """
        return _calibration.entropy_range(*self, bits=bits, symmetric=symmetric)


class _Bins(NamedTuple):
    counts: Counter
    exponent: Array  # the bins cover [-2**exponent, 2**exponent)
    zeros: Counter
    low: Array
    high: Array


def histogram(*, bins: int = 4096, reads: str = "input") -> Statistic:
    """Count the entries of the whole array in bins of equal width, in one pass.

    Args:
        bins: A power of two, at least 4. Half of them are for the entries below zero.
        reads: Which array of the site (see `Statistic`).

    Returns:
        A statistic with result `Histogram`. However the rows are cut into batches, the result is
        the same, bit for bit. Non-finite entries are left out.

    Raises:
        ArgumentError: If `bins` is not a power of two, or below 4.

    Example:
        >>> s = histogram(bins=4)
        >>> state = s.update(s.init(2), jnp.array([[0.1, 0.9], [0.0, -0.2]]))
        >>> s.finalize(state).counts
        Array([0., 1., 2., 1.], dtype=float32)
        >>> s.finalize(s.update(state, jnp.array([[1.5, -2.0]]))).edges
        Array([-4., -2.,  0.,  2.,  4.], dtype=float32)
    """
    if bins < 4 or bins & (bins - 1):
        raise ArgumentError(
            "bins", got=bins, expected="a power of two, at least 4", fix="Try bins=4096."
        )

    def init(_: int) -> _Bins:
        return _Bins(
            counter((bins,)),
            jnp.int32(_LEAST_EXPONENT),
            counter(),
            jnp.float32(jnp.inf),
            jnp.float32(-jnp.inf),
        )

    def update(state: _Bins, x: Array) -> _Bins:
        x = as_float32(x).reshape(-1)
        finite = jnp.isfinite(x)
        low = jnp.min(x, where=finite, initial=jnp.inf)
        high = jnp.max(x, where=finite, initial=-jnp.inf)
        _, exponents = jnp.frexp(jnp.stack([low, high]))  # |x| < 2**exponent
        exponents = jnp.where(jnp.isfinite(jnp.stack([low, high])), exponents, _LEAST_EXPONENT)
        exponent = jnp.maximum(state.exponent, exponents.max().astype(jnp.int32))
        offset = jnp.floor(_multiply_by_power(x, -exponent) * (bins // 2)).astype(jnp.int32)
        # What is negative stays below the middle, even where the product underflows to -0.
        index = jnp.where(x < 0, jnp.minimum(offset, -1), offset) + bins // 2
        # Left-out entries count 0 in bin 0.
        new = jnp.zeros(bins, jnp.uint32).at[jnp.where(finite, index, 0)]
        counts = add_counters(
            _widen(state.counts, exponent - state.exponent),
            Counter(new.add(finite.astype(jnp.uint32)), jnp.zeros(bins, jnp.uint32)),
        )
        zeros = add_count(state.zeros, (x == 0).sum(dtype=jnp.uint32))
        return _Bins(
            counts, exponent, zeros, jnp.minimum(state.low, low), jnp.maximum(state.high, high)
        )

    def finalize(state: _Bins) -> Histogram:
        width = _multiply_by_power(jnp.float32(2 / bins), state.exponent)
        some = state.low <= state.high
        return Histogram(
            read_count(state.counts),
            width,
            read_count(state.zeros),
            jnp.where(some, state.low, 0),
            jnp.where(some, state.high, 0),
        )

    return Statistic(init=init, update=update, finalize=finalize, reads=(reads,))


def _widen(counts: Counter, doublings: Array) -> Counter:
    """Merge `2**doublings` bins into one, towards the middle."""
    bins = counts.low.size
    half = bins // 2
    # An arithmetic shift is a floor, so negative offsets go to the right bin as well.
    offset = jnp.arange(bins, dtype=jnp.int32) - half
    index = (offset >> jnp.minimum(doublings, 31)) + half
    # Sums of words would lose their carries: add halves of words, and put those together.
    parts = [counts.low & 0xFFFF, counts.low >> 16, counts.high]
    low, middle, high = (jnp.zeros(bins, jnp.uint32).at[index].add(part) for part in parts)
    total = Counter(low, high)
    carried = Counter((middle & 0xFFFF) << 16, middle >> 16)
    return add_counters(total, carried)


def _multiply_by_power(x: Array, exponent: Array) -> Array:
    """Compute `x * 2**exponent` exactly, in two steps since 2**128 is infinite."""
    half = exponent // 2
    return x * _power_of_two(half) * _power_of_two(exponent - half)


def _power_of_two(exponent: Array) -> Array:
    bits = ((exponent + 127) << 23).astype(jnp.int32)
    return jnp.asarray(bits).view(jnp.float32)
