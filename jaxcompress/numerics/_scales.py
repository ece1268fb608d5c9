"""Scales as they are stored: what each `scale_dtype` holds, and how a scale is rounded to it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.errors import ArgumentError
from jaxcompress.numerics._pass_through import pass_through
from jaxcompress.numerics._qtypes import Float, Limits

WIDE = tuple(np.dtype(dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16))
POWERS = np.dtype(jnp.float8_e8m0fnu)
NARROW = np.dtype(jnp.float8_e4m3fn)

_NARROW_GRID = Float(name=NARROW.name, bits=8)
_INFINITE = 255  # the exponent field of float32 infinity and NaN


def scale_bounds(scale_dtype: Any) -> tuple[float, float]:
    """Give the smallest and the largest scale in use, both with a normal float32 reciprocal.

    `float8_e8m0fnu` would also hold 2**-127, a float32 subnormal, which most backends take for 0.

    Args:
        scale_dtype: A dtype of scales; see `Format.scale_dtype`.

    Returns:
        The two.

    Example:
        >>> scale_bounds(jnp.float8_e8m0fnu) == (2.0**-126, 2.0**126)
        True
    """
    if scale_dtype == POWERS:
        return 2.0**-126, 2.0**126
    info = jnp.finfo(scale_dtype)
    if scale_dtype == NARROW:  # every number counts where there are so few, subnormals too
        return float(info.smallest_subnormal), float(info.max)
    return float(info.smallest_normal), min(float(info.max), 2.0**126)


# With any block scale the product must have a normal reciprocal too.
GLOBAL_BOUNDS = 2.0**-117, 2.0**117


def round_scale(scale: Array, scale_dtype: Any) -> Array:
    """Round float32 scales to what `scale_dtype` holds; the gradient passes straight through.

    Args:
        scale: Scales, float32.
        scale_dtype: A dtype of scales; see `Format.scale_dtype`.

    Returns:
        Scales, float32.

    Example:
        >>> round_scale(jnp.float32(1 + 2**-9), jnp.bfloat16)
        Array(1., dtype=float32)
    """
    if scale_dtype == jnp.float32:
        return scale
    return pass_through(scale, _round_scale(jax.lax.stop_gradient(scale), np.dtype(scale_dtype)))


def _round_scale(scale: Array, scale_dtype: np.dtype) -> Array:
    if scale_dtype == POWERS:
        return _nearest_power(scale)
    # Not a pair of casts, which XLA may drop as excess precision.
    if scale_dtype == NARROW:
        low, high = _NARROW_GRID.limits
        return _NARROW_GRID.encode(jnp.clip(scale, low, high))
    info = jnp.finfo(scale_dtype)
    return jax.lax.reduce_precision(scale, info.nexp, info.nmant)


def _nearest_power(scale: Array) -> Array:
    """Find the nearest power of two in bounds, half-way up; NaN for what is not finite."""
    bits = jax.lax.bitcast_convert_type(jnp.clip(jnp.abs(scale), *scale_bounds(POWERS)), jnp.int32)
    power = (bits + 0x40_0000) & 0x7F80_0000
    power = jax.lax.bitcast_convert_type(power, jnp.float32)
    return jnp.where(jnp.isfinite(scale), power, jnp.nan)


def settle_scale(scale: Array, scale_dtype: Any, global_scale: Array | None) -> Array:
    """Bring a scale to what `scale_dtype` holds, beside a global scale; 1 for an empty range."""
    if global_scale is not None:
        scale = scale * (1 / global_scale)
    # The selects also keep XLA on CPU from fusing the slice's reduction with the rounding that
    # follows, which would write a float32 temporary and take four times as long.
    size = jnp.clip(jnp.abs(scale), *scale_bounds(scale_dtype))
    return round_scale(jnp.where(scale == 0, 1, jnp.where(scale < 0, -size, size)), scale_dtype)


def microscale(low: Array, high: Array, limits: Limits) -> Array:
    r"""Give the power of two $2^{\lfloor \log_2 a \rfloor - e}$ for a range of magnitude a.

    e is the exponent of the largest code: 2 for e2m1, 8 for e4m3, 15 for e5m2. Done on the
    exponents' bits, for `log2` is not exact.

    Reference: "OCP Microscaling Formats (MX) Specification", version 1.0, section 6.3.
    """
    least, most = limits
    up, down = _exponent(high), _exponent(low)
    field = up - math.floor(math.log2(most))
    if least < 0:
        field = jnp.maximum(field, down - math.floor(math.log2(-least)))
    first, last = (math.frexp(bound)[1] - 1 + 127 for bound in scale_bounds(POWERS))
    power = jax.lax.bitcast_convert_type(jnp.clip(field, first, last) << 23, jnp.float32)
    largest = jnp.maximum(up, down)
    # A field of 0 is zero or subnormal, which counts as zero.
    return jnp.where(largest == _INFINITE, jnp.nan, jnp.where(largest == 0, 1, power))


def _exponent(x: Array) -> Array:
    """Read the exponent field of float32 numbers, biased by 127."""
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF


def multiply_scales(scale: Array, global_scale: Array | None) -> Array:
    """Multiply the two levels; every code is worked out with this product."""
    return scale if global_scale is None else scale * global_scale


def require_global_scale(global_scale: object, *, wanted: bool) -> None:
    """Refuse a global scale where none is wanted, and its absence where one is."""
    if (global_scale is not None) != wanted:
        raise ArgumentError(
            "global_scale",
            got="nothing" if global_scale is None else "an array",
            expected="one for a format with global_scale=True, and nothing for others",
            fix="Find it with numerics.fit_global_scale, once for the whole array.",
        )
