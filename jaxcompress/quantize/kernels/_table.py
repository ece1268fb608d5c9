"""The table of kernels: what runs at a site, by backend, primitive and formats."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.graph.leaves import place_result
from jaxcompress.quantize import _activations as activations
from jaxcompress.quantize._carried import CarriedCodes
from jaxcompress.quantize.kernels import _codes, _conv, _dot, _rows

_PATCHES: Mapping[str, int] = {"cpu": 16}
"""Input channels up to which gathering windows beats an integer convolution, measured."""

_GROUPED: Mapping[str, bool] = {"cpu": False}
"""Whether convolutions of codes with several feature groups are worth it; true elsewhere."""

_CONTRACTIONS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


@dataclass(frozen=True)
class Choice:
    """What runs at a site.

    Attributes:
        kernel: "codes" (codes by codes), "codes in groups", "codes as patches", "weights" (a
            float activation by codes, scaled after the sum), "weights in groups" (by scaled
            codes, over two axes at once), "rows" (a lookup) or "dequantized".
        why: Why the last, else empty.
    """

    kernel: str
    why: str = ""


def choose_kernel(
    name: str, params: Any, operand: int, node: CarriedCodes, x: Any, backend: str
) -> Choice:
    """Look a site up in the table.

    Args:
        name: The primitive's name.
        params: The equation's parameters.
        operand: Which operand is quantized.
        node: The quantized operand.
        x: The activation (indices, for a lookup).
        backend: "cpu", "gpu" or "tpu".

    Returns:
        The choice.
    """
    rule = {
        "dot_general": _choose_dot,
        "conv_general_dilated": _choose_conv,
        "gather": _choose_rows,
        "ragged_dot_general": _choose_ragged,
    }.get(name)
    if rule is None:
        return Choice("dequantized", f"there is no kernel for {name}")
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return Choice("dequantized", "the activation is complex, and stays as it is")
    return rule(params, operand, node, x, backend)


def _against(node: CarriedCodes, count: int) -> str | None:
    """Say why `count` codes of weights and activations cannot be multiplied and added, if so."""
    assert node.activation_format is not None
    formats = node.format, node.activation_format
    return _codes.find_format_obstacle(*formats) or _codes.overflow(*formats, count)


def _choose_dot(params: Any, operand: int, node: CarriedCodes, x: Any, backend: str) -> Choice:
    how = _dot.arrange_axes(params, operand, node, x)
    grouped = any(how.grouped)
    if node.activation_format is None:
        return Choice("weights in groups" if grouped else "weights")
    why = _against(node, math.prod(node.values.shape[k] for k in how.summed[1]))
    if why:
        return Choice("dequantized", why)
    return Choice("codes in groups" if grouped else "codes")


def _choose_conv(params: Any, operand: int, node: CarriedCodes, x: Any, backend: str) -> Choice:
    why = _conv.find_conv_obstacle(params, operand, node)
    if why is None and node.activation_format is None:
        return Choice("weights")
    outputs = node.shape[params["dimension_numbers"].rhs_spec[0]]
    why = why or _against(node, node.size // outputs)
    if why is None and node.zero is not None:
        why = "the kernel has zero points, which meet windows of varying sums"
    grouped = params["feature_group_count"] > 1
    if why is None and grouped and not _GROUPED.get(backend, True):
        why = f"convolutions of codes with feature groups are slower than float32 on {backend}"
    if why:
        return Choice("dequantized", why)
    channels = x.shape[params["dimension_numbers"].lhs_spec[1]]
    gathered = not grouped and channels <= _PATCHES.get(backend, 0)
    return Choice("codes as patches" if gathered else "codes")


def _choose_rows(params: Any, operand: int, node: CarriedCodes, x: Any, backend: str) -> Choice:
    why = "the indices are quantized" if operand else _rows.find_lookup_obstacle(params, node)
    return Choice("dequantized", why) if why else Choice("rows")


def _choose_ragged(params: Any, operand: int, node: CarriedCodes, x: Any, backend: str) -> Choice:
    why = _rows.find_ragged_obstacle(params, operand, node)
    if why is None and node.activation_format is not None:
        (_, (contract,)), _ = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        why = _against(node, node.shape[contract])
        if why is None and (node.zero is not None or node.activation_format.symmetric is False):
            why = "zero points in a ragged_dot"
    if why:
        return Choice("dequantized", why)
    return Choice("weights" if node.activation_format is None else "codes")


def run_kernel(
    equation: Any, operands: Sequence[Any], operand: int, choice: Choice, backend: str
) -> Array:
    """Run an equation one of whose operands is quantized.

    Args:
        equation: A `graph.Equation`.
        operands: Its operands; the others are arrays.
        operand: Which one is quantized.
        choice: What `choose_kernel` said.
        backend: What it runs on.

    Returns:
        Its result, in its dtype.
    """
    node, name, params = operands[operand], equation.primitive.name, equation.params
    x, rest, dtype = operands[1 - operand], operands[2:], equation.result_dtype
    if name in _CONTRACTIONS and not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.float32)  # numbers in the dtype of integers would be cut
    if choice.kernel == "dequantized":
        return equation.bind(*_exchange(operands, operand, _round_both(equation, operand, node, x)))

    by_codes = choice.kernel.startswith("codes")

    def kernel(x: Array, node: CarriedCodes, *rest: Any) -> Array:
        if choice.kernel == "rows":
            return _rows.lookup(params, node, x)
        if name == "dot_general":
            run = _dot.by_codes if by_codes else _dot.by_weights
            return run(params, operand, node, x, backend)
        if name == "ragged_dot_general":
            return _rows.ragged(params, node, x, rest[0], backend)
        if by_codes:
            patches = choice.kernel == "codes as patches"
            return _conv.by_codes(params, node, x, backend, patches=patches)
        return _conv.by_weights(params, node, x, backend)

    call = place_result(lambda *xs: kernel(*xs).astype(dtype), equation, operands)
    if not by_codes:
        return call(x, node, *rest)
    through = _differentiate_linearly(
        lambda x, node: call(x, node, *rest),
        lambda x, node: equation.bind(*_exchange(operands, operand, (x, node.dequantize()))),
        _list_shared(equation, operand, node, x),
    )
    return through(x, node)


def _exchange(operands: Sequence[Any], operand: int, pair: tuple[Any, Any]) -> list[Any]:
    """Put an activation and weights in their places among the operands."""
    new = list(operands)
    new[1 - operand], new[operand] = pair
    return new


def _list_shared(equation: Any, operand: int, node: CarriedCodes, x: Any) -> tuple[int, ...]:
    activation = node.activation
    assert activation is not None
    name, params = equation.primitive.name, equation.params
    return activations.shared_axes(name, params, 1 - operand, activation, x.ndim)


def _round_both(equation: Any, operand: int, node: CarriedCodes, x: Any) -> tuple[Any, Array]:
    """Give what codes would stand for, on both sides; indices are no activation."""
    contracts = equation.primitive.name in _CONTRACTIONS
    if node.activation is not None and contracts and not jnp.iscomplexobj(x):
        shared = _list_shared(equation, operand, node, x)
        scale, zero = activations.fit_activation(x, node.activation, shared)
        x = activations.round_through(x, scale, zero, node.activation)
    return x, node.dequantize()


def _differentiate_linearly(
    by_codes: Callable[[Array, CarriedCodes], Array],
    linear: Callable[[Array, CarriedCodes], Array],
    shared: tuple[int, ...],
) -> Callable[[Array, CarriedCodes], Array]:
    """Give a function of codes the gradient of the contraction, where the activation was rounded.

    The weights are constants.
    """

    @jax.custom_jvp
    def call(x: Array, node: CarriedCodes) -> Array:
        return by_codes(x, node)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        x, node = primals
        format = node.activation.format
        scale, zero = activations.fit_activation(x, node.activation, shared)
        inside = format.qtype.inside(x.astype(jnp.float32), scale, zero, limits=format.limits)
        tangent = jnp.where(inside, tangents[0], jnp.zeros_like(tangents[0]))
        return call(x, node), linear(tangent, node)

    return call
