"""Checks of the arrays that are to be brought into a format."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxcompress.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from jaxcompress.numerics._format import Format


def check_array(x: ArrayLike, format: Format) -> Array:
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
    require_no_obstacle(format, x.shape, x.dtype)
    return x


def require_no_obstacle(format: Format, shape: tuple[int, ...], dtype: Any) -> None:
    """Refuse a shape or dtype that the format cannot take."""
    obstacle = format.obstacle(shape, dtype)
    if obstacle is not None:
        raise ArgumentError(
            "x",
            got=f"an array that {obstacle}",
            expected=f"an array that {format.granularity} can split",
            fix="Choose another granularity, or leave this array alone.",
        )


def require_all_finite(finite: Array) -> None:
    """Refuse NaN and infinity, where values can be looked at."""
    if not isinstance(finite, Tracer) and not finite:
        raise NonFiniteError(
            "x",
            got="NaN or infinity among the entries",
            expected="finite numbers",
            fix="Find where they come from; quantizing would spread them over whole slices.",
        )
