"""The walk over a jaxpr that follows leaves to their sites and records every use of them."""

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import jax

from jaxcompress import tree
from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._compat import Program
from jaxcompress.graph.program._constructs import Body, construct
from jaxcompress.graph.sites._graph import Contraction, Use
from jaxcompress.graph.sites._sites import Axes, Layout, Site, contraction_flops, site_rule, struct
from jaxcompress.graph.sites._views import MOVES, View, elements, fitted, view_rule

Position: TypeAlias = tuple[int, ...]
"""An equation's address: equation and body numbers in turn, from the outermost jaxpr in."""


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


class Found(NamedTuple):
    """A site, the position of its equation, and its number in the walk."""

    position: Position
    site: Site
    number: int


@dataclass(frozen=True)
class Place:
    """Where in the nest of constructs the walk is; the attributes are those of `Site`."""

    position: Position = ()
    scope: tuple[str, ...] = ()
    stack: tuple[int, ...] = ()
    repeats: int = 1
    bounded: bool = True

    def inside(self, eqn_number: int, body_number: int, body: Body) -> "Place":
        return Place(
            position=(*self.position, eqn_number, body_number),
            scope=(*self.scope, body.label),
            stack=(*self.stack, *body.stack),
            repeats=self.repeats * body.repeats,
            bounded=self.bounded and body.bounded,
        )


@dataclass
class Record:
    """What a walk found, in order.

    Attributes:
        sites: The sites; `named` gives them their final names.
        uses: `(path, use)` pairs, each once, in order.
        elsewhere: Contractions without a leaf.
        opaque: The primitives that run jaxprs and are no constructs, with the scope of each.
        operands: The operands of each construct.
        flops: Of all contractions.
    """

    sites: list[Found] = field(default_factory=list)
    uses: dict[tuple[str, Use], None] = field(default_factory=dict)
    elsewhere: list[Contraction] = field(default_factory=list)
    opaque: list[tuple[str, ...]] = field(default_factory=list)
    operands: dict[Position, list[Value]] = field(default_factory=dict)
    flops: int = 0

    def take(self, other: "Record", *, flops: bool = True) -> None:
        self.sites += other.sites
        self.uses |= other.uses
        self.elsewhere += other.elsewhere
        self.opaque += other.opaque
        self.operands |= other.operands
        self.flops += other.flops if flops else 0


class Walker:
    """Walks programs and records what it finds; `leaves` give the bytes of weights."""

    def __init__(self, leaves: dict[str, Any]):
        self._leaves = leaves
        self._bytes = {path: tree.nbytes({"": leaf}) for path, leaf in leaves.items()}
        self._idents, self._numbers = itertools.count(), itertools.count()
        self._reached: dict[int, int] = {}  # all sites before each site, as bits
        self._known: dict[Any, int] = {}  # one ident per pure equation on the same operands

    def fresh(self) -> int:
        return next(self._idents)

    def walk(self, program: Program, args: Sequence[Value], place: Place) -> tuple[Record, list]:
        """Walk one program; returns what it found and the values of its results."""
        record, env = Record(), {}
        for var in program.constvars:
            env[var] = Value(ident=self.fresh())
        env.update(zip(program.invars, args, strict=True))

        def read(atom: Any) -> Value:
            return Value(ident=self.fresh()) if isinstance(atom, _compat.Literal) else env[atom]

        for number, eqn in enumerate(program.eqns):
            operands = [read(atom) for atom in eqn.invars]
            env.update(
                zip(eqn.outvars, self._equation(eqn, number, operands, place, record), strict=True)
            )
        return record, [read(atom) for atom in program.outvars]

    def _equation(
        self, eqn: Any, number: int, operands: list[Value], place: Place, record: Record
    ) -> list[Value]:
        entered = construct(eqn.primitive.name)
        if entered is not None:
            return self._construct(eqn, number, entered.bodies(eqn), operands, place, record)
        if eqn.primitive.name == "optimization_barrier":
            return operands
        if _compat.has_subprograms(eqn):
            record.opaque.append((*place.scope, eqn.primitive.name))
        if not any(value.views for value in operands):
            self._count_elsewhere(eqn, place, record)
            return self._results(eqn, operands)
        at_site, after = self._sites(eqn, number, operands, place, record)
        if any(at_site):
            for value, done in zip(operands, at_site, strict=True):
                self._use(eqn, () if done else value.views, place, record)
            return [value._replace(after=after) for value in self._results(eqn, operands)]
        if contraction_flops(eqn):
            self._count_elsewhere(eqn, place, record)
        return [
            value._replace(views=views)
            for value, views in zip(
                self._results(eqn, operands),
                self._follow(eqn, operands, place, record),
                strict=True,
            )
        ]

    def _results(self, eqn: Any, operands: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        varies, after = any(value.varies for value in operands), _union(operands)
        if name not in MOVES:  # cheap, and written anew by each layer that reads it
            return [Value((), varies, self.fresh(), after) for _ in eqn.outvars]
        key = (name, operands[0].ident, tuple(eqn.params.values()))
        return [Value((), varies, self._known.setdefault(key, self.fresh()), after)]

    # --- leaves at an equation -----------------------------------------------------------------

    def _sites(
        self, eqn: Any, number: int, operands: list[Value], place: Place, record: Record
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
        shares = self._shares([view.path for _, view, _ in layouts])
        for (k, view, layout), share in zip(layouts, shares, strict=True):
            found[k] = True
            flops = max(flops, layout.flops)
            mine = next(self._numbers)
            self._reached[mine] = before
            after |= 1 << mine
            site = self._site(eqn, k, operands, view, layout, place)
            site = replace(site, flops=site.flops * share[0] // share[1])
            record.sites.append(Found((*place.position, number), site, mine))
        record.flops += flops * place.repeats
        return found, after

    def _shares(self, paths: Sequence[str]) -> list[tuple[int, int]]:
        sizes = [max(elements(self._leaves[path].shape), 1) for path in paths]
        return [(size, sum(sizes)) for size in sizes]

    def upstream(self, number: int) -> list[int]:
        """List the sites before a site with no other site between, in order."""
        left, parents = self._reached[number], []
        while left:
            last = left.bit_length() - 1
            parents.append(last)
            left &= ~(self._reached[last] | 1 << last)
        return parents[::-1]

    def _site(
        self, eqn: Any, k: int, operands: list[Value], view: View, layout: Layout, place: Place
    ) -> Site:
        other = layout.activation
        weight, output = struct(eqn.invars[k]), struct(eqn.outvars[0])
        activation = struct(eqn.invars[other])
        size = elements(self._leaves[view.path].shape)
        layers = {depth: axis for axis, depth in view.layers}
        moved = _nbytes(activation) + _nbytes(output)
        if layout.axes.lookup:  # only the rows that are picked are read
            moved += _nbytes(output)
        else:
            moved += self._bytes[view.path] * min(elements(weight.shape), size) // max(size, 1)
        return Site(
            name=view.path,
            path=view.path,
            primitive=eqn.primitive.name,
            operand=k,
            axes=replace(layout.axes, sliced=_unseen(layout.axes, self._leaves[view.path].shape)),
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
            aligned=_aligned(view, layout.axes, self._leaves[view.path].shape),
            flops=layout.flops * place.repeats,
            bytes=moved * place.repeats,
            feature_groups=layout.feature_groups,
            layout=layout,
        )

    def _follow(
        self, eqn: Any, operands: list[Value], place: Place, record: Record
    ) -> list[tuple[View, ...]]:
        """Follow leaves into an equation's results; where that ends, record the use."""
        rule = view_rule(eqn.primitive.name)
        if rule is None or any(value.varies for value in operands):
            for value in operands:
                self._use(eqn, value.views, place, record)
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
        self._use(eqn, lost, place, record)
        return [_widest(results.values()) for results in kept]

    def _use(self, eqn: Any, views: Sequence[View], place: Place, record: Record) -> None:
        use = Use(primitive=eqn.primitive.name, scope=place.scope, repeats=place.repeats)
        for view in views:
            record.uses[view.path, use] = None

    def _count_elsewhere(self, eqn: Any, place: Place, record: Record) -> None:
        flops = contraction_flops(eqn)
        if not flops:
            return
        operands, output = tuple(map(struct, eqn.invars)), struct(eqn.outvars[0])
        record.flops += flops * place.repeats
        record.elsewhere.append(
            Contraction(
                primitive=eqn.primitive.name,
                operands=operands,
                output=output,
                repeats=place.repeats,
                bounded=place.bounded,
                scope=place.scope,
                flops=flops * place.repeats,
                bytes=sum(map(_nbytes, (*operands, output))) * place.repeats,
            )
        )

    # --- constructs ----------------------------------------------------------------------------

    def _construct(
        self,
        eqn: Any,
        number: int,
        bodies: list[Body],
        operands: list[Value],
        place: Place,
        record: Record,
    ) -> list[Value]:
        record.operands[(*place.position, number)] = operands
        results: list[Value | None] = [None] * len(eqn.outvars)
        branches = 0
        operands = list(operands)
        for k, body in enumerate(bodies):
            inside = place.inside(number, k, body)
            found, outs, unchanged = self._body(eqn, body, operands, inside)
            branches = max(branches, found.flops) if body.branch else branches
            record.take(found, flops=not body.branch)
            for (target, role), value in zip(body.results, outs, strict=True):
                if target is None:
                    continue
                if role != "same" and value.ident in unchanged:  # handed back as it came
                    results[target] = unchanged[value.ident]
                else:
                    self._join(eqn, results, target, role, value, inside, record)
        record.flops += branches
        chosen = bodies[0].branch and operands[0].varies
        joined = [value or Value(ident=self.fresh()) for value in results]
        return [v._replace(varies=v.varies or (chosen and not v.views)) for v in joined]

    def _body(
        self, eqn: Any, body: Body, operands: list[Value], inside: Place
    ) -> tuple[Record, list[Value], dict[int, Value]]:
        """Walk a body until what it carries round is what it was given.

        Returns:
            What it found, the values of its results, and the operands that it may hand back,
            by the ident that they have inside.
        """
        args = [
            self._fed(operands[k], role, var.aval, len(inside.stack) - 1)
            for (k, role), var in zip(body.inputs, body.program.invars, strict=True)
        ]
        carried = [i for i, (_, role) in enumerate(body.inputs) if role == "carry"]
        returns = [i for i, (_, role) in enumerate(body.results) if role == "carry"]
        while True:
            record, outs = self.walk(body.program, args, inside)
            settled = True
            for i, j in zip(carried, returns, strict=False):
                before, after = args[i], outs[j]
                views = before.views if before.views == after.views else ()
                varies = before.varies or after.varies
                if (views, varies) != (before.views, before.varies):
                    settled = False
                    args[i] = before._replace(views=views, varies=varies)
            if settled:
                break
        handed = zip(args, body.inputs, strict=True)
        unchanged = {a.ident: operands[k] for a, (k, role) in handed if role != "same"}
        for i in carried:
            k = body.inputs[i][0]
            self._use(eqn, () if args[i].views else operands[k].views, inside, record)
            # A condition reads what is carried in the end, not only what it began with.
            operands[k] = operands[k]._replace(views=args[i].views, varies=args[i].varies)
        return record, outs, unchanged

    def _fed(self, value: Value, role: str, aval: Any, depth: int) -> Value:
        if role == "same":
            return value._replace(views=_fitted(value.views, aval))
        if role == "carry":
            return value._replace(ident=self.fresh())
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

    def _join(
        self,
        eqn: Any,
        results: list[Value | None],
        target: int,
        role: str,
        value: Value,
        inside: Place,
        record: Record,
    ) -> None:
        """Merge a body's result into the construct's: branches must agree on what they show."""
        if role == "slice":  # stacked anew: not followed
            self._use(eqn, value.views, inside, record)
            value = value._replace(views=(), ident=self.fresh())
        elif role == "carry":
            value = value._replace(ident=self.fresh())
        value = value._replace(views=_fitted(value.views, eqn.outvars[target].aval))
        before = results[target]
        if before is not None:
            agree = before.views == value.views
            if not agree:
                self._use(eqn, (*before.views, *value.views), inside, record)
            same = before.ident if before.ident == value.ident else self.fresh()
            value = Value(
                before.views if agree else (),
                before.varies or value.varies,
                same,
                before.after | value.after,
            )
        results[target] = value


def _unseen(axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
    """List the axes of a leaf that have no role at a site: it sees one index of them."""
    named = {k for role in vars(axes).values() for k in role}
    return tuple(k for k, n in enumerate(shape) if n > 1 and k not in named)


def _aligned(view: View, axes: Axes, shape: Sequence[int]) -> bool:
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


def _fitted(views: Sequence[View], aval: Any) -> tuple[View, ...]:
    """Cut views to the size of a variable: inside a `shard_map` it is a shard."""
    return tuple(fitted(view, aval.shape) for view in views)


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
