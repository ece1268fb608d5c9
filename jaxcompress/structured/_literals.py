"""Widths that a function has as numbers: where they divide, and which leaves can make up for it.

A smaller function from `rebuild` still divides by the widths of the larger one. The same model
built at the new widths divides by those, so that leaves nearby must be scaled to agree with it.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import graph, tree
from jaxcompress.graph import _compat
from jaxcompress.graph._constructs import construct
from jaxcompress.graph._replay import Equation, Plan, execute
from jaxcompress.graph._resize import Removed, removed_by
from jaxcompress.graph._trace import capture
from jaxcompress.graph._walk import Position

Kind: TypeAlias = Literal[
    "number", "leaf", "sum", "mean", "deviation", "root", "norm", "output", "dot"
]


@dataclass(frozen=True, kw_only=True)
class WidthLiteral:
    """A place that divides by a width, or by its root.

    Attributes:
        kind: `"norm"`: by the root of a mean over an axis that shrinks. `"attention"`: scores, by
            the root of the size of heads.
        leaves: What can be scaled instead: a norm's scale, the weights of queries. May be empty.
        old: The width in fn.
        new: The width at the new size.
        epsilon: What a norm adds to its mean.
        added: Where it does: the address of the addition, and which operand epsilon is.
        offset: What is added to a norm's scale before it multiplies.
        centred: Whether the norm subtracts a mean, for which nothing can make up exactly.
    """

    kind: Literal["norm", "attention"]
    leaves: tuple[str, ...]
    old: int
    new: int
    epsilon: float = 0.0
    added: tuple[Position, int] | None = None
    offset: float = 0.0
    centred: bool = False

    @property
    def factor(self) -> float:
        """What leaves are to be multiplied by."""
        ratio = self.old / self.new
        return math.sqrt(ratio if self.kind == "norm" else 1 / ratio)

    @property
    def wanted_epsilon(self) -> float:
        """What a norm over the new width should add."""
        return self.epsilon * self.old / self.new


@dataclass(frozen=True, kw_only=True)
class _Tag:
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


def width_literals(dims: graph.Dims, keep: graph.KeepIndices) -> tuple[WidthLiteral, ...]:
    """Find where a function divides by widths that `keep` changes.

    Found are root mean squares and standard deviations over an axis that shrinks, as
    `rsqrt(mean + eps)`, `x / sqrt(mean + eps)` or a power of -1/2; and queries or scores divided by
    the root of their heads' size. Other numbers are not looked for.

    Args:
        dims: The labels of the function at full size.
        keep: `{path: {axis: indices to keep}}`.

    Returns:
        The places, in the order in which they run.
    """
    reader = _Reader(dims, removed_by(dims, keep))
    reader.run()
    return (*reader.found, *reader.bare())


def with_epsilons(fn: Callable[..., Any], literals: Sequence[WidthLiteral]) -> Callable[..., Any]:
    """Make fn add the wanted epsilons; it must be built like the function they were found in.

    Args:
        fn: `fn(params, *inputs) -> outputs`.
        literals: Norms.

    Returns:
        A function of the same arguments. It is not for differentiation.
    """
    wanted = {x.added[0]: (x.added[1], x.wanted_epsilon) for x in literals if x.added}

    def visit(at: Position, equation: Equation, operands: Sequence[Any], cells: Any) -> Any:
        side, epsilon = wanted[at]
        operands = list(operands)
        if equation.primitive.name == "add":
            operands[side] = jnp.full_like(operands[side], epsilon)
        return [equation.bind(*operands)], {}

    def run(params: Any, *inputs: Any) -> Any:
        traced = capture(fn, params, inputs, {})
        plan = Plan({at: functools.partial(visit, at) for at in wanted}, {}, _never)
        return execute(traced, plan, (params, inputs, {}), {})[0]

    return run


def _never(position: Position, program: Any) -> Plan:
    raise AssertionError("what is compared is not differentiated")


class _Reader:
    """One pass over a program that follows sums over axes that shrink."""

    def __init__(self, dims: graph.Dims, removed: Removed):
        self._dims, self._removed = dims, removed
        self._norms: dict[Position, _Tag] = {}
        self._met: set[Position] = set()
        self.found: list[WidthLiteral] = []

    def run(self) -> None:
        program, _ = self._dims.programs[()]
        args: list[_Tag | None] = []
        for path, leaf in self._dims.traced.leaves.items():
            if isinstance(leaf, tree.LeafNode):
                args += [None] * len(jax.tree.leaves(leaf))
            else:
                args.append(_Tag(kind="leaf", leaves=frozenset([path])))
        args += [None] * (len(program.invars) - len(args))
        self._walk((), args)

    def bare(self) -> list[WidthLiteral]:
        """List the norms that no leaf scales."""
        return [
            WidthLiteral(kind="norm", leaves=(), old=tag.old, new=tag.new, epsilon=tag.value,
                         added=tag.added, centred=tag.centred)
            for at, tag in self._norms.items() if at not in self._met
        ]  # fmt: skip

    def _walk(self, prefix: Position, args: Sequence[_Tag | None]) -> list[_Tag | None]:
        program, labels = self._dims.programs[prefix]
        tags: dict[Any, _Tag | None] = dict(zip(program.invars, args, strict=True))
        for number, eqn in enumerate(program.eqns):
            operands = [_read(atom, tags) for atom in eqn.invars]
            here = (*prefix, number)
            rule = construct(eqn.primitive.name)
            if rule is not None:
                results = self._construct(eqn, here, rule.bodies(eqn), operands)
            else:
                axes = [None if _is_literal(a) else labels[a] for a in eqn.invars]
                widths = [[] if a is None else self._widths(a) for a in axes]
                results = [self._follow(eqn, here, operands, widths)] * len(eqn.outvars)
            tags.update(zip(eqn.outvars, results, strict=True))
        return [_read(atom, tags) for atom in program.outvars]

    def _widths(self, axes: Sequence[Any]) -> list[tuple[int, int]]:
        """Give the size of each axis, before and after."""
        masks = self._removed.masks(tuple(axes))
        return [
            (len(axis), len(axis) if mask is None else int(np.atleast_2d(mask)[0].sum()))
            for axis, mask in zip(axes, masks, strict=True)
        ]

    def _construct(
        self, eqn: Any, here: Position, bodies: Sequence[Any], operands: Sequence[_Tag | None]
    ) -> list[_Tag | None]:
        results: list[_Tag | None] = [None] * len(eqn.outvars)
        for number, body in enumerate(bodies):
            args = [None if role == "carry" else operands[k] for k, role in body.inputs]
            outs = self._walk((*here, number), args)
            for (target, role), tag in zip(body.results, outs, strict=True):
                if target is not None and role != "carry" and len(bodies) == 1:
                    results[target] = tag
        return results

    def _follow(
        self,
        eqn: Any,
        here: Position,
        operands: Sequence[_Tag | None],
        widths: Sequence[Sequence[tuple[int, int]]],
    ) -> _Tag | None:
        name = eqn.primitive.name
        if name == "reduce_sum":
            return _summed(operands[0], [widths[0][k] for k in eqn.params["axes"]])
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            return _contracted(*operands, [widths[0][k] for k in contract])
        if name in _ARITHMETIC and all(x and x.kind == "number" for x in operands):
            a, b = (x.value for x in operands if x)
            known = name != "div" or b != 0
            return _Tag(kind="number", value=_ARITHMETIC[name](a, b)) if known else None
        if name in ("mul", "div"):
            self._scores(name, operands, widths)
        tag = _RULES[name](eqn, *operands) if name in _RULES else None
        if name == "add" and tag is not None and tag.kind == "mean":
            side = next(k for k, x in enumerate(operands) if x and x.kind == "number")
            tag = replace(tag, added=(here, side))
        if tag is not None and tag.kind == "norm" and not tag.at:
            tag = self._norms[here] = replace(tag, at=here)
        if name == "mul":
            self._scaled(operands)
            if {x.kind for x in operands if x} == {"norm", "leaf"}:
                return None
        return tag

    def _scaled(self, operands: Sequence[_Tag | None]) -> None:
        """Record a norm that is multiplied by a leaf: its scale."""
        norm = next((x for x in operands if x and x.kind == "norm"), None)
        leaf = next((x for x in operands if x and x.kind == "leaf"), None)
        if norm and leaf:
            self._met.add(norm.at)
            self.found.append(
                WidthLiteral(kind="norm", leaves=tuple(leaf.leaves), old=norm.old, new=norm.new,
                             epsilon=norm.value, added=norm.added, offset=leaf.value,
                             centred=norm.centred)
            )  # fmt: skip

    def _scores(
        self,
        name: str,
        operands: Sequence[_Tag | None],
        widths: Sequence[Sequence[tuple[int, int]]],
    ) -> None:
        """Record queries or scores that are divided by the root of a width that shrinks."""
        for k in (0, 1) if name == "mul" else (0,):
            x, number = operands[k], operands[1 - k]
            if not (x and number and number.kind == "number" and number.value > 0):
                continue
            sizes = {"dot": [(x.old, x.new)], "output": widths[k]}.get(x.kind, [])
            root = number.value if name == "div" else 1 / number.value
            for old, new in sizes:
                if new < old and math.isclose(root, math.sqrt(old), rel_tol=1e-3):
                    leaves = tuple(sorted(x.leaves))
                    self.found.append(
                        WidthLiteral(kind="attention", leaves=leaves, old=old, new=new)
                    )


# --- Rules --------------------------------------------------------------------------------------

_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv
}  # fmt: skip
_Rule: TypeAlias = Callable[..., "_Tag | None"]
_RULES: dict[str, _Rule] = {}


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _is_literal(atom: Any) -> bool:
    return isinstance(atom, _compat.Literal)


def _read(atom: Any, tags: dict[Any, _Tag | None]) -> _Tag | None:
    if not _is_literal(atom):
        return tags.get(atom)
    value = np.asarray(atom.val)
    if value.ndim or value.dtype.kind in "VOb":
        return None
    return _Tag(kind="number", value=float(value.real))


def _summed(x: _Tag | None, sizes: Sequence[tuple[int, int]]) -> _Tag | None:
    old, new = math.prod(a for a, _ in sizes), math.prod(b for _, b in sizes)
    if new == old:
        return None
    return _Tag(kind="sum", old=old, new=new, centred=x is not None and x.kind == "deviation")


def _contracted(x: _Tag | None, y: _Tag | None, sizes: Sequence[tuple[int, int]]) -> _Tag | None:
    kinds = {tag.kind if tag else "" for tag in (x, y)}
    for tag in (x, y):
        if tag and tag.kind == "leaf" and kinds != {"leaf"}:
            return _Tag(kind="output", leaves=tag.leaves)
    if x and y and kinds == {"output"} and not x.leaves & y.leaves:
        old, new = math.prod(a for a, _ in sizes), math.prod(b for _, b in sizes)
        return _Tag(kind="dot", leaves=x.leaves, old=old, new=new)
    return None


def _linear(operands: Sequence[_Tag | None]) -> _Tag | None:
    """Follow what is computed from one product by whatever keeps it linear, such as a rotation."""
    tags = [tag for tag in operands if tag is not None and tag.kind != "number"]
    same = {tag.leaves for tag in tags if tag.kind == "output"}
    if len(same) == 1 and all(tag.kind == "output" for tag in tags):
        return tags[0]
    return None


@_rule(
    "broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reduce_precision",
    "reshape", "reshard", "sharding_constraint", "squeeze", "transpose", "name",
)  # fmt: skip
def _passed(eqn: Any, x: _Tag | None, *rest: Any) -> _Tag | None:
    return x


@_rule("add_any", "concatenate", "neg", "pad", "rev", "slice", "split")
def _rearranged(eqn: Any, *operands: _Tag | None) -> _Tag | None:
    return _linear(operands)


@_rule("square", "integer_pow")
def _power(eqn: Any, x: _Tag | None) -> _Tag | None:
    power = eqn.params.get("y", 2)
    if x and x.kind == "number":
        return replace(x, value=x.value**power)
    if x and power == -1 and x.kind == "root":
        return replace(x, kind="norm")
    return x if x and power == 2 and x.kind in ("deviation", "mean") else None


@_rule("sqrt", "rsqrt")
def _rooted(eqn: Any, x: _Tag | None) -> _Tag | None:
    inverse = eqn.primitive.name == "rsqrt"
    if x and x.kind == "number" and x.value > 0:
        return replace(x, value=x.value ** (-0.5 if inverse else 0.5))
    return replace(x, kind="norm" if inverse else "root") if x and x.kind == "mean" else None


@_rule("pow")
def _raised(eqn: Any, x: _Tag | None, y: _Tag | None) -> _Tag | None:
    if x and y and x.kind == "mean" and y.kind == "number" and abs(y.value) == 0.5:
        return replace(x, kind="norm" if y.value < 0 else "root")
    return None


@_rule("div")
def _divided(eqn: Any, x: _Tag | None, y: _Tag | None) -> _Tag | None:
    if x and y and x.kind == "sum" and y.kind == "number":
        return replace(x, kind="mean") if math.isclose(y.value, x.old, rel_tol=1e-3) else None
    if y and y.kind == "root":
        return replace(y, kind="norm")
    return _linear([x]) if y is None or y.kind == "number" else None


@_rule("mul")
def _multiplied(eqn: Any, x: _Tag | None, y: _Tag | None) -> _Tag | None:
    kinds = {tag.kind: tag for tag in (x, y) if tag}
    if "sum" in kinds and "number" in kinds:
        near = math.isclose(kinds["number"].value * kinds["sum"].old, 1, rel_tol=1e-3)
        return replace(kinds["sum"], kind="mean") if near else None
    if "norm" in kinds:
        return kinds["norm"]
    if x is not None and x == y and x.kind in ("mean", "deviation"):  # a square
        return x
    return _linear([x, y])


@_rule("add")
def _added(eqn: Any, x: _Tag | None, y: _Tag | None) -> _Tag | None:
    kinds = {tag.kind: tag for tag in (x, y) if tag}
    number = kinds.get("number")
    for kind in ("mean", "leaf"):
        if number and kind in kinds:
            return replace(kinds[kind], value=kinds[kind].value + number.value)
    if "output" in kinds and "leaf" in kinds:  # a bias
        return replace(kinds["output"], leaves=kinds["output"].leaves | kinds["leaf"].leaves)
    return _linear([x, y]) if x and y else None


@_rule("sub")
def _subtracted(eqn: Any, x: _Tag | None, y: _Tag | None) -> _Tag | None:
    if y and y.kind == "mean":
        return replace(y, kind="mean" if x and x.kind == "mean" else "deviation", centred=True)
    return _linear([x, y]) if x and y else None


@_rule("select_n")
def _selected(eqn: Any, which: Any, *cases: _Tag | None) -> _Tag | None:
    """Follow a mean that NaN stands in for where nothing was counted."""
    means = [tag for tag in cases if tag and tag.kind in ("mean", "sum")]
    others = [tag for tag in cases if tag not in means]
    return means[0] if means and all(tag and tag.kind == "number" for tag in others) else None


@_rule("max")
def _at_least(eqn: Any, x: _Tag | None, y: _Tag | None) -> _Tag | None:
    return next((tag for tag in (x, y) if tag and tag.kind == "mean"), None)
