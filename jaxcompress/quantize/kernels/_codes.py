"""Which contractions multiply codes, and how an activation becomes codes that they can take."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxcompress.numerics import Float, Format, Int
from jaxcompress.quantize import _activations as activations
from jaxcompress.quantize._carried import CarriedCodes


class Operand(NamedTuple):
    """One side of a contraction of codes.

    Attributes:
        codes: int8, or a float8 type (or bfloat16, which holds both float8 types exactly).
        scale: float32, of the same rank.
        zero: int32 zero point, or `None`.
    """

    codes: Array
    scale: Array
    zero: Array | None


def find_format_obstacle(weights: Format, activation: Format) -> str | None:
    """Say why codes of two formats cannot be multiplied with each other; `None` if they can."""
    w, x = weights.qtype, activation.qtype
    if isinstance(w, Int) and isinstance(x, Int):
        return None
    if isinstance(w, Float) and isinstance(x, Float) and w.bits == x.bits == 8:
        return None
    return f"no unit multiplies {x.name} activations by {w.name} weights"


def overflow(weights: Format, activation: Format, count: int) -> str | None:
    """Say that a sum of `count` products may not fit the accumulator; `None` if it does."""
    if not isinstance(weights.qtype, Int):
        return None
    if count * _reach(weights) * _reach(activation) < 2**31:
        return None
    return f"a sum of {count:,} products does not fit int32"


def _reach(format: Format) -> int:
    """The largest distance of a code from its zero point."""
    assert format.limits is not None
    low, high = map(int, format.limits)
    return max(-low, high) if format.symmetric else high - low


def accumulator(weights: Format) -> Any:
    """Give the dtype in which products of codes are summed."""
    return jnp.int32 if isinstance(weights.qtype, Int) else jnp.float32


def _to_multiplied(
    values: Array, scale: Array, zero: Array | None, format: Format, backend: str
) -> Operand:
    """Bring codes into the type that the backend multiplies.

    Unsigned integers are shifted by half their range, to fit int8. float8 goes in as it is on
    GPUs; elsewhere as bfloat16, in which its products are the same.
    """
    qtype = format.qtype
    if isinstance(qtype, Float):
        codes = values if backend == "gpu" else values.astype(jnp.bfloat16)
        return Operand(codes, scale, None)
    assert isinstance(qtype, Int)
    zero = None if zero is None else zero.astype(jnp.int32)
    if qtype.signed:
        return Operand(values.astype(jnp.int8), scale, zero)
    shift = 2 ** (qtype.bits - 1)
    codes = (values.astype(jnp.int16) - jnp.int16(shift)).astype(jnp.int8)
    ones = (1,) * values.ndim
    zero = jnp.zeros(ones, jnp.int32) if zero is None else zero
    return Operand(codes, scale, zero - jnp.int32(shift))


def encode_sides(
    name: str, params: Any, operand: int, node: CarriedCodes, x: Array, backend: str
) -> tuple[Operand, Operand]:
    """Round an activation to codes, and bring those of the weights beside it.

    Args:
        name: The primitive's name.
        params: The equation's parameters.
        operand: Which operand the weights are.
        node: The weights; `node.activation` says how x is rounded.
        x: The activation.
        backend: What multiplies them.

    Returns:
        The activation and the weights.
    """
    activation = node.activation
    assert activation is not None
    shared = activations.shared_axes(name, params, 1 - operand, activation, x.ndim)
    scale, zero = activations.fit_activation(x, activation, shared)
    values = activations.to_codes(x, scale, zero, activation)
    acts = _to_multiplied(values, scale, zero, activation.format, backend)
    scale = node.scale.astype(jnp.float32)
    return acts, _to_multiplied(node.values, scale, node.zero, node.format, backend)
