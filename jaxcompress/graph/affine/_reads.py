"""What each variable of fn reads: which leaves, or fn's inputs; and the values of the former."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._compat import Program
from jaxcompress.graph.program._constructs import Role, construct, is_call
from jaxcompress.graph.program._interpret import (
    Domain,
    Frame,
    Place,
    Position,
    Walk,
    interpret,
)
from jaxcompress.graph.program._live import Live, equation_steps, live, variables
from jaxcompress.graph.program._primitives import ELEMENTWISE, MOVES, PASSES, arrange
from jaxcompress.graph.sites._trace import Traced

Slot: TypeAlias = tuple[Position, int]
"""Operand k of the equation at a position; or result k of the body at one (of even length)."""


class Known(NamedTuple):
    """What a variable is that does not depend on fn's inputs; `None` stands for one that does.

    Attributes:
        leaves: The leaves that it is computed from.
        linear: Leaves of which, entry by entry, it is a multiple: zero where they are.
        same: The leaf whose entries it has, rearranged, repeated or cast.
        constant: Axes along which its entries are known to be equal.
        levels: The scans, by position, that take it apart: it differs between their iterations.
    """

    leaves: frozenset[str] = frozenset()
    linear: frozenset[str] = frozenset()
    same: str | None = None
    constant: frozenset[int] = frozenset()
    levels: frozenset[Position] = frozenset()


@dataclass
class Reads:
    """What the variables of a captured call read.

    Attributes:
        walk: What each of them is; `None` for what depends on fn's inputs.
        contacts: For each leaf, where it meets what depends on fn's inputs, or is returned.
        paths: The leaf of each of the first arguments.
    """

    walk: Walk[Known | None]
    contacts: Mapping[str, set[Slot]]
    paths: tuple[str, ...]
    _readers: dict[Position, dict[Any, list[int]]] = field(default_factory=dict, repr=False)

    def program(self, prefix: Position) -> Program:
        """Give the program of a body."""
        return self.walk.bodies[prefix].program

    def readers(self, prefix: Position, var: Any) -> list[int]:
        """List the equations of a body that read a variable, by number."""
        if prefix not in self._readers:
            found = self._readers[prefix] = collections.defaultdict(list)
            for number, eqn in enumerate(self.program(prefix).eqns):
                for atom in set(variables(eqn.invars)):
                    found[atom].append(number)
        return self._readers[prefix].get(var, [])

    def scans(self, position: Position) -> list[Position]:
        """List the scans around a position, outermost first."""
        around = [position[:k] for k in range(1, len(position), 2)]
        return [p for p in around if self.walk.equation(p).primitive.name == "scan"]

    def evaluate(
        self, leaves: Mapping[str, Any], wanted: Iterable[Slot], *, moves_only: bool = False
    ) -> dict[Slot, Any]:
        """Compute known values from leaves; equations that they do not need are not run.

        Args:
            leaves: `{path: leaf}`; those that are not needed may be missing.
            wanted: Slots of known values.
            moves_only: Take leaves of any dtype through rearrangements alone, without casts.

        Returns:
            The values, with the enclosing scans as leading axes.
        """
        parts = collections.defaultdict(
            list, {path: jax.tree.leaves(leaf) for path, leaf in leaves.items()}
        )
        env = {}
        for var, path in zip(self.program(()).invars, self.paths, strict=False):
            if parts[path]:
                env[var] = parts[path].pop(0)
        return _Evaluation(self, moves_only).run((), env, set(wanted))


def read_all(traced: Traced) -> Reads:
    """Follow leaves and inputs forward through a captured call, once."""
    return traced.derive("reads", lambda: _read_all(traced))


def _read_all(traced: Traced) -> Reads:
    domain, args, paths = _Reading(), list[Known | None](), traced.part_paths
    for path in paths:
        mine = frozenset({path})
        quantized = isinstance(traced.leaves[path], tree.LeafNode)
        args.append(Known(mine) if quantized else Known(mine, mine, path))
    args += [None] * (len(traced.program.invars) - len(args))
    walk = interpret(traced.program, args, domain)
    for k, result in enumerate(walk.results):
        domain.touch(result, (), k)
    return Reads(walk, domain.contacts, tuple(paths))


class _Reading(Domain[Known | None]):
    """Follows what is computed from leaves alone; `None` is what depends on fn's inputs."""

    def __init__(self) -> None:
        self.contacts: dict[str, set[Slot]] = collections.defaultdict(set)

    def touch(self, value: Known | None, position: Position, k: int) -> None:
        for path in value.leaves if value is not None else ():
            self.contacts[path].add((position, k))

    def constant(self, var: Any, value: Any, place: Place) -> Known:
        return Known()

    def literal(self, atom: Any) -> Known:
        return Known(constant=frozenset(range(jnp.ndim(atom.val))))

    def equation(
        self, eqn: Any, operands: Sequence[Known | None], here: Position, place: Place
    ) -> Sequence[Known | None]:
        if eqn.primitive.name in PASSES:
            return operands
        known = [value for value in operands if value is not None]
        if len(known) == len(operands):
            return [_result(eqn, known, k) for k in range(len(eqn.outvars))]
        for k, value in enumerate(operands):
            self.touch(value, here, k)
        return [None] * len(eqn.outvars)

    # --- constructs: those that inputs enter give nothing known back, unless they are inline -----

    def enters(self, eqn: Any, operands: Sequence[Known | None], here: Position) -> bool:
        name = eqn.primitive.name
        return is_call(name) or (None in operands and name != "shard_map")

    def feed(
        self, value: Known | None, k: int, role: Role, frame: Frame[Known | None]
    ) -> Known | None:
        if role == "carry":
            self.touch(value, frame.here, frame.body.inputs[k][0])
            return None
        if role == "slice" and value is not None:
            rest = frozenset(axis - 1 for axis in value.constant if axis > 0)
            return value._replace(constant=rest, levels=value.levels | {frame.here})
        return value

    def leave(self, frame: Frame[Known | None]) -> None:
        fed = {k for k, _ in frame.body.inputs}
        for k, value in enumerate(frame.operands):
            if k not in fed:  # what chooses a branch
                self.touch(value, frame.here, k)

    def give(
        self, value: Known | None, k: int, role: Role, frame: Frame[Known | None]
    ) -> Known | None:
        if is_call(frame.eqn.primitive.name):
            return value
        self.touch(value, frame.place.position, k)
        return None


def _result(eqn: Any, operands: Sequence[Known], k: int) -> Known:
    """Say what result `k` of an equation on known operands is."""
    name, out = eqn.primitive.name, eqn.outvars[k].aval
    leaves = frozenset[str]().union(*(value.leaves for value in operands))
    levels = frozenset[Position]().union(*(value.levels for value in operands))
    plain = Known(leaves, levels=levels)
    if not hasattr(out, "dtype") or not jnp.issubdtype(out.dtype, jnp.inexact):
        return plain
    if name in MOVES:
        return operands[0]._replace(constant=_move(eqn, operands[0].constant))
    if name not in ELEMENTWISE:
        return plain
    constant = frozenset(range(len(out.shape)))
    for atom, value in zip(eqn.invars, operands, strict=True):
        shape = atom.aval.shape
        ones = {axis for axis in constant if not shape or shape[axis] == 1}
        constant &= value.constant | ones
    linear = frozenset()
    if name == "neg":
        linear = operands[0].linear
    elif name == "mul":
        first, second = operands
        linear = (first.linear - second.leaves) | (second.linear - first.leaves)
    elif name == "div":
        linear = operands[0].linear - operands[1].leaves
    return plain._replace(linear=linear, constant=constant)


def _move(eqn: Any, constant: frozenset[int]) -> frozenset[int]:
    """Find the constant axes of an array that was rearranged."""
    source, target = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    flags = [k in constant or n == 1 for k, n in enumerate(source)]
    if eqn.primitive.name == "reshape":
        long = [k for k, n in enumerate(source) if n != 1]
        now = [k for k, n in enumerate(target) if n != 1]
        if [source[k] for k in long] != [target[k] for k in now]:
            return frozenset()
        return frozenset(t for k, t in zip(long, now, strict=True) if k in constant)
    moved = arrange(eqn, flags, lambda n: True)
    return constant if moved is None else frozenset(k for k, flag in enumerate(moved) if flag)


class _Evaluation:
    """One computation of known values, level by level."""

    def __init__(self, reads: Reads, moves_only: bool):
        self._reads, self._moves_only = reads, moves_only

    def run(self, prefix: Position, env: dict[Any, Any], wanted: set[Slot]) -> dict[Slot, Any]:
        program, depth = self._reads.program(prefix), len(prefix)
        env = {**env, **dict(zip(program.constvars, program.consts, strict=False))}
        outputs = [k for position, k in wanted if position == prefix]
        here = {(p[depth], k) for p, k in wanted if len(p) == depth + 1}
        below = collections.defaultdict[int, set[Slot]](set)
        for position, k in wanted:
            if len(position) > depth + 1:
                below[position[depth]].add((position, k))
        atoms = [program.eqns[number].invars[k] for number, k in here]
        needed = self._needed(prefix, [*atoms, *(program.outvars[k] for k in outputs)], below)

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, _compat.Literal) else env.get(atom)

        found: dict[Slot, Any] = {}
        for number in needed:
            eqn = program.eqns[number]
            operands = [read(atom) for atom in eqn.invars]
            if number in below:
                inside = self._enter((*prefix, number), eqn, operands, below[number])
                body = (*prefix, number, 0)
                for k, var in enumerate(eqn.outvars):
                    if (body, k) in inside:
                        env[var] = inside.pop((body, k))
                found |= inside
            elif eqn.primitive.name in PASSES:
                env.update(zip(eqn.outvars, operands, strict=True))
            elif not any(x is None for x in operands):
                env.update(zip(eqn.outvars, self._bind(eqn, operands), strict=True))
        found |= {
            ((*prefix, number), k): read(program.eqns[number].invars[k]) for number, k in here
        }
        return found | {(prefix, k): read(program.outvars[k]) for k in outputs}

    def _needed(
        self, prefix: Position, atoms: Sequence[Any], below: dict[int, set[Slot]]
    ) -> list[int]:
        """List the equations to run; results wanted of an inline body are added to `below`."""
        program, values = self._reads.walk.bodies[prefix]

        def reads(number: int, found: Live) -> list[Any]:
            eqn = program.eqns[number]
            if is_call(eqn.primitive.name):
                results = [k for k, var in enumerate(eqn.outvars) if var in found.last]
                below[number] |= {((*prefix, number, 0), k) for k in results}
            return [var for var in variables(eqn.invars) if values[var] is not None]

        steps = [
            step._replace(lasts=number in below)
            for number, step in enumerate(equation_steps(program))
        ]
        return live(steps, variables(atoms), reads).numbers

    def _enter(
        self, here: Position, eqn: Any, operands: Sequence[Any], wanted: set[Slot]
    ) -> dict[Slot, Any]:
        rule = construct(eqn.primitive.name)
        assert rule is not None
        found: dict[Slot, Any] = {}
        for number, body in enumerate(rule.bodies(eqn)):
            prefix = (*here, number)
            mine = {slot for slot in wanted if slot[0][: len(prefix)] == prefix}
            if not mine:
                continue
            invars = self._reads.program(prefix).invars
            given = [
                (var, operands[k], role)
                for var, (k, role) in zip(invars, body.inputs, strict=True)
                if operands[k] is not None and role != "carry"
            ]
            env = {var: x for var, x, role in given if role == "same"}
            if not body.stack:
                found |= self.run(prefix, env, mine)
                continue
            sliced = [(var, x) for var, x, role in given if role == "slice"]
            (length,) = body.stack

            def layer(_: Any, xs: Sequence[Any], env=env, sliced=sliced, prefix=prefix, mine=mine):
                names = [var for var, _ in sliced]
                return self.run(prefix, {**env, **dict(zip(names, xs, strict=True))}, mine)

            found |= jax.vmap(layer)(jnp.arange(length), [x for _, x in sliced])
        return found

    def _bind(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name == "stop_gradient" or (self._moves_only and name == "convert_element_type"):
            return list(operands)  # so that the leaf can be solved for, in its own dtype
        return _compat.bind(eqn, operands)
