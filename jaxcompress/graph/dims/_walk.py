"""`dims`: which indices of which axes of which variables are the same index.

A walk over fn's program gives every axis of every variable a vector of labels (`_labels`), and one
rule per primitive says how those of its results follow from those of its operands. What a rule does
not know is frozen, with a reason.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxcompress import tree
from jaxcompress.graph.dims._found import Dims, Level, Product
from jaxcompress.graph.dims._known import (
    Fact,
    Facts,
    compared,
    fact_after,
    fact_of,
    fact_of_constant,
)
from jaxcompress.graph.dims._labels import Axis, Labels
from jaxcompress.graph.dims._rule import Axes, Step, concrete, dims_rule
from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._compat import Program
from jaxcompress.graph.program._constructs import Body, construct
from jaxcompress.graph.sites._sites import contraction_flops
from jaxcompress.graph.sites._trace import Traced, capture
from jaxcompress.graph.sites._walk import Position

_PASSES = 3
"""How often a program is walked at most."""
_OPEN = frozenset({"cond", "jit", "remat2", "scan", "while"})
"""Constructs that take cells in whole, whatever is differentiated."""


def dims(fn: Callable[..., Any], params: tree.Params, *inputs: Any, **kwargs: Any) -> Dims:
    """Find which indices of the leaves are the same index, so that they live and die together.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
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
    return dims_of(capture(fn, params, inputs, kwargs))


def dims_of(traced: Traced) -> Dims:
    labels = Labels()
    leaves = {
        path: tuple(labels.fresh(n) for n in concrete(leaf.shape))
        for path, leaf in traced.leaves.items()
    }
    result = Walker(traced, labels).whole(leaves)
    for _ in range(_PASSES - 1):
        if not labels.conflicts:
            break
        # What was learned late may show how to split an axis that was met early.
        labels.frozen, labels.frozen_else, labels.conflicts = [], [], 0
        result = Walker(traced, labels).whole(leaves)
    return result


class Walker:
    """One pass over a program.

    Args:
        traced: The captured call.
        labels: Where labels are kept.
        closed: Whether no cells come in, so that what is made is the same in all layers.
    """

    def __init__(self, traced: Traced, labels: Labels, *, closed: bool = False):
        self._traced, self._labels = traced, labels
        self.programs: dict[Position, tuple[Program, dict[Any, Axes]]] = {}
        self.scans: dict[Position, tuple[int, ...]] = {}
        self.facts: dict[Position, Facts] = {}
        self._levels: list[Level] = []
        self._uniform: list[Axis] = []
        self._products: list[Product] = []
        self._summed: list[Axis] = []
        self._carried: list[Axis] = []
        self._cuts: list[Axis] = []
        self._spread: set[int] = set()
        self._closed = closed
        self.dead: set[Position] = set()

    def whole(self, leaves: Mapping[str, Axes]) -> Dims:
        traced, labels, program = self._traced, self._labels, self._traced.program
        args: list[Axes] = []
        for path, leaf in traced.leaves.items():
            if not isinstance(leaf, tree.LeafNode):
                args.append(leaves[path])
                continue
            for axis in leaves[path]:
                labels.freeze(axis, "it is quantized: shrink before that")
            for part in jax.tree.leaves(leaf):
                args.append(self._outer(part.shape, f"{path} is quantized"))
        for path, var in zip(traced.inputs, program.invars[len(args) :], strict=True):
            axes = self._outer(var.aval.shape, None)
            for k, axis in enumerate(axes):
                labels.freeze(axis, f"it is tied to axis {k} of input {path}")
            args.append(axes)
        outs = self.walk(program, args, (), (), 1, ())
        # New state is made from the old: its indices are the leaf's by fn itself.
        alike = lambda axes, path: all(
            np.array_equal(labels.rows(a), labels.rows(b))
            for a, b in zip(axes, leaves[path], strict=True)
        )
        state = {k: path for k, path in _mirrors(traced).items() if alike(outs[k], path)}
        paths = jax.tree_util.tree_flatten_with_path(traced.outputs)[0]
        for number, ((keypath, _), axes) in enumerate(zip(paths, outs, strict=True)):
            name = tree.path_str(keypath) or "0"
            for k, axis in enumerate(axes if number not in state else ()):
                labels.freeze(axis, f"it is axis {k} of output {name}")
        return self._result(leaves, state)

    def _outer(self, shape: Sequence[Any], reason: str | None) -> Axes:
        axes = tuple(self._labels.fresh(n) for n in concrete(shape))
        for axis in axes if reason else ():
            self._labels.freeze(axis, str(reason))
        return axes

    def _result(self, leaves: Mapping[str, Axes], state: Mapping[int, str]) -> Dims:
        labels = self._labels
        reasons = np.full(len(labels), "", object)
        for axis, reason in reversed([*labels.frozen, *labels.frozen_else]):
            rows = labels.rows(axis)
            reasons[rows[rows >= 0]] = reason
        levels, layers = tuple(self._levels), np.zeros(len(labels), np.int32)
        first = [int(labels.find(level.axis)[0]) for level in levels]
        canonical = [first.index(label) for label in first]  # scans over the same layers are one
        if levels:
            layers = self._layers(canonical)
        return Dims(
            traced=self._traced,
            labels=labels,
            leaves=leaves,
            programs=self.programs,
            facts=self.facts,
            scans={prefix: tuple(canonical[k] for k in at) for prefix, at in self.scans.items()},
            reasons=reasons,
            layers=layers,
            levels=levels,
            products=tuple(self._products),
            summed=self._flags(self._summed),
            carried=self._flags(self._carried),
            cuts=tuple(self._cuts),
            dead=frozenset(self.dead),
            state=state,
        )

    def _flags(self, axes: Sequence[Axis]) -> np.ndarray:
        flags = np.zeros(len(self._labels), bool)
        for axis in axes:
            rows = self._labels.rows(axis)
            flags[rows[rows >= 0]] = True
        return flags

    def _layers(self, canonical: Sequence[int]) -> np.ndarray:
        """Find the labels that occur only beside the layers of a scan, or inside it."""
        labels, levels = self._labels, self._levels
        layered = {k: labels.find(levels[k].axis) for k in canonical}
        names = {int(axis[0]): k for k, axis in layered.items()}
        allowed = np.full(len(labels), -1, np.int64)
        for prefix, (_, env) in self.programs.items():
            inside = sum(1 << k for k in {canonical[k] for k in self.scans[prefix]})
            for axes in env.values():
                beside = inside
                for axis in axes:
                    k = names.get(int(labels.find(axis[:1])[0])) if len(axis) > 1 else None
                    if k is not None and np.array_equal(labels.find(axis), layered[k]):
                        beside |= 1 << k
                for axis in axes:
                    rows = labels.rows(axis)
                    allowed[rows[rows >= 0]] &= beside
        for axis in self._uniform:
            rows = labels.rows(axis)
            allowed[rows[rows >= 0]] = 0
        layers = np.zeros(len(labels), np.int32)
        for k in sorted(set(canonical), reverse=True):
            layers[(allowed & (1 << k) > 0) & (allowed >= 0)] = k + 1
        return layers

    # --- walking --------------------------------------------------------------------------------

    def walk(
        self,
        program: Program,
        args: Sequence[Axes],
        prefix: Position,
        scans: tuple[int, ...],
        repeats: int,
        branch: tuple[tuple[Position, int], ...],
        facts: Facts | None = None,
    ) -> list[Axes]:
        env: dict[Any, Axes] = dict(zip(program.invars, args, strict=True))
        facts = self.facts[prefix] = {} if facts is None else facts
        self.programs[prefix], self.scans[prefix] = (program, env), scans
        for var, value in zip(program.constvars, program.consts, strict=True):
            env[var] = self._outer(np.shape(value), None)
            self._uniform += env[var]
            facts[var] = fact_of_constant(value, env[var])
        live = _live(program)
        for number, eqn in enumerate(program.eqns):
            here = (*prefix, number)
            if number not in live:  # only shapes of it were used
                self.dead.add(here)
                env.update((var, self._outer(var.aval.shape, None)) for var in eqn.outvars)
                continue
            operands = tuple(self._read(atom, env) for atom in eqn.invars)
            if eqn.primitive.name == "broadcast_in_dim":
                self._spread.add(id(eqn.outvars[0]))
            mine = tuple(fact_of(atom, facts) for atom in eqn.invars)
            rule = construct(eqn.primitive.name)
            if rule is not None:
                bodies = rule.bodies(eqn)
                results, after = self._construct(
                    eqn, here, bodies, operands, scans, repeats, branch, mine
                )
            else:
                results = self._follow(eqn, here, operands, mine, repeats, branch)
                after = [fact_after(eqn, mine, results)] * len(results)
            env.update(zip(eqn.outvars, results, strict=True))
            facts.update(zip(eqn.outvars, after, strict=True))
        return [self._read(atom, env) for atom in program.outvars]

    def _read(self, atom: Any, env: Mapping[Any, Axes]) -> Axes:
        if isinstance(atom, _compat.Literal):
            return tuple(self._labels.fresh(n) for n in np.shape(atom.val))
        return env[atom]

    def _follow(
        self,
        eqn: Any,
        here: Position,
        operands: tuple[Axes, ...],
        known: tuple[Fact, ...],
        repeats: int,
        branch: tuple[tuple[Position, int], ...],
    ) -> list[Axes]:
        step = Step(eqn=eqn, operands=operands, known=tuple(fact.value for fact in known),
                    labels=self._labels, uniform=self._uniform.append,
                    cut=self._cuts.append, by_layer=not self._closed)  # fmt: skip
        rule = dims_rule(eqn.primitive.name)
        if rule is None:
            reason = f"{eqn.primitive.name} has no rule"
            for axes in operands:
                for axis in axes:
                    self._labels.freeze(axis, reason)
            return step.fresh(frozen=reason)
        results = rule.follow(step)
        for axis in compared(eqn, known):
            self._labels.freeze(axis, "its positions are compared with values")
        if flops := contraction_flops(eqn):
            self._contracts(eqn, here, operands, results[0], repeats, branch, flops)
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
        repeats: int,
        branch: tuple[tuple[Position, int], ...],
        flops: int,
    ) -> None:
        name = eqn.primitive.name
        if name == "dot_general":
            (contract, _), (batch, _) = eqn.params["dimension_numbers"]
            sums = tuple(operands[0][k] for k in contract)
            shared = len(batch)
        elif name == "conv_general_dilated":
            spec = eqn.params["dimension_numbers"].rhs_spec
            sums, shared = tuple(operands[1][k] for k in spec[1:]), 0
        else:
            numbers = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
            (contract, _), _ = numbers
            sums, shared = tuple(operands[0][k] for k in contract), 0
        self._products.append(
            Product(position=here, axes=(*result, *sums), batch=shared, summed=len(sums),
                    repeats=repeats, branch=branch, flops=flops * repeats)
        )  # fmt: skip

    def _construct(
        self,
        eqn: Any,
        here: Position,
        bodies: Sequence[Body],
        operands: tuple[Axes, ...],
        scans: tuple[int, ...],
        repeats: int,
        branch: tuple[tuple[Position, int], ...],
        known: tuple[Fact, ...],
    ) -> tuple[list[Axes], list[Fact]]:
        labels = self._labels
        results: list[Axes | None] = [None] * len(eqn.outvars)
        after: list[Fact | None] = [None] * len(eqn.outvars)
        name, closed = eqn.primitive.name, self._closed
        for number, body in enumerate(bodies):
            condition = all(target is None for target, _ in body.results)
            self._closed = closed or name not in _OPEN or condition
            inner, level = scans, None
            if name == "scan":
                level = self._level(eqn, body, operands)
                inner = (*scans, len(self._levels) - 1)
            args, facts = [], Facts()
            for (k, role), var in zip(body.inputs, body.program.invars, strict=True):
                axes = operands[k][1:] if role == "slice" else operands[k]
                args.append(self._fitted(axes, var.aval.shape, name))
                facts[var] = known[k].through(role)
                if role == "carry":
                    self._carried += axes
                if condition:  # it sees no layers
                    self._uniform += axes
            inside = branch
            if body.branch:
                inside = (*branch, (here, number))
                for axis in operands[0]:
                    labels.freeze(axis, "it chooses a branch")
            outs = self.walk(
                body.program, args, (*here, number), inner, repeats * body.repeats, inside, facts
            )
            carried = [i for i, (_, role) in enumerate(body.inputs) if role == "carry"]
            returns = [i for i, (_, role) in enumerate(body.results) if role == "carry"]
            for i, j in zip(carried, returns, strict=False):
                for a, b in zip(args[i], outs[j], strict=True):
                    labels.unify(a, b)
            for (target, role), axes, atom in zip(
                body.results, outs, body.program.outvars, strict=True
            ):
                if target is None:
                    continue
                fact = fact_of(atom, facts).through(role)._replace(value=None)
                if body.branch:  # which of them it is depends on operand 0
                    fact = fact.or_else(known[0]._replace(counts=()))
                before = after[target]
                after[target] = fact if before is None else before.or_else(fact)
                if role == "slice" and level is not None:
                    axes = (level.axis, *axes)
                axes = self._fitted(axes, eqn.outvars[target].aval.shape, name)
                earlier = results[target]
                if earlier is not None:
                    for a, b in zip(earlier, axes, strict=True):
                        labels.unify(a, b)
                results[target] = axes
        self._closed = closed
        assert all(axes is not None for axes in results), f"{name} gives a result of no body"
        return [axes for axes in results if axes is not None], [fact or Fact() for fact in after]

    def _level(self, eqn: Any, body: Body, operands: Sequence[Axes]) -> Level:
        length = int(eqn.params["length"])
        sliced = [operands[k][0] for k, role in body.inputs if role == "slice" and operands[k]]
        axis = sliced[0] if sliced else self._labels.fresh(length)
        for other in sliced[1:]:
            self._labels.unify(axis, other)
        self._labels.freeze(axis, "a scan runs over it: drop_layers removes layers")
        level = Level(axis=axis, length=length)
        self._levels.append(level)
        return level

    def _fitted(self, axes: Axes, shape: Sequence[Any], name: str) -> Axes:
        """Cut an axis off where a border changes its size: inside a `shard_map` it is a shard."""
        fitted = []
        for axis, n in zip(axes, concrete(shape), strict=True):
            if len(axis) == n:
                fitted.append(axis)
                continue
            reason = f"{name} divides it among devices"
            self._labels.freeze(axis, reason)
            fitted.append(self._labels.fresh(n))
            self._labels.freeze(fitted[-1], reason)
        return tuple(fitted)


def _live(program: Program) -> set[int]:
    """List the equations that results, or effects, depend on."""
    needed = {atom for atom in program.outvars if not isinstance(atom, _compat.Literal)}
    live = set()
    for number, eqn in reversed(list(enumerate(program.eqns))):
        if eqn.effects or any(var in needed for var in eqn.outvars):
            live.add(number)
            needed.update(a for a in eqn.invars if not isinstance(a, _compat.Literal))
    return live


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
