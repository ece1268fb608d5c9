"""`leaks`: where entries that are masked, but not removed, still change the outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import tree
from jaxcompress.graph.dims._kept import Kept
from jaxcompress.graph.dims._remask import Masker, fill_removed, neutral_of
from jaxcompress.graph.dims._removed import KeepIndices, Removed, removed_by
from jaxcompress.graph.dims._walk import dims
from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._constructs import Cells
from jaxcompress.graph.program._interpret import Position
from jaxcompress.graph.program._run import Equation
from jaxcompress.graph.sites._replay import execute_plan
from jaxcompress.graph.sites._trace import Traced, call_of


@dataclass(frozen=True, kw_only=True)
class Leak:
    """A place where entries that are removed, but not zero, flow into entries that stay.

    Attributes:
        where: The module or function, as JAX names it; empty for fn itself.
        primitive: The reductions that see them, with commas between.
        magnitude: The largest absolute entry that they see.
        effect: How far outputs move by what comes in here, relative to their largest entry.
    """

    where: str
    primitive: str
    magnitude: float
    effect: float


class _Opened(Masker):
    """Masks only what reductions without a leaf sum over; records it, or leaves some unmasked."""

    def __init__(self, removed: Removed, opened: Callable[[str], Any] | None = None):
        self._opened = opened
        self._sites = {found.position for found in removed.dims.traced.record.sites}
        super().__init__(removed, fills=opened is None)

    def _takes(self, here: Position, kept: Kept) -> bool:
        # At a site the leaf is zero where the activation is not.
        count = lambda masks: sum(mask is not None for mask in masks)
        given = max((count(kept.operand(k)) for k in range(len(kept.eqn.invars))), default=0)
        left = max((count(kept.result(k)) for k in range(len(kept.eqn.outvars))), default=0)
        return here not in self._sites and given > left

    def _visit(
        self, here: Position, kept: Kept, equation: Equation, operands: Sequence[Any], cells: Cells
    ) -> tuple[list, Cells]:
        fill = lambda value: [
            self._fill(here, kept, cells, x, "operand", k, value) for k, x in enumerate(operands)
        ]
        if self._opened is None:
            pairs = zip(operands, fill(0), strict=True)
            gaps = [jnp.max(jnp.abs(x - z), initial=0) for x, z in pairs if tree.is_floating(x)]
            seen = jnp.max(jnp.stack([jnp.float32(0), *map(jnp.float32, gaps)]))
            return _compat.bind(equation.eqn, operands), {(here, "seen"): seen}
        flag = self._opened(self.places[here][0])
        clean = fill(neutral_of(equation.eqn))
        if flag is not None:
            clean = [jnp.where(flag, x, z) for x, z in zip(operands, clean, strict=True)]
        return _compat.bind(equation.eqn, clean), {}


def leaks(
    fn: Callable[..., Any] | Traced,
    removed_from: KeepIndices,
    params: tree.Params,
    *inputs: Any,
    most: int = 32,
    **kwargs: Any,
) -> tuple[Leak, ...]:
    """Find where removed entries that are not zero flow into others, and how far outputs move.

    With zeros in params, a sigmoid still turns 0 into 0.5, and a bias along another axis is still
    added. A normalisation then counts these numbers in its mean and variance.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; or a `Traced` of this call.
        removed_from: `{path: {axis: indices to keep}}`, as for `resize`.
        params: Params at full size; their removed entries are taken to be zero.
        *inputs: fn's other arguments.
        most: How many places are tried, those with the largest entries.
        **kwargs: fn's keyword arguments.

    Returns:
        The places that move outputs, largest effect first.

    Example:
        >>> fn = lambda p, x: jnp.exp(x @ p["up"]).sum(-1)
        >>> keep = {"up": {1: np.array([0])}}
        >>> (leak,) = leaks(fn, keep, {"up": jnp.zeros((3, 2))}, jnp.ones((1, 3)))
        >>> leak.primitive, leak.magnitude, leak.effect
        ('reduce_sum', 1.0, 1.0)
    """
    traced = call_of(fn, params, inputs, kwargs)
    removed = removed_by(dims(traced), removed_from)
    args = (_set_zero(params, removed), inputs, kwargs)
    recorder = _Opened(removed)
    record = jax.jit(lambda: execute_plan(traced, recorder.plan, args, recorder.cells)[1])()
    places: dict[str, tuple[float, dict[str, None]]] = {}
    for here, (place, name) in recorder.places.items():
        seen = float(np.max(record.get((here, "seen"), 0.0)))
        if seen > 0:
            largest, names = places.get(place, (0.0, {}))
            places[place] = max(largest, seen), {**names, name: None}
    chosen = sorted(places, key=lambda place: -places[place][0])[:most]
    if not chosen:
        return ()

    def outputs(flags: Any) -> list[Any]:
        opened = lambda place: flags[chosen.index(place)] if place in chosen else None
        masker = _Opened(removed, opened)
        results, _ = execute_plan(traced, masker.plan, args, masker.cells)
        return [x for x in jax.tree.leaves(results) if tree.is_floating(x)]

    flags = np.concatenate([np.zeros((1, len(chosen)), bool), np.eye(len(chosen), dtype=bool)])
    results = jax.jit(lambda flags: lax.map(outputs, flags))(flags)
    found = []
    for k, place in enumerate(chosen):
        pairs = [
            (float(jnp.max(jnp.abs(y[k + 1] - y[0]), initial=0)),
             float(jnp.max(jnp.abs(y[0]), initial=0)))
            for y in results
        ]  # fmt: skip
        effect = max((moved / (scale or 1.0) for moved, scale in pairs), default=0.0)
        largest, names = places[place]
        found.append(
            Leak(where=place, primitive=", ".join(names), magnitude=largest, effect=effect)
        )
    found = [leak for leak in found if leak.effect > 1e-6]
    return tuple(sorted(found, key=lambda leak: -leak.effect))


def _set_zero(params: tree.Params, removed: Removed) -> tree.Params:
    def set_leaf(path: str, leaf: Any) -> Any:
        axes = removed.dims.leaves[path]
        for k, mask in enumerate(removed.masks(axes)):
            if mask is not None:
                layer = None if mask.ndim == 1 else removed.place_layers(mask, axes, k, ())[1]
                leaf = fill_removed(leaf, mask, k, layer, 0)
        return leaf

    return tree.map_with_path(set_leaf, params)
