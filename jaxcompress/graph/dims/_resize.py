"""`resize`: fn on params with axes that are smaller.

fn is traced on its full shapes, and that program is run on smaller arrays, with the parameters that
carry shapes derived again. What fn makes itself (iotas, constants, random bits) is made at full
size, then the kept indices are taken. Widths that are written in fn as numbers, such as the divisor
of a mean, stay.
"""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, StructureError
from jaxcompress.graph.dims._found import Dims
from jaxcompress.graph.dims._kept import Kept, Mask, take_kept
from jaxcompress.graph.dims._known import fact_of_literal
from jaxcompress.graph.dims._labels import Labels
from jaxcompress.graph.dims._removed import KeepIndices, Removed, removed_by
from jaxcompress.graph.dims._rule import Axes, dims_rule
from jaxcompress.graph.dims._walk import Labelled, Labelling, dims
from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._calls import Calls
from jaxcompress.graph.program._compat import Program
from jaxcompress.graph.program._constructs import Cells, construct
from jaxcompress.graph.program._interpret import Position
from jaxcompress.graph.program._run import Equation, Plan, Visit, leave_out
from jaxcompress.graph.sites._replay import execute_plan
from jaxcompress.graph.sites._trace import Traced, call_of, describe_array, wraps


class _Resizer:
    """Makes the plan by which a program runs on smaller arrays."""

    def __init__(self, removed: Removed):
        self._removed, self._dims = removed, removed.dims
        self.cells: Cells = {}
        """What is kept in each layer of what is made there, by equation."""
        self._laters: dict[Hashable, tuple[Program, Plan]] = {}
        self._visits: dict[Position, Visit] = {}
        self._entered: set[Position] = set()
        self._consts: dict[Position, Sequence[Any]] = {}

    def plan(self) -> Plan:
        for prefix, (program, env) in self._dims.programs.items():
            self._program(prefix, program, env)
        around = {p[:k] for p in self._entered for k in range(1, len(p) + 1)}
        programs = [program.consts for program, _ in self._dims.programs.values()]
        # Constants of a trace around end with it, and so does a plan that has them.
        ends = any(isinstance(x, Tracer) for xs in (*programs, *self._consts.values()) for x in xs)
        return Plan(
            self._visits,
            {},
            self._forward,
            entered=frozenset(around),
            consts=self._consts,
            derivative=self._derivative,
            keyed={here: (here,) for here in self.cells},
            made=None if ends else {},
        )

    def _program(self, prefix: Position, program: Program, env: Mapping[Any, Axes]) -> None:
        masks = [self._removed.masks(env[var]) for var in program.constvars]
        if any(mask is not None for one in masks for mask in one):
            pairs = zip(program.consts, masks, strict=True)
            self._consts[prefix] = [_take_constant(value, one) for value, one in pairs]
            self._entered.add(prefix)
        for number, eqn in enumerate(program.eqns):
            kept = self._removed.kept_at(eqn, env)
            here = (*prefix, number)
            if here in self._dims.dead:
                self._visits[here] = leave_out
                continue
            if not kept.changes:
                continue
            if construct(eqn.primitive.name) is not None:
                self._entered.add(here)
                continue
            rule: Any = dims_rule(eqn.primitive.name)
            resize = getattr(rule, "resize", None)
            by_layer = getattr(rule, "by_layer", False)
            rows = self._rows(kept, env, self._dims.scans[prefix]) if by_layer else {}
            if cell := {key: x for key, (x, layer) in rows.items() if layer is None}:
                self.cells[here] = cell
            self._visits[here] = functools.partial(self._visit, resize, kept, rows, here)

    def _rows(
        self, kept: Kept, env: Mapping[Any, Axes], scans: Sequence[int]
    ) -> dict[tuple[int, int], tuple[np.ndarray, int | None]]:
        """List what is kept of results that differ between layers, as `Kept` says.

        Inside the loop it is for all iterations of all loops around, which slice it.
        """
        rows: dict[tuple[int, int], tuple[np.ndarray, int | None]] = {}
        for number, var in enumerate(kept.eqn.outvars):
            for k, mask in enumerate(kept.result(number)):
                if mask is None or mask.ndim == 1:
                    continue
                indices = np.nonzero(mask)[1].reshape(len(mask), kept.count(mask))
                rows[number, k] = self._removed.place_layers(indices, env[var], k, scans)
        return rows

    def _visit(
        self,
        resize: Any,
        kept: Kept,
        rows: Mapping[tuple[int, int], tuple[np.ndarray, int | None]],
        here: Position,
        equation: Equation,
        operands: Sequence[Any],
        cells: Cells,
    ) -> tuple[list, Cells]:
        if rows:
            kept = replace(kept, rows={
                key: (cells[here][key] if layer is None else x, layer)
                for key, (x, layer) in rows.items()
            })  # fmt: skip
        if resize is None:
            return _compat.bind(equation.eqn, operands), {}
        with _compat.context(equation.eqn):
            return resize(equation.eqn, operands, kept), {}

    # --- rules of differentiation ---------------------------------------------------------------

    def _forward(self, position: Position, program: Program) -> Plan:
        count = len(program.invars)
        return self._later((position, None), program, lambda operands: operands[-count:])

    def _derivative(self, position: Position, program: Program, zeros: Sequence[bool]) -> Plan:
        def given(operands: list[Labelled]) -> list[Labelled]:
            primals = operands[len(operands) - len(zeros) :]
            pairs = zip(primals, zeros, strict=True)
            return [*primals, *(Labelled(x.axes) for x, zero in pairs if not zero)]

        return self._later((position, tuple(zeros)), program, given)

    def _later(
        self,
        at: tuple[Position, Hashable],
        program: Program,
        given: Callable[[list[Labelled]], list[Labelled]],
    ) -> Plan:
        """Label a program that comes to light under differentiation, and plan it likewise."""
        known = self._laters.get(at)
        if known is not None and _is_same(known[0], program):
            return known[1]
        labels = self._dims.labels.copy()
        args = given(_operands(self._dims, at[0], labels)) if program.invars else []
        plan = _Resizer(_extend(self._removed, labels, program, args)).plan()
        if plan.made is not None:
            self._laters[at] = program, plan
        return plan


def _operands(dims: Dims, position: Position, labels: Labels) -> list[Labelled]:
    """Give the labels of an equation's operands, and what is known of them."""
    program, env = dims.programs[position[:-1]]
    facts = dims.facts[position[:-1]]
    return [
        Labelled(tuple(labels.fresh(n) for n in np.shape(atom.val)), fact_of_literal(atom))
        if isinstance(atom, _compat.Literal)
        else Labelled(env[atom], facts[atom])
        for atom in program.eqns[position[-1]].invars
    ]


def _take_constant(constant: Any, masks: Sequence[Mask]) -> Any:
    """Take from a constant at once, whatever is traced around, unless it belongs to that."""
    if isinstance(constant, Tracer):
        return take_kept(constant, masks)
    with jax.ensure_compile_time_eval():
        return take_kept(constant, masks)


def _is_same(known: Program, other: Program) -> bool:
    """Tell whether JAX gave a program again, rather than traced another."""
    if known.invars != other.invars or len(known.consts) != len(other.consts):
        return False
    return all(a is b for a, b in zip(known.consts, other.consts, strict=True))


def _extend(
    removed: Removed, labels: Labels, program: Program, args: Sequence[Labelled]
) -> Removed:
    """Say which labels are gone in another program; `labels` is a copy that grows."""
    roots = np.flatnonzero(removed.everywhere)
    walked = Labelling(removed.dims.traced, labels, closed=True).walk(program, args)
    grown = len(labels) - len(removed.everywhere)
    everywhere = np.concatenate([removed.everywhere, np.zeros(grown, bool)])
    # Labels made here join those that are known: what stands for them now is gone as they are.
    rows = labels.rows(roots) if len(roots) else np.zeros((0, 1), np.int32)
    everywhere[rows[rows >= 0]] = True
    by_layer = {}
    for level, flags in removed.by_layer.items():
        wide = np.concatenate([flags, np.zeros((len(flags), grown), bool)], axis=1)
        gone = np.flatnonzero(flags.any(axis=0))
        wide[:, labels.find(gone)] |= flags[:, gone]
        by_layer[level] = wide
    scans = dict.fromkeys(walked["programs"], ())  # no cells come here
    del walked["results"]
    later = Dims(**{**vars(removed.dims), **walked, "labels": labels, "scans": scans})
    return Removed(dims=later, everywhere=everywhere, by_layer=by_layer)


def dense_like(params: tree.Params, shapes: Mapping[str, tuple[int, ...]]) -> tree.Params:
    """Write params as shapes at full size, with the dtypes (and explicit shardings) they have."""

    def like(path: str, leaf: Any) -> Any:
        shape = shapes.get(path)
        if shape is None:
            raise StructureError(
                "params",
                got=f"a leaf {path!r} that the kept indices do not know",
                expected="the params that `shrink` gave, or trained from them",
                fix="Give the params of the model that the indices were chosen for.",
            )
        return describe_array(leaf, None if tuple(leaf.shape) == tuple(shape) else shape)

    return tree.map_with_path(like, params)


def resize(
    fn: Callable[..., Any] | Traced, keep: KeepIndices, shapes: Mapping[str, tuple[int, ...]]
) -> Callable[..., Any]:
    """Make fn run on params with axes that are smaller: only `keep` of their indices.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; or a `Traced` of it at full size, for
            calls with inputs like those that it was captured for.
        keep: `{path: {axis: indices}}` of all leaves that are smaller.
        shapes: `{path: shape at full size}` of all leaves.

    Returns:
        A function of the smaller params and the same inputs. It is fn replayed, so it works
        wherever fn does: under jit, grad, vmap and export, and for other batch sizes. fn is traced
        once for arguments of the same shapes and types, as under jit.

    Raises:
        ArgumentError: When called, if the indices do not fit fn, or params do not fit them.
        StructureError: When called, if params has other leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> fn = lambda p, x: jnp.tanh(x @ p["up"]).reshape(-1, 4) @ p["down"]
        >>> keep = {"up": {1: np.array([0, 2])}, "down": {0: np.array([0, 2])}}
        >>> small = resize(fn, keep, {"up": (3, 4), "down": (4, 2)})
        >>> small({"up": jnp.ones((3, 2)), "down": jnp.ones((2, 2))}, jnp.ones((5, 3))).shape
        (5, 2)
    """
    calls: Calls[_Planned] = Calls()

    def planned(params: tree.Params, inputs: Any, kwargs: Any) -> _Planned:
        dense = dense_like(params, shapes)
        _check_shrunk_shapes(params, keep, shapes)
        traced = call_of(fn, dense, inputs, kwargs)
        resizer = _Resizer(removed_by(dims(traced), keep))
        return _Planned(traced, resizer.plan(), resizer.cells)

    @wraps(fn)
    def resized(params: tree.Params, *inputs: Any, **kwargs: Any) -> Any:
        args = params, inputs, kwargs
        call = calls.get(args, lambda: planned(*args), lambda call: call.plan.made is not None)
        return execute_plan(call.traced, call.plan, args, call.cells)[0]

    return resized


class _Planned(NamedTuple):
    """A captured call with the plan by which it runs smaller.

    Attributes:
        traced: The call.
        plan: The plan.
        cells: The cells that it reads.
    """

    traced: Traced
    plan: Plan
    cells: Cells


def _check_shrunk_shapes(
    params: tree.Params, keep: KeepIndices, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    found = {path: tuple(leaf.shape) for path, leaf in tree.items(params)}
    if missing := sorted(set(shapes) - set(found)):
        raise StructureError(
            "params",
            got=f"no leaf at {tree.shorten(missing)}",
            expected="all leaves of the shrunk model",
            fix="Give the params that `shrink` gave, or trained from them.",
        )
    for path, shape in shapes.items():
        want = list(shape)
        for k, indices in keep.get(path, {}).items():
            want[k] = indices.shape[-1]
        if found[path] != tuple(want):
            raise ArgumentError(
                "params",
                got=f"{path!r} of shape {found[path]}",
                expected=f"{tuple(want)}: {shape} with the kept indices only",
                fix="Give the params that `shrink` gave, not those at full size.",
            )
