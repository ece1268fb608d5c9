"""One batch through fn, with the states of all statistics on the way."""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress import graph, tree
from jaxcompress.errors import ArgumentError
from jaxcompress.graph import Site
from jaxcompress.stats._plan import Keyed, Plan, batch_shape, lead, read, sizes
from jaxcompress.stats._statistic import Statistic

Step = Callable[..., tuple[Any, dict[str, Array]]]
"""`(states, params, batch) -> (states, {site name: non-finite entries, per iteration})`."""


def init_states(plan: Plan) -> dict[str, Keyed]:
    """Make the initial states: `{"forward" or "gradient": {site name: {key: state}}}`."""

    def init(name: str, statistic: Statistic) -> Any:
        state = statistic.init(*sizes(plan, name, statistic))
        axes = lead(plan, name, statistic)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*axes, *jnp.shape(x))), state)

    return {
        part: {
            name: {key: init(name, one) for key, one in keys.items()}
            for name, keys in plan.owned(gradients=part == "gradient").items()
        }
        for part in ("forward", "gradient")
    }


def finalize(plan: Plan, states: dict[str, Keyed]) -> Keyed:
    """Finalize each state, under its leading axes; results by owner."""
    results: Keyed = {}
    for part in states.values():
        for name, keys in part.items():
            for key, state in keys.items():
                statistic = plan.statistics[key]
                run = _vmapped(statistic.finalize, len(lead(plan, name, statistic)))
                results.setdefault(name, {})[key] = run(state)
    return results


def make_step(fn: Callable[..., Any], plan: Plan) -> Step:
    """Make the function that collects from one batch."""
    forward, backward = plan.owned(gradients=False), plan.owned(gradients=True)
    observers = {
        name: make_observer(plan, forward.get(name, {})) for name in {**forward, **backward}
    }

    def blank(states: dict[str, Keyed]) -> dict[str, Any]:
        cells = {}
        for name in observers:
            zeros = jnp.zeros(plan.seen[name].site.stack, jnp.uint32)
            cells[name] = (zeros, zeros, states["forward"].get(name, {}))
        return cells

    def step(states: Any, params: tree.Params, batch: Sequence[Any]) -> tuple[Any, dict]:
        observed = graph.observe(fn, observers)
        if not backward:
            _, cells = observed(params, blank(states), *batch)
            gradient, worse = {}, {}
        else:
            cells, arrays = _differentiate(observed, plan, backward, params, blank(states), batch)
            gradient, worse = _update_from_gradients(
                plan, backward, states["gradient"], arrays, {n: c[1] for n, c in cells.items()}
            )
        bad = {name: cell[0] + worse.get(name, jnp.uint32(0)) for name, cell in cells.items()}
        kept = {name: cells[name][2] for name in forward}
        return {"forward": kept, "gradient": gradient}, bad

    return step


def make_observer(plan: Plan, statistics: Mapping[str, Statistic]) -> Callable[..., Any]:
    """Make an observer: its cell is `(non-finite entries, runs, states)`."""

    def observe(site: Site, cell: Any, activation: Array, output: Array) -> Any:
        def update(cell: Any, activation: Array, output: Array) -> Any:
            bad, runs, states = cell
            arrays = {"activation": activation, "output": output}
            states, new = _update(plan, site, statistics, states, arrays)
            return bad + new, runs + jnp.uint32(1), states

        # Collected are not differentiated, whatever is done with the outputs.
        activation, output = lax.stop_gradient((activation, output))
        return _without_explicit_axes(update)(cell, activation, output)

    return observe


def _update(
    plan: Plan,
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
                rows[kind] = read(site, kind, arrays)
        given = [rows[kind] for kind in statistic.reads]
        if not given[0].shape[-2]:
            raise ArgumentError(
                "batches",
                got=f"a batch without rows at the site {site.name!r}",
                expected="batches of one example or more",
                fix="Leave empty batches out.",
            )
        run = _vmapped(statistic.update, len(batch_shape(plan.seen[site.name], statistic)))
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
    observed: Callable[..., Any],
    plan: Plan,
    backward: Mapping[str, Mapping[str, Statistic]],
    params: tree.Params,
    cells: dict[str, Any],
    batch: Sequence[Any],
) -> tuple[dict[str, Any], dict[str, dict[str, Array]]]:
    """Run fn and its gradient; returns the cells, and arrays of each site with stacked axes."""
    paths = {plan.seen[name].site.path for name in backward}
    reads = {name: {r for s in keys.values() for r in s.reads} for name, keys in backward.items()}

    def where(path: str, leaf: Any) -> bool:
        return path in paths

    tapped = _bare(graph.tap(_bare(observed), where, at="input"))
    tapped = _bare(graph.tap(tapped, where, at="output"))
    moved = _bare(graph.perturb(tapped, where, at="output"))
    moved = _bare(graph.perturb(moved, where, at="input"))
    # The shapes of this batch; those of the plan are of the first.
    (_, activations), results = jax.eval_shape(tapped, params, cells, *batch)
    offsets = tuple(
        {n: jnp.zeros(like[n].shape, like[n].dtype) for n in backward if kind in reads[n]}
        for kind, like in (("input_grad", activations), ("output_grad", results))
    )

    def total(offsets: Any, params: tree.Params, cells: Any, batch: Sequence[Any]) -> Any:
        # perturb at the input is outermost: its offsets come first.
        result = moved(params, *offsets, cells, *batch)
        ((outputs, cells), activations), results = result
        return _summed(outputs), (cells, activations, results)

    gradients, aux = jax.grad(total, has_aux=True)(offsets, params, cells, batch)
    cells, activations, results = aux
    arrays: dict[str, dict[str, Array]] = {}
    for name in backward:
        arrays[name] = {"activation": activations[name], "output": results[name]}
        for kind, found in zip(("input_grad", "output_grad"), gradients, strict=True):
            if name in found:
                arrays[name][kind] = found[name]
    return cells, arrays


def _bare(f: Callable[..., Any]) -> Callable[..., Any]:
    """Hide that f wraps a function of other arguments."""
    return lambda *args: f(*args)


def _summed(outputs: Any) -> Array:
    """Sum all floating-point outputs in float32."""
    leaves = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not leaves:
        raise ArgumentError(
            "fn",
            got="outputs without a floating-point array",
            expected="a loss, or outputs whose sum can be differentiated",
            fix="Return the loss: lambda params, x, y: loss(fn(params, x), y).",
        )
    return jnp.stack([x.astype(jnp.float32).sum() for x in leaves]).sum()


def _update_from_gradients(
    plan: Plan,
    backward: Mapping[str, Mapping[str, Statistic]],
    states: Keyed,
    arrays: Mapping[str, Mapping[str, Array]],
    runs: Mapping[str, Array],
) -> tuple[Keyed, dict[str, Array]]:
    """Update the states of statistics that read gradients, from arrays with stacked axes."""
    updated, bad = {}, {}
    for name, statistics in backward.items():
        site = plan.seen[name].site
        counted = _arrays(plan.owned(gradients=False).get(name, {}))

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

        run = _without_explicit_axes(_vmapped(update, len(site.stack)))
        updated[name], bad[name] = run(states[name], dict(arrays[name]), runs[name])
    return updated, bad


def _vmapped(f: Callable[..., Any], axes: int) -> Callable[..., Any]:
    for _ in range(axes):
        f = jax.vmap(f)
    return f


def _without_explicit_axes(f: Callable[..., Any]) -> Callable[..., Any]:
    """Let the compiler shard inside f, whose results are replicated, on Explicit mesh axes."""

    def call(*args: Any) -> Any:
        shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(args)]
        meshes = [s.mesh for s in shardings if AxisType.Explicit in s.mesh.axis_types]
        if not meshes:
            return f(*args)
        out = NamedSharding(meshes[0], PartitionSpec())
        automatic: Callable[..., Any] = jax.sharding.auto_axes(f, out_sharding=out)
        return automatic(*args)

    return call
