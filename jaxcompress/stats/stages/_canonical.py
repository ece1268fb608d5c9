"""Structural keys: equal for programs that do the same, whatever their variables are called.

Layers that are written out one by one give equations that differ in nothing but the names of
their variables. `Keys` tells that they are equal, and `Shared` compiles what is equal once.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress.graph.program import (
    NOTHING,
    Literal,
    Program,
    capture_program,
    equation_steps,
    has_own_rule,
    is_jaxpr,
    live,
    normalize,
    run_program,
    variables,
)


class Same:
    """An object that equals only itself, for what cannot be compared."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Keys:
    """Numbers for equations and programs: equal numbers for equal structure.

    A key holds what it compares, so that no address is used again while numbers are in use.
    """

    def __init__(self):
        self._numbers: dict[Hashable, int] = {}
        self._seen: dict[int, tuple[Any, int]] = {}  # by address: scans run one equation often

    def number(self, key: Hashable) -> int:
        """Give the number of any hashable key."""
        return self._numbers.setdefault(key, len(self._numbers))

    def equation(self, eqn: Any) -> int:
        """Give the number of an equation, its operands left aside."""
        known = self._seen.get(id(eqn))
        if known is None:
            params = eqn.params
            if has_own_rule(eqn.primitive.name):  # the rules matter under differentiation only
                params = {"call_jaxpr": params["call_jaxpr"]}
            key = (
                eqn.primitive,
                tuple((name, self._value(value)) for name, value in sorted(params.items())),
                eqn.ctx,
                tuple(var.aval for var in eqn.outvars),
            )
            known = self._seen[id(eqn)] = (eqn, self.number(key))
        return known[1]

    def program(self, program: Program) -> int:
        """Give the number of a program with its constants."""
        names: dict[Any, int] = {}

        def define(atoms: Sequence[Any]) -> tuple:
            for var in atoms:
                names[var] = len(names)
            return tuple(var.aval for var in atoms)

        def read(atom: Any) -> Hashable:
            return self.literal(atom) if isinstance(atom, Literal) else names[atom]

        key: list[Hashable] = [
            define(program.constvars),
            tuple(self._value(value) for value in program.consts),
            define(program.invars),
        ]
        for eqn in program.eqns:
            key.append((self.equation(eqn), tuple(map(read, eqn.invars))))
            define(eqn.outvars)
        key.append(tuple(map(read, program.outvars)))
        return self.number(("program", *key))

    def literal(self, atom: Any) -> Hashable:
        """Describe a literal by type and bits: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
        return "literal", atom.aval, np.asarray(atom.val).tobytes()

    def _value(self, value: Any) -> Hashable:
        if is_jaxpr(value):
            return "jaxpr", self.program(normalize(value))
        if isinstance(value, tuple | list):
            return type(value), tuple(map(self._value, value))
        if isinstance(value, dict):
            return "dict", tuple((k, self._value(v)) for k, v in sorted(value.items()))
        if isinstance(value, np.ndarray | np.generic):
            return type(value), value.shape, value.dtype, value.tobytes()
        if isinstance(value, float):
            return float, value.hex()
        try:
            hash(value)
        except TypeError:
            return Same(value)
        return type(value), value


class Op(NamedTuple):
    """A step of a flat program.

    Attributes:
        key: Its number in `Keys`.
        run: `operands -> results`, traceable.
        inputs: Numbers of variables, or literals.
        outputs: Numbers of variables.
    """

    key: int
    run: Callable[[Sequence[Any]], list[Any]]
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]


class CompiledSteps(NamedTuple):
    """A function that runs steps, and the variables it takes, in order."""

    function: Callable[..., list[Any]]
    inputs: tuple[int, ...]


class Shared:
    """Compiles steps, once for all that are equal but for the numbers of their variables."""

    def __init__(self, keys: Keys):
        self.keys = keys
        self.functions: dict[Hashable, Callable[..., list[Any]]] = {}

    def compile(
        self,
        ops: Sequence[Op],
        outputs: Sequence[int],
        avals: Callable[[int], Any],
        *,
        donated: frozenset[int] = frozenset(),
        sharding: jax.sharding.Sharding | None = None,
    ) -> CompiledSteps:
        """Make a jitted function of the variables that `ops` read and do not compute.

        Args:
            ops: The steps, in order.
            outputs: The variables to return.
            avals: Variable to its abstract value.
            donated: Variables whose arrays are used up.
            sharding: Of all results, if not what the compiler likes.
        """
        names: dict[int, int] = {}
        inputs: list[int] = []

        def name(atom: Any) -> Any:
            if isinstance(atom, Literal):
                return atom
            if atom not in names:
                names[atom] = len(names)
                inputs.append(atom)
            return names[atom]

        rows = []
        for op in ops:
            read = tuple(map(name, op.inputs))
            for var in op.outputs:
                names[var] = len(names)
            rows.append((op, read, tuple(names[var] for var in op.outputs)))
        results = tuple(map(name, outputs))
        taken = tuple(names[var] for var in inputs)
        donate = tuple(k for k, var in enumerate(inputs) if var in donated)
        key = (
            tuple((op.key, tuple(map(self._ref, read)), made) for op, read, made in rows),
            results,
            tuple((names[var], avals(var)) for var in inputs),
            donate,
            sharding,
        )
        if key not in self.functions:
            stage = functools.partial(_run_rows, rows, taken, results)
            self.functions[key] = jax.jit(stage, donate_argnums=donate, out_shardings=sharding)
        return CompiledSteps(self.functions[key], tuple(inputs))

    def _ref(self, atom: Any) -> Hashable:
        return self.keys.literal(atom) if isinstance(atom, Literal) else atom

    def call(
        self, f: Callable[..., Any], *args: Any, sharding: jax.sharding.Sharding | None = None
    ) -> Any:
        """Call `f(*args)` jitted, compiled once for all functions that do the same."""
        program, shapes = capture_program(f, args)
        given = jax.tree.leaves(args)
        op = program_op(self.keys, program, range(len(given)), range(len(given), 10**9))
        compiled = self.compile([op], op.outputs, lambda k: jax.typeof(given[k]), sharding=sharding)
        results = compiled.function(*(given[k] for k in compiled.inputs))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _run_rows(
    rows: Sequence[tuple[Op, tuple, tuple]],
    taken: Sequence[int],
    results: Sequence[int],
    *args: Any,
) -> list[Any]:
    env = dict(zip(taken, args, strict=True))
    for op, read, made in rows:
        operands = [a.val if isinstance(a, Literal) else env[a] for a in read]
        env.update(zip(made, op.run(operands), strict=True))
    return [env[name] for name in results]


def program_op(keys: Keys, program: Program, inputs: Sequence[Any], numbers: Sequence[int]) -> Op:
    """Make one step of a program, without the equations and arguments that nothing needs."""
    program, used = _prune(program)
    outputs = tuple(numbers[k] for k in range(len(program.outvars)))
    run = lambda args: run_program(program, args, NOTHING, {})[0]
    return Op(keys.program(program), run, tuple(inputs[k] for k in used), outputs)


def _prune(program: Program) -> tuple[Program, list[int]]:
    """Drop dead equations and arguments; returns the program and the arguments kept."""
    alive, needed = live(equation_steps(program), variables(program.outvars))
    consts = [(v, c) for v, c in zip(program.constvars, program.consts, strict=True) if v in needed]
    used = [k for k, var in enumerate(program.invars) if var in needed]
    pruned = Program(
        invars=tuple(program.invars[k] for k in used),
        constvars=tuple(v for v, _ in consts),
        consts=tuple(c for _, c in consts),
        eqns=tuple(program.eqns[number] for number in alive),
        outvars=program.outvars,
    )
    return pruned, used
