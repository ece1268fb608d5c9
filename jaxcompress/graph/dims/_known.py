"""What is known of values as a program is traced: small integers, and positions along axes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from jaxcompress.graph.dims._labels import Axis
from jaxcompress.graph.dims._rule import Axes
from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._constructs import Role

_SMALL = 1 << 16
_FOLDED = frozenset(
    {
        "add", "broadcast_in_dim", "clamp", "concatenate", "convert_element_type", "copy", "div",
        "eq", "ge", "gt", "iota", "le", "lt", "max", "min", "mul", "ne", "neg", "rem", "reshape",
        "select_n", "slice", "squeeze", "sub", "transpose", "and", "or", "not", "rev", "floor",
    }
)  # fmt: skip
_COMPARES = frozenset({"eq", "ge", "gt", "le", "lt", "ne", "eq_to", "le_to", "lt_to"})
_COUNTS = frozenset(
    {
        "add", "broadcast_in_dim", "clamp", "concatenate", "convert_element_type", "copy", "div",
        "dynamic_slice", "floor", "max", "min", "mul", "name", "neg", "rem", "reshape", "rev",
        "select_n", "sharding_constraint", "slice", "squeeze", "stop_gradient", "sub", "transpose",
    }
)  # fmt: skip
"""What turns positions into positions: moved, scaled, grouped."""


class Fact(NamedTuple):
    """What is known of a value before fn runs.

    Attributes:
        made: Whether it depends on nothing that fn is given.
        value: The value, where it is made of small integers.
        counts: The axes whose positions it counts, as an iota does.
    """

    made: bool = False
    value: np.ndarray | None = None
    counts: tuple[Axis, ...] = ()

    def through(self, role: Role) -> "Fact":
        """Say what is known of it across the border of a construct."""
        if role == "carry":
            return Fact()
        return self if role == "same" else self._replace(value=None)

    def or_else(self, other: "Fact") -> "Fact":
        """Say what is known of a value that is this one or another."""
        return Fact(made=self.made and other.made, counts=self.counts + other.counts)


Facts = dict[Any, Fact]
"""What is known of the variables of a program; nothing of those that are not in it."""


def is_small(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    if dtype is None or isinstance(value, Tracer):
        return isinstance(value, bool | int)
    integer = isinstance(dtype, np.dtype) and dtype.kind in "iub"
    return integer and math.prod(np.shape(value)) <= _SMALL


def fact_of_literal(atom: Any) -> Fact:
    value = np.asarray(atom.val)
    return Fact(made=True, value=value if is_small(value) else None)


def fact_of_constant(value: Any, axes: Axes) -> Fact:
    """Look at a constant of a program: does it count, as `np.arange` does?"""
    if isinstance(value, Tracer):
        return Fact()
    if not is_small(value):
        return Fact(made=True)
    value = np.asarray(value)
    steps = [np.diff(value, axis=k) for k in range(value.ndim) if value.dtype.kind != "b"]
    counts = tuple(
        a for a, step in zip(axes, steps, strict=False) if step.size and (step == 1).all()
    )
    return Fact(made=True, value=value, counts=counts)


def fact_after(eqn: Any, known: Sequence[Fact], results: Sequence[Axes]) -> Fact:
    """Say what is known of an equation's results."""
    name, counts = eqn.primitive.name, tuple(axis for fact in known for axis in fact.counts)
    made = all(fact.made for fact in known) and not eqn.effects
    if name == "iota":
        counts = (results[0][eqn.params["dimension"]],)
    elif name not in _COUNTS or not (made or _offsets(eqn)):
        counts = ()
    return Fact(made, _fold_constants(eqn, [fact.value for fact in known]), counts)


def _offsets(eqn: Any) -> bool:
    """Tell whether integers that count positions still do so, moved or with values added."""
    dtype = eqn.outvars[0].aval.dtype
    integer = isinstance(dtype, np.dtype) and dtype.kind in "iu"
    moves = len(eqn.invars) == 1 or eqn.primitive.name in ("add", "sub")
    return integer and moves


def list_compared(eqn: Any, known: Sequence[Fact]) -> tuple[Axis, ...]:
    """List the axes whose positions an equation compares with values that fn is given."""
    if eqn.primitive.name not in _COMPARES or all(fact.made for fact in known):
        return ()
    return tuple(axis for fact in known for axis in fact.counts)


def _fold_constants(eqn: Any, known: Sequence[np.ndarray | None]) -> np.ndarray | None:
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
