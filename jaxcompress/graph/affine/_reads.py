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
from jaxcompress.graph.program._constructs import Body, construct
from jaxcompress.graph.sites._views import ELEMENTWISE, MOVES
from jaxcompress.graph.sites._walk import Position

Slot: TypeAlias = tuple[Position, int]
"""Operand k of the equation at a position; or result k of the body at one (of even length)."""

INLINE = frozenset({"jit", "remat2"})
"""Constructs whose operands and results are those of their one body."""


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
    """The result of `read_all` on a program.

    Attributes:
        programs: The program of each body that was entered, by position; fn's own at `()`.
        known: For each of them, what its variables are.
        contacts: For each leaf, where it meets what depends on fn's inputs, or is returned.
        paths: The leaf of each of the first arguments.
    """

    programs: dict[Position, Program] = field(default_factory=dict)
    known: dict[Position, dict[Any, Known | None]] = field(default_factory=dict)
    contacts: dict[str, set[Slot]] = field(default_factory=lambda: collections.defaultdict(set))
    paths: tuple[str, ...] = ()
    _readers: dict[Position, dict[Any, list[int]]] = field(default_factory=dict, repr=False)

    def readers(self, prefix: Position, var: Any) -> list[int]:
        """List the equations of a body that read a variable, by number."""
        if prefix not in self._readers:
            found = self._readers[prefix] = collections.defaultdict(list)
            for number, eqn in enumerate(self.programs[prefix].eqns):
                for atom in {a for a in eqn.invars if not isinstance(a, _compat.Literal)}:
                    found[atom].append(number)
        return self._readers[prefix].get(var, [])

    def at(self, prefix: Position, atom: Any) -> Known | None:
        """Say what a variable or literal is."""
        if isinstance(atom, _compat.Literal):
            return Known(constant=frozenset(range(jnp.ndim(atom.val))))
        return self.known[prefix][atom]

    def equation(self, position: Position) -> Any:
        """Find an equation by its position."""
        return self.programs[position[:-1]].eqns[position[-1]]

    def scans(self, position: Position) -> list[Position]:
        """List the scans around a position, outermost first."""
        around = [position[:k] for k in range(1, len(position), 2)]
        return [p for p in around if self.equation(p).primitive.name == "scan"]

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
        for var, path in zip(self.programs[()].invars, self.paths, strict=False):
            if parts[path]:
                env[var] = parts[path].pop(0)
        return _Evaluation(self, moves_only).run((), env, set(wanted))


def read_all(program: Program, leaves: Mapping[str, Any]) -> Reads:
    """Follow leaves and inputs forward through a program whose first arguments are the leaves."""
    reads, args = Reads(), []
    for path, leaf in leaves.items():
        parts, mine = jax.tree.leaves(leaf), frozenset({path})
        whole = not isinstance(leaf, tree.LeafNode)
        one = Known(mine, mine if whole else frozenset(), path if whole else None)
        args += [one] * len(parts)
        reads.paths += (path,) * len(parts)
    args += [None] * (len(program.invars) - len(args))
    for k, result in enumerate(_read(reads, program, args, ())):
        _touch(reads, result, (), k)
    return reads


def _touch(reads: Reads, value: Known | None, position: Position, k: int) -> None:
    for path in value.leaves if value is not None else ():
        reads.contacts[path].add((position, k))


def _read(
    reads: Reads, program: Program, args: Sequence[Known | None], prefix: Position
) -> list[Known | None]:
    env: dict[Any, Known | None] = dict.fromkeys(program.constvars, Known())
    env.update(zip(program.invars, args, strict=True))
    reads.programs[prefix], reads.known[prefix] = program, env
    for number, eqn in enumerate(program.eqns):
        here = (*prefix, number)
        operands = [reads.at(prefix, atom) for atom in eqn.invars]
        rule, name = construct(eqn.primitive.name), eqn.primitive.name
        mixed = any(value is None for value in operands)
        if name in INLINE:
            assert rule is not None
            (body,) = rule.bodies(eqn)
            results = _read(reads, body.program, operands, (*here, 0))
        elif rule is not None and mixed and name != "shard_map":
            for k, body in enumerate(rule.bodies(eqn)):
                _enter(reads, body, operands, here, k)
            results = [None] * len(eqn.outvars)
        elif mixed:
            for k, value in enumerate(operands):
                _touch(reads, value, here, k)
            results = [None] * len(eqn.outvars)
        else:
            known = [value for value in operands if value is not None]
            results = [_result(eqn, known, k) for k in range(len(eqn.outvars))]
        env.update(zip(eqn.outvars, results, strict=True))
    return [reads.at(prefix, atom) for atom in program.outvars]


def _enter(
    reads: Reads, body: Body, operands: Sequence[Known | None], here: Position, number: int
) -> None:
    """Read a body that gives nothing known back: a loop, a branch, a rule of differentiation."""
    args, fed = [], set()
    for k, role in body.inputs:
        fed.add(k)
        value = operands[k]
        if role == "carry":
            _touch(reads, value, here, k)
            value = None
        elif role == "slice" and value is not None:
            rest = frozenset(axis - 1 for axis in value.constant if axis > 0)
            value = value._replace(constant=rest, levels=value.levels | {here})
        args.append(value)
    for k, value in enumerate(operands):
        if k not in fed:  # what chooses a branch
            _touch(reads, value, here, k)
    position = (*here, number)
    for k, result in enumerate(_read(reads, body.program, args, position)):
        _touch(reads, result, position, k)


def _result(eqn: Any, operands: Sequence[Known], k: int) -> Known:
    """Say what result `k` of an equation on known operands is."""
    name, out = eqn.primitive.name, eqn.outvars[k].aval
    if name == "optimization_barrier":
        return operands[k]
    leaves = frozenset[str]().union(*(value.leaves for value in operands))
    levels = frozenset[Position]().union(*(value.levels for value in operands))
    plain = Known(leaves, levels=levels)
    if not hasattr(out, "dtype") or not jnp.issubdtype(out.dtype, jnp.inexact):
        return plain
    if name in MOVES:
        return operands[0]._replace(constant=_moved(eqn, operands[0].constant))
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


def _moved(eqn: Any, constant: frozenset[int]) -> frozenset[int]:
    """Find the constant axes of an array that was rearranged."""
    name, params = eqn.primitive.name, eqn.params
    source, target = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if name == "broadcast_in_dim":
        kept = params["broadcast_dimensions"]
        differs = {
            t for k, t in enumerate(kept) if k not in constant and source[k] == target[t] != 1
        }
        return frozenset(range(len(target))) - differs
    if name == "transpose":
        return frozenset(i for i, k in enumerate(params["permutation"]) if k in constant)
    if name == "reshape" or name == "squeeze":
        long = [k for k, n in enumerate(source) if n != 1]
        now = [k for k, n in enumerate(target) if n != 1]
        if [source[k] for k in long] != [target[k] for k in now]:
            return frozenset()
        return frozenset(t for k, t in zip(long, now, strict=True) if k in constant)
    return constant


class _Evaluation:
    """One computation of known values, level by level."""

    def __init__(self, reads: Reads, moves_only: bool):
        self._reads, self._moves_only = reads, moves_only

    def run(self, prefix: Position, env: dict[Any, Any], wanted: set[Slot]) -> dict[Slot, Any]:
        program, depth = self._reads.programs[prefix], len(prefix)
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
        program, numbers = self._reads.programs[prefix], []
        needed = {atom for atom in atoms if not isinstance(atom, _compat.Literal)}
        for number in reversed(range(len(program.eqns))):
            eqn = program.eqns[number]
            results = [k for k, var in enumerate(eqn.outvars) if var in needed]
            if eqn.primitive.name in INLINE:
                below_here = {((*prefix, number, 0), k) for k in results}
                if below_here:
                    below[number] |= below_here
            if results or number in below:
                numbers.append(number)
                needed |= {
                    atom
                    for atom in eqn.invars
                    if not isinstance(atom, _compat.Literal)
                    and self._reads.known[prefix][atom] is not None
                }
        return numbers[::-1]

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
            invars = self._reads.programs[prefix].invars
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
