"""Widths that a function has as numbers: where they divide, and which leaves can make up for it.

A smaller function from `rebuild` still divides by the widths of the larger one. The same model
built at the new widths divides by those, so that leaves nearby must be scaled to agree with it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from typing import Literal as Choice

import jax.numpy as jnp
import numpy as np

from jaxcompress import graph, tree
from jaxcompress.graph import Equation
from jaxcompress.graph.dims import Removed, removed_by
from jaxcompress.graph.program import (
    Domain,
    Frame,
    Literal,
    Place,
    Plan,
    Position,
    Role,
    interpret,
    never,
)
from jaxcompress.graph.sites import capture_call, execute_plan
from jaxcompress.structured.module._literal_rules import (
    ARITHMETIC,
    RULES,
    Tag,
    contract_tags,
    sum_tag,
    tag_of,
)


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

    kind: Choice["norm", "attention"]
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
    return (*reader.found, *reader.list_bare())


def set_epsilons(fn: Callable[..., Any], literals: Sequence[WidthLiteral]) -> Callable[..., Any]:
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
        traced = capture_call(fn, params, inputs, {})
        plan = Plan({at: functools.partial(visit, at) for at in wanted}, {}, never)
        return execute_plan(traced, plan, (params, inputs, {}), {})[0]

    return run


class _Reader(Domain[Tag | None]):
    """Follows sums over axes that shrink through a program."""

    def __init__(self, dims: graph.Dims, removed: Removed):
        self._dims, self._removed = dims, removed
        self._norms: dict[Position, Tag] = {}
        self._met: set[Position] = set()
        self.found: list[WidthLiteral] = []

    def run(self) -> None:
        program, _ = self._dims.programs[()]
        traced = self._dims.traced
        args: list[Tag | None] = [
            None
            if isinstance(traced.leaves[path], tree.LeafNode)
            else Tag(kind="leaf", leaves=frozenset([path]))
            for path in traced.part_paths
        ]
        args += [None] * (len(program.invars) - len(args))
        interpret(program, args, self)

    def list_bare(self) -> list[WidthLiteral]:
        """List the norms that no leaf scales."""
        return [_describe_norm(tag) for at, tag in self._norms.items() if at not in self._met]

    def constant(self, var: Any, value: Any, place: Place) -> None:
        return None

    def literal(self, atom: Any) -> Tag | None:
        return tag_of(atom)

    def equation(
        self, eqn: Any, operands: Sequence[Tag | None], here: Position, place: Place
    ) -> list[Tag | None]:
        _, labels = self._dims.programs[place.position]
        axes = [() if isinstance(a, Literal) else labels[a] for a in eqn.invars]
        widths = [self._widths(each) for each in axes]
        return [self._follow(eqn, here, operands, widths)] * len(eqn.outvars)

    def enters(self, eqn: Any, operands: Sequence[Tag | None], here: Position) -> bool:
        return here not in self._dims.dead

    def feed(self, value: Tag | None, k: int, role: Role, frame: Frame[Tag | None]) -> Tag | None:
        return None if role == "carry" else value

    def give(self, value: Tag | None, k: int, role: Role, frame: Frame[Tag | None]) -> Tag | None:
        return None if role == "carry" or frame.body.branch else value

    def _widths(self, axes: Sequence[Any]) -> list[tuple[int, int]]:
        """Give the size of each axis, before and after."""
        masks = self._removed.masks(tuple(axes))
        return [
            (len(axis), len(axis) if mask is None else int(np.atleast_2d(mask)[0].sum()))
            for axis, mask in zip(axes, masks, strict=True)
        ]

    def _follow(
        self,
        eqn: Any,
        here: Position,
        operands: Sequence[Tag | None],
        widths: Sequence[Sequence[tuple[int, int]]],
    ) -> Tag | None:
        name = eqn.primitive.name
        if name == "reduce_sum":
            return sum_tag(operands[0], [widths[0][k] for k in eqn.params["axes"]])
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            return contract_tags(operands[0], operands[1], [widths[0][k] for k in contract])
        if name in ARITHMETIC and all(x and x.kind == "number" for x in operands):
            a, b = (x.value for x in operands if x)
            known = name != "div" or b != 0
            return Tag(kind="number", value=ARITHMETIC[name](a, b)) if known else None
        if name in ("mul", "div"):
            self._record_scores(name, operands, widths)
        rule = RULES.get(name)
        tag = rule(eqn, *operands) if rule is not None else None
        if name == "add" and tag is not None and tag.kind == "mean":
            side = next(k for k, x in enumerate(operands) if x and x.kind == "number")
            tag = replace(tag, added=(here, side))
        if tag is not None and tag.kind == "norm" and not tag.at:
            tag = self._norms[here] = replace(tag, at=here)
        if name == "mul":
            self._record_scale(operands)
            if {x.kind for x in operands if x} == {"norm", "leaf"}:
                return None
        return tag

    def _record_scale(self, operands: Sequence[Tag | None]) -> None:
        """Record a norm that is multiplied by a leaf: its scale."""
        norm = next((x for x in operands if x and x.kind == "norm"), None)
        leaf = next((x for x in operands if x and x.kind == "leaf"), None)
        if norm and leaf:
            self._met.add(norm.at)
            self.found.append(_describe_norm(norm, tuple(leaf.leaves), leaf.value))

    def _record_scores(
        self,
        name: str,
        operands: Sequence[Tag | None],
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


def _describe_norm(norm: Tag, leaves: tuple[str, ...] = (), offset: float = 0.0) -> WidthLiteral:
    return WidthLiteral(kind="norm", leaves=leaves, old=norm.old, new=norm.new, epsilon=norm.value,
                        added=norm.added, offset=offset, centred=norm.centred)  # fmt: skip
