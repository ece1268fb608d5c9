"""Activations at a site: which entries share a scale, how they become codes, and what is lost."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.numerics import Activation, Format, PerTensor


def shared_axes(
    primitive: str, params: Mapping[str, Any], operand: int, activation: Activation, ndim: int
) -> tuple[int, ...]:
    """List the axes of an activation along which one scale is shared.

    Args:
        primitive: Name of the contraction's primitive.
        params: The equation's parameters.
        operand: Which operand of the equation is the activation.
        activation: How it is rounded.
        ndim: Its number of axes.

    Returns:
        All axes for `PerTensor()`. For `PerToken()` the contracted ones; of a convolution, whose
        windows overlap, all but the batch axis.
    """
    if isinstance(activation.format.granularity, PerTensor):
        return tuple(range(ndim))
    if primitive == "conv_general_dilated":
        batch = params["dimension_numbers"].lhs_spec[0]
        return tuple(k for k in range(ndim) if k != batch)
    if primitive == "ragged_dot_general":
        (contracts, _) = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    else:
        (contracts, _) = params["dimension_numbers"]
    return tuple(contracts[operand])


def fit_activation(
    x: Array, activation: Activation, shared: tuple[int, ...]
) -> tuple[Array, Array | None]:
    """Find (or take) the scale and zero point of an activation.

    Args:
        x: The activation, any float dtype.
        activation: How it is rounded; a static scale has one entry here.
        shared: The axes that share a scale.

    Returns:
        float32 scale and zero point, of x's shape with 1 for the shared axes (all 1 if static).
    """
    if activation.scale is not None:
        ones = (1,) * x.ndim
        zero = None if activation.zero is None else activation.zero.reshape(ones)
        return activation.scale.reshape(ones), zero
    range = activation.format.range
    assert range is not None
    return range.fit(x.astype(jnp.float32), shared=shared, format=activation.format)


def to_codes(x: Array, scale: Array, zero: Array | None, activation: Activation) -> Array:
    """Round an activation to the stored values of its format.

    Args:
        x: The activation, any float dtype.
        scale: What `fit_activation` gave.
        zero: Likewise.
        activation: How it is rounded.

    Returns:
        Codes in the storage dtype of the format, of x's shape.
    """
    format = activation.format
    return format.qtype.to_values(x.astype(jnp.float32), scale, zero, limits=format.limits)


def round_through(x: Array, scale: Array, zero: Array | None, activation: Activation) -> Array:
    """Round an activation and come back to its dtype, letting gradients through.

    The gradient is the straight-through one: 1 where x was rounded, 0 where it was clipped; scale
    and zero point count as constants. A range that was found anew and leaves nothing out clips
    nothing, so that the backward pass needs no mask.

    Args:
        x: The activation.
        scale: What `fit_activation` gave.
        zero: Likewise.
        activation: How it is rounded.

    Returns:
        What the codes stand for, in x's shape and dtype.
    """
    return _round_through(
        x, scale, zero, activation.format, activation.is_static or activation.format.clips
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _round_through(
    x: Array, scale: Array, zero: Array | None, format: Format, clips: bool
) -> Array:
    wide = x.astype(jnp.float32)
    return format.qtype.round_trip(wide, scale, zero, limits=format.limits).astype(x.dtype)


@_round_through.defjvp
def _round_through_jvp(
    format: Format, clips: bool, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    x, scale, zero = primals
    out = _round_through(x, scale, zero, format, clips)
    if not clips:
        return out, tangents[0]
    inside = format.qtype.inside(x.astype(jnp.float32), scale, zero, limits=format.limits)
    return out, jnp.where(inside, tangents[0], jnp.zeros_like(tangents[0]))
