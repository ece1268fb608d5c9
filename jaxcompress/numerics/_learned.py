"""Quantizers with parameters that training learns: LSQ, LSQ+, PACT and DoReFa.

Each is differentiable in its input and its parameters by the rule of its paper, stated with it.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxcompress.errors import ArgumentError
from jaxcompress.numerics._checks import check_array
from jaxcompress.numerics._format import Format
from jaxcompress.numerics._pass_through import pass_through
from jaxcompress.numerics._qtypes import Int, Limits
from jaxcompress.numerics._quantize import scale_shape
from jaxcompress.numerics._scales import round_scale


def lsq(x: ArrayLike, step: ArrayLike, format: Format) -> Array:
    r"""Fake-quantize with a learned step size.

    $\hat x = \mathrm{round}(\mathrm{clip}(x / s, -Q_N, Q_P)) s$, equal to
    `dequantize(quantize(x, format, scale=step))` bit for bit. Backwards, x gets the
    straight-through gradient, and each step $g \cdot \partial \hat x / \partial s$ with

    $\partial \hat x / \partial s = \mathrm{round}(x/s) - x/s$ inside, $-Q_N$ or $Q_P$ outside,
    $g = 1 / \sqrt{N Q_P}$.

    Args:
        x: Floating-point array: weights, or activations (then with an unsigned type after ReLU).
        step: Positive step sizes s, of the shape `scale_shape(x.shape, format)`.
        format: Symmetric integer format. N counts the entries that share a step.

    Returns:
        An array of x's shape and dtype.

    Raises:
        ArgumentError: If the format is not a symmetric integer one, or a shape does not fit.

    Example:
        >>> from jaxcompress.numerics import int4
        >>> lsq(jnp.asarray([0.3, 9.0]), jnp.asarray([0.5]), Format(int4)).tolist()
        [0.5, 3.5]

    Reference: Esser et al., "Learned Step Size Quantization" (arXiv:1902.08153), equations 1 to 5.
    With `Convention.NARROW`, the default, $Q_N = Q_P$; `Convention.TIGHT` has the paper's $Q_N$.
    """
    x, limits = _prepare(x, format, symmetric=True)
    step = jnp.asarray(round_scale(_check_size(step, x, format, "step"), format.scale_dtype))
    blocked = format.granularity.block(x.astype(jnp.float32))
    quantized = _round_to_steps(blocked, _scale_parameter_gradient(step, x, limits), limits)
    return format.granularity.unblock(quantized).astype(x.dtype)


def lsq_init(x: ArrayLike, format: Format) -> Array:
    r"""Give LSQ's initial step sizes, $2 \, \mathrm{mean}|x| / \sqrt{Q_P}$.

    Args:
        x: The weights, or a first batch of activations.
        format: Symmetric integer format.

    Returns:
        float32 steps of the shape `scale_shape(x.shape, format)`; 1 for an all-zero slice.

    Raises:
        ArgumentError: If the format is not a symmetric integer one, or does not fit x's shape.

    Example:
        >>> from jaxcompress.numerics import Int
        >>> lsq_init(jnp.asarray([1.0, -3.0]), Format(Int(name="int3", bits=3, signed=False)))
        Array([1.5118579], dtype=float32)

    Reference: Esser et al. (arXiv:1902.08153), section 2.1.
    """
    x, (_, high) = _prepare(x, format, symmetric=True)
    blocked = jnp.abs(format.granularity.block(x.astype(jnp.float32)))
    mean = blocked.mean(format.granularity.shared(x.ndim), keepdims=True)
    return jnp.where(mean > 0, mean * (2 / math.sqrt(high)), 1)


def lsq_plus(x: ArrayLike, step: ArrayLike, offset: ArrayLike, format: Format) -> Array:
    r"""Fake-quantize with a learned step size and a learned offset.

    $\hat x = \mathrm{round}(\mathrm{clip}((x - \beta) / s, n, p)) s + \beta$. Backwards as in
    `lsq`, with $x - \beta$ for x; the offset gets $g$ times 1 where x is clipped, 0 elsewhere.

    Args:
        x: Floating-point array: usually activations of a nonlinearity that dips below zero.
        step: Positive step sizes s, of the shape `scale_shape(x.shape, format)`.
        offset: Offsets $\beta$, of that shape.
        format: Asymmetric integer format, whose limits are n and p.

    Returns:
        An array of x's shape and dtype. Zero is exact only if the offset is a multiple of the
        step, unlike in `quantize`.

    Raises:
        ArgumentError: If the format is not an asymmetric integer one, or a shape does not fit.

    Example:
        >>> from jaxcompress.numerics import int4
        >>> step, offset = jnp.asarray([0.5]), jnp.asarray([3.75])
        >>> lsq_plus(jnp.asarray([0.3, 9.0]), step, offset, Format(int4, symmetric=False)).tolist()
        [0.25, 7.25]

    Reference: Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and
    better initialization" (arXiv:2004.09576), equations 1 to 7.
    """
    x, limits = _prepare(x, format, symmetric=False)
    step, offset = _check_size(step, x, format, "step"), _check_size(offset, x, format, "offset")
    step, offset = (
        _scale_parameter_gradient(step, x, limits),
        _scale_parameter_gradient(offset, x, limits),
    )
    blocked = format.granularity.block(x.astype(jnp.float32))
    quantized = _round_to_steps(blocked - offset, step, limits) + offset
    return format.granularity.unblock(quantized).astype(x.dtype)


def lsq_plus_init(x: ArrayLike, format: Format) -> tuple[Array, Array]:
    r"""Give LSQ+'s initial step sizes and offsets for activations: the range of a first batch.

    $s = (\max x - \min x) / (p - n)$, $\beta = \min x - n s$.

    Args:
        x: A first batch of activations.
        format: Asymmetric integer format.

    Returns:
        `(step, offset)`, float32, of the shape `scale_shape(x.shape, format)`; step 1 for a
        constant slice.

    Raises:
        ArgumentError: If the format is not an asymmetric integer one, or does not fit x's shape.

    Example:
        >>> from jaxcompress.numerics import int4
        >>> step, offset = lsq_plus_init(jnp.asarray([-1.0, 6.5]), Format(int4, symmetric=False))
        >>> step.tolist(), offset.tolist()
        ([0.5], [3.0])

    Reference: Bhalgat et al. (arXiv:2004.09576), section 4.1.
    """
    x, (low, high) = _prepare(x, format, symmetric=False)
    blocked = format.granularity.block(x.astype(jnp.float32))
    shared = format.granularity.shared(x.ndim)
    least = blocked.min(shared, keepdims=True)
    spread = blocked.max(shared, keepdims=True) - least
    step = jnp.where(spread > 0, spread * np.float32(1 / (high - low)), 1)
    return step, least - low * step


def pact(x: ArrayLike, alpha: ArrayLike, *, bits: int) -> Array:
    r"""Clip activations at a learned level and quantize them to `[0, alpha]`.

    $y = \mathrm{clip}(x, 0, \alpha)$, $\hat y = \mathrm{round}(y (2^k - 1) / \alpha) \, \alpha /
    (2^k - 1)$. Backwards: x gets 1 where $0 \le x < \alpha$; $\alpha$ gets 1 where
    $x \ge \alpha$; else 0.

    Args:
        x: Activations.
        alpha: The clipping level, positive: a scalar, or of a shape that broadcasts to x.
        bits: k, 1 to 8.

    Returns:
        An array of x's shape and dtype.

    Raises:
        ArgumentError: If `bits` is out of range.

    Example:
        >>> pact(jnp.asarray([-1.0, 0.4, 2.0]), 1.5, bits=2).tolist()
        [0.0, 0.5, 1.5]

    Reference: Choi et al., "PACT: Parameterized Clipping Activation" (arXiv:1805.06085), equations
    1 to 3.
    """
    steps = _count_steps(bits)
    x = jnp.asarray(x)
    wide, alpha = x.astype(jnp.float32), jnp.asarray(alpha).astype(jnp.float32)
    alpha = jnp.broadcast_to(alpha, x.shape)
    # Written so that alpha, not x, gets the gradient at x == alpha.
    clipped = jnp.where(wide < 0, 0, jnp.where(wide < alpha, wide, alpha))
    level = jax.lax.stop_gradient(alpha)
    return pass_through(clipped, jnp.round(clipped * (steps / level)) * (level / steps)).astype(
        x.dtype
    )


def dorefa_weights(x: ArrayLike, *, bits: int, axes: Sequence[int] | None = None) -> Array:
    r"""Fake-quantize weights after squeezing them into [-1, 1] by tanh.

    $2 \, q_k\!\left(\frac{\tanh x}{2 \max |\tanh x|} + \frac12\right) - 1$ with
    $q_k(r) = \mathrm{round}((2^k - 1) r) / (2^k - 1)$; for one bit, $\mathrm{sign}(x) \cdot
    \mathrm{mean}|x|$. Backwards $q_k$ and the one-bit form count as the identity.

    Args:
        x: Weights.
        bits: k, 1 to 8.
        axes: The axes over which the maximum and the mean are taken; all of them by default.

    Returns:
        An array of x's shape and dtype.

    Raises:
        ArgumentError: If `bits` is out of range.

    Example:
        >>> dorefa_weights(jnp.asarray([-2.0, 0.5, 3.5]), bits=1).tolist()
        [-2.0, 2.0, 2.0]

    Reference: Zhou et al., "DoReFa-Net" (arXiv:1606.06160), section 2.3.
    """
    steps = _count_steps(bits)
    x = jnp.asarray(x)
    wide = x.astype(jnp.float32)
    if bits == 1:
        mean = jnp.abs(wide).mean(axes, keepdims=True)
        return pass_through(wide, jnp.where(wide < 0, -mean, mean)).astype(x.dtype)
    squeezed = jnp.tanh(wide)
    largest = jnp.abs(squeezed).max(axes, keepdims=True)
    unit = squeezed / (2 * jnp.where(largest > 0, largest, 1)) + 0.5
    return (2 * pass_through(unit, jnp.round(unit * steps) / steps) - 1).astype(x.dtype)


def dorefa_activations(x: ArrayLike, *, bits: int) -> Array:
    r"""Fake-quantize activations clipped to [0, 1]: $q_k(\mathrm{clip}(x, 0, 1))$.

    Backwards, x gets 1 where $0 \le x \le 1$, else 0.

    Args:
        x: Activations.
        bits: k, 1 to 8.

    Returns:
        An array of x's shape and dtype.

    Raises:
        ArgumentError: If `bits` is out of range.

    Example:
        >>> dorefa_activations(jnp.asarray([-1.0, 0.4, 2.0]), bits=1).tolist()
        [0.0, 0.0, 1.0]

    Reference: Zhou et al., "DoReFa-Net" (arXiv:1606.06160), section 2.4.
    """
    steps = _count_steps(bits)
    x = jnp.asarray(x)
    wide = x.astype(jnp.float32)
    clipped = jnp.where(wide < 0, 0, jnp.where(wide > 1, 1, wide))
    return pass_through(clipped, jnp.round(clipped * steps) / steps).astype(x.dtype)


@jax.custom_jvp
def _scale_gradient(x: Array, factor: Array) -> Array:
    return x


@_scale_gradient.defjvp
def _scale_gradient_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]):
    return primals[0], tangents[0] * primals[1]


def _round_to_steps(x: Array, step: Array, limits: Limits) -> Array:
    """Quantize by `step`; autodiff through this is equation 3 of LSQ, and equation 5 for x."""
    low, high = limits
    t = x * (1 / step)
    clipped = jnp.where(t < low, low, jnp.where(t > high, high, t))
    return pass_through(clipped, jnp.round(clipped)) * step


def _scale_parameter_gradient(parameter: Array, x: Array, limits: Limits) -> Array:
    per_step = x.size // max(parameter.size, 1)
    return _scale_gradient(parameter, jnp.float32(1 / math.sqrt(per_step * limits[1])))


def _prepare(x: ArrayLike, format: Format, *, symmetric: bool) -> tuple[Array, Limits]:
    x = check_array(x, format)
    if not isinstance(format.qtype, Int) or format.symmetric != symmetric:
        raise ArgumentError(
            "format",
            got=f"{format.qtype.name}, symmetric={format.symmetric}",
            expected=f"an integer type with symmetric={symmetric}",
            fix="For example Format(int8, symmetric=...): lsq is symmetric, lsq_plus is not.",
        )
    if format.global_scale:
        raise ArgumentError(
            "format",
            got="one with global_scale=True",
            expected="a format whose steps are all that is learned",
            fix="Leave `global_scale` out, or use fake_quant.",
        )
    assert format.limits is not None
    return x, format.limits


def _check_size(parameter: ArrayLike, x: Array, format: Format, name: str) -> Array:
    expected = scale_shape(x.shape, format)
    if np.shape(parameter) != expected:
        raise ArgumentError(
            name,
            got=f"an array of shape {np.shape(parameter)}",
            expected=f"shape {expected}",
            fix="Start from `lsq_init` or `lsq_plus_init`.",
        )
    return jnp.asarray(parameter).astype(jnp.float32)


def _count_steps(bits: int) -> float:
    if bits not in range(1, 9):
        raise ArgumentError("bits", got=bits, expected="1 to 8", fix="4 and 8 are usual.")
    return 2.0**bits - 1
