"""Ranges of activations that are followed through training: moving averages as explicit state."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import Array, lax

from jaxcompress import numerics
from jaxcompress.numerics import AbsMax, Activation, Format
from jaxcompress.quantize._quantizer import SeenRange
from jaxcompress.quantize._train_sites import Met

Range: TypeAlias = Mapping[str, Array]
"""`low`, `high` (float32) and `count` (int32): the averages, and over how many calls."""


class Extent(NamedTuple):
    """What one or several runs of a site have shown; `low > high` if none ran."""

    low: Array
    high: Array
    total: Array
    entries: Array


def nothing(shape: tuple[int, ...]) -> Extent:
    """Start with no run seen."""
    zeros = jnp.zeros(shape, jnp.float32)
    return Extent(jnp.full(shape, jnp.inf), jnp.full(shape, -jnp.inf), zeros, zeros)


def extend(seen: Extent, x: Array, format: Format | None) -> Extent:
    """Take in one run: its whole range, or what the range method of a format leaves of it."""
    x = lax.stop_gradient(x).astype(jnp.float32)
    if format is None or isinstance(format.range, AbsMax):
        low, high = x.min(), x.max()
    else:
        low, high = _ends(x, format)
    return Extent(
        jnp.minimum(seen.low, low),
        jnp.maximum(seen.high, high),
        seen.total + jnp.abs(x).sum(),
        seen.entries + jnp.float32(x.size),
    )


def _ends(x: Array, format: Format) -> tuple[Array, Array]:
    """Find the numbers that the first and the last code stand for."""
    assert format.range is not None and format.limits is not None
    scale, zero = format.range.fit(x, shared=tuple(range(x.ndim)), format=format)
    shift = jnp.zeros_like(scale) if zero is None else zero
    first, last = ((limit - shift) * scale for limit in format.limits)
    return jnp.minimum(first, last).reshape(()), jnp.maximum(first, last).reshape(())


def merge_extents(met: Met, seen: Sequence[Extent]) -> SeenRange:
    """Bring together what all sites and runs of a leaf have shown."""
    low = met.over([one.low for one in seen], jnp.min)
    high = met.over([one.high for one in seen], jnp.max)
    total = met.over([one.total for one in seen], jnp.sum)
    entries = met.over([one.entries for one in seen], jnp.sum)
    return SeenRange(low, high, total / jnp.maximum(entries, 1))


def start(shape: tuple[int, ...]) -> Range:
    """Start an average over nothing."""
    zeros = jnp.zeros(shape, jnp.float32)
    return {"low": zeros, "high": zeros, "count": jnp.zeros(shape, jnp.int32)}


def follow(old: Range, seen: SeenRange, decay: float, moving: Array | bool = True) -> Range:
    r"""Average in what one call has shown.

    $m_n = \beta m_{n-1} + (1 - \beta) x_n$, $\bar x_n = m_n / (1 - \beta^n)$, written for the
    corrected $\bar x$ itself. Runs that did not take place, and ranges that are not finite,
    leave the average alone.

    Args:
        old: The average so far.
        seen: What the call has shown.
        decay: $\beta$.
        moving: Whether to average at all.
    """
    usable = jnp.isfinite(seen.low) & jnp.isfinite(seen.high) & moving
    count = old["count"] + usable.astype(jnp.int32)
    power = jnp.power(jnp.float32(decay), jnp.maximum(count, 1).astype(jnp.float32))
    share = jnp.float32(1 - decay) / (1 - power)

    def average(before: Array, now: Array) -> Array:
        now = jnp.where(usable, now, before)
        return before + share * (now - before)

    return {
        "low": average(old["low"], seen.low),
        "high": average(old["high"], seen.high),
        "count": count,
    }


def settle_activation(range: Range, format: Format) -> Activation:
    """Turn averages into a static form, its scale and zero point of their shape."""
    scale, zero = numerics.scale_of_range(range["low"], range["high"], format)
    return Activation(format=format, scale=scale, zero=zero)


def is_known(range: Range) -> Array:
    """Tell where a range has been seen at all."""
    return range["count"] > 0
