"""`dims`: which indices of which axes of which variables are the same index.

A walk over fn's program gives every axis of every variable a vector of labels (`_labels`), and one
rule per primitive says how those of its results follow from those of its operands. What a rule does
not know is frozen, with a reason.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress import tree
from jaxcompress.graph.dims._found import Dims, Level, Product
from jaxcompress.graph.dims._known import (
    Fact,
    fact_after,
    fact_of_constant,
    fact_of_literal,
    list_compared,
)
from jaxcompress.graph.dims._labels import Axis, Labels
from jaxcompress.graph.dims._rule import Axes, Step, concrete, dims_rule
from jaxcompress.graph.program._compat import Program
from jaxcompress.graph.program._constructs import Role, construct
from jaxcompress.graph.program._interpret import Domain, Frame, Place, Position, interpret
from jaxcompress.graph.program._live import equation_steps, live, variables
from jaxcompress.graph.sites._sites import contraction_flops, summed_axes
from jaxcompress.graph.sites._trace import Traced, capture

_PASSES = 3
"""How often a program is walked at most."""


class Labelled(NamedTuple):
    """What the walk knows of a variable: the labels of its axes, and what it is before fn runs."""

    axes: Axes
    fact: Fact = Fact()


def dims(
    fn: Callable[..., Any] | Traced, params: tree.Params = None, *inputs: Any, **kwargs: Any
) -> Dims:
    """Find which indices of the leaves are the same index, so that they live and die together.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; or a `Traced`, without arguments.
        params: Any pytree of arrays; shapes are enough.
        *inputs: fn's other arguments; shapes are enough.
        **kwargs: fn's keyword arguments.

    Returns:
        The labels. Axes of inputs are frozen, and so are those of outputs, but for outputs that
        mirror a leaf of params (a path that ends with the leaf's, and its shape): new state.

    Raises:
        ArgumentTypeError: As `trace`.

    Example:
        >>> import jax.numpy as jnp
        >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
        >>> found = dims(fn, {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}, jnp.ones((1, 3)))
        >>> up, down = (found.labels.find(found.leaves["up"][1]), found.leaves["down"][0])
        >>> bool((up == found.labels.find(down)).all()), found.reasons[up].tolist()
        (True, ['', '', '', ''])
        >>> str(found.reasons[found.labels.find(found.leaves["up"][0])[0]])
        'it is tied to axis 1 of input 0'
    """
    traced = capture(fn, params, *inputs, **kwargs)
    return traced.derive("dims", lambda: _label_call(traced))


def state_outputs(traced: Traced) -> Mapping[int, str]:
    """Find which outputs of a captured call are new state, made from leaves of params.

    Args:
        traced: The call.

    Returns:
        `{number of the output: path of the leaf}` of the outputs with the path and shape of a leaf
        whose indices are the leaf's own. An activation that is as large as a leaf is none.
    """
    return dims(traced).state if _mirrors(traced) else {}


def _label_call(traced: Traced) -> Dims:
    labels = Labels()
    leaves = {
        path: tuple(labels.fresh(n) for n in concrete(leaf.shape))
        for path, leaf in traced.leaves.items()
    }
    result = Labelling(traced, labels).whole(leaves)
    for _ in range(_PASSES - 1):
        if not labels.conflicts:
            break
        # What was learned late may show how to split an axis that was met early.
        labels.frozen, labels.frozen_else, labels.conflicts = [], [], 0
        result = Labelling(traced, labels).whole(leaves)
    return result


class Labelling(Domain[Labelled]):
    """One pass over a program that gives labels.

    Args:
        traced: The captured call.
        labels: Where labels are kept.
        closed: Whether no cells come in, so that what is made is the same in all layers.
    """

    def __init__(self, traced: Traced, labels: Labels, *, closed: bool = False):
        self._traced, self._labels = traced, labels
        self._levels: list[Level] = []
        self._uniform: list[Axis] = []
        self._products: list[Product] = []
        self._summed: list[Axis] = []
        self._carried: list[Axis] = []
        self._cuts: list[Axis] = []
        self._spread: set[int] = set()
        self._scans: dict[Position, tuple[int, ...]] = {(): ()}
        self._closed: dict[Position, bool] = {(): closed}
        self._dead: set[Position] = set()

    def whole(self, leaves: Mapping[str, Axes]) -> Dims:
        """Label the captured call; `leaves` are the labels of its leaves."""
        traced, labels, program = self._traced, self._labels, self._traced.program
        args: list[Axes] = []
        for path, leaf in traced.leaves.items():
            if not isinstance(leaf, tree.LeafNode):
                args.append(leaves[path])
                continue
            labels.freeze_all(leaves[path], "it is quantized: shrink before that")
            for part in jax.tree.leaves(leaf):
                args.append(self._outer(part.shape, f"{path} is quantized"))
        for path, var in zip(traced.inputs, program.invars[len(args) :], strict=True):
            axes = self._outer(var.aval.shape, None)
            for k, axis in enumerate(axes):
                labels.freeze(axis, f"it is tied to axis {k} of input {path}")
            args.append(axes)
        walked = self.walk(program, [Labelled(axes) for axes in args])
        outs = walked.pop("results")
        # New state is made from the old: its indices are the leaf's by fn itself.
        alike = lambda axes, path: all(
            np.array_equal(labels.rows(a), labels.rows(b))
            for a, b in zip(axes, leaves[path], strict=True)
        )
        state = {k: path for k, path in _mirrors(traced).items() if alike(outs[k].axes, path)}
        paths = jax.tree_util.tree_flatten_with_path(traced.outputs)[0]
        for number, ((keypath, _), out) in enumerate(zip(paths, outs, strict=True)):
            name = tree.path_str(keypath) or "0"
            for k, axis in enumerate(out.axes if number not in state else ()):
                labels.freeze(axis, f"it is axis {k} of output {name}")
        return self._result(walked, leaves, state)

    def walk(self, program: Program, args: Sequence[Labelled]) -> dict[str, Any]:
        """Label a program; gives what `Dims` says of its bodies, and the results."""
        walk = interpret(program, args, self)
        bodies = walk.bodies.items()
        return {
            "programs": {
                at: (body.program, {var: x.axes for var, x in body.values.items()})
                for at, body in bodies
            },
            "facts": {at: {v: x.fact for v, x in body.values.items()} for at, body in bodies},
            "scans": dict(self._scans),
            "dead": frozenset(self._dead),
            "results": walk.results,
        }

    def _outer(self, shape: Sequence[Any], reason: str | None) -> Axes:
        return tuple(self._labels.fresh(n, frozen=reason) for n in concrete(shape))

    def _result(
        self, walked: dict[str, Any], leaves: Mapping[str, Axes], state: Mapping[int, str]
    ) -> Dims:
        labels = self._labels
        reasons = np.full(len(labels), "", object)
        for axis, reason in reversed([*labels.frozen, *labels.frozen_else]):
            reasons[labels.members(axis)] = reason
        levels = tuple(self._levels)
        first = [int(labels.find(level.axis)[0]) for level in levels]
        canonical = [first.index(label) for label in first]  # scans over the same layers are one
        scans = {at: tuple(canonical[k] for k in inside) for at, inside in self._scans.items()}
        layers = np.zeros(len(labels), np.int32)
        if levels:
            layers = self._layers(canonical, walked["programs"], scans)
        return Dims(
            **{**walked, "scans": scans},
            traced=self._traced,
            labels=labels,
            leaves=leaves,
            reasons=reasons,
            layers=layers,
            levels=levels,
            products=tuple(self._products),
            summed=self._flags(self._summed),
            carried=self._flags(self._carried),
            cuts=tuple(self._cuts),
            state=state,
        )

    def _flags(self, axes: Sequence[Axis]) -> np.ndarray:
        flags = np.zeros(len(self._labels), bool)
        for axis in axes:
            flags[self._labels.members(axis)] = True
        return flags

    def _layers(
        self,
        canonical: Sequence[int],
        programs: Mapping[Position, tuple[Program, Mapping[Any, Axes]]],
        scans: Mapping[Position, tuple[int, ...]],
    ) -> np.ndarray:
        """Find the labels that occur only beside the layers of a scan, or inside it."""
        labels, levels = self._labels, self._levels
        layered = {k: labels.find(levels[k].axis) for k in canonical}
        names = {int(axis[0]): k for k, axis in layered.items()}
        allowed = np.full(len(labels), -1, np.int64)
        for prefix, (_, env) in programs.items():
            inside = sum(1 << k for k in set(scans[prefix]))
            for axes in env.values():
                beside = inside
                for axis in axes:
                    k = names.get(int(labels.find(axis[:1])[0])) if len(axis) > 1 else None
                    if k is not None and np.array_equal(labels.find(axis), layered[k]):
                        beside |= 1 << k
                for axis in axes:
                    allowed[labels.members(axis)] &= beside
        for axis in self._uniform:
            allowed[labels.members(axis)] = 0
        layers = np.zeros(len(labels), np.int32)
        for k in sorted(set(canonical), reverse=True):
            layers[(allowed & (1 << k) > 0) & (allowed >= 0)] = k + 1
        return layers

    # --- equations ------------------------------------------------------------------------------

    def begin(self, program: Program, place: Place) -> None:
        alive = set(live(equation_steps(program), variables(program.outvars)).numbers)
        numbers = range(len(program.eqns))
        self._dead |= {(*place.position, k) for k in numbers if k not in alive}

    def constant(self, var: Any, value: Any, place: Place) -> Labelled:
        axes = self._outer(np.shape(value), None)
        self._uniform += axes
        return Labelled(axes, fact_of_constant(value, axes))

    def literal(self, atom: Any) -> Labelled:
        return Labelled(self._outer(np.shape(atom.val), None), fact_of_literal(atom))

    def enters(self, eqn: Any, operands: Sequence[Labelled], here: Position) -> bool:
        return here not in self._dead

    def equation(
        self, eqn: Any, operands: Sequence[Labelled], here: Position, place: Place
    ) -> Sequence[Labelled]:
        if here in self._dead:  # only shapes of it were used
            return [Labelled(self._outer(var.aval.shape, None)) for var in eqn.outvars]
        if eqn.primitive.name == "broadcast_in_dim":
            self._spread.add(id(eqn.outvars[0]))
        facts = [x.fact for x in operands]
        results = self._follow(eqn, here, tuple(x.axes for x in operands), facts, place)
        after = fact_after(eqn, facts, results)
        return [Labelled(axes, after) for axes in results]

    def _follow(
        self,
        eqn: Any,
        here: Position,
        operands: tuple[Axes, ...],
        known: Sequence[Fact],
        place: Place,
    ) -> list[Axes]:
        step = Step(eqn=eqn, operands=operands, known=tuple(fact.value for fact in known),
                    labels=self._labels, uniform=self._uniform.append,
                    cut=self._cuts.append, by_layer=not self._closed[place.position])  # fmt: skip
        rule = dims_rule(eqn.primitive.name)
        if rule is None:
            reason = f"{eqn.primitive.name} has no rule"
            self._labels.freeze_all(itertools.chain(*operands), reason)
            return step.fresh(frozen=reason)
        results = rule.follow(step)
        self._labels.freeze_all(list_compared(eqn, known), "its positions are compared with values")
        if flops := contraction_flops(eqn):
            self._contracts(eqn, here, operands, results[0], place, flops)
        elif eqn.primitive.name in ("add", "sub") and all(len(axes) for axes in operands):
            whole = [
                axes
                for axes in operands
                if all(len(a) == len(r) for a, r in zip(axes, results[0], strict=True))
            ]
            # A bias that was spread first is no stream of its own.
            if len(whole) == 2 and not self._spread & set(map(id, eqn.invars)):
                self._summed += results[0]
        return results

    def _contracts(
        self,
        eqn: Any,
        here: Position,
        operands: tuple[Axes, ...],
        result: Axes,
        place: Place,
        flops: int,
    ) -> None:
        found = summed_axes(eqn)
        assert found is not None, "what has operations sums over axes"
        operand, axes = found
        sums = [operands[operand][k] for k in axes]
        dot = eqn.primitive.name == "dot_general"
        self._products.append(
            Product(position=here, axes=(*result, *sums), summed=len(sums),
                    batch=len(eqn.params["dimension_numbers"][1][0]) if dot else 0,
                    repeats=place.repeats, branch=place.branch, flops=flops * place.repeats)
        )  # fmt: skip

    # --- constructs -----------------------------------------------------------------------------

    def enter(self, frame: Frame[Labelled]) -> None:
        name, at, outside = frame.eqn.primitive.name, frame.place.position, frame.here[:-1]
        opens = getattr(construct(name), "takes_cells", False) and not _is_condition(frame)
        self._closed[at] = self._closed[outside] or not opens
        self._scans[at] = self._scans[outside]
        if name == "scan":
            self._levels.append(self._level(frame))
            self._scans[at] = (*self._scans[outside], len(self._levels) - 1)
        if frame.body.branch:
            self._labels.freeze_all(frame.operands[0].axes, "it chooses a branch")

    def _level(self, frame: Frame[Labelled]) -> Level:
        length = int(frame.eqn.params["length"])
        operands = [frame.operands[k].axes for k, role in frame.body.inputs if role == "slice"]
        sliced = [axes[0] for axes in operands if axes]
        axis = sliced[0] if sliced else self._labels.fresh(length)
        for other in sliced[1:]:
            self._labels.unify(axis, other)
        self._labels.freeze(axis, "a scan runs over it: drop_layers removes layers")
        return Level(axis=axis, length=length)

    def feed(self, value: Labelled, k: int, role: Role, frame: Frame[Labelled]) -> Labelled:
        axes = value.axes[1:] if role == "slice" else value.axes
        if role == "carry":
            self._carried += axes
        if _is_condition(frame):  # it sees no layers
            self._uniform += axes
        shape = frame.body.program.invars[k].aval.shape
        return Labelled(self._fit(axes, shape, frame), value.fact.through(role))

    def carry(self, before: Labelled, after: Labelled, frame: Frame[Labelled]) -> Labelled:
        for a, b in zip(before.axes, after.axes, strict=True):
            self._labels.unify(a, b)
        return before

    def give(self, value: Labelled, k: int, role: Role, frame: Frame[Labelled]) -> Labelled:
        fact = value.fact.through(role)._replace(value=None)
        if frame.body.branch:  # which of them it is depends on operand 0
            fact = fact.or_else(frame.operands[0].fact._replace(counts=()))
        axes, target = value.axes, frame.body.results[k][0]
        assert target is not None
        if role == "slice":
            axes = (self._levels[self._scans[frame.place.position][-1]].axis, *axes)
        return Labelled(self._fit(axes, frame.eqn.outvars[target].aval.shape, frame), fact)

    def join(self, earlier: Labelled, later: Labelled, frame: Frame[Labelled]) -> Labelled:
        for a, b in zip(earlier.axes, later.axes, strict=True):
            self._labels.unify(a, b)
        return Labelled(later.axes, earlier.fact.or_else(later.fact))

    def _fit(self, axes: Axes, shape: Sequence[Any], frame: Frame[Labelled]) -> Axes:
        """Cut an axis off where a border changes its size: inside a `shard_map` it is a shard."""
        fitted = []
        for axis, n in zip(axes, concrete(shape), strict=True):
            if len(axis) == n:
                fitted.append(axis)
                continue
            reason = f"{frame.eqn.primitive.name} divides it among devices"
            self._labels.freeze(axis, reason)
            fitted.append(self._labels.fresh(n, frozen=reason))
        return tuple(fitted)


def _is_condition(frame: Frame[Labelled]) -> bool:
    return all(target is None for target, _ in frame.body.results)


def _mirrors(traced: Traced) -> dict[int, str]:
    """Match outputs with the leaves that they may be new values of, by path and shape."""
    found: dict[int, str] = {}
    for number, (keypath, out) in enumerate(
        jax.tree_util.tree_flatten_with_path(traced.outputs)[0]
    ):
        parts = tree.path_str(keypath).split("/")
        # The longest path of a leaf that the output's ends with: `bn/mean` is not `1/bn/mean`.
        for k in range(len(parts)):
            leaf = traced.leaves.get("/".join(parts[k:]))
            if leaf is not None and keypath:
                if concrete(out.shape) == concrete(leaf.shape):
                    found[number] = "/".join(parts[k:])
                break
    return found
