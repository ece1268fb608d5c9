"""The walk over a program: one interpreter, and domains that say what values are.

An abstract interpreter runs a program on descriptions of values, such as which leaf a variable
shows, or which indices its axes have. `interpret` goes through the equations, enters constructs,
and walks loops until what they carry is settled; a `Domain` says what becomes of a value.
"""

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._compat import Program
from jaxcompress.graph.program._constructs import Body, Role, construct

Value = TypeVar("Value")
Position: TypeAlias = tuple[int, ...]
"""An equation's address: equation and body numbers in turn, from the outermost program in."""


@dataclass(frozen=True)
class Place:
    """Where in the nest of constructs a body is.

    Attributes:
        position: Its address; of even length.
        scope: The constructs around it, outermost first.
        stack: Lengths of the scans around it, outermost first.
        repeats: How often it runs in one call.
        bounded: Whether that is known.
        branch: The branches that it is in, outermost first: `(position of the cond, number)`.
    """

    position: Position = ()
    scope: tuple[str, ...] = ()
    stack: tuple[int, ...] = ()
    repeats: int = 1
    bounded: bool = True
    branch: tuple[tuple[Position, int], ...] = ()

    def inside(self, here: Position, number: int, body: Body) -> "Place":
        """Give the place of a body of the construct at a position."""
        return Place(
            position=(*here, number),
            scope=(*self.scope, body.label),
            stack=(*self.stack, *body.stack),
            repeats=self.repeats * body.repeats,
            bounded=self.bounded and body.bounded,
            branch=(*self.branch, (here, number)) if body.branch else self.branch,
        )


@dataclass
class Frame(Generic[Value]):
    """One body of a construct, as it is walked.

    Attributes:
        eqn: The construct.
        body: The body.
        operands: The values of the construct's operands.
        place: Where the body is.
        args: The values of the body's arguments.
    """

    eqn: Any
    body: Body
    operands: Sequence[Value]
    place: Place
    args: list[Value] = field(default_factory=list)

    @property
    def here(self) -> Position:
        """The position of the construct."""
        return self.place.position[:-1]

    @property
    def carries(self) -> Iterator[tuple[int, int]]:
        """Pairs of an argument and the result that is handed to it in the next iteration."""
        given = (k for k, (_, role) in enumerate(self.body.inputs) if role == "carry")
        made = (k for k, (_, role) in enumerate(self.body.results) if role == "carry")
        return zip(given, made, strict=False)


class Domain(abc.ABC, Generic[Value]):
    """What an interpretation is about; a subclass says what its values are.

    Methods get the place of the body that they are asked for, and for an equation its position.
    """

    def begin(self, program: Program, place: Place) -> None:
        """Note that a body is about to be walked."""

    @abc.abstractmethod
    def constant(self, var: Any, value: Any, place: Place) -> Value:
        """Say what a constant of a program is."""

    @abc.abstractmethod
    def literal(self, atom: Any) -> Value:
        """Say what a literal is."""

    @abc.abstractmethod
    def equation(
        self, eqn: Any, operands: Sequence[Value], here: Position, place: Place
    ) -> Sequence[Value]:
        """Say what the results of an equation are, or of a construct that is not entered."""

    # --- constructs -----------------------------------------------------------------------------

    def enters(self, eqn: Any, operands: Sequence[Value], here: Position) -> bool:
        """Tell whether the bodies of a construct are walked."""
        return True

    def enter(self, frame: Frame[Value]) -> None:
        """Note that a body of a construct is entered."""

    def feed(self, value: Value, k: int, role: Role, frame: Frame[Value]) -> Value:
        """Say what argument `k` of a body is, given the operand that feeds it."""
        return value

    def carry(self, before: Value, after: Value, frame: Frame[Value]) -> Value:
        """Say what a carry is that was this and comes round as that.

        Give `before` itself where nothing changed: for any other object the body is walked again.
        """
        return before

    def again(self, frame: Frame[Value]) -> None:
        """Note that a body is walked again: what was found in it before is void."""

    def leave(self, frame: Frame[Value]) -> None:
        """Note that a body has been walked, and what it carries is settled."""

    def give(self, value: Value, k: int, role: Role, frame: Frame[Value]) -> Value:
        """Say what result `k` of a body is as a result of the construct."""
        return value

    def join(self, earlier: Value, later: Value, frame: Frame[Value]) -> Value:
        """Say what a result of a construct is that several bodies give."""
        return earlier

    def end(
        self, eqn: Any, operands: Sequence[Value], results: list[Value], here: Position
    ) -> list[Value]:
        """Say what the results of a construct are when all its bodies have been walked."""
        return results


class Walked(NamedTuple):
    """A body that was walked, and the values of its variables."""

    program: Program
    values: dict[Any, Any]


@dataclass
class Walk(Generic[Value]):
    """What a walk went through.

    Attributes:
        domain: What it was about.
        bodies: The program of each body that was entered, with the values of its variables, by
            position; the outermost at `()`.
        results: The values of the outermost program's results.
    """

    domain: Domain[Value]
    bodies: dict[Position, Walked] = field(default_factory=dict)
    results: list[Value] = field(default_factory=list)

    def equation(self, position: Position) -> Any:
        """Find an equation by its position."""
        return self.bodies[position[:-1]].program.eqns[position[-1]]

    def read(self, prefix: Position, atom: Any) -> Value:
        """Give the value of a variable or literal of a body."""
        if isinstance(atom, _compat.Literal):
            return self.domain.literal(atom)
        return self.bodies[prefix].values[atom]

    def operands(self, position: Position) -> list[Value]:
        """Give the values of an equation's operands."""
        return [self.read(position[:-1], atom) for atom in self.equation(position).invars]


def interpret(
    program: Program, args: Sequence[Value], domain: Domain[Value], place: Place | None = None
) -> Walk[Value]:
    """Walk a program.

    Args:
        program: The program.
        args: The values of its arguments.
        domain: What values are.
        place: Where it is; the outermost by default.

    Returns:
        The values of all variables.
    """
    walk = Walk(domain)
    walk.results = _walk_body(program, args, place or Place(), walk)
    return walk


def _walk_body(
    program: Program, args: Sequence[Value], place: Place, walk: Walk[Value]
) -> list[Value]:
    domain, values = walk.domain, dict[Any, Value](zip(program.invars, args, strict=True))
    walk.bodies[place.position] = Walked(program, values)
    domain.begin(program, place)
    for var, constant in zip(program.constvars, program.consts, strict=True):
        values[var] = domain.constant(var, constant, place)
    for number, eqn in enumerate(program.eqns):
        here = (*place.position, number)
        operands = [walk.read(place.position, atom) for atom in eqn.invars]
        rule = construct(eqn.primitive.name)
        if rule is None or not domain.enters(eqn, operands, here):
            results = domain.equation(eqn, operands, here, place)
        else:
            results = _construct(eqn, rule.bodies(eqn), operands, here, place, walk)
        values.update(zip(eqn.outvars, results, strict=True))
    return [walk.read(place.position, atom) for atom in program.outvars]


def _construct(
    eqn: Any,
    bodies: Sequence[Body],
    operands: list[Value],
    here: Position,
    place: Place,
    walk: Walk[Value],
) -> list[Value]:
    domain, results = walk.domain, dict[int, Value]()
    seen = list(operands)  # by the next body: a condition reads what is carried in the end
    for number, body in enumerate(bodies):
        frame = Frame(eqn, body, seen, place.inside(here, number, body))
        domain.enter(frame)
        frame.args = [
            domain.feed(seen[k], i, role, frame) for i, (k, role) in enumerate(body.inputs)
        ]
        outs = _settle(frame, walk)
        domain.leave(frame)
        for k, ((target, role), value) in enumerate(zip(body.results, outs, strict=True)):
            if target is None:
                continue
            value = domain.give(value, k, role, frame)
            known = target in results
            results[target] = domain.join(results[target], value, frame) if known else value
        seen = list(seen)
        for i, _ in frame.carries:
            seen[body.inputs[i][0]] = frame.args[i]
    assert len(results) == len(eqn.outvars), f"{eqn.primitive.name} gives a result of no body"
    return domain.end(eqn, operands, [results[k] for k in range(len(results))], here)


def _settle(frame: Frame[Value], walk: Walk[Value]) -> list[Value]:
    """Walk a body until what it carries round is what it was given; returns its results."""
    domain = walk.domain
    while True:
        outs = _walk_body(frame.body.program, frame.args, frame.place, walk)
        settled = True
        for i, j in frame.carries:
            before = frame.args[i]
            frame.args[i] = domain.carry(before, outs[j], frame)
            settled = settled and frame.args[i] is before
        if settled:
            return outs
        domain.again(frame)


def equations(program: Program, position: Position = ()) -> Iterator[tuple[Position, Any]]:
    """Iterate over the equations of a program and of all bodies in it, a construct before these.

    Args:
        program: The program.
        position: Where it is.

    Yields:
        Pairs of a position and the equation there.
    """
    for number, eqn in enumerate(program.eqns):
        here = (*position, number)
        yield here, eqn
        rule = construct(eqn.primitive.name)
        for k, body in enumerate(rule.bodies(eqn) if rule is not None else ()):
            yield from equations(body.program, (*here, k))
