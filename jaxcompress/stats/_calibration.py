"""Ranges from histograms: percentile, mean squared error, entropy.

Pure functions of the fields of a `Histogram`, over any leading axes. Masses in the tails are
summed from the outside in, so that a tail keeps its digits next to a centre a billion times as
heavy.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.errors import ArgumentError

Range = tuple[Array, Array]


def percentile(counts: Array, width: Array, low: Array, high: Array, q: float) -> Array:
    """Find the q-th percentile; see `Histogram.percentile`."""
    if not 0 <= q <= 100:
        raise ArgumentError("q", got=q, expected="a number in [0, 100]", fix="Try 99.9.")
    if q < 50:
        # Mirrored: the tail below is short, and is summed on its own.
        return -percentile(counts[..., ::-1], width, -high, -low, 100 - q)
    bins = counts.shape[-1]
    cut = jnp.vectorize(functools.partial(_find_upper_cut, q=q), signature="(b),()->()")
    return jnp.clip(cut(counts, width) - (bins // 2) * width, low, high)


def percentile_range(
    counts: Array, width: Array, low: Array, high: Array, q: float, *, symmetric: bool
) -> Range:
    """Cut at a percentile; see `Histogram.percentile_range`."""
    if not 0 < q <= 100:
        raise ArgumentError("q", got=q, expected="a number in (0, 100]", fix="Try 99.9.")
    if not symmetric:
        tail = (100 - q) / 2
        ends = (percentile(counts, width, low, high, p) for p in (tail, 100 - tail))
        least, most = ends
        return jnp.minimum(least, 0), jnp.maximum(most, 0)
    cut = jnp.vectorize(functools.partial(_find_upper_cut, q=q), signature="(b),()->()")
    size = jnp.minimum(cut(_fold_negative(counts), width), _find_larger_end(low, high))
    return -size, size


def mse_range(*histogram: Array, bits: int, symmetric: bool, points: int | None) -> Range:
    """Minimize the squared error; see `Histogram.mse_range`."""
    points = (100 if symmetric else 32) if points is None else points
    if points < 1:
        raise ArgumentError("points", got=points, expected="1 or more", fix="Try 100.")
    search = functools.partial(_least_error, symmetric=symmetric, points=points)
    return _over_leading(search, bits, histogram)


def entropy_range(*histogram: Array, bits: int, symmetric: bool) -> Range:
    """Minimize the divergence; see `Histogram.entropy_range`."""
    search = functools.partial(_least_divergence, symmetric=symmetric)
    return _over_leading(search, bits, histogram)


def _over_leading(search: Callable[..., Range], bits: int, histogram: Sequence[Array]) -> Range:
    bins = histogram[0].shape[-1]
    if not (bits >= 2 and 4 * 2**bits <= bins):
        raise ArgumentError(
            "bits",
            got=f"{bits} bits for {bins} bins",
            expected="at least 2, and at least four bins per code",
            fix="Collect histogram(bins=...) with more bins.",
        )
    search = functools.partial(search, bits=bits)
    return jnp.vectorize(search, signature="(b),(),(),(),()->(),()")(*histogram)


def _find_larger_end(low: Array, high: Array) -> Array:
    return jnp.maximum(-low, high)


def _fold_negative(counts: Array) -> Array:
    """Add each negative bin to the positive one as far from zero."""
    half = counts.shape[-1] // 2
    return counts[..., half:] + counts[..., :half][..., ::-1]


def _sum_above(counts: Array) -> Array:
    """Sum each bin and those above it, summing from the top: `(bins + 1,)`, 0 at the end."""
    return jnp.append(jnp.cumsum(counts[::-1])[::-1], jnp.zeros((), counts.dtype))


def _find_upper_cut(counts: Array, width: Array, q: float) -> Array:
    """Find, from the first edge on, where the mass above is `100 - q` per cent."""
    above = _sum_above(counts)
    needed = above[0] * np.float32((100 - q) / 100)
    # The lowest edge beyond which there is no more than that: above falls from bin to bin.
    edge = (above > needed).sum()
    inside = counts[jnp.maximum(edge - 1, 0)]
    share = jnp.where(inside > 0, (needed - above[edge]) / jnp.where(inside > 0, inside, 1), 0)
    return jnp.maximum(edge.astype(jnp.float32) - share, 0) * width


@functools.partial(jax.jit, static_argnames=("bits", "symmetric", "points"))
def _least_error(
    counts: Array,
    width: Array,
    zeros: Array,
    low: Array,
    high: Array,
    *,
    bits: int,
    symmetric: bool,
    points: int,
) -> Range:
    bins = counts.size
    fractions = _fractions(points, symmetric)
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    if symmetric:
        high = _find_larger_end(low, high)
        low = -high
    # In units of the larger end: squares of very large or small entries would leave float32.
    unit = jnp.where(_find_larger_end(low, high) > 0, _find_larger_end(low, high), 1)
    middles = (jnp.arange(bins, dtype=jnp.float32) - (bins // 2 - 0.5)) * (width / unit)
    mass = counts.at[bins // 2].add(-zeros)
    mass = mass / jnp.maximum(mass.max(), 1)
    limit = 2 ** (bits - 1) - 1

    def attempt(best: tuple[Array, Array], fraction: Array) -> tuple[tuple[Array, Array], None]:
        ends = fraction * jnp.stack([low, high]) / unit
        if symmetric:
            step, least, most = ends[1] / limit, -limit, limit
        else:
            step = (ends[1] - ends[0]) / (2**bits - 1)
            least = jnp.round(ends[0] / jnp.where(step > 0, step, 1))
            most = least + (2**bits - 1)
        step = jnp.where(step > 0, step, 1)
        rounded = jnp.clip(jnp.round(middles / step), least, most) * step
        error = (mass * jnp.square(middles - rounded)).sum()
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, fraction, best[1])), None

    start = (jnp.float32(jnp.inf), jnp.ones(2, jnp.float32))
    (_, fraction), _ = lax.scan(attempt, start, jnp.asarray(fractions))
    return fraction[0] * low, fraction[1] * high


def _fractions(points: int, symmetric: bool) -> np.ndarray:
    """List the fractions of both ends to try, the widest first: it wins ties."""
    grid = np.arange(points, 0, -1, dtype=np.float32) / points
    if symmetric:
        return np.stack([grid, grid], -1)
    return np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)


@functools.partial(jax.jit, static_argnames=("bits", "symmetric"))
def _least_divergence(
    counts: Array,
    width: Array,
    zeros: Array,
    low: Array,
    high: Array,
    *,
    bits: int,
    symmetric: bool,
) -> Range:
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    sizes = _fold_negative(counts).at[0].add(-zeros)
    edge = _best_edge(sizes, levels=2 ** (bits - 1))
    if not symmetric:
        one_sided = jnp.minimum(-low, high) == 0
        edge = jnp.where(one_sided, _best_edge(sizes, levels=2**bits), edge)
    size = jnp.minimum(edge.astype(jnp.float32) * width, _find_larger_end(low, high))
    if symmetric:
        return -size, size
    return jnp.maximum(low, -size), jnp.minimum(high, size)


def _best_edge(sizes: Array, *, levels: int) -> Array:
    """Find the number of bins to keep, of those for the magnitudes, that diverges least."""
    bins = sizes.size
    mass = sizes / jnp.maximum(sizes.sum(), 1)
    above = _sum_above(mass)
    filled = _sum_above((mass > 0).astype(jnp.float32))
    place = jnp.arange(bins, dtype=jnp.int32)

    def divergence(kept: Array) -> Array:
        inside = place < kept
        level = jnp.where(inside, place * levels // kept, 0)
        first, end = -(-level * kept // levels), -(-(level + 1) * kept // levels)
        share = (above[first] - above[end]) / jnp.maximum(filled[first] - filled[end], 1)
        q = jnp.where(inside & (mass > 0), share, 0)
        p = jnp.where(inside, mass, 0) + jnp.where(place == kept - 1, above[kept], 0)
        terms = jnp.where(p > 0, p * jnp.log(p / jnp.where(q > 0, q, 1)), 0)
        # P sums to 1; Q, which lacks what was cut off, to `within`.
        within = jnp.maximum(above[0] - above[kept], jnp.finfo(jnp.float32).tiny)
        return jnp.where(((p > 0) & (q == 0)).any(), jnp.inf, terms.sum() + jnp.log(within))

    kept = jnp.arange(levels, bins + 1, dtype=jnp.int32)
    divergences = lax.map(divergence, kept, batch_size=16)
    # The widest of equally good ones, as nothing is then cut off for nothing.
    best = kept.size - 1 - jnp.argmin(divergences[::-1])
    return kept[best]
