"""`remask`: fn at full size with what was removed set to zero, and `leaks`: what that changes.

A program is run with zeros (or what changes nothing, before a maximum or a product) wherever a
removed index occurs. Widths that are written in fn as numbers, such as the divisor of a mean, stay.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import tree
from jaxcompress.graph import _compat
from jaxcompress.graph._compat import Program
from jaxcompress.graph._constructs import Cells, construct
from jaxcompress.graph._dims import Axes, dims_of, dims_rule
from jaxcompress.graph._kept import Kept, Mask
from jaxcompress.graph._replay import Equation, Plan, Visit, execute, run
from jaxcompress.graph._resize import KeepIndices, Removed, removed_by
from jaxcompress.graph._trace import capture
from jaxcompress.graph._walk import Position



class Masker:
    """Makes the plan by which a program runs at full size, with zeros where indices are gone."""

    def __init__(
        self, removed: Removed, *, records: bool = False, open_in: Callable[[str], Any] | None = None
    ):
        """Plan.

        Args:
            removed: What is gone.
            records: Whether visits fill cells with the largest entry that they make of zeros.
            open_in: `place -> whether nothing is set to zero there`.
        """
        self._removed, self.cells = removed, dict[str, Any]()
        self._records, self._open_in = records, open_in
        self.places: dict[Position, tuple[str, str]] = {}
        """Where each visited equation is, in JAX's names of modules, and its primitive."""
        self._layer_axes: dict[tuple[Position, str, int, int], int] = {}
        visits: dict[Position, Visit] = {}
        keyed: dict[Position, tuple[str, ...]] = {}
        around: dict[Position, str] = {}
        for prefix, (program, env) in removed.dims.programs.items():
            for number, eqn in enumerate(program.eqns):
                here = (*prefix, number)
                names = (around.get(prefix[:-1], ""), str(eqn.source_info.name_stack))
                around[here] = "/".join(name for name in names if name)
                if eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
                    # Nothing here is differentiated, so that the body can stand in the open.
                    visits[here] = functools.partial(self._inline, here)
                    continue
                of = functools.partial(self._of, env)
                kept = Kept(eqn, [*map(of, eqn.invars)], [*map(of, eqn.outvars)])
                if kept.changes and construct(eqn.primitive.name) is None:
                    visits[here] = functools.partial(self._visit, here, kept)
                    self.places[here] = around[here], eqn.primitive.name
                    self._add_cell(here, kept, env, keyed)
        if records:
            keyed |= {here: (*keyed.get(here, ()), _made(here)) for here in visits}
        self.plan = Plan(visits, {}, _never, fills=records, keyed=keyed)

    def _of(self, env: Mapping[Any, Axes], atom: Any) -> tuple[Mask, ...]:
        return () if isinstance(atom, _compat.Literal) else self._removed.masks(env[atom])

    def _add_cell(
        self, here: Position, kept: Kept, env: Mapping[Any, Axes], keyed: dict[Position, tuple[str, ...]]
    ) -> None:
        """Have masks that differ between layers sliced by the scans around, layer by layer."""
        dims, scans = self._removed.dims, self._removed.dims.scans[here[:-1]]
        cell: dict[str, Any] = {}
        for side, masks, atoms in (("operand", kept.operand, kept.eqn.invars),
                                   ("result", kept.result, kept.eqn.outvars)):  # fmt: skip
            for number, atom in enumerate(atoms):
                for k, mask in enumerate(masks(number)):
                    if mask is None or mask.ndim == 1:
                        continue
                    level = self._removed.level_of(env[atom][k])
                    if level in scans:
                        cell[f"{side} {number} {k}"] = self._spread(mask, scans, level)
                    else:
                        at = dims.layer_axis(env[atom], level)
                        assert at is not None, "masks that differ stand beside their layers"
                        self._layer_axes[here, side, number, k] = at
        if cell:
            keyed[here] = (str(here),)
            self.cells[str(here)] = cell

    def _spread(self, mask: np.ndarray, scans: Sequence[int], level: int) -> np.ndarray:
        """Give a mask an axis for each scan around; it differs along one of them."""
        lengths = [self._removed.dims.levels[k].length for k in scans]
        shape = [n if k == level else 1 for k, n in zip(scans, lengths, strict=True)]
        wide = mask.reshape((*shape, mask.shape[1]))
        return np.broadcast_to(wide, (*lengths, mask.shape[1]))

    def _inline(
        self, here: Position, equation: Equation, operands: Sequence[Any], cells: Cells
    ) -> tuple[list, Cells]:
        rule: Any = construct(equation.primitive.name)
        (body,) = rule.bodies(equation._eqn)
        return run(body.program, operands, self.plan, cells, (*here, 0))

    def _visit(
        self, here: Position, kept: Kept, equation: Equation, operands: Sequence[Any], cells: Cells
    ) -> tuple[list, Cells]:
        eqn, cell = equation._eqn, cells.get(str(here), {})
        neutral = getattr(dims_rule(eqn.primitive.name), "neutral", 0)
        if callable(neutral):
            neutral = neutral(eqn.invars[0].aval.dtype)

        def masked(x: Any, side: str, number: int, value: Any) -> Any:
            for k, mask in enumerate(getattr(kept, side)(number)):
                mask = cell.get(f"{side} {number} {k}", mask)
                if mask is not None:
                    x = _filled(x, mask, k, self._layer_axes.get((here, side, number, k)), value)
            return x

        results, opened = None, self._open_in and self._open_in(self.places[here][0])
        if opened is not None:
            results = _compat.bind(eqn, operands)
        clean = [masked(x, "operand", k, neutral) for k, x in enumerate(operands)]
        made = _compat.bind(eqn, clean)
        zeroed = [masked(y, "result", k, 0) for k, y in enumerate(made)]
        filled = {}
        if self._records:
            pairs = zip(made, zeroed, strict=True)
            gaps = [jnp.max(jnp.abs(y - z), initial=0) for y, z in pairs if _is_float(y)]
            filled[_made(here)] = functools.reduce(jnp.maximum, map(jnp.float32, gaps), jnp.float32(0))
        if results is not None:
            zeroed = [jnp.where(opened, y, z) for y, z in zip(results, zeroed, strict=True)]
        return zeroed, filled


def _made(here: Position) -> str:
    return f"made at {here}"


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def remask(fn: Callable[..., Any], removed_from: KeepIndices) -> Callable[..., Any]:
    """Make fn run at full size with everything that `removed_from` leaves out set to zero.

    Every variable that carries a removed index is zeroed there as soon as it is made, and before a
    maximum, minimum or product it is set to what changes nothing. This is what `resize` must equal.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        removed_from: `{path: {axis: indices to keep}}`, as for `resize`.

    Returns:
        A function of params at full size, and of the same inputs. It is not for differentiation.

    Example:
        >>> fn = lambda p, x: jnp.exp(x @ p["up"]) @ p["down"]
        >>> keep = {"up": {1: np.array([0])}, "down": {0: np.array([0])}}
        >>> params = {"up": jnp.zeros((3, 2)), "down": jnp.ones((2, 1))}
        >>> remask(fn, keep)(params, jnp.ones((1, 3))).tolist(), fn(params, jnp.ones((1, 3))).tolist()
        ([[1.0]], [[2.0]])
    """

    @functools.wraps(fn)
    def remasked(params: tree.Params, *inputs: Any, **kwargs: Any) -> Any:
        traced = capture(fn, params, inputs, kwargs)
        masker = Masker(removed_by(dims_of(traced), removed_from))
        return execute(traced, masker.plan, (params, inputs, kwargs), masker.cells)[0]

    return remasked


@dataclass(frozen=True, kw_only=True)
class Leak:
    """A place that makes something of zeros.

    Attributes:
        where: The module or function, as JAX names it.
        primitive: The primitives that do, with commas between.
        magnitude: The largest absolute entry that one makes.
        effect: How far outputs move if nothing is set to zero there, relative to the largest
            entry of an output.
    """

    where: str
    primitive: str
    magnitude: float
    effect: float


def leaks(
    fn: Callable[..., Any],
    removed_from: KeepIndices,
    params: tree.Params,
    *inputs: Any,
    most: int = 32,
    **kwargs: Any,
) -> tuple[Leak, ...]:
    """Find why params with zeros are not fn without what they stand for.

    A sigmoid makes 0.5 of 0, a normalisation subtracts a mean from it. Where such an entry is
    removed it is gone; where params are only masked it may come back by way of a variance.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        removed_from: `{path: {axis: indices to keep}}`, as for `resize`.
        params: Params at full size; their removed entries are taken to be zero.
        *inputs: fn's other arguments.
        most: How many places are tried, those with the largest entries.
        **kwargs: fn's keyword arguments.

    Returns:
        The places that move outputs, largest effect first.
    """
    traced = capture(fn, params, inputs, kwargs)
    removed = removed_by(dims_of(traced), removed_from)
    zeroed = _zeroed(params, removed)
    recorder = Masker(removed, records=True)
    run_with = lambda masker, cells: execute(traced, masker.plan, (zeroed, inputs, kwargs), cells)
    record = jax.jit(lambda: run_with(recorder, recorder.cells)[1])()
    places: dict[str, tuple[float, dict[str, None]]] = {}
    for here, (place, name) in recorder.places.items():
        made = float(np.max(record.get(_made(here), 0.0)))
        if made > 0:
            largest, names = places.get(place, (0.0, {}))
            places[place] = max(largest, made), {**names, name: None}
    chosen = sorted(places, key=lambda place: -places[place][0])[:most]
    if not chosen:
        return ()

    def outputs(flags: Any) -> list[Any]:
        opened = lambda place: flags[chosen.index(place)] if place in chosen else None
        masker = Masker(removed, open_in=opened)
        return [x for x in jax.tree.leaves(run_with(masker, masker.cells)[0]) if _is_float(x)]

    flags = np.concatenate([np.zeros((1, len(chosen)), bool), np.eye(len(chosen), dtype=bool)])
    results = jax.jit(lambda flags: lax.map(outputs, flags))(flags)
    found = []
    for k, place in enumerate(chosen):
        moved = [float(jnp.max(jnp.abs(y[k + 1] - y[0]), initial=0)) for y in results]
        scale = [float(jnp.max(jnp.abs(y[0]), initial=0)) or 1.0 for y in results]
        effect = max((m / s for m, s in zip(moved, scale, strict=True)), default=0.0)
        largest, names = places[place]
        found.append(
            Leak(where=place, primitive=", ".join(names), magnitude=largest, effect=effect)
        )
    found = [leak for leak in found if leak.effect > 1e-6]
    return tuple(sorted(found, key=lambda leak: -leak.effect))


def _zeroed(params: tree.Params, removed: Removed) -> tree.Params:
    dims = removed.dims

    def zeroed(path: str, leaf: Any) -> Any:
        for k, mask in enumerate(removed.masks(dims.leaves[path])):
            if mask is not None:
                level = None
                if mask.ndim > 1:
                    level = dims.layer_axis(
                        dims.leaves[path], removed.level_of(dims.leaves[path][k])
                    )
                leaf = _filled(leaf, mask, k, level, 0)
        return leaf

    return tree.map_with_path(zeroed, params)


def _filled(x: Any, mask: Any, axis: int, layer_axis: int | None, value: Any) -> Any:
    """Set removed indices of an axis to a value; of each layer its own, along another axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    mask, shape = jnp.asarray(mask), [1] * x.ndim
    shape[axis] = mask.shape[-1]
    if layer_axis is not None:
        shape[layer_axis] = mask.shape[0]
        mask = mask if layer_axis < axis else mask.T
    return jnp.where(mask.reshape(shape), x, jnp.asarray(value, x.dtype))


def _never(position: Position, program: Program) -> Plan:
    raise AssertionError("the reference is not differentiated")
