"""fn as a graph of values: what each is computed from, and what is needed for chosen results.

The borders of `jit` and `checkpoint` are transparent here; the body of a scan is a flow of its
own; every other construct is one node.
"""

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcompress.graph import Traced
from jaxcompress.graph.program import (
    IDENTITIES,
    Domain,
    Frame,
    Live,
    LiveStep,
    Place,
    Position,
    Program,
    Role,
    construct,
    interpret,
    is_call,
    live,
    scan_counts,
)

NO_VALUE = -1
"""Stands for a literal."""


@dataclass(frozen=True, eq=False)
class Node:
    """An equation on values.

    Attributes:
        position: Its address.
        eqn: The equation.
        operands: Its operands' values; `NO_VALUE` for a literal.
        results: Its results' values.
        body: The flow inside, if it is a scan.
        sites: Numbers of the sites at it or in it.
    """

    position: Position
    eqn: Any
    operands: tuple[int, ...]
    results: tuple[int, ...]
    body: "Flow | None"
    sites: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.eqn.primitive.name


class Border(NamedTuple):
    """A `jit` or `checkpoint`: what it is given and what it gives, as values."""

    operands: tuple[int, ...]
    results: tuple[int, ...]


@dataclass(eq=False)
class Flow:
    """One program, with the programs that it calls.

    Values are numbers, in the order in which they are computed.

    Attributes:
        position: Where it is; `()` for fn's own.
        program: The program.
        inputs: The values of its arguments.
        outputs: The values of its results; `NO_VALUE` for a literal.
        nodes: The equations, in order.
        borders: The calls that are transparent.
        root: For each value, the one that it is a cast or a copy of, or itself.
        maker: The node that makes each value; `None` for an argument or a constant.
        above: For each value, what it is computed from and itself, as a set of bits.
        paths: For each value that does not depend on inputs, the leaves that it is made of.
        varying: The values that depend on inputs, as a set of bits.
        shapes: The shape of each value.
    """

    position: Position
    program: Program
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    nodes: list[Node] = field(default_factory=list)
    borders: dict[Position, Border] = field(default_factory=dict)
    root: list[int] = field(default_factory=list)
    maker: list[Node | None] = field(default_factory=list)
    above: list[int] = field(default_factory=list)
    paths: list[frozenset[str]] = field(default_factory=list)
    varying: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def varies(self, value: int) -> bool:
        return value != NO_VALUE and bool(self.varying >> value & 1)

    def list_between(self, start: int, end: int) -> list[int]:
        """List the values that are computed from `start`, and `end` from them; with `end`."""
        return [v for v in bits(self.above[end]) if v != start and self.above[v] >> start & 1]

    def sites_of(self, values: Iterable[int]) -> list[int]:
        """List the sites at which values are made, in order."""
        nodes = {node.position: node for v in values if (node := self.maker[v]) is not None}
        return sorted({number for node in nodes.values() for number in node.sites})

    @functools.cached_property
    def readers(self) -> dict[int, list[tuple[Node, int]]]:
        """The nodes that read each value, and as which operand."""
        found: dict[int, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for k, value in enumerate(node.operands):
                found.setdefault(value, []).append((node, k))
        return found

    def _add(self, above: int, shape: Sequence[int]) -> int:
        value = len(self.root)
        self.root.append(value)
        self.maker.append(None)
        self.above.append(above | 1 << value)
        self.paths.append(frozenset())
        self.shapes.append(tuple(shape))
        return value


def bits(mask: int) -> list[int]:
    """List the members of a set of bits."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def flow_of(traced: Traced) -> Flow:
    """Read a captured call as a flow, once."""
    return traced.derive("flow", lambda: _flow_of(traced))


def _flow_of(traced: Traced) -> Flow:
    sites: dict[Position, list[int]] = {}
    for number, found in enumerate(traced.record.sites):
        for k in range(1, len(found.position) + 1, 2):
            sites.setdefault(found.position[:k], []).append(number)
    paths = [frozenset({path}) for path in traced.part_paths]
    inputs = len(traced.program.invars) - len(paths)
    return _read_flow(traced.program, (), [*paths, *[None] * inputs], sites)


def _read_flow(
    program: Program,
    position: Position,
    args: Sequence[frozenset[str] | None],
    sites: Mapping[Position, list[int]],
) -> Flow:
    """Read a program; `args` has the leaves of each argument, `None` for what depends on inputs."""
    flow = Flow(position, program)
    values = []
    for var, paths in zip(program.invars, args, strict=True):
        value = flow._add(0, _find_shape(var))
        if paths is None:
            flow.varying |= 1 << value
        else:
            flow.paths[value] = paths
        values.append(value)
    flow.inputs = tuple(values)
    walk = interpret(program, values, _Flowing(flow, sites), Place(position=position))
    flow.outputs = tuple(walk.results)
    return flow


class _Flowing(Domain[int]):
    """Numbers the values of a flow."""

    def __init__(self, flow: Flow, sites: Mapping[Position, list[int]]):
        self._flow, self._sites = flow, sites

    def constant(self, var: Any, value: Any, place: Place) -> int:
        return self._flow._add(0, _find_shape(var))

    def literal(self, atom: Any) -> int:
        return NO_VALUE

    def enters(self, eqn: Any, operands: Sequence[int], here: Position) -> bool:
        return is_call(eqn.primitive.name)

    def feed(self, value: int, k: int, role: Role, frame: Frame[int]) -> int:
        return self._flow._add(0, ()) if value == NO_VALUE else value

    give = feed

    def end(
        self, eqn: Any, operands: Sequence[int], results: list[int], here: Position
    ) -> list[int]:
        self._flow.borders[here] = Border(tuple(operands), tuple(results))
        return results

    def equation(
        self, eqn: Any, operands: Sequence[int], here: Position, place: Place
    ) -> Sequence[int]:
        flow, read = self._flow, [v for v in operands if v != NO_VALUE]
        above = functools.reduce(operator.or_, (flow.above[v] for v in read), 0)
        varies = any(flow.varies(v) for v in read)
        results = tuple(flow._add(above, _find_shape(var)) for var in eqn.outvars)
        inside = self._scan_body(eqn, operands, here) if eqn.primitive.name == "scan" else None
        sites = tuple(self._sites.get(here, ()))
        node = Node(here, eqn, tuple(operands), results, inside, sites)
        flow.nodes.append(node)
        paths = frozenset[str]().union(*(flow.paths[v] for v in read))
        for k, value in enumerate(results):
            flow.maker[value] = node
            if varies:
                flow.varying |= 1 << value
            else:
                flow.paths[value] = paths
            if eqn.primitive.name in IDENTITIES and operands[k] != NO_VALUE and _keeps(eqn):
                flow.root[value] = flow.root[operands[k]]
        return results

    def _scan_body(self, eqn: Any, operands: Sequence[int], here: Position) -> Flow:
        rule = construct("scan")
        assert rule is not None
        (body,) = rule.bodies(eqn)
        args: list[frozenset[str] | None] = []
        for k, role in body.inputs:
            value = operands[k]
            known = frozenset[str]() if value == NO_VALUE else self._flow.paths[value]
            args.append(None if role == "carry" or self._flow.varies(value) else known)
        return _read_flow(body.program, (*here, 0), args, self._sites)


def _find_shape(var: Any) -> tuple[int, ...]:
    return getattr(var.aval, "shape", ())


def _keeps(eqn: Any) -> bool:
    """Tell whether a cast keeps what it casts: between floats."""
    if eqn.primitive.name != "convert_element_type":
        return True
    return jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.inexact) and jnp.issubdtype(
        eqn.params["new_dtype"], jnp.inexact
    )


@dataclass(frozen=True)
class Needed:
    """What is needed for chosen results.

    Attributes:
        nodes: Positions of the nodes, in the bodies of scans too.
        values: For each flow, by position, the values.
    """

    nodes: frozenset[Position]
    values: Mapping[Position, frozenset[int]]


def find_needed(flow: Flow, roots: Iterable[int], passes: Mapping[Position, int]) -> Needed:
    """Find what is needed for some values of a flow.

    Args:
        flow: The flow.
        roots: The values.
        passes: `{position: operand}`: nodes that only pass an operand on.

    Returns:
        What is needed; equations with effects always are.
    """
    nodes: set[Position] = set()
    values: dict[Position, frozenset[int]] = {}
    _find_needed(flow, roots, passes, nodes, values)
    return Needed(frozenset(nodes), values)


def _find_needed(
    flow: Flow,
    roots: Iterable[int],
    passes: Mapping[Position, int],
    nodes: set[Position],
    values: dict[Position, frozenset[int]],
) -> frozenset[int]:
    def reads(number: int, found: Live) -> Iterable[int]:
        node = flow.nodes[number]
        nodes.add(node.position)
        if node.position in passes:
            operands: Iterable[int] = (node.operands[passes[node.position]],)
        elif node.body is None:
            operands = node.operands
        else:
            operands = scan_operands(node, node.body, found)
        return set(operands) - {NO_VALUE}

    def scan_operands(node: Node, body: Flow, found: Live) -> Iterable[int]:
        consts, carry = scan_counts(node.eqn)
        wanted = [
            value
            for k, value in enumerate(body.outputs)
            if k < carry or node.results[k] in found.last  # what is carried stays, used or not
        ]
        inside = _find_needed(body, wanted, passes, nodes, values)
        return [
            node.operands[k]
            for k, value in enumerate(body.inputs)
            if value in inside or consts <= k < consts + carry
        ]

    steps = [LiveStep(node.operands, node.results, bool(node.eqn.effects)) for node in flow.nodes]
    needed = frozenset(live(steps, set(roots) - {NO_VALUE}, reads).last)
    values[flow.position] = needed
    return needed


def find_tainted(
    flow: Flow,
    nodes: frozenset[Position],
    passes: Mapping[Position, int],
    start: Iterable[int] = (),
) -> set[int]:
    """Find the values of a flow that are computed from what some nodes make.

    Args:
        flow: The flow.
        nodes: Positions of the nodes, in the bodies of scans too.
        passes: `{position: operand}`: nodes that only pass an operand on.
        start: Arguments of the flow that are such values themselves.

    Returns:
        The values.
    """
    found = set(start)
    for node in flow.nodes:
        if node.position in passes:
            if node.operands[passes[node.position]] in found:
                found.update(node.results)
        elif node.position in nodes and node.body is None:
            found.update(node.results)
        elif node.body is None:
            if not found.isdisjoint(node.operands):
                found.update(node.results)
        else:
            found |= _taint_scan(node, node.body, found, nodes, passes)
    return found


def _taint_scan(
    node: Node,
    body: Flow,
    found: set[int],
    nodes: frozenset[Position],
    passes: Mapping[Position, int],
) -> set[int]:
    consts, carry = scan_counts(node.eqn)
    start = {v for k, v in enumerate(body.inputs) if node.operands[k] in found}
    while True:
        inside = find_tainted(body, nodes, passes, start)
        more = {body.inputs[consts + k] for k in range(carry) if body.outputs[k] in inside} - start
        if not more:
            return {node.results[k] for k, v in enumerate(body.outputs) if v in inside}
        start |= more
