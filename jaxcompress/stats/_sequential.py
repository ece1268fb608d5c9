"""`sequential`: statistics site by site, each after all that comes before has been replaced."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress import tree
from jaxcompress.batches import open_stream
from jaxcompress.errors import ArgumentError, NonFiniteError, StructureError
from jaxcompress.graph import Site, Traced
from jaxcompress.stats import _collect, _step
from jaxcompress.stats._plan import StatisticPlan, plan_statistics
from jaxcompress.stats._statistic import Statistic
from jaxcompress.stats.stages._stages import BatchRun, Boundary, Stages


@dataclass(frozen=True, kw_only=True)
class Stop:
    """What `sequential` hands over at one stop: what is needed to replace the leaves there.

    Attributes:
        sites: The sites of this stop: those that read one activation. Their `axes`, `stack`,
            `repeats`, `flops` and `bytes` are those of the slice that is handed over.
        leaves: `{path: leaf}`, as it is now. Of a stacked leaf, the slice of this iteration.
        index: `{path: index}`: `leaf[index]` of the whole leaf is what `leaves` has; `()` for a
            leaf that is handed over whole.
        iteration: Which iterations of the enclosing scans over layers, outermost first.
        results: `{Site.name: result}`, or `{Site.name: {key: result}}` for a mapping of
            statistics, of shape `(*site.stack, *batch, ...)`. A site where none applies (see
            `collect`) has no entry.
        number: The number of the stop.
        total: How many there are.
    """

    sites: tuple[Site, ...]
    leaves: Mapping[str, Any]
    index: Mapping[str, tuple[Any, ...]]
    iteration: tuple[int, ...]
    results: Mapping[str, Any]
    number: int
    total: int


Visit: TypeAlias = Callable[[Stop], Mapping[str, Any] | None]
"""`stop -> {path: new leaf}`, like `stop.leaves`; paths may be left out."""


def sequential(
    fn: Callable[..., Any] | Traced,
    params: tree.Params,
    batches: Iterable[Any],
    statistics: Statistic | Mapping[str, Statistic],
    visit: Visit,
    *,
    where: tree.Where = tree.weights,
    host: bool = False,
    allow_non_finite: bool = False,
    progress: bool = False,
) -> tree.Params:
    """Advance all batches through fn together, and replace its leaves on the way.

    True-sequential GPTQ and SparseGPT: all batches go to a site, the statistics of what it reads
    are computed over all of them, `visit` may replace its leaf, and the batches move on through
    the new one. So the statistics at a site are those of a function in which everything upstream
    is replaced already. Each equation that depends on the inputs runs once per batch: altogether it
    costs one forward pass and the statistics. What comes after the last stop does not run.

    Sites that read one activation (query, key and value; gate and up) make one stop with one
    computation. A scan that takes selected leaves apart (layers) is left at each iteration: each
    slice is a leaf of its own, and what `visit` returns is put back into the stacked one. The same
    holds for `kernel[i]` in a Python loop. A `while`, a `cond`, a `shard_map` and a scan over
    anything else (time) cannot be left halfway: all sites in it make one stop before it, with the
    leaves as they are then, and it runs after that (so its callbacks run twice). A leaf with
    several sites (tied embeddings, layers that share weights) is visited at each of them. Later
    visits see the earlier replacements; earlier sites are not run anew.

    What a batch carries between stops stays in memory for all batches at once: a residual stream,
    in most models. `host=True` keeps it in NumPy arrays, so that the device holds one batch at a
    time. Stages compile once per structure: layers that are alike, scanned or written out, share
    them.

    Args:
        fn: `fn(params, *inputs) -> outputs`, pure; or a `Traced` of its call with the first batch.
        params: Any pytree of arrays.
        batches: An iterable of input tuples; a lone array (or other pytree that is no tuple)
            counts as a one-tuple. Read once, and kept. A smaller last batch compiles once more.
        statistics: One `Statistic`, or `{key: Statistic}`; none that reads gradients.
        visit: `visit(stop) -> {path: new leaf}`, called once per stop in fn's order; see `Stop`.
            New leaves have the shape and dtype of `stop.leaves[path]`. `None` leaves all as is.
        where: Leaves to visit; see `tree.matches`.
        host: Keep what batches carry in host memory.
        allow_non_finite: Go on when NaN or infinity is read.
        progress: Show a progress bar, if the output is a terminal.

    Returns:
        Params with the replaced leaves.

    Raises:
        SelectionError: If `where` selects no site, or no statistic applies to any.
        NonFiniteError: If activations that were read are not finite; it names the sites.
        StructureError: If a batch is structured unlike the first, or `visit` returns an unknown
            path or a leaf of another shape or dtype.
        ArgumentError: If there are no batches, or a statistic reads gradients.
        ArgumentTypeError: If `statistics` or `batches` are of another type.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress import stats
        >>> fn = lambda params, x: (x @ params["up"]) @ params["down"]
        >>> params = {"up": jnp.full((2, 3), 0.4), "down": jnp.ones((3, 2))}
        >>> def visit(stop):
        ...     for site in stop.sites:
        ...         print(site.name, stop.results[site.name])
        ...     return {path: jnp.round(leaf + 0.2) for path, leaf in stop.leaves.items()}
        >>> params = stats.sequential(fn, params, [jnp.ones((1, 2))], stats.absmax(), visit)
        up [1. 1.]
        down [2. 2. 2.]
        >>> params["up"].tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    several = _collect.check_statistics(statistics)
    _refuse_gradients(several)
    first, rest = open_stream(batches)
    stages = Stages(fn, where, host=host, sharding=_collect.find_sharding((params, first)))
    batch_runs = [stages.make_pipeline(params, first).start(first)]
    plan = plan_statistics(batch_runs[0].pipeline.traced, params, several, where)
    for batch in rest:
        batch_runs.append(stages.make_pipeline(params, batch).start(batch))
    stops = _find_common_stops(batch_runs)
    run = _SequentialRun(stages, plan, params, batch_runs, single=isinstance(statistics, Statistic))
    for number, stop in enumerate(_collect.show_progress(iter(stops), len(stops), progress)):
        results = run.collect(stop, allow_non_finite=allow_non_finite)
        leaves, index = run.leaves_at(stop)
        replaced = visit(
            Stop(
                sites=stop.sites,
                leaves=leaves,
                index=index,
                iteration=stop.iteration,
                results=results,
                number=number,
                total=len(stops),
            )
        )
        run.replace(stop, leaves, replaced)
    return tree.map_with_path(lambda path, _: run.current[path], params)


def _refuse_gradients(statistics: Mapping[str, Statistic]) -> None:
    for key, statistic in statistics.items():
        if statistic.needs_gradients:
            raise ArgumentError(
                "statistics",
                got=f"{key!r}, which reads {statistic.reads}",
                expected="statistics of activations: gradients come from what has not run yet",
                fix="Use stats.collect for it, before or after.",
            )


def _find_common_stops(batch_runs: list[BatchRun]) -> tuple[Boundary, ...]:
    """Give the stops of all batches: those of the first, if the others have the same."""
    pipelines = dict.fromkeys(batch_run.pipeline for batch_run in batch_runs)
    stops, *others = (pipeline.boundaries for pipeline in pipelines)
    for other in others:
        if list(map(_identify_stop, other)) != list(map(_identify_stop, stops)):
            raise StructureError(
                "batches",
                got="sizes for which fn has other sites than for the first batch",
                expected="batches that take one way through fn",
                fix="Collect from batches of one size.",
            )
    return stops


def _identify_stop(stop: Boundary) -> Any:
    return [site.name for site in stop.sites], stop.iteration, stop.slices


class _SequentialRun:
    """The state of one call: the current leaves, and the runs of all batches."""

    def __init__(
        self,
        stages: Stages,
        plan: StatisticPlan,
        params: tree.Params,
        batch_runs: list[BatchRun],
        *,
        single: bool,
    ):
        self.current = dict(tree.items(params))
        self._stages, self._plan, self._batch_runs, self._single = stages, plan, batch_runs, single
        self._plans: dict[Any, tuple[StatisticPlan, dict[str, Any]]] = {}
        self._ours: set[str] = set()  # stacked leaves that are copies, to be updated in place

    def collect(self, stop: Boundary, *, allow_non_finite: bool) -> dict[str, Any]:
        """Take all batches to a stop; returns the results there by site."""
        plan, observers = self._plan_at(stop)
        cells = self._stages.call(
            lambda: _step.make_cells(plan, observers, _step.init_states(plan))
        )
        leaves = [part for leaf in self.current.values() for part in jax.tree.leaves(leaf)]
        for batch_run in self._batch_runs:
            cells = batch_run.advance(leaves, observers, cells)
        if not allow_non_finite:
            _check_activations({name: cell[0] for name, cell in cells.items()}, stop)
        states = {"forward": {name: cell[2] for name, cell in cells.items()}}
        results = self._stages.call(lambda states: _step.finalize(plan, states), states)
        return plan.sort_by_site(results, single=self._single)

    def _plan_at(self, stop: Boundary) -> tuple[StatisticPlan, dict[str, Any]]:
        """Narrow the plan to a stop; all iterations of a scan share it."""
        names = tuple(site.name for site in stop.sites)
        if names not in self._plans:
            owners, first = {}, {}
            for name in names:
                for key, owner in self._plan.owners.get(name, {}).items():
                    owner = first.setdefault((key, owner), name)
                    owners.setdefault(name, {})[key] = owner
            sites = {site.name: site for site in stop.sites if site.name in owners}
            seen = {n: replace(self._plan.seen[n], site=site) for n, site in sites.items()}
            plan = replace(self._plan, seen=seen, owners=owners)
            owned = plan.list_owned(gradients=False)
            observers = {name: _step.make_observer(plan, keys) for name, keys in owned.items()}
            self._plans[names] = plan, observers
        return self._plans[names]

    def leaves_at(self, stop: Boundary) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
        """Give the leaves of a stop, or their slices, and what indexes these."""
        leaves, index = {}, {}
        for path, picks in stop.slices.items():
            axes = tuple(sorted(picks))
            leaf = self.current[path]
            leaves[path] = _take(leaf, [picks[a] for a in axes], axes=axes) if axes else leaf
            index[path] = tuple(picks.get(a, slice(None)) for a in range(max(axes, default=-1) + 1))
        return leaves, index

    def replace(self, stop: Boundary, before: Mapping[str, Any], replaced: Any) -> None:
        """Put the visitor's leaves in place."""
        for path, new in check_replaced(before, replaced).items():
            picks, new = stop.slices[path], _place_as_before(new, before[path])
            if not picks:
                self.current[path] = new
                continue
            axes, leaf = tuple(sorted(picks)), self.current[path]
            sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
            donated = "leaf" if path in self._ours else None
            put = jax.jit(
                _put, static_argnames="axes", out_shardings=sharding, donate_argnames=donated
            )
            self.current[path] = put(leaf, new, [picks[a] for a in axes], axes=axes)
            self._ours.add(path)


def _check_activations(bad: Mapping[str, Array], stop: Boundary) -> None:
    found = {name: int(np.sum(n, dtype=np.uint64)) for name, n in jax.device_get(bad).items()}
    if any(found.values()):
        iteration = f" in iteration {stop.iteration}" if stop.iteration else ""
        raise NonFiniteError(
            "batches",
            got="NaN or infinity"
            + "; ".join(f" at {name!r}{iteration}: {n}" for name, n in found.items() if n),
            expected="finite activations",
            fix="Look at what `visit` returned upstream, or pass allow_non_finite=True to go on.",
        )


def check_replaced(before: Mapping[str, Any], replaced: Any) -> Mapping[str, Any]:
    """Refuse what `visit` may not return."""
    if replaced is None:
        return {}
    known = tree.shorten(list(before))
    if not isinstance(replaced, Mapping) or not set(replaced) <= set(before):
        raise StructureError(
            "visit",
            got=f"a result for {tree.shorten(sorted(set(replaced) - set(before)))}"
            if isinstance(replaced, Mapping)
            else f"a result of type {type(replaced).__name__}",
            expected=f"a mapping from paths of this stop ({known}) to leaves, or None",
            fix="Return {path: new leaf} for paths of stop.leaves.",
        )
    for path, new in replaced.items():
        got, expected = _describe_leaf(new), _describe_leaf(before[path])
        if got != expected:
            raise StructureError(
                "visit",
                got=f"{', '.join(got[1])} for {path!r}",
                expected=f"a leaf like the one it replaces: {', '.join(expected[1])}",
                fix="Keep shape and dtype: later stages are compiled for them.",
            )
    return replaced


def _describe_leaf(leaf: Any) -> tuple[Any, list[str]]:
    leaves, structure = jax.tree.flatten(leaf)
    return structure, [f"{jax.dtypes.result_type(x)} {np.shape(x)}" for x in leaves]


def _place_as_before(new: Any, old: Any) -> Any:
    def place(new: Any, old: Any) -> Any:
        return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new

    return jax.tree.map(place, new, old)


@functools.partial(jax.jit, static_argnames="axes")
def _take(leaf: Array, indices: list[Any], *, axes: tuple[int, ...]) -> Array:
    for axis, i in reversed(list(zip(axes, indices, strict=True))):
        leaf = lax.dynamic_index_in_dim(leaf, i, axis, keepdims=False)
    return leaf


def _put(leaf: Array, new: Array, indices: list[Any], *, axes: tuple[int, ...]) -> Array:
    starts = [0] * leaf.ndim
    for axis, i in zip(axes, indices, strict=True):
        starts[axis] = i
    return lax.dynamic_update_slice(leaf, jnp.expand_dims(new, axes), starts)
