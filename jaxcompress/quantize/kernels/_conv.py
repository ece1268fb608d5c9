"""`conv_general_dilated` with a quantized kernel: by codes, as patches, or scaled after the sum."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.quantize._carried import CarriedCodes
from jaxcompress.quantize.kernels import _codes as codes_of


def find_conv_obstacle(params: Any, operand: int, node: CarriedCodes) -> str | None:
    """Say why codes cannot enter a convolution; `None` if they can."""
    if operand != 1 or params["batch_group_count"] != 1:
        return "the weights take the place of an activation in the convolution"
    if node.split != (1,) * node.ndim:
        return "groups run along an axis of the convolution's kernel"
    out = params["dimension_numbers"].rhs_spec[0]
    if any(n > 1 for k, n in enumerate(node.scale.shape) if k != out):
        return "scales vary along what the convolution sums"
    return None


def by_codes(params: Any, node: CarriedCodes, x: Array, backend: str, *, patches: bool) -> Array:
    r"""Convolve codes with codes; symmetric weights.

    $s_x s_w (q_x * q_w - z_x \sum q_w)$, the borders padded with $z_x$, so that zeros are zeros.

    Args:
        params: The equation's parameters.
        node: The kernel.
        x: The activation.
        backend: What runs it.
        patches: Gather the windows and multiply matrices, rather than convolve.

    Returns:
        float32, in the shape of the equation's result.
    """
    acts, weights = codes_of.encode_sides("conv_general_dilated", params, 1, node, x, backend)
    numbers = params["dimension_numbers"]
    run = _patches if patches else _convolve
    sums = run(params, acts, weights.codes, codes_of.accumulator(node.format))
    out = numbers.rhs_spec[0]
    batch, channels = numbers.out_spec[0], numbers.out_spec[1]
    if acts.zero is not None:
        others = [k for k in range(x.ndim) if k != out]
        total = weights.codes.sum(others, dtype=jnp.int32)
        sums -= _along(acts.zero, batch, x.ndim) * _along(total, channels, x.ndim)
    scaled = sums.astype(jnp.float32) * _along(weights.scale, channels, x.ndim)
    return scaled * _along(acts.scale, batch, x.ndim)


def by_weights(params: Any, node: CarriedCodes, x: Array, backend: str) -> Array:
    """Convolve a float activation with codes, and scale the result.

    Returns:
        float32 (or wider, as x is), in the shape of the equation's result.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    w = node.codes(x.dtype, backend=backend)
    sums = lax.conv_general_dilated(x, w, **_read_conv_params(params), preferred_element_type=wide)
    return sums * _along(node.scale.astype(wide), params["dimension_numbers"].out_spec[1], x.ndim)


def _along(part: Array, axis: int, ndim: int) -> Array:
    """Bring a part of one entry per index of an axis beside an array of so many axes."""
    return part.reshape([-1 if k == axis else 1 for k in range(ndim)])


def _read_conv_params(params: Any) -> dict[str, Any]:
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    return {name: params[name] for name in (*names, "feature_group_count", "precision")}


def _convolve(params: Any, acts: codes_of.Operand, w: Array, dtype: Any) -> Array:
    options, x = _read_conv_params(params), acts.codes
    if acts.zero is not None:
        x = _pad(params, acts)
        spatial = len(options["window_strides"])
        options |= {"padding": [(0, 0)] * spatial, "lhs_dilation": (1,) * spatial}
    return lax.conv_general_dilated(x, w, **options, preferred_element_type=dtype)


def _pad(params: Any, acts: codes_of.Operand) -> Array:
    """Pad and dilate codes with the code of zero."""
    spec = params["dimension_numbers"].lhs_spec
    dilation = params["lhs_dilation"] or (1,) * len(params["padding"])
    config = [(0, 0, 0)] * acts.codes.ndim
    for axis, (low, high), step in zip(spec[2:], params["padding"], dilation, strict=True):
        config[axis] = (low, high, step - 1)
    if acts.zero is None or acts.zero.size == 1:
        fill = jnp.zeros((), jnp.int32) if acts.zero is None else acts.zero.reshape(())
        return lax.pad(acts.codes, fill.astype(acts.codes.dtype), config)
    # A zero point per example: pad what is left when it is taken away.
    away = acts.codes.astype(jnp.int32) - acts.zero
    padded = lax.pad(away, jnp.zeros((), jnp.int32), config) + acts.zero
    return padded.astype(acts.codes.dtype)


def _patches(params: Any, acts: codes_of.Operand, w: Array, dtype: Any) -> Array:
    """Gather windows of codes by strided slices, and multiply them by the kernel as a matrix."""
    numbers = params["dimension_numbers"]
    # Without the barrier each window would be rounded anew.
    acts = acts._replace(codes=lax.optimization_barrier(acts.codes))
    x = jnp.transpose(
        _pad(params, acts), (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    )
    out, feature, *spatial = numbers.rhs_spec
    w = jnp.transpose(w, (*spatial, feature, out))  # (*window, in, out)
    window, strides = w.shape[:-2], params["window_strides"]
    dilation = params["rhs_dilation"] or (1,) * len(window)
    sizes = [
        (n - (size - 1) * step - 1) // stride + 1
        for n, size, step, stride in zip(x.shape[1:-1], window, dilation, strides, strict=True)
    ]
    columns = [
        _window(x, offset, sizes, strides, dilation)
        for offset in itertools.product(*map(range, window))
    ]
    rows = jnp.concatenate(columns, -1)  # (batch, *spatial, window * in)
    matrix = w.reshape(-1, w.shape[-1])
    last = rows.ndim - 1
    sums = lax.dot_general(rows, matrix, (((last,), (0,)), ((), ())), preferred_element_type=dtype)
    back = [0] * sums.ndim
    for place, axis in enumerate((0, *range(2, sums.ndim), 1)):
        back[numbers.out_spec[axis]] = place
    return jnp.transpose(sums, back)


def _window(
    x: Array,
    offset: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
) -> Array:
    starts = [k * step for k, step in zip(offset, dilation, strict=True)]
    ends = [a + (n - 1) * s + 1 for a, n, s in zip(starts, sizes, strides, strict=True)]
    first, last = x.shape[0], x.shape[-1]
    return lax.slice(x, (0, *starts, 0), (first, *ends, last), (1, *strides, 1))
