"""Leaving residual blocks and layers of a stack out of a captured call, and what goes with them."""

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxcompress import tree
from jaxcompress.errors import ArgumentError
from jaxcompress.graph import Equation, Traced
from jaxcompress.graph.dims import state_outputs
from jaxcompress.graph.program import (
    CASTS,
    Cells,
    Entry,
    Plan,
    Position,
    Program,
    Visit,
    leave_out,
    pass_on,
    rebuild_construct,
    reenter,
    scan_counts,
)
from jaxcompress.structured.depth._flow import (
    NO_VALUE,
    Flow,
    Needed,
    Node,
    find_needed,
    find_tainted,
    flow_of,
)
from jaxcompress.structured.depth._residuals import Residual

_ROWWISE = CASTS | {"copy", "name", "transpose"}
"""Primitives that do the same with fewer rows."""
Kept = Mapping[Position, tuple[int, ...]]
"""The iterations that stay of each scan that loses some."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Surgery:
    """What is left out of a call, with all that only served it.

    Attributes:
        passes: `{position: operand}` of the sums that pass x on.
        kept: The iterations that stay.
        live: What is still needed.
        removed: Paths of the leaves that nothing reads any more.
        rows: `{path: (axis, scan)}` of the leaves that lose the rows of iterations of a scan.
        small: The values of fn's own flow that have fewer rows.
        dropped_outputs: Numbers of the results that mirror leaves of what is gone.
        short_outputs: `{number: (axis, scan)}` of the results that mirror leaves that lose rows.
    """

    passes: Mapping[Position, int]
    kept: Kept
    live: Needed
    removed: tuple[str, ...]
    rows: Mapping[str, tuple[int, Position]]
    small: frozenset[int]
    dropped_outputs: frozenset[int]
    short_outputs: Mapping[int, tuple[int, Position]]


def operate(
    traced: Traced,
    dropped: Iterable[Residual],
    kept: Kept,
    *,
    shorter: Container[str] | None = None,
) -> Surgery:
    """Work out what goes if these sums pass their input on and these iterations stay.

    Args:
        traced: The captured call.
        dropped: The sums.
        kept: The iterations.
        shorter: The leaves that may lose rows; `None` for all that can.

    Returns:
        What goes.

    Raises:
        ArgumentError: If a result stacked over the iterations of a scan is needed.
    """
    passes = {one.node.position: one.skip for one in dropped}
    flow, parts = flow_of(traced), traced.part_paths
    state = state_outputs(traced)
    leaves = set(flow.inputs[: len(parts)])
    through = {k for k in state if flow.outputs[k] in leaves}
    fixed = [v for k, v in enumerate(flow.outputs) if k not in state]
    lost = set[int]()
    if state:
        whole = traced.derive("needed beside state", lambda: find_needed(flow, fixed, {}))
        gone = whole.nodes - find_needed(flow, fixed, passes).nodes
        touched = find_tainted(flow, gone, passes)
        lost = {k for k in state.keys() - through if flow.outputs[k] in touched}
    roots = [(k, v) for k, v in enumerate(flow.outputs) if k not in through]
    every = [v for _, v in roots]
    before = traced.derive("needed", lambda: find_needed(flow, every, {})).values[()]
    after = find_needed(flow, [v for k, v in roots if k not in lost], passes)
    read_before = {parts[v] for v in before & leaves}
    read_after = {parts[v] for v in after.values[()] & leaves}
    removed = _list_removed(list(traced.leaves), read_before, read_after)
    lost |= {k for k in through if state[k] in removed}
    rows = _Rows(traced, flow, after, kept, state, lost, shorter)
    return Surgery(
        passes=passes,
        kept=kept,
        live=after,
        removed=removed,
        rows=rows.leaves,
        small=frozenset(rows.small),
        dropped_outputs=frozenset(lost),
        short_outputs=rows.outputs,
    )


def _list_removed(paths: Sequence[str], before: set[str], after: set[str]) -> tuple[str, ...]:
    """List the leaves that are not read any more, and unread ones of what is gone altogether."""
    gone = before - after
    alive = {folder for path in paths if path in after for folder in _folders(path)}
    emptied = {folder for path in gone for folder in _folders(path)} - alive
    return tuple(
        path
        for path in paths
        if path in gone or (path not in before and not emptied.isdisjoint(_folders(path)))
    )


def _folders(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rsplit("/", 1)[0]
        yield path


class _Rows:
    """Follows leaves to the scans that lose iterations, and their stacked results to outputs."""

    def __init__(
        self,
        traced: Traced,
        flow: Flow,
        after: Needed,
        kept: Kept,
        state: Mapping[int, str],
        lost: set[int],
        shorter: Container[str] | None,
    ):
        self._flow, self._after, self._kept = flow, after, kept
        self._state, self._lost = state, lost
        self.leaves: dict[str, tuple[int, Position]] = {}
        self.small: set[int] = set()
        self.outputs: dict[int, tuple[int, Position]] = {}
        parts, scans = traced.part_paths, [n for n in flow.nodes if n.position in kept]
        values = {path: v for v, path in zip(flow.inputs, parts, strict=False)}
        for scan in scans:
            for path, axis in self._leaves(scan, parts, traced).items():
                if shorter is not None and path not in shorter:
                    continue
                outputs: dict[int, tuple[int, Position]] = {}
                reached = self._spread(values[path], axis, scan, path, outputs)
                if reached is not None:
                    self.leaves[path] = axis, scan.position
                    self.small |= reached
                    self.outputs |= outputs
        for scan in scans:
            self._results(scan)

    def _leaves(self, scan: Node, parts: Sequence[str], traced: Traced) -> dict[str, int]:
        """Find the leaves whose rows a scan reads one by one, and along which axis."""
        found: dict[str, int] = {}
        for k in range(_first_slice(scan), len(scan.operands)):
            value, axis = scan.operands[k], 0
            while value != NO_VALUE and (maker := self._flow.maker[value]) is not None:
                if maker.name not in _ROWWISE:
                    break
                if maker.name == "transpose":
                    axis = maker.eqn.params["permutation"][axis]
                value = maker.operands[0]
            if value in self._after.values[()] and value in self._flow.inputs[: len(parts)]:
                path = parts[self._flow.inputs.index(value)]
                if not isinstance(traced.leaves[path], tree.LeafNode):
                    found[path] = axis
        return found

    def _spread(
        self, value: int, axis: int, scan: Node, path: str, outputs: dict[int, tuple[int, Position]]
    ) -> set[int] | None:
        """Follow the rows of a value; `None` if something reads them that needs all of them."""
        flow, reached, left = self._flow, {value}, [(value, axis)]
        while left:
            value, axis = left.pop()
            for k, output in enumerate(flow.outputs):
                if output == value and k not in self._lost:
                    if self._state.get(k) != path:
                        return None
                    outputs[k] = axis, scan.position
            for node, k in flow.readers.get(value, ()):
                if node.position not in self._after.nodes:
                    continue
                same = self._kept.get(node.position) == self._kept[scan.position]
                if same and k >= _first_slice(node) and axis == 0:
                    continue
                if node.name not in _ROWWISE:
                    return None
                order = node.eqn.params.get("permutation", range(len(flow.shapes[value])))
                (result,) = node.results
                reached.add(result)
                left.append((result, list(order).index(axis)))
        return reached

    def _results(self, scan: Node) -> None:
        """Check that results stacked by a scan are state of leaves that lose the same rows."""
        carry = scan_counts(scan.eqn)[1]
        for value in scan.results[carry:]:
            if value not in self._after.values[()]:
                continue
            paths = {self._state.get(k) for k, v in self._ends(value)}
            outputs: dict[int, tuple[int, Position]] = {}
            path = next(iter(paths), None)
            reached, ends = None, list[bool]()
            if path in self.leaves and len(paths) == 1:
                reached = self._spread(value, 0, scan, path, outputs)
                ends = [end == self.leaves[path] for end in outputs.values()]
            if reached is None or not all(ends):
                raise ArgumentError(
                    "blocks",
                    got="layers of a scan whose stacked results fn returns or goes on with",
                    expected="a scan that stacks nothing but the new state of its own leaves",
                    fix="Return no values per layer, or drop blocks in all layers instead.",
                )
            self.small |= reached
            self.outputs |= outputs

    def _ends(self, value: int) -> list[tuple[int, int]]:
        """List the results of fn that a value leads to."""
        return [
            (k, v)
            for k, v in enumerate(self._flow.outputs)
            if v != NO_VALUE and k not in self._lost and self._flow.above[v] >> value & 1
        ]


def _first_slice(node: Node) -> int:
    return sum(scan_counts(node.eqn)) if node.name == "scan" else len(node.operands)


# --- carrying it out ------------------------------------------------------------------------------


def new_plan(
    *, fills: bool = False, keyed: Mapping[Position, Sequence[Any]] | None = None
) -> tuple[Plan, dict[Position, Visit]]:
    """Make a plan and the visits in it, to be filled in before it is run."""
    visits: dict[Position, Visit] = {}

    def forward(position: Position, program: Program) -> Plan:
        return Plan({}, {}, forward)  # no rule of differentiation is entered

    cells = {position: tuple(names) for position, names in (keyed or {}).items()}
    return Plan(visits, {}, forward, fills, keyed=cells), visits


def plan_of(flow: Flow, surgery: Surgery) -> Plan:
    """Plan a run without what is left out."""
    plan, visits = new_plan()
    _plan_flow(flow, surgery, plan, visits)
    return plan


def _plan_flow(flow: Flow, surgery: Surgery, plan: Plan, visits: dict[Position, Visit]) -> None:
    needed = surgery.live.values[flow.position]
    small = surgery.small if flow.position == () else frozenset[int]()
    alive = surgery.live.nodes
    for position, border in flow.borders.items():
        inside = any(p[: len(position)] == position for p in alive)
        given = [v for v in border.operands if v != NO_VALUE]
        if not inside and needed.isdisjoint(border.results):
            visits[position] = leave_out
        elif any(v not in needed or v in small for v in given):
            visits[position] = functools.partial(reenter, plan, position)
    for node in flow.nodes:
        here = node.position
        if here in surgery.passes and here in alive:
            visits[here] = functools.partial(pass_on, surgery.passes[here])
        elif here not in alive:
            visits[here] = leave_out
        elif node.body is not None:
            kept = surgery.kept.get(here)
            if kept is not None or any(v not in needed for v in node.operands if v != NO_VALUE):
                whole = {
                    k
                    for k in range(_first_slice(node), len(node.operands))
                    if node.operands[k] not in small
                }
                visits[here] = functools.partial(_run_shorter, plan, here, kept, whole)
            _plan_flow(node.body, surgery, plan, visits)


def _run_shorter(
    plan: Plan,
    position: Position,
    kept: tuple[int, ...] | None,
    whole: set[int],
    equation: Equation,
    operands: Sequence[Any],
    cells: Cells,
) -> tuple[list, Cells]:
    """Run a scan with the iterations that stay; `whole` are the operands that have all rows."""
    eqn = equation.eqn
    if kept is not None:
        eqn = eqn.replace(params={**eqn.params, "length": len(kept)})
        operands = [
            take_rows(x, 0, kept) if k in whole and x is not None else x
            for k, x in enumerate(operands)
        ]
    return rebuild_construct(plan, position, eqn, operands, {})


def take_rows(x: Any, axis: int, kept: Sequence[int]) -> Any:
    """Take rows of an array, of a shape only, or of a NumPy array, which stays one."""
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = (*x.shape[:axis], len(kept), *x.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, x.dtype)
    first, last = kept[0], kept[-1] + 1
    if last - first == len(kept) and isinstance(x, jax.Array):
        return lax.slice_in_dim(x, first, last, axis=axis)
    return x[(slice(None),) * axis + (np.asarray(kept),)]


Step = Callable[[Sequence[Any], Sequence[Any], Any], tuple[Sequence[Any], Cells]]
"""`(carry before, carry after, cell) -> (carry, filled cells)` of one iteration of a scan."""


class _SteppedEntry(Entry):
    """Runs the body of a scan, then a step on what it carries."""

    def __init__(self, carried: slice, cell: Any, step: Step, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self._carried, self._cell, self._step = carried, cell, step

    def __call__(self, body: int, operands: Sequence[Any], cells: Cells) -> tuple[list, Cells]:
        results, filled = super().__call__(body, operands, cells)
        before = operands[self._carried]
        carry, more = self._step(before, results[: len(before)], cells.get(self._cell))
        return [*carry, *results[len(before) :]], {**filled, **more}


def add_step(plan: Plan, position: Position, cell: Any, step: Step) -> Visit:
    """Make a visit that runs a scan with a step after each iteration."""

    def visit(equation: Equation, operands: Sequence[Any], cells: Cells) -> tuple[list, Cells]:
        consts, carry = scan_counts(equation.eqn)
        carried = slice(consts, consts + carry)
        entry = functools.partial(_SteppedEntry, carried, cell, step)
        return rebuild_construct(plan, position, equation.eqn, operands, cells, entry)

    return visit
