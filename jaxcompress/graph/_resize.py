"""`resize`: fn on params with axes that are smaller.

fn is traced on its full shapes, and that program is run on smaller arrays, with the parameters that
carry shapes derived again. What fn makes itself (iotas, constants, random bits) is made at full
size, then the kept indices are taken. Widths that are written in fn as numbers, such as the divisor
of a mean, stay.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, StructureError
from jaxcompress.graph import _compat
from jaxcompress.graph._compat import Program
from jaxcompress.graph._constructs import Cells, construct
from jaxcompress.graph._dims import Walker, dims_of
from jaxcompress.graph._dims_found import Dims
from jaxcompress.graph._dims_step import Axes, dims_rule
from jaxcompress.graph._kept import Kept, Mask, taken
from jaxcompress.graph._labels import Axis
from jaxcompress.graph._replay import Equation, Plan, Visit, execute
from jaxcompress.graph._trace import capture
from jaxcompress.graph._walk import Position

KeepIndices: TypeAlias = Mapping[str, Mapping[int, np.ndarray]]
"""`{path: {axis: indices to keep}}`, (K,), or (L, K) where L stacked layers differ."""


@dataclass(frozen=True, kw_only=True)
class Removed:
    """Which labels are gone.

    Attributes:
        dims: The labels.
        everywhere: (labels,) bool: gone from all layers.
        by_layer: `{level: (L, labels) bool}`: gone from some layers of a scan.
    """

    dims: Dims
    everywhere: np.ndarray
    by_layer: Mapping[int, np.ndarray]
    _masks: dict[int, tuple[Axis, Mask]] = field(default_factory=dict, repr=False)

    def mask(self, axis: Axis) -> Mask:
        """Say which indices of an axis are kept; `None` if all are."""
        known = self._masks.get(id(axis))
        if known is None:
            known = self._masks[id(axis)] = axis, self._mask(axis)
        return known[1]

    def _mask(self, axis: Axis) -> Mask:
        rows = self.dims.labels.rows(axis)
        real = rows >= 0
        gone = (self.everywhere[rows] & real).any(axis=1)
        for flags in self.by_layer.values():
            inside = (flags[:, rows] & real).any(axis=2)
            if inside.any():
                return np.logical_not(inside | gone)
        return np.logical_not(gone) if gone.any() else None

    def level_of(self, axis: Axis) -> int:
        """Find the scan between whose layers an axis keeps different indices."""
        rows = self.dims.labels.rows(axis)
        rows = rows[rows >= 0]
        (level,) = (k for k, flags in self.by_layer.items() if flags[:, rows].any())
        return level

    def spread(self, x: np.ndarray, scans: Sequence[int], level: int) -> np.ndarray:
        """Give (L, n) an axis for each scan around; it differs along one of them."""
        lengths = [self.dims.levels[k].length for k in scans]
        shape = [n if k == level else 1 for k, n in zip(scans, lengths, strict=True)]
        return np.broadcast_to(x.reshape((*shape, x.shape[1])), (*lengths, x.shape[1]))

    def masks(self, axes: Axes) -> tuple[Mask, ...]:
        """Say it for all axes of a variable."""
        return tuple(self.mask(axis) for axis in axes)


def removed_by(dims: Dims, keep: KeepIndices) -> Removed:
    """Find the labels that indices to keep leave out, and check that nothing else goes.

    Raises:
        ArgumentError: If an index that goes is tied to one that stays, or may not go.
    """
    everywhere, by_layer = np.zeros(len(dims.labels), bool), dict[int, np.ndarray]()
    for path, axes in keep.items():
        for k, indices in axes.items():
            rows = dims.labels.rows(dims.leaves[path][k])
            for layer, kept in enumerate(np.atleast_2d(indices)):
                gone = _absent(rows, kept)
                if np.ndim(indices) == 1:
                    everywhere[gone] = True
                else:
                    _add_layer(dims, by_layer, gone, layer, len(indices), path)
    removed = Removed(dims=dims, everywhere=everywhere, by_layer=by_layer)
    _check(dims, removed, keep)
    return removed


def _absent(rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """List the labels of an axis that no kept index has."""
    there = np.unique(rows[kept])
    return np.setdiff1d(np.unique(rows[rows >= 0]), there)


def _add_layer(
    dims: Dims, by_layer: dict[int, np.ndarray], gone: Axis, layer: int, count: int, path: str
) -> None:
    for level in np.unique(dims.layers[gone]):
        if level == 0 or dims.levels[level - 1].length != count:
            raise ArgumentError(
                "keep",
                got=f"indices of its own for each of {count} layers of {path!r}",
                expected="one set of indices, as the layers share this axis",
                fix="Give indices of shape (K,).",
            )
        flags = by_layer.setdefault(int(level) - 1, np.zeros((count, len(dims.labels)), bool))
        flags[layer, gone[dims.layers[gone] == level]] = True


def _check(dims: Dims, removed: Removed, keep: KeepIndices) -> None:
    any_layer = removed.everywhere.copy()
    for flags in removed.by_layer.values():
        any_layer |= flags.any(axis=0)
    frozen = np.flatnonzero(any_layer & (dims.reasons != ""))
    for path, axes in dims.leaves.items():
        for k, axis in enumerate(axes):
            rows = dims.labels.rows(axis)
            if len(frozen) and np.isin(rows, frozen).any():
                label = rows[np.isin(rows, frozen)][0]
                raise ArgumentError(
                    "keep",
                    got=f"fewer than all indices along axis {k} of {path!r}",
                    expected=f"all of them: {dims.reasons[label]}",
                    fix="Keep the whole of a frozen axis; `structured.groups` says which are.",
                )
            mask, mine = removed.mask(axis), keep.get(path, {}).get(k)
            want = np.ones(len(axis), bool) if mine is None else _mask_of(mine, len(axis))
            have = np.ones(len(axis), bool) if mask is None else mask
            if not np.array_equal(np.broadcast_to(have, want.shape) if have.ndim <= want.ndim
                                  else have, want):  # fmt: skip
                raise ArgumentError(
                    "keep",
                    got=f"{want.sum(-1)} of {len(axis)} indices along axis {k} of {path!r}",
                    expected=f"{have.sum(-1)}, which go with what is kept of the other leaves",
                    fix="Take `keep` from `structured.choose`, or from groups, of this function.",
                )


def _mask_of(indices: np.ndarray, size: int) -> np.ndarray:
    mask = np.zeros((*indices.shape[:-1], size), bool)
    np.put_along_axis(mask, indices, True, axis=-1)
    return mask


# --- Running --------------------------------------------------------------------------------------


class _Resizer:
    """Makes the plan by which a program runs on smaller arrays."""

    def __init__(self, removed: Removed):
        self._removed, self._dims = removed, removed.dims
        self.cells: dict[str, Any] = {}
        """What is kept in each layer of what is made there, by equation."""

    def plan(self) -> Plan:
        visits: dict[Position, Visit] = {}
        entered: set[Position] = set()
        consts: dict[Position, Sequence[Any]] = {}
        for prefix, (program, env) in self._dims.programs.items():
            self._program(prefix, program, env, visits, entered, consts)
        return self._plan(visits, entered, consts)

    def _plan(self, visits: Any, entered: set[Position], consts: Any) -> Plan:
        around = {p[:k] for p in entered for k in range(1, len(p) + 1)}
        return Plan(
            visits,
            {},
            self._forward,
            entered=frozenset(around),
            consts=consts,
            derivative=self._derivative,
            keyed={here: (str(here),) for here in visits if str(here) in self.cells},
        )

    def _program(
        self,
        prefix: Position,
        program: Program,
        env: Mapping[Any, Axes],
        visits: dict[Position, Visit],
        entered: set[Position],
        consts: dict[Position, Sequence[Any]],
    ) -> None:
        masks = [self._removed.masks(env[var]) for var in program.constvars]
        if any(mask is not None for one in masks for mask in one):
            pairs = zip(program.consts, masks, strict=True)
            consts[prefix] = [taken(value, one) for value, one in pairs]
            entered.add(prefix)
        for number, eqn in enumerate(program.eqns):
            kept = Kept(
                eqn,
                [self._of(atom, env) for atom in eqn.invars],
                [self._of(atom, env) for atom in eqn.outvars],
            )
            here = (*prefix, number)
            if here in self._dims.dead:
                visits[here] = _leave_out
                continue
            if not kept.changes:
                continue
            if construct(eqn.primitive.name) is not None:
                entered.add(here)
                continue
            rule: Any = dims_rule(eqn.primitive.name)
            resize = getattr(rule, "resize", None)
            rows = self._rows(kept, env, self._dims.scans[prefix]) if _by_layer(rule) else {}
            if cell := {str(key): x for key, (x, layer) in rows.items() if layer is None}:
                self.cells[str(here)] = cell
            visits[here] = functools.partial(self._visit, resize, kept, rows, here)

    def _of(self, atom: Any, env: Mapping[Any, Axes]) -> tuple[Mask, ...]:
        return () if isinstance(atom, _compat.Literal) else self._removed.masks(env[atom])

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
                level = self._removed.level_of(env[var][k])
                indices = np.nonzero(mask)[1].reshape(len(mask), kept.count(mask))
                if level in scans:
                    rows[number, k] = self._removed.spread(indices, scans, level), None
                else:
                    layer = self._dims.layer_axis(env[var], level)
                    assert layer is not None, "masks that differ stand beside their layers"
                    rows[number, k] = indices, layer
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
            of_layer = lambda key: cells[str(here)][str(key)]
            kept = kept.within({
                key: (of_layer(key) if layer is None else x, layer)
                for key, (x, layer) in rows.items()
            })  # fmt: skip
        if resize is None:
            return _compat.bind(equation._eqn, operands), {}
        with _compat.context(equation._eqn):
            return resize(equation._eqn, operands, kept), {}

    # --- rules of differentiation ---------------------------------------------------------------

    def _forward(self, position: Position, program: Program) -> Plan:
        operands = self._operands(position)
        return self._later(program, operands[len(operands) - len(program.invars) :])

    def _derivative(self, position: Position, program: Program, zeros: Sequence[bool]) -> Plan:
        operands = self._operands(position)
        operands = operands[len(operands) - len(zeros) :]
        moved = [axes for axes, zero in zip(operands, zeros, strict=True) if not zero]
        return self._later(program, [*operands, *moved])

    def _operands(self, position: Position) -> list[Axes]:
        program, env = self._dims.programs[position[:-1]]
        labels = self._dims.labels
        return [
            tuple(labels.fresh(n) for n in np.shape(atom.val))
            if isinstance(atom, _compat.Literal)
            else env[atom]
            for atom in program.eqns[position[-1]].invars
        ]

    def _later(self, program: Program, operands: Sequence[Axes]) -> Plan:
        """Label a program that comes to light under differentiation, and plan it likewise."""
        return _Resizer(_extended(self._removed, program, operands)).plan()


def _by_layer(rule: Any) -> bool:
    return getattr(rule, "by_layer", False)


def _leave_out(
    equation: Equation, operands: Sequence[Any], cells: Cells
) -> tuple[list[None], Cells]:
    return [None] * len(equation._eqn.outvars), {}


def _extended(removed: Removed, program: Program, operands: Sequence[Axes]) -> Removed:
    dims = removed.dims
    labels = dims.labels
    roots = np.flatnonzero(removed.everywhere)
    walker = Walker(dims.traced, labels, closed=True)
    walker.walk(program, operands, (), (), 1, ())
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
    programs, dead = walker.programs, frozenset(walker.dead)
    scans = dict.fromkeys(programs, ())  # no cells come here
    later = Dims(**{**vars(dims), "programs": programs, "scans": scans, "dead": dead})
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
        aval = jax.typeof(leaf) if isinstance(leaf, jax.Array) else leaf
        spec = getattr(aval, "sharding", None)
        explicit = spec is not None and getattr(spec, "mesh", None) is not None \
            and any(name is not None for name in getattr(spec, "spec", ()))  # fmt: skip
        return jax.ShapeDtypeStruct(shape, aval.dtype, sharding=spec if explicit else None)

    return tree.map_with_path(like, params)


def resize(
    fn: Callable[..., Any], keep: KeepIndices, shapes: Mapping[str, tuple[int, ...]]
) -> Callable[..., Any]:
    """Make fn run on params with axes that are smaller: only `keep` of their indices.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        keep: `{path: {axis: indices}}` of all leaves that are smaller.
        shapes: `{path: shape at full size}` of all leaves.

    Returns:
        A function of the smaller params and the same inputs. It is fn replayed, so it works
        wherever fn does: under jit, grad, vmap and export, and for other batch sizes.

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

    @functools.wraps(fn)
    def resized(params: tree.Params, *inputs: Any, **kwargs: Any) -> Any:
        dense = dense_like(params, shapes)
        _check_shapes(params, keep, shapes)
        traced = capture(fn, dense, inputs, kwargs)
        removed = removed_by(dims_of(traced), keep)
        resizer = _Resizer(removed)
        return execute(traced, resizer.plan(), (params, inputs, kwargs), resizer.cells)[0]

    return resized


def _check_shapes(
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
