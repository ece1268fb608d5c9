"""Small integers that are known as a program is traced, such as the indices of a lookup."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxcompress.graph import _compat

_SMALL = 1 << 16
_FOLDED = frozenset(
    {
        "add", "broadcast_in_dim", "clamp", "concatenate", "convert_element_type", "copy", "div",
        "eq", "ge", "gt", "iota", "le", "lt", "max", "min", "mul", "ne", "neg", "rem", "reshape",
        "select_n", "slice", "squeeze", "sub", "transpose", "and", "or", "not", "rev", "floor",
    }
)  # fmt: skip


def is_small(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    if dtype is None or isinstance(value, Tracer):
        return isinstance(value, bool | int)
    integer = isinstance(dtype, np.dtype) and dtype.kind in "iub"
    return integer and math.prod(np.shape(value)) <= _SMALL


def value_of(atom: Any, values: Mapping[Any, np.ndarray]) -> np.ndarray | None:
    if isinstance(atom, _compat.Literal):
        return np.asarray(atom.val) if is_small(np.asarray(atom.val)) else None
    return values.get(atom)


def folded(eqn: Any, known: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Evaluate an equation on small integers that are known."""
    if eqn.primitive.name not in _FOLDED or any(value is None for value in known):
        return None
    out = eqn.outvars[0].aval
    small = all(isinstance(n, int) for n in out.shape) and math.prod(out.shape) <= _SMALL
    integer = isinstance(out.dtype, np.dtype) and out.dtype.kind in "iub"
    if not small or not integer:
        return None
    with jax.ensure_compile_time_eval():
        return np.asarray(_compat.bind(eqn, [jax.numpy.asarray(value) for value in known])[0])
