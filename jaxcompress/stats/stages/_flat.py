"""A captured call as one flat list of steps, with a stop before each selected site.

This is the one place where inlining is right, as nothing here is differentiated: `jit`, `remat`,
`custom_jvp` and `custom_vjp` dissolve into their equations, and a scan over stacked leaves that
are selected is written out iteration by iteration. Everything else stays whole.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import tree
from jaxcompress.graph import Site, Traced
from jaxcompress.graph.program import (
    Literal,
    Position,
    Program,
    bind,
    construct,
    has_own_rule,
    is_call,
    normalize,
    scan_counts,
)
from jaxcompress.stats.stages._canonical import Keys, Op

Pick: TypeAlias = tuple[str, int, int]
"""A leaf's path, one of its axes, and the index that is used of it."""


class LeafPart(NamedTuple):
    """A variable that is part `number` of params, a `LeafNode` having several parts."""

    number: int


class Constant(NamedTuple):
    """A variable with a value of its own: an array that fn closes over, or an iteration."""

    value: Any


class Visit(NamedTuple):
    """An equation to stop at: a site's, or a construct's that holds sites.

    Attributes:
        eqn: The equation.
        position: Its position in the walk.
        operands: Variables or literals.
        sites: The selected sites at it or in it.
    """

    eqn: Any
    position: Position
    operands: tuple[Any, ...]
    sites: tuple[Site, ...]


@dataclass
class FlatStop:
    """A stop in the list of steps.

    Attributes:
        index: The number of steps before it.
        iteration: The iterations of the scans around it, outermost first.
        whole: Whether it is a construct that cannot be stopped in.
        picks: `{path: {leaf axis: index}}` of each leaf: the slice that is read here.
        visits: Equations whose selected sites read one activation; one construct, if `whole`.
    """

    index: int
    iteration: tuple[int, ...]
    whole: bool
    picks: dict[str, dict[int, int]] = field(default_factory=dict)
    visits: list[Visit] = field(default_factory=list)


@dataclass
class Flat:
    """A flat program.

    Attributes:
        ops: The steps, in fn's order.
        stops: The stops, in order.
        base: What variables are that are neither computed nor inputs.
        inputs: The variables of fn's flat inputs.
        avals: The abstract value of each variable.
        maker: The number of the step that computes a variable, for those computed.
        roots: What a variable is recomputed from besides params: the variables to keep for it.
            Itself, if it depends on inputs.
        lasting: Numbers of steps with effects, which run though nobody reads their results.
    """

    ops: list[Op] = field(default_factory=list)
    stops: list[FlatStop] = field(default_factory=list)
    base: dict[int, LeafPart | Constant] = field(default_factory=dict)
    inputs: list[int] = field(default_factory=list)
    avals: dict[int, Any] = field(default_factory=dict)
    maker: dict[int, int] = field(default_factory=dict)
    roots: dict[int, frozenset[int]] = field(default_factory=dict)
    lasting: set[int] = field(default_factory=set)

    def is_recomputed(self, op: Op) -> bool:
        """Tell whether a step depends on params only, and so is done anew where it is needed."""
        return bool(op.outputs) and op.outputs[0] not in self.roots[op.outputs[0]]

    def roots_of(self, atoms: Sequence[Any]) -> set[int]:
        """List the variables to keep for the sake of these."""
        found: set[int] = set()
        for atom in atoms:
            if not isinstance(atom, Literal):
                found |= self.roots[atom]
        return found


class _UnrolledScans(NamedTuple):
    """Where the flattening is: iterations of unrolled scans, and what they pick from leaves."""

    iteration: tuple[tuple[Position, int], ...] = ()
    picks: tuple[Pick, ...] = ()


def flatten(traced: Traced, names: Sequence[str], keys: Keys) -> Flat:
    """Flatten a captured call, with stops at the sites of the given names."""
    flattener = _Flattener(traced, frozenset(names), keys)
    flat, program = flattener.flat, traced.program
    parts = len(traced.part_paths)
    args = [
        flattener.add_base(LeafPart(k), var.aval) for k, var in enumerate(program.invars[:parts])
    ]
    for var in program.invars[parts:]:
        flat.inputs.append(flattener.add_variable(var.aval))
        flat.roots[flat.inputs[-1]] = frozenset(flat.inputs[-1:])
    flattener.flatten(program, [*args, *flat.inputs], (), _UnrolledScans())
    return flat


class _Flattener:
    def __init__(self, traced: Traced, names: frozenset[str], keys: Keys):
        self.flat = Flat()
        self._traced, self._keys = traced, keys
        self._sites: dict[Position, list[Site]] = {}
        self._lookups: set[Position] = set()
        for found in traced.record.sites:
            if found.site.axes.lookup:
                self._lookups.add(found.position)
            if found.site.name in names:
                self._sites.setdefault(found.position, []).append(found.site)
        self._below: dict[Position, list[Site]] = {}
        for position, sites in self._sites.items():
            for k in range(len(position)):
                self._below.setdefault(position[:k], []).extend(sites)
        self._paths = traced.part_paths
        self._groups: dict[Any, FlatStop] = {}
        self._slices: dict[int, frozenset[Pick]] = {}
        self._constants: dict[Hashable, int] = {}

    # --- variables -----------------------------------------------------------------------------

    def add_variable(self, aval: Any) -> int:
        number = len(self.flat.avals)
        self.flat.avals[number] = aval
        return number

    def add_base(self, base: LeafPart | Constant, aval: Any) -> int:
        var = self.add_variable(aval)
        self.flat.base[var], self.flat.roots[var] = base, frozenset()
        return var

    def _constant(self, value: Any, aval: Any, key: Hashable = None) -> int:
        key = id(value) if key is None else key
        if key not in self._constants:
            self._constants[key] = self.add_base(Constant(value), aval)
        return self._constants[key]

    def _emit(
        self,
        key: int,
        run: Callable[[Sequence[Any]], list[Any]],
        atoms: Sequence[Any],
        avals: Sequence[Any],
        *,
        kept: bool = False,
        reads: Sequence[Any] | None = None,
        lasting: bool = False,
    ) -> list[int]:
        """Append a step.

        Args:
            key: Its key.
            run: What it does.
            atoms: Its operands.
            avals: Of its results.
            kept: Compute it once and keep the results, even if it depends on params only.
            reads: The operands that count for that, if not all.
            lasting: Whether it has effects.
        """
        flat = self.flat
        outputs = [self.add_variable(aval) for aval in avals]
        reads = atoms if reads is None else reads
        roots = flat.roots_of(atoms)
        kept = kept or lasting or bool(flat.roots_of(reads))
        for var in outputs:
            flat.roots[var] = frozenset((var,)) if kept else frozenset(roots)
            flat.maker[var] = len(flat.ops)
        if lasting:
            flat.lasting.add(len(flat.ops))
        flat.ops.append(Op(key, run, tuple(atoms), tuple(outputs)))
        return outputs

    # --- programs ------------------------------------------------------------------------------

    def flatten(
        self, program: Program, args: Sequence[Any], position: Position, frame: _UnrolledScans
    ) -> list[Any]:
        """Flatten a program on the given operands; returns the atoms of its results."""
        env: dict[Any, Any] = dict(zip(program.invars, args, strict=True))
        for var, value in zip(program.constvars, program.consts, strict=True):
            env[var] = self._constant(value, var.aval)

        def read(atom: Any) -> Any:
            return atom if isinstance(atom, Literal) else env[atom]

        for number, eqn in enumerate(program.eqns):
            operands = [read(atom) for atom in eqn.invars]
            results = self._flatten_equation(eqn, (*position, number), operands, frame)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in program.outvars]

    def _flatten_equation(
        self, eqn: Any, here: Position, operands: list[Any], frame: _UnrolledScans
    ) -> Sequence[Any]:
        name = eqn.primitive.name
        rule = construct(name)
        if rule is not None and (is_call(name) or has_own_rule(name)):
            (body,) = rule.bodies(eqn)
            return self.flatten(body.program, operands, (*here, 0), frame)
        if name == "scan" and here in self._below:
            cuts = self._find_cuts(eqn, here)
            if cuts:
                return self._unroll_scan(eqn, here, operands, frame, cuts)
        if here in self._sites:
            self._stop_at_sites(eqn, here, operands, frame)
        elif here in self._below:
            self._stop_at_construct(eqn, here, operands, frame)
        # What is picked from params depends on params only, wherever it is picked.
        picks = name == "dynamic_slice" or (name == "gather" and here not in self._lookups)
        outputs = self._emit(
            self._keys.equation(eqn),
            lambda values: bind(eqn, values),
            operands,
            [var.aval for var in eqn.outvars],
            reads=operands[:1] if picks else None,
            lasting=bool(eqn.effects),
        )
        if operands and not self.flat.roots_of(operands):
            self._note_slices(eqn, operands, outputs)
        return outputs

    # --- stops ---------------------------------------------------------------------------------

    def _add_stop(self, frame: _UnrolledScans, *, whole: bool) -> FlatStop:
        stop = FlatStop(len(self.flat.ops), tuple(i for _, i in frame.iteration), whole)
        self.flat.stops.append(stop)
        return stop

    def _stop_at_construct(
        self, eqn: Any, here: Position, operands: Sequence[Any], frame: _UnrolledScans
    ) -> None:
        stop = self._add_stop(frame, whole=True)
        stop.visits.append(Visit(eqn, here, tuple(operands), tuple(self._below[here])))
        for site in self._below[here]:
            _narrow(stop, site, frame.picks)

    def _stop_at_sites(
        self, eqn: Any, here: Position, operands: Sequence[Any], frame: _UnrolledScans
    ) -> None:
        """Stop at a site, or let it join an earlier stop with the same activation."""
        by_source: dict[int, list[Site]] = {}
        for site in self._sites[here]:
            by_source.setdefault(site.source, []).append(site)
        for source, sites in by_source.items():
            other = 0 if sites[0].operand else 1
            stop = self._groups.get((frame.iteration, source))
            joined = list(operands)
            if stop is not None:
                first = stop.visits[0]
                joined[other] = first.operands[0 if first.sites[0].operand else 1]
            if stop is None or not self._is_ready(joined, stop):
                stop = self._groups[frame.iteration, source] = self._add_stop(frame, whole=False)
                joined = list(operands)
            stop.visits.append(Visit(eqn, here, tuple(joined), tuple(sites)))
            for site in sites:
                _narrow(stop, site, (*frame.picks, *self._slices.get(operands[site.operand], ())))

    def _is_ready(self, operands: Sequence[Any], stop: FlatStop) -> bool:
        """Tell whether all that depends on inputs is computed before an earlier stop."""
        maker = self.flat.maker
        return all(maker.get(var, -1) < stop.index for var in self.flat.roots_of(operands))

    def _note_slices(self, eqn: Any, operands: Sequence[Any], outputs: Sequence[int]) -> None:
        """Note which index of a leaf a value shows, as in the `kernel[i]` of a loop of Python."""
        found: set[Pick] = set()
        for atom in operands:
            if not isinstance(atom, Literal):
                found |= self._slices.get(atom, frozenset())
        base = None if isinstance(operands[0], Literal) else self.flat.base.get(operands[0])
        if eqn.primitive.name == "slice" and isinstance(base, LeafPart):
            start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
            path = self._paths[base.number]
            leaf = self._traced.leaves[path]
            for axis, n in enumerate(eqn.invars[0].aval.shape):
                if limit[axis] - start[axis] == 1 < n and not isinstance(leaf, tree.LeafNode):
                    found.add((path, axis, start[axis]))
        if found:
            self._slices.update(dict.fromkeys(outputs, frozenset(found)))

    # --- scans ---------------------------------------------------------------------------------

    def _find_cuts(self, eqn: Any, here: Position) -> dict[int, list[tuple[str, int]]]:
        """Find what selected leaves a scan takes apart, by operand, and along which axis.

        Without any, it is a loop over time, not over layers: it is not written out.
        """
        consts, carry = scan_counts(eqn)
        stacked = {(s.path, axis) for s in self._below[here] for axis in s.axes.stacked}
        found: dict[int, list[tuple[str, int]]] = {}
        for k, value in enumerate(self._traced.walk.operands(here)):
            for view in value.views if k >= consts + carry else ():
                leaf = self._traced.leaves[view.path]
                factors = view.axes[0]
                if isinstance(leaf, tree.LeafNode) or len(factors) != 1:
                    continue
                (factor,) = factors
                # All of one axis: iteration i then reads index i of the leaf.
                whole = factor.exact and len(factor.axes) == 1
                for axis in factor.axes if whole else ():
                    if factor.size == leaf.shape[axis] and (view.path, axis) in stacked:
                        found.setdefault(k, []).append((view.path, axis))
        return found

    def _unroll_scan(
        self,
        eqn: Any,
        here: Position,
        operands: list[Any],
        frame: _UnrolledScans,
        cuts: Mapping[int, Sequence[tuple[str, int]]],
    ) -> list[Any]:
        """Write a scan out, iteration by iteration."""
        n_consts, n_carry = scan_counts(eqn)
        body, length = normalize(eqn.params["jaxpr"]), eqn.params["length"]
        n_xs = n_consts + n_carry
        consts, carry, xs = operands[:n_consts], operands[n_consts:n_xs], operands[n_xs:]
        steps = range(length)[::-1] if eqn.params["reverse"] else range(length)
        collected: list[list[Any]] = [[None] * length for _ in body.outvars[n_carry:]]
        for i in steps:
            picks = [(path, axis, i) for leaves in cuts.values() for path, axis in leaves]
            inside = _UnrolledScans((*frame.iteration, (here, i)), (*frame.picks, *picks))
            slots = zip(body.invars[n_consts:n_xs], body.outvars, strict=False)
            carry = [
                atom if entry is left else self._keep_carry(atom, entry.aval)
                for atom, (entry, left) in zip(carry, slots, strict=True)
            ]
            slices = [
                self._slice(x, i, var.aval) for x, var in zip(xs, body.invars[n_xs:], strict=True)
            ]
            results = self.flatten(body, [*consts, *carry, *slices], (*here, 0), inside)
            carry = results[:n_carry]
            for rows, y in zip(collected, results[n_carry:], strict=True):
                rows[i] = y
        stacked = [
            self._stack(rows, var.aval)
            for rows, var in zip(collected, eqn.outvars[n_carry:], strict=True)
        ]
        return [*carry, *stacked]

    def _keep_carry(self, atom: Any, aval: Any) -> int:
        """Keep a carry, even one of params only: its history would grow with each iteration."""

        def run(values: Sequence[Any]) -> list[Any]:
            return [_literal_to_array(values[0], aval)]

        return self._emit(self._keys.number(("carry", aval)), run, [atom], [aval], kept=True)[0]

    def _slice(self, atom: Any, i: int, aval: Any) -> int:
        def run(values: Sequence[Any]) -> list[Any]:
            return [lax.dynamic_index_in_dim(*values, axis=0, keepdims=False)]

        # The index is an argument: all iterations are one computation.
        index = self._constant(np.int32(i), jax.typeof(np.int32(i)), ("index", i))
        return self._emit(self._keys.number(("slice", aval)), run, [atom, index], [aval])[0]

    def _stack(self, atoms: Sequence[Any], aval: Any) -> int:
        def run(values: Sequence[Any]) -> list[Any]:
            return [jnp.stack([_literal_to_array(x, aval) for x in values])]

        return self._emit(self._keys.number(("stack", aval)), run, atoms, [aval])[0]


def _literal_to_array(x: Any, aval: Any) -> jax.Array:
    """Make an array of a literal."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x, aval.dtype)


def _narrow(stop: FlatStop, site: Site, picks: Iterable[Pick]) -> None:
    """Note what a site reads of its leaf; a stop has the slice that all its sites share."""
    cut = {*site.axes.stacked, *site.axes.sliced}
    mine = {(axis, i) for path, axis, i in picks if path == site.path and axis in cut}
    axes = [axis for axis, _ in mine]
    mine = {(axis, i) for axis, i in mine if axes.count(axis) == 1}
    before = stop.picks.get(site.path)
    stop.picks[site.path] = dict(mine if before is None else mine & set(before.items()))
