"""The walk that follows leaves to their sites and records every use of them."""

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax

from jaxcompress import tree
from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._compat import Program
from jaxcompress.graph.program._constructs import Role
from jaxcompress.graph.program._interpret import Domain, Frame, Place, Position, Walk, interpret
from jaxcompress.graph.program._primitives import MOVES, PASSES
from jaxcompress.graph.sites._graph import Contraction, Use
from jaxcompress.graph.sites._sites import Axes, Layout, Site, contraction_flops, site_rule, struct
from jaxcompress.graph.sites._views import View, elements, fit_view, view_rule


class Value(NamedTuple):
    """What the walk knows of a variable.

    Attributes:
        views: What it shows of leaves.
        varies: Whether it depends on fn's inputs.
        ident: Equal for variables that are known to hold the same array.
        after: The sites that it was computed from, as a set of bits: site n is bit n.
    """

    views: tuple[View, ...] = ()
    varies: bool = False
    ident: int = -1
    after: int = 0


class FoundSite(NamedTuple):
    """A site, the position of its equation, and its number in the walk."""

    position: Position
    site: Site
    number: int


@dataclass
class Record:
    """What a walk found, in order, with the position of each.

    Attributes:
        sites: The sites.
        uses: What consumes a leaf outside any site: `(position, path, use)`.
        elsewhere: Contractions without a leaf.
        opaque: The primitives that run jaxprs and are no constructs, with the scope of each.
        flops: Of each contraction, with the branches that it is in.
    """

    sites: list[FoundSite] = field(default_factory=list)
    uses: list[tuple[Position, str, Use]] = field(default_factory=list)
    elsewhere: list[tuple[Position, Contraction]] = field(default_factory=list)
    opaque: list[tuple[Position, tuple[str, ...]]] = field(default_factory=list)
    flops: list[tuple[Position, tuple[Any, ...], int]] = field(default_factory=list)

    def forget(self, position: Position) -> None:
        """Drop what was found in the body at a position."""
        outside = lambda entry: entry[0][: len(position)] != position
        for entries in vars(self).values():
            entries[:] = filter(outside, entries)


def costliest(parts: Iterable[tuple[tuple[Any, ...], float]]) -> float:
    """Add up numbers, of alternative branches only the largest.

    Args:
        parts: Pairs of `Place.branch` and a number.

    Returns:
        The sum.

    Example:
        >>> cond = (3,)
        >>> costliest([((), 10), (((cond, 0),), 5), (((cond, 1),), 7)])
        17
    """
    total: float = 0
    inside: dict[Any, dict[Any, list[Any]]] = {}
    for branch, number in parts:
        if not branch:
            total += number
        else:
            (position, alternative), *rest = branch
            inside.setdefault(position, {}).setdefault(alternative, []).append((rest, number))
    return total + sum(max(map(costliest, each.values())) for each in inside.values())


class Sites(Domain[Value]):
    """Follows leaves, and records where they go; `leaves` give the bytes of weights."""

    def __init__(self, leaves: dict[str, Any]):
        self._leaves, self._record = leaves, Record()
        self._bytes = {path: tree.nbytes({"": leaf}) for path, leaf in leaves.items()}
        self._idents, self._numbers = itertools.count(), itertools.count()
        self._reached: dict[int, int] = {}  # all sites before each site, as bits
        self._known: dict[Any, int] = {}  # one ident per pure equation on the same operands

    def walk(self, program: Program, args: Sequence[Value]) -> tuple[Record, Walk[Value]]:
        """Walk a program; of the same walker several, as one goes on from another's values."""
        self._record = Record()
        walk = interpret(program, args, self)
        return self._record, walk

    def fresh(self) -> int:
        return next(self._idents)

    def constant(self, var: Any, value: Any, place: Place) -> Value:
        return Value(ident=self.fresh())

    def literal(self, atom: Any) -> Value:
        return Value(ident=self.fresh())

    def equation(
        self, eqn: Any, operands: Sequence[Value], here: Position, place: Place
    ) -> Sequence[Value]:
        if eqn.primitive.name in PASSES:
            return operands
        if _compat.subjaxprs(eqn):
            self._record.opaque.append((here, (*place.scope, eqn.primitive.name)))
        if not any(value.views for value in operands):
            self._count_elsewhere(eqn, here, place)
            return self._results(eqn, operands)
        at_site, after = self._sites(eqn, operands, here, place)
        if any(at_site):
            for value, done in zip(operands, at_site, strict=True):
                self._use(eqn, () if done else value.views, here, place)
            return [value._replace(after=after) for value in self._results(eqn, operands)]
        if contraction_flops(eqn):
            self._count_elsewhere(eqn, here, place)
        results = self._results(eqn, operands)
        followed = self._follow(eqn, operands, here, place)
        return [x._replace(views=views) for x, views in zip(results, followed, strict=True)]

    def _results(self, eqn: Any, operands: Sequence[Value]) -> list[Value]:
        name = eqn.primitive.name
        varies, after = any(value.varies for value in operands), _union(operands)
        if name not in MOVES:  # cheap, and written anew by each layer that reads it
            return [Value((), varies, self.fresh(), after) for _ in eqn.outvars]
        key = (name, operands[0].ident, tuple(eqn.params.values()))
        return [Value((), varies, self._known.setdefault(key, self.fresh()), after)]

    # --- leaves at an equation -----------------------------------------------------------------

    def _sites(
        self, eqn: Any, operands: Sequence[Value], here: Position, place: Place
    ) -> tuple[list[bool], int]:
        """Record the sites of an equation.

        Returns:
            Which operands are weights at one, and the sites that the result comes after.
        """
        rule = site_rule(eqn.primitive.name)
        found, before = [False] * len(operands), _union(operands)
        after, flops = before, 0
        if rule is None:
            return found, after
        varies = [value.varies for value in operands]
        layouts = [
            (k, view, layout)
            for k, value in enumerate(operands)
            for view in value.views
            if (layout := rule(eqn, k, view, varies)) is not None
        ]
        # Leaves that are contracted together share the operations, by their entries.
        sizes = [max(elements(self._leaves[view.path].shape), 1) for _, view, _ in layouts]
        for (k, view, layout), size in zip(layouts, sizes, strict=True):
            found[k] = True
            flops = max(flops, layout.flops)
            mine = next(self._numbers)
            self._reached[mine] = before
            after |= 1 << mine
            site = self._site(eqn, k, operands, view, layout, place)
            site = replace(site, flops=site.flops * size // sum(sizes))
            self._record.sites.append(FoundSite(here, site, mine))
        self._record.flops.append((here, place.branch, flops * place.repeats))
        return found, after

    def upstream(self, number: int) -> list[int]:
        """List the sites before a site with no other site between, in order."""
        left, parents = self._reached[number], []
        while left:
            last = left.bit_length() - 1
            parents.append(last)
            left &= ~(self._reached[last] | 1 << last)
        return parents[::-1]

    def _site(
        self, eqn: Any, k: int, operands: Sequence[Value], view: View, layout: Layout, place: Place
    ) -> Site:
        other = layout.activation
        weight, output = struct(eqn.invars[k]), struct(eqn.outvars[0])
        activation = struct(eqn.invars[other])
        shape, axes = self._leaves[view.path].shape, replace(layout.axes, stacked=view.stacked)
        size = elements(shape)
        layers = {depth: axis for axis, depth in view.layers}
        moved = _nbytes(activation) + _nbytes(output)
        if axes.lookup:  # only the rows that are picked are read
            moved += _nbytes(output)
        else:
            moved += self._bytes[view.path] * min(elements(weight.shape), size) // max(size, 1)
        return Site(
            name=view.path,
            path=view.path,
            primitive=eqn.primitive.name,
            operand=k,
            axes=replace(axes, sliced=_unseen(axes, shape)),
            activation=activation,
            weight=weight,
            output=output,
            source=operands[other].ident,
            upstream=(),
            beside=(),
            stack=place.stack,
            layers=tuple(layers.get(k) for k in range(len(place.stack))),
            repeats=place.repeats,
            bounded=place.bounded,
            scope=place.scope,
            through=view.through,
            aligned=_runs_in_order(view, axes, shape),
            flops=layout.flops * place.repeats,
            bytes=moved * place.repeats,
            feature_groups=layout.feature_groups,
            layout=layout,
        )

    def _follow(
        self, eqn: Any, operands: Sequence[Value], here: Position, place: Place
    ) -> list[tuple[View, ...]]:
        """Follow leaves into an equation's results; where that ends, record the use."""
        rule = view_rule(eqn.primitive.name)
        if rule is None or any(value.varies for value in operands):
            for value in operands:
                self._use(eqn, value.views, here, place)
            return [()] * len(eqn.outvars)
        kept: list[dict[tuple[str, str], View]] = [{} for _ in eqn.outvars]
        for views in itertools.product(*[value.views or (None,) for value in operands]):
            for k, results in enumerate(kept):
                for view in rule(eqn, views, k):
                    # One number of a leaf, its norm, is a use: no site can contract it.
                    if view is not None and view.leaf_axes(range(len(view.axes))):
                        results[view.path, str(view.axes)] = view
        # A leaf that goes on by way of another operand is not lost: a scale, a mask of its own.
        followed = {path for results in kept for path, _ in results}
        lost = [v for value in operands for v in value.views if v.path not in followed]
        self._use(eqn, lost, here, place)
        return [_widest(results.values()) for results in kept]

    def _use(self, eqn: Any, views: Sequence[View], position: Position, place: Place) -> None:
        use = Use(primitive=eqn.primitive.name, scope=place.scope, repeats=place.repeats)
        self._record.uses += [(position, view.path, use) for view in views]

    def _count_elsewhere(self, eqn: Any, here: Position, place: Place) -> None:
        flops = contraction_flops(eqn)
        if not flops:
            return
        operands, output = tuple(map(struct, eqn.invars)), struct(eqn.outvars[0])
        found = Contraction(
            primitive=eqn.primitive.name,
            operands=operands,
            output=output,
            repeats=place.repeats,
            bounded=place.bounded,
            scope=place.scope,
            flops=flops * place.repeats,
            bytes=sum(map(_nbytes, (*operands, output))) * place.repeats,
        )
        self._record.flops.append((here, place.branch, found.flops))
        self._record.elsewhere.append((here, found))

    # --- constructs ----------------------------------------------------------------------------

    def feed(self, value: Value, k: int, role: Role, frame: Frame[Value]) -> Value:
        aval = frame.body.program.invars[k].aval
        if role == "same":
            return value._replace(views=_fit_views(value.views, aval))
        if role == "carry":
            return value._replace(ident=self.fresh())
        depth = len(frame.place.stack) - 1
        views = tuple(
            replace(
                view,
                axes=view.axes[1:],
                stacked=tuple(sorted({*view.stacked, *view.leaf_axes([0])})),
                layers=(*view.layers, *self._layers(view, depth)),
            )
            for view in value.views
        )
        return value._replace(views=views, ident=self.fresh())

    def _layers(self, view: View, depth: int) -> list[tuple[int, int]]:
        match view.axes[0]:
            case (factor,) if factor.exact and len(factor.axes) == 1:
                (axis,) = factor.axes
                whole = factor.size == self._leaves[view.path].shape[axis]
                return [(axis, depth)] if whole else []
        return []

    def carry(self, before: Value, after: Value, frame: Frame[Value]) -> Value:
        views = before.views if before.views == after.views else ()
        varies = before.varies or after.varies
        if (views, varies) == (before.views, before.varies):
            return before
        return before._replace(views=views, varies=varies)

    def again(self, frame: Frame[Value]) -> None:
        self._record.forget(frame.place.position)

    def leave(self, frame: Frame[Value]) -> None:
        for i, _ in frame.carries:
            if not frame.args[i].views:
                views = frame.operands[frame.body.inputs[i][0]].views
                self._use(frame.eqn, views, frame.place.position, frame.place)

    def give(self, value: Value, k: int, role: Role, frame: Frame[Value]) -> Value:
        if role != "same" and (operand := self._handed_back(value, k, role, frame)) is not None:
            return frame.operands[operand]
        if role == "slice":  # stacked anew: not followed
            self._use(frame.eqn, value.views, frame.place.position, frame.place)
            value = value._replace(views=())
        if role != "same":
            value = value._replace(ident=self.fresh())
        target = frame.body.results[k][0]
        assert target is not None
        value = value._replace(views=_fit_views(value.views, frame.eqn.outvars[target].aval))
        return _chosen(value, frame)

    def _handed_back(self, value: Value, k: int, role: Role, frame: Frame[Value]) -> int | None:
        """Find the operand that a result of a loop is: carried round or stacked as it came."""
        same = {j: i for i, j in frame.carries}
        for i, (arg, (operand, mine)) in enumerate(zip(frame.args, frame.body.inputs, strict=True)):
            if arg.ident == value.ident and mine == role:
                return operand if role == "slice" or same.get(k) == i else None
        return None

    def join(self, earlier: Value, later: Value, frame: Frame[Value]) -> Value:
        """Branches must agree on what they show."""
        agree = earlier.views == later.views
        if not agree:
            views = (*earlier.views, *later.views)
            self._use(frame.eqn, views, frame.place.position, frame.place)
        value = Value(
            earlier.views if agree else (),
            earlier.varies or later.varies,
            earlier.ident if earlier.ident == later.ident else self.fresh(),
            earlier.after | later.after,
        )
        return _chosen(value, frame)


def _chosen(value: Value, frame: Frame[Value]) -> Value:
    """Have a value vary that is one of several, chosen by what varies, unless it shows a leaf."""
    chosen = frame.body.branch and frame.operands[0].varies
    return value._replace(varies=value.varies or (chosen and not value.views))


def _unseen(axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
    """List the axes of a leaf that have no role at a site: it sees one index of them."""
    named = {k for role in vars(axes).values() for k in role}
    return tuple(k for k, n in enumerate(shape) if n > 1 and k not in named)


def _runs_in_order(view: View, axes: Axes, shape: Sequence[int]) -> bool:
    """Tell whether a view runs through the leaf axes that the site sees, in order and whole."""
    factors = [factor for axis in view.axes for factor in axis]
    if any(not factor.axes and factor.size > 1 for factor in factors):
        return False  # copies of the leaf, or other leaves beside it
    for k in (*axes.contract, *axes.spatial, *axes.output, *axes.batch, *axes.lookup):
        mine = [factor for factor in factors if k in factor.axes]
        whole = math.prod(factor.size for factor in mine) == shape[k]
        if not whole or not all(factor.exact and len(factor.axes) == 1 for factor in mine):
            return False
    return True


def _union(values: Sequence[Value]) -> int:
    return functools.reduce(operator.or_, (value.after for value in values), 0)


def _fit_views(views: Sequence[View], aval: Any) -> tuple[View, ...]:
    """Cut views to the size of a variable: inside a `shard_map` it is a shard."""
    return tuple(fit_view(view, aval.shape) for view in views)


def _widest(views: Iterable[View]) -> tuple[View, ...]:
    """Keep, of several views of one leaf, those that show the most of its axes."""
    shown = [(view, len(view.leaf_axes(range(len(view.axes))))) for view in views]
    best: dict[str, int] = {}
    for view, count in shown:
        best[view.path] = max(count, best.get(view.path, 0))
    return tuple(view for view, count in shown if count == best[view.path])


def _nbytes(like: jax.ShapeDtypeStruct) -> int:
    if not hasattr(like.dtype, "itemsize"):
        return 0
    return -(-elements(like.shape) * tree.bits_of(like.dtype) // 8)
