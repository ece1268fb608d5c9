"""Forward passes in integers: codes by codes, differentiated as the unrounded contraction."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxcompress.graph import Equation, Site
from jaxcompress.numerics import Format, Int, PerChannel, PerTensor

_EXACT = 2**31 // 127**2  # products of two codes that int32 can sum


def suits(site: Site, weights: Format, activations: Format, shape: Sequence[int]) -> bool:
    """Tell whether a site can contract codes: what is contracted must share its scales.

    Args:
        site: The site.
        weights: The format of the leaf.
        activations: The format of activations.
        shape: The leaf's shape.
    """
    if site.primitive != "dot_general" or site.stack != tuple(shape[: len(site.stack)]):
        return False
    if site.layers != tuple(range(len(site.stack))) or site.beside:
        return False
    seen_whole = tuple(site.weight.shape) == tuple(shape[len(site.stack) :])
    if not seen_whole or set(site.through) - {"convert_element_type", "copy"}:
        return False
    if not isinstance(weights.granularity, PerTensor | PerChannel):
        return False
    shared = weights.granularity.shared(len(shape))
    summed = math.prod(shape[k] for k in site.axes.contract)
    return (
        summed <= _EXACT
        and all(k in shared for k in site.axes.contract)
        and all(
            isinstance(format.qtype, Int)
            and format.qtype.signed
            and format.symmetric
            and not format.clips
            for format in (weights, activations)
        )
    )


def contract_codes(
    equation: Equation,
    k: int,
    x: tuple[Array, Array, Array],
    w: tuple[Array, Array, Array],
) -> Array:
    """Contract codes in int32 and scale the sums; differentiate as if nothing had been rounded.

    Args:
        equation: A `dot_general`.
        k: Which operand the activation is.
        x: The activation as it came, through which gradients flow; its codes; its scale.
        w: The same of the weight.

    Returns:
        The equation's result.
    """
    numbers, codes, scales = zip(*((x, w) if k == 0 else (w, x)), strict=True)
    return _contraction(equation)(*numbers, *codes, *scales)


def _contraction(equation: Equation) -> Any:
    params = equation.params

    @jax.custom_jvp
    def run(a: Array, b: Array, p: Array, q: Array, r: Array, s: Array) -> Array:
        sums = lax.dot_general(p, q, params["dimension_numbers"], preferred_element_type=jnp.int32)
        scaled = (
            sums.astype(jnp.float32)
            * _broadcast_scale(params, r, s, 0)
            * _broadcast_scale(params, r, s, 1)
        )
        return scaled.astype(params["preferred_element_type"] or jnp.result_type(a, b))

    def jvp(primals: Sequence[Array], tangents: Sequence[Any]) -> tuple[Array, Any]:
        a, b, *_ = primals
        out = run(*primals)
        terms = []
        if not isinstance(tangents[0], SymbolicZero):
            terms.append(equation.bind(tangents[0], b))
        if not isinstance(tangents[1], SymbolicZero):
            terms.append(equation.bind(a, tangents[1]))
        return out, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(out)

    run.defjvp(jvp, symbolic_zeros=True)
    return run


def _broadcast_scale(params: Mapping[str, Any], first: Array, second: Array, which: int) -> Array:
    """Bring the scale of one operand into the axes of the result."""
    contracts, batches = params["dimension_numbers"]
    scale, other = (first, second) if which == 0 else (second, first)
    summed, batch = contracts[which], batches[which]
    free = [k for k in range(scale.ndim) if k not in (*summed, *batch)]
    scale = scale.transpose([*batch, *free, *summed])
    shape = scale.shape[: len(batch) + len(free)]  # those that are summed have length 1
    ones = (1,) * (other.ndim - len(summed) - len(batch))
    at = len(batch) if which == 1 else len(batch) + len(free)
    return scale.reshape(*shape[:at], *ones, *shape[at:])
