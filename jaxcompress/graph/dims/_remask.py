"""`remask`: fn at full size with what was removed set to zero.

A program is run with zeros (or what changes nothing, before a maximum or a product) wherever a
removed index occurs. Widths that are written in fn as numbers, such as the divisor of a mean, stay.
"""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.graph.dims._kept import Kept
from jaxcompress.graph.dims._removed import KeepIndices, Removed, removed_by
from jaxcompress.graph.dims._rule import Axes, dims_rule
from jaxcompress.graph.dims._walk import dims
from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._constructs import Cells, construct, has_own_rule
from jaxcompress.graph.program._interpret import Position
from jaxcompress.graph.program._run import Equation, Plan, Visit, never, run_program
from jaxcompress.graph.sites._replay import execute_plan
from jaxcompress.graph.sites._trace import Traced, call_of, wraps


class Masker:
    """Makes the plan by which a program runs at full size, with zeros where indices are gone."""

    def __init__(self, removed: Removed, *, fills: bool = False):
        self._removed, self.cells = removed, Cells()
        self.places: dict[Position, tuple[str, str]] = {}
        """Where each visited equation is, in JAX's names of modules, and its primitive."""
        self._layer_axes: dict[tuple[Position, str, int, int], int] = {}
        visits: dict[Position, Visit] = {}
        around: dict[Position, str] = {}
        for prefix, (program, env) in removed.dims.programs.items():
            for number, eqn in enumerate(program.eqns):
                here = (*prefix, number)
                if here in removed.dims.dead:
                    continue
                names = (around.get(prefix[:-1], ""), str(eqn.source_info.name_stack))
                around[here] = "/".join(name for name in names if name)
                if has_own_rule(eqn.primitive.name):
                    # Nothing here is differentiated, so that the body can stand in the open.
                    visits[here] = functools.partial(self._inline, here)
                    continue
                kept = removed.kept_at(eqn, env)
                if construct(eqn.primitive.name) is None and self._takes(here, kept):
                    visits[here] = functools.partial(self._visit, here, kept)
                    self.places[here] = around[here], eqn.primitive.name
                    self._add_cell(here, kept, env)
        keyed: dict[Position, tuple[Hashable, ...]] = {cell[0]: (cell,) for cell in self.cells}
        if fills:
            keyed |= {here: (*keyed.get(here, ()), (here, "seen")) for here in visits}
        self.plan = Plan(visits, {}, never, fills=fills, keyed=keyed)

    def _takes(self, here: Position, kept: Kept) -> bool:
        """Tell whether an equation is visited."""
        return kept.changes

    def _add_cell(self, here: Position, kept: Kept, env: Mapping[Any, Axes]) -> None:
        """Have masks that differ between layers sliced by the scans around, layer by layer."""
        scans = self._removed.dims.scans[here[:-1]]
        cell: dict[tuple[str, int, int], Any] = {}
        for side, masks, atoms in (("operand", kept.operand, kept.eqn.invars),
                                   ("result", kept.result, kept.eqn.outvars)):  # fmt: skip
            for number, atom in enumerate(atoms):
                for k, mask in enumerate(masks(number)):
                    if mask is None or mask.ndim == 1:
                        continue
                    spread, layer = self._removed.place_layers(mask, env[atom], k, scans)
                    if layer is None:
                        cell[side, number, k] = spread
                    else:
                        self._layer_axes[here, side, number, k] = layer
        if cell:
            self.cells[here, "masks"] = cell

    def _inline(
        self, here: Position, equation: Equation, operands: Sequence[Any], cells: Cells
    ) -> tuple[list, Cells]:
        rule: Any = construct(equation.primitive.name)
        (body,) = rule.bodies(equation.eqn)
        return run_program(body.program, operands, self.plan, cells, (*here, 0))

    def _visit(
        self, here: Position, kept: Kept, equation: Equation, operands: Sequence[Any], cells: Cells
    ) -> tuple[list, Cells]:
        neutral = neutral_of(equation.eqn)
        fill = functools.partial(self._fill, here, kept, cells)
        operands = [fill(x, "operand", k, neutral) for k, x in enumerate(operands)]
        results = _compat.bind(equation.eqn, operands)
        return [fill(y, "result", k, 0) for k, y in enumerate(results)], {}

    def _fill(
        self, here: Position, kept: Kept, cells: Cells, x: Any, side: str, number: int, value: Any
    ) -> Any:
        """Set the removed indices of an operand or result to a value."""
        cell = cells.get((here, "masks"), {})
        for k, mask in enumerate(getattr(kept, side)(number)):
            mask = cell.get((side, number, k), mask)
            if mask is not None:
                x = fill_removed(x, mask, k, self._layer_axes.get((here, side, number, k)), value)
        return x


def neutral_of(eqn: Any) -> Any:
    """Give what changes nothing when an equation reduces over it."""
    neutral = getattr(dims_rule(eqn.primitive.name), "neutral", 0)
    return neutral(eqn.invars[0].aval.dtype) if callable(neutral) else neutral


def remask(fn: Callable[..., Any] | Traced, removed_from: KeepIndices) -> Callable[..., Any]:
    """Make fn run at full size with everything that `removed_from` leaves out set to zero.

    Every variable that carries a removed index is zeroed there as soon as it is made, and before a
    maximum, minimum or product it is set to what changes nothing. This is what `resize` must equal.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; or a `Traced`, for calls with
            arguments like those that it was captured for.
        removed_from: `{path: {axis: indices to keep}}`, as for `resize`.

    Returns:
        A function of params at full size, and of the same inputs. It is not for differentiation.

    Example:
        >>> import numpy as np
        >>> fn = lambda p, x: jnp.exp(x @ p["up"]) @ p["down"]
        >>> keep = {"up": {1: np.array([0])}, "down": {0: np.array([0])}}
        >>> params = {"up": jnp.zeros((3, 2)), "down": jnp.ones((2, 1))}
        >>> x = jnp.ones((1, 3))
        >>> remask(fn, keep)(params, x).tolist(), fn(params, x).tolist()
        ([[1.0]], [[2.0]])
    """

    @wraps(fn)
    def remasked(params: tree.Params, *inputs: Any, **kwargs: Any) -> Any:
        traced = call_of(fn, params, inputs, kwargs)
        masker = Masker(removed_by(dims(traced), removed_from))
        return execute_plan(traced, masker.plan, (params, inputs, kwargs), masker.cells)[0]

    return remasked


def fill_removed(x: Any, mask: Any, axis: int, layer_axis: int | None, value: Any) -> Any:
    """Set removed indices of an axis to a value; of each layer its own, along another axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    mask, shape = jnp.asarray(mask), [1] * x.ndim
    shape[axis] = mask.shape[-1]
    if layer_axis is not None:
        shape[layer_axis] = mask.shape[0]
        mask = mask if layer_axis < axis else mask.T
    return jnp.where(mask.reshape(shape), x, jnp.asarray(value, x.dtype))
