"""Quantize, dequantize and fake-quantize one array."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxcompress.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from jaxcompress.numerics._format import Format
from jaxcompress.numerics._qarray import QArray
from jaxcompress.numerics._qtypes import Scaled
from jaxcompress.numerics._range import rounded


def quantize(
    x: ArrayLike,
    format: Format,
    *,
    scale: ArrayLike | None = None,
    zero: ArrayLike | None = None,
    key: Array | None = None,
) -> QArray:
    r"""Bring an array into stored form.

    $q = \mathrm{round}(x / s) + z$, clipped to the format's limits, with scale s and zero point z
    per slice as `format.range` finds them.

    Args:
        x: Floating-point array; bfloat16 and float16 are computed in float32.
        format: Number type, granularity, and the rest.
        scale: Use this scale instead of looking for one, such as a learned step; of the shape
            that `QArray.scale` has.
        zero: The zero point to use with `scale`, if the format is not symmetric.
        key: Round stochastically with this key, without bias: the mean over keys of the result
            is x, inside the limits. By default round to the nearest.

    Returns:
        The stored form.

    Raises:
        ArgumentTypeError: If x is not floating point.
        ArgumentError: If the format does not fit x's shape.
        NonFiniteError: If x is concrete and holds NaN or infinity. Under `jit` they poison the
            scale instead.

    Example:
        >>> from jaxcompress.numerics import int4
        >>> quantize(jnp.asarray([[-7.0, 0.4, 3.6]]), Format(int4)).values.tolist()
        [[-7, 0, 4]]
    """
    x = checked(x, format)
    if key is not None and not isinstance(format.qtype, Scaled):
        raise ArgumentError(
            "key",
            got=f"a key with {format.qtype.name}",
            expected="a type with one scale per slice where rounding is stochastic",
            fix="Leave `key` out.",
        )
    given = _given_fit(x, format, scale, zero)
    values, fitted_scale, fitted_zero, finite = _quantize(x, format, given, key)
    _require_finite(finite)
    return QArray(values=values, scale=fitted_scale, zero=fitted_zero, format=format, dtype=x.dtype)


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
    return _dequantize(q.values, q.scale, q.zero, q.format, q.dtype)


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
    x = checked(x, format)
    if not isinstance(x, Tracer):
        _require_finite(jnp.isfinite(x).all())
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
    _require_no_obstacle(format, shape, jnp.float32)
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
    x, hat = jnp.asarray(x).astype(jnp.float32), jnp.asarray(hat).astype(jnp.float32)
    peak = jnp.maximum(jnp.abs(x).max(initial=0), jnp.finfo(jnp.float32).smallest_normal)
    norm, off = jnp.linalg.norm(jnp.ravel(x / peak)), jnp.linalg.norm(jnp.ravel((x - hat) / peak))
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


def _fit(x: Array, format: Format, given: Any) -> tuple[Array, Array, Array | None]:
    """Block x, in float32, and find (or take) its scale and zero point."""
    blocked = format.granularity.block(x.astype(jnp.float32))
    if given is not None:
        return blocked, *given
    shared = format.granularity.shared(x.ndim)
    assert format.range is not None
    return blocked, *format.range.fit(blocked, shared=shared, format=format)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(
    x: Array, format: Format, given: Any, key: Array | None
) -> tuple[Array, Array, Array | None, Array]:
    blocked, scale, zero = _fit(x, format, given)
    noise = None if key is None else jax.random.uniform(key, blocked.shape)
    values = format.qtype.to_values(blocked, scale, zero, limits=format.limits, noise=noise)
    stored_zero = None if zero is None else zero.astype(format.qtype.storage)
    return values, scale.astype(format.scale_dtype), stored_zero, jnp.isfinite(x).all()


@functools.partial(jax.jit, static_argnums=(3, 4))
def _dequantize(
    values: Array, scale: Array, zero: Array | None, format: Format, dtype: Any
) -> Array:
    scale, zero = jax.tree.map(lambda part: part.astype(jnp.float32), (scale, zero))
    numbers = format.qtype.to_numbers(values, scale, zero)
    return format.granularity.unblock(numbers).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _straight_through(x: Array, format: Format) -> Array:
    blocked, scale, zero = _fit(x, format, None)
    numbers = format.qtype.round_trip(blocked, scale, zero, limits=format.limits)
    return format.granularity.unblock(numbers).astype(x.dtype)


@_straight_through.defjvp
def _straight_through_jvp(format: Format, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    if not format.clips:  # nothing to compute, and no mask to keep for the backward pass
        return _fake_quant(x, format), tangent
    blocked, scale, zero = _fit(jax.lax.stop_gradient(x), format, None)
    inside = format.qtype.inside(blocked, scale, zero, limits=format.limits)
    inside = format.granularity.unblock(inside)
    return _fake_quant(x, format), jnp.where(inside, tangent, jnp.zeros_like(tangent))


_fake_quant = jax.jit(_straight_through, static_argnums=1)


# --- Checks -----------------------------------------------------------------------------------


def checked(x: ArrayLike, format: Format) -> Array:
    """Refuse what cannot be brought into the format; value checks are left to the caller."""
    if not isinstance(format, Format):
        raise ArgumentTypeError(
            "format",
            got=type(format).__name__,
            expected="a numerics.Format",
            fix="For example Format(int8, PerChannel()).",
        )
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ArgumentTypeError(
            "x", got=f"dtype {x.dtype}", expected="a floating-point array", fix="Cast it first."
        )
    _require_no_obstacle(format, x.shape, x.dtype)
    return x


def _require_no_obstacle(format: Format, shape: tuple[int, ...], dtype: Any) -> None:
    obstacle = format.obstacle(shape, dtype)
    if obstacle is not None:
        raise ArgumentError(
            "x",
            got=f"an array that {obstacle}",
            expected=f"an array that {format.granularity} can split",
            fix="Choose another granularity, or leave this array alone.",
        )


def _require_finite(finite: Array) -> None:
    if not isinstance(finite, Tracer) and not finite:
        raise NonFiniteError(
            "x",
            got="NaN or infinity among the entries",
            expected="finite numbers",
            fix="Find where they come from; quantizing would spread them over whole slices.",
        )


def _given_fit(
    x: Array, format: Format, scale: ArrayLike | None, zero: ArrayLike | None
) -> tuple[Array, Array | None] | None:
    if scale is None and zero is None:
        return None
    expected = scale_shape(x.shape, format)
    wanted = {"scale": (scale, True), "zero": (zero, not format.symmetric)}
    for name, (part, needed) in wanted.items():
        shape = None if part is None else np.shape(part)
        if shape != (expected if needed else None):
            raise ArgumentError(
                name,
                got="nothing" if shape is None else f"an array of shape {shape}",
                expected=f"an array of shape {expected}" if needed else "nothing",
                fix="Give both for an asymmetric format, and the scale alone for a symmetric one.",
            )
    assert scale is not None
    wide_zero = None if zero is None else jnp.asarray(zero).astype(jnp.float32)
    return rounded(jnp.asarray(scale).astype(jnp.float32), format), wide_zero
