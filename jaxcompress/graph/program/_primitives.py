"""What primitives do to entries: the one list that sites, dims, reads, affine and leaves read."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Axis = TypeVar("Axis")

PASSES = frozenset({"device_put", "optimization_barrier", "pbroadcast"})
"""Primitives that give each operand as it is: result k is operand k."""
PLACES = frozenset({"copy", "layout_constraint", "name", "reshard", "sharding_constraint"})
"""Primitives that give their operand as it is, named or placed elsewhere."""
CASTS = frozenset({"convert_element_type", "reduce_precision"})
"""Primitives that give their operand in another type."""
ARRANGES = frozenset({"broadcast_in_dim", "reshape", "squeeze", "transpose"})
"""Primitives that rearrange or repeat the entries of one array; see `arrange`."""
MOVES = ARRANGES | {"convert_element_type", "copy", "stop_gradient"}
"""Primitives that cast, rearrange or repeat the entries of one array."""
IDENTITIES = PASSES | PLACES | CASTS | {"stop_gradient"}
"""Primitives whose results are their operands, cast or placed elsewhere."""
ELEMENTWISE = frozenset(
    {
        "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
        "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex", "conj",
        "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div",
        "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt",
        "igamma", "igamma_grad_a", "igammac", "imag", "integer_pow", "is_finite",
        "layout_constraint", "le", "le_to", "lgamma", "log", "log1p", "log2", "logistic", "lt",
        "lt_to", "max", "min", "mul", "mulhi", "name", "ne", "neg", "nextafter", "not",
        "one_minus_square", "or", "polygamma", "population_count", "pow", "pvary",
        "random_gamma_grad", "real", "reduce_precision", "regularized_incomplete_beta", "rem",
        "reshard", "round", "rsqrt", "select_n", "sharding_constraint", "shift_left",
        "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
        "stop_gradient", "sub", "tan", "tanh", "vary_unreduced_cast", "xor", "zeta",
    }
)  # fmt: skip
"""Primitives of which each entry of the result depends on the entries in its place alone.

Operands have the shape of the result, or size 1 along some axes, or are scalars.
"""


def arrange(eqn: Any, axes: Sequence[Axis], new: Callable[[Any], Axis]) -> list[Axis] | None:
    """Follow the axes of an array through an equation of `ARRANGES`.

    Args:
        eqn: The equation.
        axes: What stands for each axis of its operand.
        new: Size to what stands for an axis along which entries are repeated.

    Returns:
        What stands for each axis of the result; `None` for a reshape, which merges or splits axes.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "transpose":
        return [axes[k] for k in params["permutation"]]
    if name == "squeeze":
        gone = {k % len(axes) for k in params["dimensions"]}
        return [axis for k, axis in enumerate(axes) if k not in gone]
    if name == "broadcast_in_dim":
        shape, source = eqn.outvars[0].aval.shape, eqn.invars[0].aval.shape
        kept = {t: k for k, t in enumerate(params["broadcast_dimensions"]) if source[k] == shape[t]}
        return [axes[kept[t]] if t in kept else new(n) for t, n in enumerate(shape)]
    return None
