"""Running a program with chosen equations visited, and everything else bound as it is."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.errors import ArgumentError
from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._compat import Primitive, Program
from jaxcompress.graph.program._constructs import Cells, Construct, construct
from jaxcompress.graph.program._interpret import Position
from jaxcompress.graph.program._live import equation_steps, live, variables


@dataclass(frozen=True)
class Equation:
    """One equation of fn, as a handler sees it.

    Attributes:
        primitive: The JAX primitive; `primitive.name` is its name.
        params: Its parameters, such as `dimension_numbers`.
        sites: The sites at this equation, one per weight operand; empty elsewhere.
        eqn: The JAX equation itself.
    """

    primitive: Primitive
    params: Mapping[str, Any]
    sites: tuple[Any, ...]
    eqn: Any = field(repr=False)

    @property
    def result_dtype(self) -> Any:
        """The dtype of its (first) result."""
        return self.eqn.outvars[0].aval.dtype

    def bind(self, *operands: Any, **changes: Any) -> Any:
        """Do what the equation does, on the given operands.

        Args:
            *operands: As many as the equation has.
            **changes: Parameters to change, such as `precision`.

        Returns:
            The result; a list of results for a primitive that has several.
        """
        results = _compat.bind(self.eqn, operands, {**self.eqn.params, **changes})
        return results if self.primitive.multiple_results else results[0]


Visit: TypeAlias = Callable[[Equation, Sequence[Any], Cells], tuple[list, Cells]]
"""What the interpreter calls: `(equation, operands, cells) -> (results, filled cells)`."""


class Carrier(Protocol):
    """Takes leaves that are no arrays through a program, as far as they can go.

    A `LeafNode` such as a quantized leaf is traced as the array that it stands for, and flows
    through the interpreter itself: into visits, through equations that the carrier follows, and
    into constructs that can hold pytrees.
    """

    def follow(self, equation: Equation, operands: Sequence[Any]) -> list[Any] | None:
        """Run an equation on operands some of which are nodes; `None` if it takes only arrays."""
        ...

    def sliced(self, node: tree.LeafNode) -> tree.LeafNode | None:
        """Describe the slices of a node along its first axis, its arrays left whole.

        `None` if some array of it cannot be sliced there.
        """
        ...

    def array(self, node: tree.LeafNode, why: str) -> Any:
        """Give the array that a node stands for; `why` says what the node could not enter."""
        ...


@dataclass(frozen=True)
class Plan:
    """Which equations of a program are visited, by position.

    Attributes:
        visits: What to call.
        sites: The sites of the equations that have any.
        forward: `(position, program) -> plan` of the forward program of a `custom_vjp`, which
            is only known under differentiation.
        fills: Whether visits fill the cells of their positions.
        carrier: What takes nodes through the program, if any are among the arguments.
        entered: Positions of constructs to rebuild though nothing inside is visited.
        consts: Other constants of the programs at some positions.
        derivative: `(position, program, which tangents are zero) -> plan` of the program of a
            `custom_jvp` rule, which is only known under differentiation; `None` runs it as it is.
        keyed: Keys of cells that visits at some positions read, beside those of their sites.
        made: What constructs made for all runs (see `Entry.once`), if the plan is kept for others.
    """

    visits: Mapping[Position, Visit]
    sites: Mapping[Position, tuple[Any, ...]]
    forward: Callable[[Position, Program], "Plan"]
    fills: bool = False
    carrier: Carrier | None = None
    entered: frozenset[Position] = frozenset()
    consts: Mapping[Position, Sequence[Any]] = field(default_factory=dict)
    derivative: Callable[[Position, Program, Sequence[bool]], "Plan"] | None = None
    keyed: Mapping[Position, tuple[Hashable, ...]] = field(default_factory=dict)
    made: dict[Position, Any] | None = None

    @functools.cached_property
    def cells(self) -> Mapping[Position, frozenset[Any]]:
        """The names of the cells of what is visited below each prefix of a visited position."""
        below: dict[Position, set[Any]] = {}
        for position in self.visits:
            names = {site.name for site in self.sites.get(position, ())}
            names.update(self.keyed.get(position, ()))
            for k in range(len(position) + 1):
                below.setdefault(position[:k], set()).update(names)
        return {position: frozenset(names) for position, names in below.items()}


class Entry:
    """Runs the bodies of one construct under a plan; see `_constructs.Enter`."""

    def __init__(
        self,
        bodies: Callable[[], Sequence[Any]],
        plan: Plan,
        position: Position,
        *,
        returns_nodes: bool = False,
    ):
        self._programs = [body.program for body in bodies()]
        self._plan, self._position, self._returns_nodes = plan, position, returns_nodes
        self.fills = plan.fills and bool(plan.cells.get(position))

    def __call__(self, body: int, operands: Sequence[Any], cells: Cells) -> tuple[list, Cells]:
        position = (*self._position, body)
        program, plan, keep = self._programs[body], self._plan, self._returns_nodes
        return run_program(program, operands, plan, cells, position, keep_nodes=keep)

    def once(self, make: Callable[[], Any]) -> Any:
        """Make something for the construct, or give what an earlier run of the plan made."""
        made = self._plan.made
        if made is None:
            return make()
        if self._position not in made:
            made[self._position] = make()
        return made[self._position]

    def forward(self, program: Program, operands: Sequence[Any]) -> list:
        """Run the forward program of a `custom_vjp` under the same handlers."""
        plan = self._plan.forward(self._position, program)
        if not plan.visits and self._plan.derivative is None:
            raise ArgumentError(
                "handlers",
                got="a handler inside a custom_vjp whose forward rule has no such equation",
                expected="equations that run with and without differentiation",
                fix="Leave it out of the handlers, or handle the primitive that the rule uses.",
            )
        return run_program(program, operands, plan, {})[0]

    def derivative(self) -> Callable[..., list] | None:
        """Give what runs the program of a `custom_jvp` rule under the same plan."""
        make = self._plan.derivative
        if make is None:
            return None

        def derived(program: Program, zeros: Sequence[bool], *operands: Any) -> list:
            return run_program(program, operands, make(self._position, program, zeros), {})[0]

        return derived


def run_program(
    program: Program,
    args: Sequence[Any],
    plan: Plan,
    cells: Cells,
    position: Position = (),
    *,
    keep_nodes: bool = False,
) -> tuple[list, Cells]:
    """Interpret a program, visiting the planned equations and binding all others whole."""
    consts = plan.consts.get(position, program.consts)
    env: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
    env.update(zip(program.invars, args, strict=True))
    dying = _last_uses(program)
    filled: Cells = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _compat.Literal) else env[atom]

    for number, eqn in enumerate(program.eqns):
        here = (*position, number)
        operands = [read(atom) for atom in eqn.invars]
        nodes = any(isinstance(x, tree.LeafNode) for x in operands)
        rule = construct(eqn.primitive.name)
        if here in plan.visits:
            equation = Equation(eqn.primitive, eqn.params, plan.sites.get(here, ()), eqn)
            results, new = plan.visits[here](equation, operands, cells)
            filled |= new
        elif rule is not None and (
            here in plan.cells or here in plan.entered or (nodes and _passes(eqn, rule))
        ):
            operands = _prepare_nodes(eqn, rule, operands, plan.carrier) if nodes else operands
            passes = _passes(eqn, rule)
            results, new = rebuild_construct(plan, here, eqn, operands, cells, returns_nodes=passes)
            filled |= new
        else:
            results = None
            if nodes and plan.carrier is not None:
                results = plan.carrier.follow(
                    Equation(eqn.primitive, eqn.params, (), eqn), operands
                )
            if results is None:
                why = eqn.primitive.name
                results = _compat.bind(eqn, [_dense(x, plan.carrier, why) for x in operands])
        env.update(zip(eqn.outvars, results, strict=True))
        for var in dying[number]:
            env.pop(var, None)
    results = [read(atom) for atom in program.outvars]
    if not keep_nodes:
        results = [_dense(x, plan.carrier, "a result") for x in results]
    return results, filled


def leave_out(equation: Equation, operands: Sequence[Any], cells: Cells) -> tuple[list, Cells]:
    """Visit an equation that nothing needs."""
    return [None] * len(equation.eqn.outvars), {}


def pass_on(
    operand: int, equation: Equation, operands: Sequence[Any], cells: Cells
) -> tuple[list, Cells]:
    """Give an operand for the result, in the dtype that the result would have had."""
    return [jnp.asarray(operands[operand], equation.result_dtype)], {}


def never(position: Position, program: Program) -> Plan:
    """Be the `Plan.forward` of a run that is not differentiated."""
    raise AssertionError("what is run here is not differentiated")


NOTHING = Plan({}, {}, never)
"""The plan of a run in which nothing is visited."""


def reenter(
    plan: Plan, position: Position, equation: Equation, operands: Sequence[Any], cells: Cells
) -> tuple[list, Cells]:
    """Visit a construct by entering it, though nothing in it may be visited."""
    return rebuild_construct(plan, position, equation.eqn, operands, cells)


def rebuild_construct(
    plan: Plan,
    position: Position,
    eqn: Any,
    operands: Sequence[Any],
    cells: Cells,
    entry: Callable[..., Entry] = Entry,
    *,
    returns_nodes: bool = False,
) -> tuple[list, Cells]:
    """Run a construct with its bodies run under a plan.

    Args:
        plan: The plan.
        position: Where the construct is.
        eqn: The construct, its parameters perhaps changed.
        operands: Its operands.
        cells: The cells that are there.
        entry: Makes what runs the bodies: `Entry`, or a subclass.
        returns_nodes: Whether results may be nodes.

    Returns:
        Its results, and the cells that were filled.
    """
    rule = construct(eqn.primitive.name)
    assert rule is not None
    names = sorted(plan.cells.get(position, ()), key=str)
    inside = {name: cells[name] for name in names if name in cells}
    bodies = functools.partial(rule.bodies, eqn)
    enter = entry(bodies, plan, position, returns_nodes=returns_nodes)
    return rule.rebuild(eqn, operands, inside, enter)


def _dense(x: Any, carrier: Carrier | None, why: str) -> Any:
    if not isinstance(x, tree.LeafNode):
        return x
    assert carrier is not None, "nodes among the arguments come with a carrier"
    return carrier.array(x, why)


def _passes(eqn: Any, rule: Construct) -> bool:
    """Tell whether nodes can enter a construct and come out of it: a plain call."""
    return getattr(rule, "returns_nodes", False) and not _compat.is_placed(eqn)


def _prepare_nodes(
    eqn: Any, rule: Construct, operands: Sequence[Any], carrier: Carrier | None
) -> list[Any]:
    """Prepare nodes for a construct: whole, as slices, or as arrays where they cannot enter."""
    assert carrier is not None, "nodes among the arguments come with a carrier"
    roles: dict[int, set[str]] = {}
    for body in rule.bodies(eqn):
        for k, role in body.inputs:
            roles.setdefault(k, set()).add(role)
    holds = getattr(rule, "holds_nodes", False) and not _compat.is_placed(eqn)
    entering = []
    for k, x in enumerate(operands):
        if isinstance(x, tree.LeafNode):
            mine = roles.get(k, {"carry"}) if holds else {"carry"}
            node = x if mine == {"same"} else None
            node = carrier.sliced(x) if mine == {"slice"} else node
            entering.append(carrier.array(x, eqn.primitive.name) if node is None else node)
        else:
            entering.append(x)
    return entering


def _last_uses(program: Program) -> list[list[Any]]:
    """List, for each equation, the variables that nothing reads after it."""
    steps = [step._replace(lasts=True) for step in equation_steps(program)]  # all are run
    last = live(steps, variables(program.outvars)).last
    dying: list[list[Any]] = [[] for _ in steps]
    for number, step in enumerate(steps):
        for var in (*step.operands, *step.results):
            if last.get(var, number) == number and var not in dying[number]:
                dying[number].append(var)
    return dying
