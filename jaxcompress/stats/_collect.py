"""`collect`: statistics of a function's sites over batches, in one streamed pass."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxcompress import tree
from jaxcompress.batches import open_stream
from jaxcompress.errors import ArgumentTypeError, NonFiniteError
from jaxcompress.graph import Traced
from jaxcompress.graph.sites import call_of
from jaxcompress.mappings import FieldMapping
from jaxcompress.stats._plan import StatisticPlan, plan_statistics
from jaxcompress.stats._statistic import Statistic
from jaxcompress.stats._step import finalize, init_states, make_collect_step

_IN_FLIGHT = 2
"""Batches that may be on their way while the next is read: what bounds memory."""


@dataclass(frozen=True, kw_only=True)
class Collected(FieldMapping[Any]):
    """Results by site: `statistics["decoder/layer_0/mlp/kernel"]`.

    Invariants: every site that `where` selected is in `results` or in `skipped`; with a mapping
    of statistics it can be in both.

    Attributes:
        results: `{Site.name: result}`, or `{Site.name: {key: result}}` where a mapping of
            statistics was collected. Arrays lead with the site's scan iterations and experts,
            `(*Site.stack, *batch, ...)`. Sites that read one activation hold the same arrays.
        skipped: `{Site.name: why}`, or `{Site.name: {key: why}}`: statistics that do not apply
            there, such as those of activations at a lookup.
        non_finite: `{Site.name: entries}`: how many NaN and infinite entries were read, for the
            sites that had any.
        batches: How many batches were read.
    """

    results: Mapping[str, Any]
    skipped: Mapping[str, Any] = field(default_factory=dict)
    non_finite: Mapping[str, int] = field(default_factory=dict)
    batches: int

    def __getitem__(self, name: str) -> Any:
        if name in self.results:
            return self.results[name]
        why = f" ({self.skipped[name]})" if name in self.skipped else ""
        raise KeyError(f"{name}{why}; there are: {tree.shorten(list(self.results))}")


def collect(
    fn: Callable[..., Any] | Traced,
    params: tree.Params,
    batches: Iterable[Any],
    statistics: Statistic | Mapping[str, Statistic],
    *,
    where: tree.Where = "**",
    allow_non_finite: bool = False,
    progress: bool = False,
) -> Collected:
    """Stream batches through fn and collect statistics at its sites.

    One compiled pass: batches of one shape compile once, memory does not grow with their number
    (three are in flight at most), and states stay on the device. Scan iterations and experts are
    kept apart, as leading axes of the results: also the time steps of a recurrent layer, whose
    sequences must then be of one length. Sites that read the same activation (query, key
    and value) share one state and one computation. A branch of a `cond` that is not taken
    counts nothing. At a `jax.lax.ragged_dot` each expert's rows are zeros where a token belongs
    to another: sums are the expert's own, while numbers of tokens (and means and extremes, which
    then see zeros) are those of all.

    Batches and params may be sharded over a mesh, whose axes may be Auto or Explicit; results
    are then replicated over it. Inside a `shard_map`, each device's rows are kept apart.

    Statistics that read gradients add a backward pass, which needs the memory of a training step
    (`jax.checkpoint` in fn lowers it). What is differentiated is the sum of all floating-point
    outputs of fn: to use a loss, collect from `lambda params, x, y: loss(fn(params, x), y)`.

    Args:
        fn: `fn(params, *inputs) -> outputs`, pure; or a `Traced` of its call with the first batch.
        params: Any pytree of arrays.
        batches: An iterable of input tuples; a lone array (or other pytree that is no tuple)
            counts as a one-tuple. Read once. A smaller last batch compiles once more.
        statistics: One `Statistic`, or `{key: Statistic}`.
        where: Leaves whose sites are observed; see `tree.matches`. At lookups (embeddings),
            statistics of activations do not apply, and `lookups` applies nowhere else: both are
            left out, and listed in `Collected.skipped`.
        allow_non_finite: Go on when NaN or infinity is read, and only report it.
        progress: Show a progress bar, if the output is a terminal.

    Returns:
        The results by site.

    Raises:
        SelectionError: If `where` selects no site, or no statistic applies to any.
        NonFiniteError: If activations (or gradients) that were read are not finite; it names
            the sites.
        StructureError: If a batch is structured unlike the first.
        ArgumentError: If there are no batches, a batch is empty, or a gradient is asked for
            where there is none (inside a function with its own differentiation rule, or a
            `while` loop).
        ArgumentTypeError: If `statistics` or `batches` are of another type.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress import stats
        >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
        >>> params = {"up": jnp.ones((2, 3)), "down": jnp.ones((3, 2))}
        >>> batches = [jnp.array([[1.0, -2.0]]), jnp.array([[0.5, 1.0]])]
        >>> collected = stats.collect(fn, params, batches, stats.absmax())
        >>> collected["up"]
        Array([1., 2.], dtype=float32)
        >>> sorted(collected), collected.batches
        (['down', 'up'], 2)
    """
    several = check_statistics(statistics)
    first, rest = open_stream(batches)
    plan = plan_statistics(call_of(fn, params, first, {}), params, several, where)
    sharding = find_sharding((params, first))
    # donated: the states are updated in place
    step = jax.jit(make_collect_step(plan), donate_argnums=0, out_shardings=sharding)
    states = jax.jit(lambda: init_states(plan), out_shardings=sharding)()
    flags = _Flags(allow=allow_non_finite)
    pending: collections.deque[dict[str, jax.Array]] = collections.deque()
    stream = itertools.chain([first], rest)
    total = len(batches) if hasattr(batches, "__len__") else None  # pyright: ignore
    for batch in show_progress(stream, total, progress):
        states, bad = step(states, params, batch)
        pending.append(bad)
        if len(pending) > _IN_FLIGHT:
            flags.read(pending.popleft())
    while pending:
        flags.read(pending.popleft())
    results = jax.jit(lambda states: finalize(plan, states))(states)
    return _make_collected(plan, results, flags, single=isinstance(statistics, Statistic))


def check_statistics(statistics: Any) -> dict[str, Statistic]:
    found = {"": statistics} if isinstance(statistics, Statistic) else statistics
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(isinstance(one, Statistic) for one in found.values())
    ):
        raise ArgumentTypeError(
            "statistics",
            got=f"{statistics!r} ({type(statistics).__name__})",
            expected="a Statistic, or a mapping of one or more by name",
            fix='For example stats.absmax(), called, or {"range": stats.min_max()}.',
        )
    return dict(found)


def find_sharding(arrays: Any) -> jax.sharding.Sharding | None:
    """Find where states live: replicated over the mesh of the arguments, if they have one."""
    for x in jax.tree.leaves(arrays):
        if isinstance(x, jax.Array) and isinstance(x.sharding, jax.sharding.NamedSharding):
            return jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
    return None


def show_progress(stream: Iterator[Any], total: int | None, progress: bool) -> Iterator[Any]:
    if not progress:
        return stream
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        return stream
    return iter(rich.progress.track(stream, "Collecting statistics", total=total, console=console))


class _Flags:
    """Adds up, on the host, how many non-finite entries each site has read."""

    def __init__(self, *, allow: bool):
        self._allow, self.batches = allow, 0
        self.totals: collections.Counter[str] = collections.Counter()

    def read(self, bad: dict[str, jax.Array]) -> None:
        found = {name: np.asarray(entries) for name, entries in jax.device_get(bad).items()}
        found = {name: entries for name, entries in found.items() if entries.any()}
        self.totals.update({name: int(n.sum(dtype=np.uint64)) for name, n in found.items()})
        if found and not self._allow:
            raise NonFiniteError(
                "batches",
                got=f"NaN or infinity in batch {self.batches} "
                + "; ".join(f"at {name!r}{_where(n)}: {n.sum()}" for name, n in found.items()),
                expected="finite activations",
                fix="Look at the first site named, or pass allow_non_finite=True to go on.",
            )
        self.batches += 1


def _where(entries: np.ndarray) -> str:
    """Name the scan iterations that are meant."""
    if not entries.ndim:
        return ""
    indices = [tuple(map(int, index)) for index in np.argwhere(entries)[:4]]
    return f", iterations {', '.join(str(i[0] if len(i) == 1 else i) for i in indices)}"


def _make_collected(plan: StatisticPlan, results: Any, flags: _Flags, *, single: bool) -> Collected:
    skipped = plan.skipped
    non_finite = {
        name: max(flags.totals[owner] for owner in {*keys.values()})
        for name, keys in plan.owners.items()
    }
    return Collected(
        results=plan.sort_by_site(results, single=single),
        skipped={name: keys[""] for name, keys in skipped.items()} if single else skipped,
        non_finite={name: entries for name, entries in non_finite.items() if entries},
        batches=flags.batches,
    )
