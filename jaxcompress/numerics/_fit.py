"""Scales of given slices: what `quantize` does first, for those who go slice by slice."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxcompress.numerics._basis import Basis
from jaxcompress.numerics._checks import check_array
from jaxcompress.numerics._format import Format
from jaxcompress.numerics._scales import GLOBAL_BOUNDS, require_global_scale, scale_bounds


def fit_global_scale(x: ArrayLike, format: Format) -> Array | None:
    r"""Find the global scale of an array, the second level of a format that has one.

    $g = \max|x| / (c_{max} s_{max})$, so that the slice with the largest entry gets the largest
    scale: $c_{max}$ is the largest code (6 for `nvfp4`) and $s_{max}$ the largest number that
    `format.scale_dtype` holds (448).

    Args:
        x: The whole array, not blocked.
        format: Number type, granularity, and the rest.

    Returns:
        float32, of the number of axes that the scale has, with one entry along each; 1 for an
        array of zeros. `None` for a format without a global scale.

    Raises:
        ArgumentTypeError: If x is not floating point.
        ArgumentError: If the format does not fit x's shape.

    Example:
        >>> from jaxcompress.numerics import nvfp4
        >>> fit_global_scale(jnp.full((32, 2), 5376.0), nvfp4).tolist()
        [[[2.0]]]
    """
    x = check_array(x, format)
    return global_scale_of(format.granularity.block(x.astype(jnp.float32)), format)


def global_scale_of(blocked: Array, format: Format) -> Array | None:
    """Find the global scale of a blocked float32 array."""
    if not format.global_scale:
        return None
    peak = jnp.abs(blocked).max(tuple(range(blocked.ndim)), keepdims=True)
    largest_code = max(map(abs, format.limits)) if format.limits else 1.0
    found = peak * np.float32(1 / (largest_code * scale_bounds(format.scale_dtype)[1]))
    found = jnp.where(peak == 0, 1, jnp.clip(found, *GLOBAL_BOUNDS))
    return found[..., None] if isinstance(format.qtype, Basis) else found


def fit_scale(
    blocked: Array,
    format: Format,
    *,
    shared: tuple[int, ...],
    global_scale: Array | None = None,
) -> tuple[Array, Array | None]:
    """Find the scales and zero points of some slices of an array, by `format.range`.

    Codes are worked out with the product of the scale and the global scale:
    `format.qtype.to_values(blocked, scale * global_scale, zero, limits=format.limits)`.

    Args:
        blocked: float32 numbers: one or more whole slices, in any layout.
        format: Number type, range method, and the rest; its granularity is not looked at.
        shared: The axes that make up a slice.
        global_scale: What `fit_global_scale` found for the whole array; `None` if the format has
            no global scale.

    Returns:
        `(scale, zero)`, float32 numbers that `format.scale_dtype` can hold, of blocked's shape
        with 1 for the shared axes (and a `Basis`' bits at the end of the scale's). `zero` is
        `None` for a symmetric format.

    Raises:
        ArgumentError: If the global scale is missing, or there should be none.

    Example:
        >>> from jaxcompress.numerics import mxfp4
        >>> fit_scale(jnp.asarray([[7.0, -2.0], [0.5, 0.1]]), mxfp4, shared=(1,))[0].tolist()
        [[1.0], [0.125]]
    """
    require_global_scale(global_scale, wanted=format.global_scale)
    assert format.range is not None
    if global_scale is None:  # ranges of one's own may not know of global scales
        return format.range.fit(blocked, shared=shared, format=format)
    return format.range.fit(blocked, shared=shared, format=format, global_scale=global_scale)
