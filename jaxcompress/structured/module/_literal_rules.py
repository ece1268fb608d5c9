"""What follows from one equation for means, norms and linear outputs: rules by primitive."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxcompress.graph.program import ARRANGES, CASTS, PLACES, Position, Rules

Kind: TypeAlias = Literal[
    "number", "leaf", "sum", "mean", "deviation", "root", "norm", "output", "dot"
]


@dataclass(frozen=True, kw_only=True)
class Tag:
    """What is known of a value: what it was made from, and over which width."""

    kind: Kind
    old: int = 0
    new: int = 0
    value: float = 0.0
    """Of a number; what was added to a mean; what was added to a leaf."""
    centred: bool = False
    leaves: frozenset[str] = frozenset()
    at: Position = ()
    added: tuple[Position, int] | None = None


ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv
}  # fmt: skip
Rule: TypeAlias = Callable[..., "Tag | None"]
RULES: Rules[Rule] = Rules()


def tag_of(literal: Any) -> Tag | None:
    value = np.asarray(literal.val)
    if value.ndim or not (jnp.issubdtype(value.dtype, jnp.number) and np.isrealobj(value)):
        return None
    return Tag(kind="number", value=float(value))


def sum_tag(x: Tag | None, sizes: Sequence[tuple[int, int]]) -> Tag | None:
    old, new = math.prod(a for a, _ in sizes), math.prod(b for _, b in sizes)
    if new == old:
        return None
    return Tag(kind="sum", old=old, new=new, centred=x is not None and x.kind == "deviation")


def contract_tags(x: Tag | None, y: Tag | None, sizes: Sequence[tuple[int, int]]) -> Tag | None:
    kinds = {tag.kind if tag else "" for tag in (x, y)}
    for tag in (x, y):
        if tag and tag.kind == "leaf" and kinds != {"leaf"}:
            return Tag(kind="output", leaves=tag.leaves)
    if x and y and kinds == {"output"} and not x.leaves & y.leaves:
        old, new = math.prod(a for a, _ in sizes), math.prod(b for _, b in sizes)
        return Tag(kind="dot", leaves=x.leaves, old=old, new=new)
    return None


def _follow_linear(operands: Sequence[Tag | None]) -> Tag | None:
    """Follow what is computed from one product by whatever keeps it linear, such as a rotation."""
    tags = [tag for tag in operands if tag is not None and tag.kind != "number"]
    same = {tag.leaves for tag in tags if tag.kind == "output"}
    if len(same) == 1 and all(tag.kind == "output" for tag in tags):
        return tags[0]
    return None


@RULES.register(*ARRANGES, *CASTS, *PLACES)
def _pass(eqn: Any, x: Tag | None, *rest: Any) -> Tag | None:
    return x


@RULES.register("add_any", "concatenate", "neg", "pad", "rev", "slice", "split")
def _rearrange(eqn: Any, *operands: Tag | None) -> Tag | None:
    return _follow_linear(operands)


@RULES.register("square", "integer_pow")
def _raise_integer(eqn: Any, x: Tag | None) -> Tag | None:
    power = eqn.params.get("y", 2)
    if x and x.kind == "number":
        return replace(x, value=x.value**power) if 1e-9 < abs(x.value) < 1e9 else None
    if x and power == -1 and x.kind == "root":
        return replace(x, kind="norm")
    return x if x and power == 2 and x.kind in ("deviation", "mean") else None


@RULES.register("sqrt", "rsqrt")
def _take_root(eqn: Any, x: Tag | None) -> Tag | None:
    inverse = eqn.primitive.name == "rsqrt"
    if x and x.kind == "number" and x.value > 0:
        return replace(x, value=x.value ** (-0.5 if inverse else 0.5))
    return replace(x, kind="norm" if inverse else "root") if x and x.kind == "mean" else None


@RULES.register("pow")
def _raise(eqn: Any, x: Tag | None, y: Tag | None) -> Tag | None:
    if x and y and x.kind == "mean" and y.kind == "number" and abs(y.value) == 0.5:
        return replace(x, kind="norm" if y.value < 0 else "root")
    return None


@RULES.register("div")
def _divide(eqn: Any, x: Tag | None, y: Tag | None) -> Tag | None:
    if x and y and x.kind == "sum" and y.kind == "number":
        return replace(x, kind="mean") if math.isclose(y.value, x.old, rel_tol=1e-3) else None
    if y and y.kind == "root":
        return replace(y, kind="norm")
    return _follow_linear([x]) if y is None or y.kind == "number" else None


@RULES.register("mul")
def _multiply(eqn: Any, x: Tag | None, y: Tag | None) -> Tag | None:
    kinds = {tag.kind: tag for tag in (x, y) if tag}
    if "sum" in kinds and "number" in kinds:
        near = math.isclose(kinds["number"].value * kinds["sum"].old, 1, rel_tol=1e-3)
        return replace(kinds["sum"], kind="mean") if near else None
    if "norm" in kinds:
        return kinds["norm"]
    if x is not None and x == y and x.kind in ("mean", "deviation"):  # a square
        return x
    return _follow_linear([x, y])


@RULES.register("add")
def _follow_sum(eqn: Any, x: Tag | None, y: Tag | None) -> Tag | None:
    kinds = {tag.kind: tag for tag in (x, y) if tag}
    number = kinds.get("number")
    for kind in ("mean", "leaf"):
        if number and kind in kinds:
            return replace(kinds[kind], value=kinds[kind].value + number.value)
    if "output" in kinds and "leaf" in kinds:  # a bias
        return replace(kinds["output"], leaves=kinds["output"].leaves | kinds["leaf"].leaves)
    return _follow_linear([x, y]) if x and y else None


@RULES.register("sub")
def _subtract(eqn: Any, x: Tag | None, y: Tag | None) -> Tag | None:
    if y and y.kind == "mean":
        return replace(y, kind="mean" if x and x.kind == "mean" else "deviation", centred=True)
    return _follow_linear([x, y]) if x and y else None


@RULES.register("select_n")
def _follow_cases(eqn: Any, which: Any, *cases: Tag | None) -> Tag | None:
    """Follow a mean that NaN stands in for where nothing was counted."""
    means = [tag for tag in cases if tag and tag.kind in ("mean", "sum")]
    others = [tag for tag in cases if tag not in means]
    return means[0] if means and all(tag and tag.kind == "number" for tag in others) else None


@RULES.register("max")
def _take_maximum(eqn: Any, x: Tag | None, y: Tag | None) -> Tag | None:
    return next((tag for tag in (x, y) if tag and tag.kind == "mean"), None)
