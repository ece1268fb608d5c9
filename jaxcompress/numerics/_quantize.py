"""Quantize, dequantize and fake-quantize one array."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxcompress.errors import ArgumentError, ArgumentTypeError
from jaxcompress.numerics._checks import check_array, require_all_finite, require_no_obstacle
from jaxcompress.numerics._fit import fit_scale, global_scale_of
from jaxcompress.numerics._format import Format
from jaxcompress.numerics._qarray import QArray
from jaxcompress.numerics._qtypes import Scaled
from jaxcompress.numerics._scales import multiply_scales, round_scale


def quantize(
    x: ArrayLike,
    format: Format,
    *,
    scale: ArrayLike | None = None,
    zero: ArrayLike | None = None,
    global_scale: ArrayLike | None = None,
    key: Array | None = None,
) -> QArray:
    r"""Bring an array into stored form.

    $q = \mathrm{round}(x / s) + z$, clipped to the format's limits, with scale s and zero point z
    per slice as `format.range` finds them. With a global scale g, s g takes the place of s.

    Args:
        x: Floating-point array; bfloat16 and float16 are computed in float32.
        format: Number type, granularity, and the rest.
        scale: Use this scale instead of looking for one, such as a learned step; of the shape
            that `QArray.scale` has.
        zero: The zero point to use with `scale`, if the format is not symmetric.
        global_scale: The global scale, if the format has one: needed beside `scale`, which is
            stored as it is given, without it; alone, the scales are found for it. Of the shape
            that `QArray.global_scale` has.
        key: Round stochastically with this key, without bias: the mean over keys of the result
            is x, inside the limits. By default round to the nearest.

    Returns:
        The stored form.

    Raises:
        ArgumentTypeError: If x is not floating point.
        ArgumentError: If the format does not fit x's shape, or the given parts do not fit it.
        NonFiniteError: If x is concrete and holds NaN or infinity. Under `jit` they poison the
            scale instead.

    Example:
        >>> from jaxcompress.numerics import int4
        >>> quantize(jnp.asarray([[-7.0, 0.4, 3.6]]), Format(int4)).values.tolist()
        [[-7, 0, 4]]
    """
    x = check_array(x, format)
    if key is not None and not isinstance(format.qtype, Scaled):
        raise ArgumentError(
            "key",
            got=f"a key with {format.qtype.name}",
            expected="a type with one scale per slice where rounding is stochastic",
            fix="Leave `key` out.",
        )
    given = _check_given(x, format, scale, zero, global_scale)
    q, finite = _quantize(x, format, given, key)
    require_all_finite(finite)
    return q


def dequantize(q: QArray) -> Array:
    r"""Give the array that a stored form stands for, $(q - z) s$.

    Args:
        q: The stored form.

    Returns:
        An array of shape `q.shape` and dtype `q.dtype`.

    Raises:
        ArgumentTypeError: If q is not a `QArray`.

    Example:
        >>> from jaxcompress.numerics import int4
        >>> dequantize(quantize(jnp.asarray([[-7.0, 0.4, 3.6]]), Format(int4))).tolist()
        [[-7.0, 0.0, 4.0]]
    """
    if not isinstance(q, QArray):
        raise ArgumentTypeError(
            "q", got=type(q).__name__, expected="a QArray", fix="Make one with `quantize`."
        )
    return _dequantize(dataclasses.replace(q, activation=None))


def effective_scale(q: QArray) -> Array:
    r"""Give the factor of the codes of each slice: $s$, or $s g$ with a global scale.

    Args:
        q: The stored form.

    Returns:
        float32, of the scale's shape: it broadcasts to `q.values` (a `Basis` has its k numbers
        along an extra last axis).

    Example:
        >>> from jaxcompress.numerics import nvfp4
        >>> q = quantize(jnp.full((32, 2), 5376.0), nvfp4)
        >>> q.scale.dtype.name, effective_scale(q).shape, float(effective_scale(q).max())
        ('float8_e4m3fn', (2, 1, 2), 896.0)
    """
    return multiply_scales(q.scale.astype(jnp.float32), q.global_scale)


def fake_quant(x: ArrayLike, format: Format) -> Array:
    """Round an array to what its stored form stands for, and let gradients through.

    Equal to `dequantize(quantize(x, format))`, bit for bit. The gradient is the straight-through
    one: 1 where x was rounded, 0 where it was clipped; the scale counts as a constant.

    Args:
        x: Floating-point array.
        format: Number type, granularity, and the rest.

    Returns:
        An array of x's shape and dtype.

    Raises:
        ArgumentTypeError: If x is not floating point.
        ArgumentError: If the format does not fit x's shape.
        NonFiniteError: If x is concrete and holds NaN or infinity.

    Example:
        >>> from jaxcompress.numerics import int4
        >>> jax.grad(lambda x: fake_quant(x, Format(int4)).sum())(jnp.asarray([[-7.0, 0.4, 3.6]]))
        Array([[1., 1., 1.]], dtype=float32)

    Reference: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons"
    (arXiv:1308.3432); clipped as in Hubara et al. (arXiv:1602.02830), equation 4.
    """
    x = check_array(x, format)
    if not isinstance(x, Tracer):
        require_all_finite(jnp.isfinite(x).all())
    return _fake_quant(x, format)


def scale_shape(shape: tuple[int, ...], format: Format) -> tuple[int, ...]:
    """Give the shape of the scale of an array: what `quantize(..., scale=)` expects.

    Args:
        shape: The array's shape.
        format: Number type, granularity, and the rest.

    Returns:
        The blocked shape with 1 for every shared axis, and for a `Basis` its bits at the end.

    Raises:
        ArgumentError: If the format does not fit the shape.

    Example:
        >>> from jaxcompress.numerics import PerGroup, int4
        >>> scale_shape((64, 10), Format(int4, PerGroup(32)))
        (2, 1, 10)
    """
    require_no_obstacle(format, shape, jnp.float32)
    block = jax.eval_shape(format.granularity.block, jax.ShapeDtypeStruct(shape, jnp.float32))
    shared = format.granularity.shared(len(shape))
    tail = () if isinstance(format.qtype, Scaled) else (format.qtype.bits,)
    return (*(1 if axis in shared else n for axis, n in enumerate(block.shape)), *tail)


def relative_error(x: ArrayLike, approximation: QArray | ArrayLike) -> Array:
    r"""Measure $\lVert x - \hat x \rVert_2 / \lVert x \rVert_2$.

    Args:
        x: The array.
        approximation: Its stored form, or an array of its shape.

    Returns:
        A float32 scalar; 0 where both are zero.

    Example:
        >>> round(float(relative_error(jnp.asarray([3.0, 4.0]), jnp.asarray([3.0, 3.0]))), 3)
        0.2
    """
    hat = dequantize(approximation) if isinstance(approximation, QArray) else approximation
    return _relative_error(jnp.asarray(x), jnp.asarray(hat))


@jax.jit
def _relative_error(x: Array, hat: Array) -> Array:
    x, hat = x.astype(jnp.float32), hat.astype(jnp.float32)
    peak = jnp.maximum(jnp.abs(x).max(initial=0), jnp.finfo(jnp.float32).smallest_normal)
    # Not flattened: with Explicit mesh axes a sharded array cannot be.
    norm, off = (jnp.sqrt(jnp.sum(jnp.square(part / peak))) for part in (x, x - hat))
    return jnp.where(off == 0, 0, off / norm)


def sqnr(x: ArrayLike, approximation: QArray | ArrayLike) -> Array:
    r"""Measure the signal-to-quantization-noise ratio.

    $10 \log_{10} (\sum x^2 / \sum (x - \hat x)^2)$

    Args:
        x: The array.
        approximation: Its stored form, or an array of its shape.

    Returns:
        Decibels, a float32 scalar: about 6 per bit; infinite where nothing was lost.

    Example:
        >>> round(float(sqnr(jnp.asarray([3.0, 4.0]), jnp.asarray([3.0, 3.5]))))
        20
    """
    return -20 * jnp.log10(relative_error(x, approximation))


# --- The mathematics, on checked arguments ----------------------------------------------------


class _Given(NamedTuple):
    """Parts of a fit that the caller brought along."""

    scale: Array | None = None
    zero: Array | None = None
    global_scale: Array | None = None


def _fit_blocked(x: Array, format: Format, given: _Given) -> tuple[Array, _Given, Array]:
    """Block x, in float32, and find what is not given of its scale, zero point, global scale.

    The last of the three is the product of both scales, which codes are worked out with.
    """
    blocked = format.granularity.block(x.astype(jnp.float32))
    scale, zero, global_scale = given
    if global_scale is None:
        global_scale = global_scale_of(blocked, format)
    if scale is None:
        shared = format.granularity.shared(x.ndim)
        scale, zero = fit_scale(blocked, format, shared=shared, global_scale=global_scale)
    assert scale is not None
    given = _Given(scale, zero, global_scale)
    return blocked, given, multiply_scales(scale, global_scale)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(x: Array, format: Format, given: _Given, key: Array | None) -> tuple[QArray, Array]:
    blocked, (scale, zero, global_scale), product = _fit_blocked(x, format, given)
    assert scale is not None
    noise = None if key is None else jax.random.uniform(key, blocked.shape)
    values = format.qtype.to_values(blocked, product, zero, limits=format.limits, noise=noise)
    q = QArray(
        values=values,
        scale=scale.astype(format.scale_dtype),
        zero=None if zero is None else zero.astype(format.qtype.storage),
        global_scale=global_scale,
        format=format,
        dtype=x.dtype,
    )
    return q, jnp.isfinite(x).all()


@jax.jit
def _dequantize(q: QArray) -> Array:
    zero = None if q.zero is None else q.zero.astype(jnp.float32)
    numbers = q.format.qtype.to_numbers(q.values, effective_scale(q), zero)
    return q.format.granularity.unblock(numbers).astype(q.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _straight_through(x: Array, format: Format) -> Array:
    blocked, fit, product = _fit_blocked(x, format, _Given())
    numbers = format.qtype.round_trip(blocked, product, fit.zero, limits=format.limits)
    return format.granularity.unblock(numbers).astype(x.dtype)


@_straight_through.defjvp
def _straight_through_jvp(format: Format, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    if not format.clips:  # nothing to compute, and no mask to keep for the backward pass
        return _fake_quant(x, format), tangent
    blocked, fit, product = _fit_blocked(jax.lax.stop_gradient(x), format, _Given())
    inside = format.qtype.inside(blocked, product, fit.zero, limits=format.limits)
    inside = format.granularity.unblock(inside)
    return _fake_quant(x, format), jnp.where(inside, tangent, jnp.zeros_like(tangent))


_fake_quant = jax.jit(_straight_through, static_argnums=1)


# --- Checks -----------------------------------------------------------------------------------


def _check_given(
    x: Array,
    format: Format,
    scale: ArrayLike | None,
    zero: ArrayLike | None,
    global_scale: ArrayLike | None,
) -> _Given:
    shape = scale_shape(x.shape, format)
    scaled = scale is not None or zero is not None
    wanted = {
        "scale": (scale, shape if scaled else None),
        "zero": (zero, shape if scaled and not format.symmetric else None),
        "global_scale": (global_scale, (1,) * len(shape) if format.global_scale else None),
    }
    if not scaled and global_scale is None:
        return _Given()
    for name, (part, expected) in wanted.items():
        got = None if part is None else np.shape(part)
        if got != expected:
            raise ArgumentError(
                name,
                got="nothing" if got is None else f"an array of shape {got}",
                expected="nothing" if expected is None else f"an array of shape {expected}",
                fix="Give every part that the format has: a scale, a zero point if it is not "
                "symmetric, a global scale if it has one; or a global scale alone.",
            )
    wide = [
        None if part is None else jnp.asarray(part).astype(jnp.float32)
        for part in (scale, zero, global_scale)
    ]
    given = _Given(*wide)
    if given.scale is None:
        return given
    return given._replace(scale=round_scale(given.scale, format.scale_dtype))
