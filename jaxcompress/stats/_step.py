"""One batch through fn, with the states of all statistics on the way."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress import tree
from jaxcompress.errors import ArgumentError
from jaxcompress.graph import Site, Traced
from jaxcompress.graph.sites import (
    Side,
    SiteLayer,
    call_of,
    check_observers,
    make_observe_layer,
    make_perturb_layer,
    make_tap_layer,
    run_layers,
)
from jaxcompress.meshes import call_with_auto_axes
from jaxcompress.stats._plan import Keyed, StatisticPlan, batch_shape, lead, read_rows, sizes
from jaxcompress.stats._statistic import Statistic

_RETURN_LOSS = "Return the loss: lambda params, x, y: loss(fn(params, x), y)."

Step = Callable[..., tuple[Any, dict[str, Array]]]
"""`(states, params, batch) -> (states, {site name: non-finite entries, per iteration})`."""


def init_states(plan: StatisticPlan) -> dict[str, Keyed]:
    """Make the initial states: `{"forward" or "gradient": {site name: {key: state}}}`."""

    def init(name: str, statistic: Statistic) -> Any:
        state = statistic.init(*sizes(plan, name, statistic))
        axes = lead(plan, name, statistic)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*axes, *jnp.shape(x))), state)

    return {
        part: {
            name: {key: init(name, one) for key, one in keys.items()}
            for name, keys in plan.list_owned(gradients=part == "gradient").items()
        }
        for part in ("forward", "gradient")
    }


def finalize(plan: StatisticPlan, states: dict[str, Keyed]) -> Keyed:
    """Finalize each state, under its leading axes; results by owner."""
    results: Keyed = {}
    for part in states.values():
        for name, keys in part.items():
            for key, state in keys.items():
                statistic = plan.statistics[key]
                run = _vmap(statistic.finalize, len(lead(plan, name, statistic)))
                results.setdefault(name, {})[key] = run(state)
    return results


def make_collect_step(plan: StatisticPlan) -> Step:
    """Make the function that collects from one batch."""
    forward, backward = plan.list_owned(gradients=False), plan.list_owned(gradients=True)
    observers = {
        name: make_observer(plan, forward.get(name, {})) for name in {**forward, **backward}
    }

    def step(states: Any, params: tree.Params, batch: Sequence[Any]) -> tuple[Any, dict]:
        traced = call_of(plan.traced, params, tuple(batch), {})
        check_observers(traced, observers, cells := make_cells(plan, observers, states))
        layers = {name: [make_observe_layer(observers[name])] for name in observers}
        args = params, batch, {}
        if not backward:
            cells = run_layers(traced, args, layers, cells, fills=True)[1]
            gradient, worse = {}, {}
        else:
            cells, arrays = _differentiate(traced, args, layers, cells, backward)
            runs = {name: cell[1] for name, cell in cells.items()}
            gradient, worse = _update_from_gradients(
                plan, backward, states["gradient"], arrays, runs
            )
        bad = {name: cell[0] + worse.get(name, jnp.uint32(0)) for name, cell in cells.items()}
        kept = {name: cells[name][2] for name in forward}
        return {"forward": kept, "gradient": gradient}, bad

    return step


def make_cells(
    plan: StatisticPlan, names: Iterable[str], states: dict[str, Keyed]
) -> dict[str, Any]:
    """Make the cells of observers: `(non-finite entries, runs, states)`."""
    cells = {}
    for name in names:
        zeros = jnp.zeros(plan.seen[name].site.stack, jnp.uint32)
        cells[name] = (zeros, zeros, states["forward"].get(name, {}))
    return cells


def make_observer(plan: StatisticPlan, statistics: Mapping[str, Statistic]) -> Callable[..., Any]:
    """Make an observer: its cell is `(non-finite entries, runs, states)`."""

    def observe(site: Site, cell: Any, activation: Array, output: Array) -> Any:
        def update(cell: Any, activation: Array, output: Array) -> Any:
            bad, runs, states = cell
            arrays = {"activation": activation, "output": output}
            states, new = _update(plan, site, statistics, states, arrays)
            return bad + new, runs + jnp.uint32(1), states

        # Statistics are not differentiated, whatever is done with the outputs.
        activation, output = lax.stop_gradient((activation, output))
        return call_with_auto_axes(update, cell, activation, output)

    return observe


def _update(
    plan: StatisticPlan,
    site: Site,
    statistics: Mapping[str, Statistic],
    states: Mapping[str, Any],
    arrays: Mapping[str, Array],
    counted: Set[str] = frozenset(),
) -> tuple[dict[str, Any], Array]:
    """Update states by one run of a site; also counts the non-finite entries that were read.

    Those of the arrays in `counted` were counted before.
    """
    rows: dict[str, Array] = {}
    updated = {}
    for key, statistic in statistics.items():
        for kind in statistic.reads:
            if kind not in rows:
                rows[kind] = read_rows(site, kind, arrays)
        given = [rows[kind] for kind in statistic.reads]
        if not given[0].shape[-2]:
            raise ArgumentError(
                "batches",
                got=f"a batch without rows at the site {site.name!r}",
                expected="batches of one example or more",
                fix="Leave empty batches out.",
            )
        run = _vmap(statistic.update, len(batch_shape(plan.seen[site.name], statistic)))
        updated[key] = run(states[key], *given)
    names = sorted(_arrays(statistics) - counted)
    return updated, sum((_non_finite(arrays[name]) for name in names), jnp.uint32(0))


def _arrays(statistics: Mapping[str, Statistic]) -> set[str]:
    """Name the arrays of a site that statistics read, whatever rows they are brought into."""
    reads = {kind for statistic in statistics.values() for kind in statistic.reads}
    return {"activation" if kind in ("input", "channels", "indices") else kind for kind in reads}


def _non_finite(x: Array) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.uint32(0)
    return (~jnp.isfinite(x)).sum(dtype=jnp.uint32)


def _differentiate(
    traced: Traced,
    args: Any,
    layers: Mapping[str, Sequence[SiteLayer]],
    cells: dict[str, Any],
    backward: Mapping[str, Mapping[str, Statistic]],
) -> tuple[dict[str, Any], dict[str, dict[str, Array]]]:
    """Run fn and its gradient; returns the cells, and arrays of each site with stacked axes.

    What is added to an array, zeros, has the array's gradient.
    """
    taps: dict[str, Side] = {"activation": "input", "output": "output"}
    reads = {name: {r for s in keys.values() for r in s.reads} for name, keys in backward.items()}
    sites = {site.name: site for site in traced.sites}
    offsets: dict[str, Array] = {}
    around = {name: list(mine) for name, mine in layers.items()}
    for name in backward:
        for key, at in taps.items():
            around[name].append(make_tap_layer(at, f"{key} of {name}"))
        for at in taps.values():
            if f"{at}_grad" in reads[name]:
                like = sites[name].activation if at == "input" else sites[name].output
                shape = (*sites[name].stack, *like.shape)
                offsets[f"{at}_grad of {name}"] = jnp.zeros(shape, like.dtype)
                around[name].append(make_perturb_layer(at, f"{at}_grad of {name}"))

    def total(offsets: Any, args: Any, cells: dict[str, Any]) -> Any:
        given = {**cells, **offsets}
        outputs, filled = run_layers(traced, args, around, given, fills=True)
        return sum_outputs(outputs), filled

    gradients, filled = jax.grad(total, has_aux=True)(offsets, args, cells)
    found = {**filled, **gradients}
    arrays = {
        name: {key: found[f"{key} of {name}"] for key in (*taps, "input_grad", "output_grad")
               if f"{key} of {name}" in found}
        for name in backward
    }  # fmt: skip
    return {name: filled[name] for name in layers}, arrays


def sum_outputs(outputs: Any, *, fix: str = _RETURN_LOSS) -> Array:
    """Sum all floating-point outputs in float32.

    Args:
        outputs: What fn returned.
        fix: What to do where there are none.

    Returns:
        float32, of no axes.

    Raises:
        ArgumentError: If no output is floating point.
    """
    leaves = [x for x in jax.tree.leaves(outputs) if tree.is_floating(x)]
    if not leaves:
        raise ArgumentError(
            "fn",
            got="outputs without a floating-point array",
            expected="a loss, or outputs whose sum can be differentiated",
            fix=fix,
        )
    return jnp.stack([x.astype(jnp.float32).sum() for x in leaves]).sum()


def _update_from_gradients(
    plan: StatisticPlan,
    backward: Mapping[str, Mapping[str, Statistic]],
    states: Keyed,
    arrays: Mapping[str, Mapping[str, Array]],
    runs: Mapping[str, Array],
) -> tuple[Keyed, dict[str, Array]]:
    """Update the states of statistics that read gradients, from arrays with stacked axes."""
    updated, bad = {}, {}
    for name, statistics in backward.items():
        site = plan.seen[name].site
        counted = _arrays(plan.list_owned(gradients=False).get(name, {}))

        def update(
            states: Any,
            arrays: Any,
            runs: Array,
            site: Site = site,
            statistics: Any = statistics,
            counted: Set[str] = counted,
        ) -> Any:
            new, bad = _update(plan, site, statistics, states, arrays, counted)
            # A branch that was not taken has zeros for activations, not rows of zeros.
            return jax.tree.map(lambda old, new: jnp.where(runs > 0, new, old), states, new), bad

        run = functools.partial(call_with_auto_axes, _vmap(update, len(site.stack)))
        updated[name], bad[name] = run(states[name], dict(arrays[name]), runs[name])
    return updated, bad


def _vmap(f: Callable[..., Any], axes: int) -> Callable[..., Any]:
    for _ in range(axes):
        f = jax.vmap(f)
    return f
