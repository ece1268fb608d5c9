"""Which statistic is computed where: what fits a site, and what sites can share."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress import graph, tree
from jaxcompress.errors import ArgumentError, SelectionError
from jaxcompress.graph import Site, Traced
from jaxcompress.graph.sites import check_observers, make_observe_layer, run_layers, suggest_sites
from jaxcompress.stats._statistic import Statistic

Keyed = dict[str, dict[str, Any]]
"""`{site name: {key of the statistic: ...}}`."""


@dataclass(frozen=True, kw_only=True)
class SiteShapes:
    """What an observer gets at a site in one run, as shapes."""

    site: Site
    activation: jax.ShapeDtypeStruct
    output: jax.ShapeDtypeStruct

    @property
    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What `read_rows` reads."""
        x, y = self.activation, self.output
        return {"activation": x, "input_grad": x, "output": y, "output_grad": y}

    @functools.cached_property
    def _known(self) -> dict[str, tuple[int, ...]]:
        return {}

    def rows(self, kind: str) -> tuple[int, ...]:
        """Give the shape of an array as rows; see `read_rows`."""
        if kind not in self._known:
            read = functools.partial(read_rows, self.site, kind)
            self._known[kind] = jax.eval_shape(read, self.arrays).shape
        return self._known[kind]


@dataclass(frozen=True, kw_only=True)
class StatisticPlan:
    """Which statistics are computed at which sites.

    Attributes:
        traced: The call of fn with the first batch.
        seen: `{site name: shapes}` of the sites with any statistic.
        owners: `{site name: {key: name of the site whose state it shares}}`.
        statistics: `{key: statistic}`.
        skipped: `{site name: {key: why it does not apply}}`.
    """

    traced: Traced
    seen: Mapping[str, SiteShapes]
    owners: Keyed
    statistics: Mapping[str, Statistic]
    skipped: Keyed

    def list_owned(self, *, gradients: bool) -> dict[str, dict[str, Statistic]]:
        """List the statistics by the site that computes them: with gradients, or without."""
        found: dict[str, dict[str, Statistic]] = {}
        for name, keys in self.owners.items():
            for key, owner in keys.items():
                statistic = self.statistics[key]
                if owner == name and statistic.needs_gradients == gradients:
                    found.setdefault(name, {})[key] = statistic
        return found

    def sort_by_site(self, results: Keyed, *, single: bool) -> dict[str, Any]:
        """Give each site its results, by key unless a `single` statistic was asked for."""
        by_site = {
            name: {key: results[owner][key] for key, owner in keys.items()}
            for name, keys in self.owners.items()
        }
        return {name: keys[""] for name, keys in by_site.items()} if single else by_site


def read_rows(site: Site, kind: str, arrays: Mapping[str, Any]) -> jax.Array:
    """Bring an array of one run of a site into rows, `(*batch, tokens, features)`.

    Args:
        site: The site.
        kind: One of `READS`.
        arrays: "activation", "output" and, for gradients, "input_grad" and "output_grad".
    """
    if kind in ("input", "indices"):
        return site.rows(arrays["activation"])
    if kind == "channels":
        return site.channels(arrays["activation"])
    if kind == "input_grad":
        return site.channels(arrays["input_grad"])
    return site.output_rows(arrays[kind])


def row_shapes(seen: SiteShapes, statistic: Statistic) -> list[tuple[int, ...]]:
    """Give the shape of each array that a statistic reads at a site."""
    return [seen.rows(kind) for kind in statistic.reads]


def sizes(plan: StatisticPlan, name: str, statistic: Statistic) -> list[int]:
    """Give what `Statistic.init` is called with at a site."""
    site = plan.seen[name].site
    if statistic.reads == ("indices",):
        return [plan.traced.leaves[site.path].shape[axis] for axis in site.axes.lookup]
    return [shape[-1] for shape in row_shapes(plan.seen[name], statistic)]


def plan_statistics(
    traced: Traced,
    params: tree.Params,
    statistics: Mapping[str, Statistic],
    where: tree.Where,
) -> StatisticPlan:
    """Select the sites of a captured call, and settle what is computed at each."""
    sites = [s for s in traced.sites if tree.matches(where, s.path, traced.leaves[s.path])]
    if not sites:
        raise _explain_nothing_selected(traced, params, where)
    skipped = {s.name: {k: _explain_misfit(s, one) for k, one in statistics.items()} for s in sites}
    skipped = {n: {k: why for k, why in keys.items() if why} for n, keys in skipped.items()}
    wanted = {
        s.name: {k: one for k, one in statistics.items() if k not in skipped[s.name]} for s in sites
    }
    wanted = {name: keys for name, keys in wanted.items() if keys}
    if not wanted:
        raise SelectionError(
            "statistics",
            got=f"{sorted(statistics)}, none of which applies at any site that `where` selects",
            expected="statistics that read what the sites have",
            fix=f"At {sites[0].name!r}: {next(iter(skipped[sites[0].name].values()))}.",
        )
    seen = _observe_shapes(traced, list(wanted))
    for name, keys in wanted.items():
        for key, statistic in keys.items():
            _check_site(seen[name], key, statistic)
    owners = _share_states(seen, wanted)
    skipped = {name: keys for name, keys in skipped.items() if keys}
    plan = StatisticPlan(
        traced=traced, seen=seen, owners=owners, statistics=statistics, skipped=skipped
    )
    for key, statistic in statistics.items():
        name = next((name for name, keys in wanted.items() if key in keys), None)
        if name is not None:
            _check_update(plan, name, key, statistic)
    return plan


def _explain_misfit(site: Site, statistic: Statistic) -> str:
    """Say why a statistic does not apply to a kind of site; empty if it does."""
    lookup, reads = bool(site.axes.lookup), set(statistic.reads)
    if not lookup and "indices" in reads:
        return "it reads indices, and the site is no lookup"
    if lookup and reads & {"input", "channels", "input_grad"}:
        return "it reads activations, and the site looks rows up by index (see stats.lookups)"
    if "indices" in reads and (len(site.axes.lookup) > 1 or site.axes.batch):
        return "it counts rows, and the site looks up along several axes"
    return ""


def _check_update(plan: StatisticPlan, name: str, key: str, statistic: Statistic) -> None:
    """Refuse a statistic whose states change their form, of which a later batch would lose some."""
    seen = plan.seen[name]
    if not all(shape[-2] for shape in row_shapes(seen, statistic)):
        return  # an empty batch, which is refused as such

    def rows(arrays: Any) -> list[Array]:
        several = [read_rows(seen.site, kind, arrays) for kind in statistic.reads]
        return [x[(0,) * (x.ndim - 2)] for x in several]

    before = jax.eval_shape(lambda: statistic.init(*sizes(plan, name, statistic)))
    after = jax.eval_shape(lambda s, a: statistic.update(s, *rows(a)), before, seen.arrays)
    form = lambda state: jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", state)
    if form(before) != form(after):
        raise ArgumentError(
            "statistics",
            got=f"{key!r}, whose update at {name!r} turns {form(before)} into {form(after)}",
            expected="states that keep their structure, shapes and dtypes",
            fix="Let init return what update does, in shape and dtype.",
        )


def _check_site(seen: SiteShapes, key: str, statistic: Statistic) -> None:
    """Refuse complex numbers, gradients that do not exist, and rows that do not align."""
    site, why = seen.site, ""
    rules = {"custom_jvp", "custom_vjp"} & set(site.scope)
    if any(jnp.iscomplexobj(x) for x in (seen.activation, seen.output)):
        why = "has complex activations, which have no order"
    elif statistic.needs_gradients and rules:
        why = f"lies inside a {rules.pop()}, whose own rule gradients follow"
    elif statistic.needs_gradients and not site.bounded:
        why = "lies in a `while` loop, which has no reverse-mode gradient"
    elif statistic.needs_gradients and seen.activation.shape != site.activation.shape:
        why = f"is a {site.primitive}, whose gradients do not come apart by expert"
    elif len({shape[:-1] for shape in row_shapes(seen, statistic)}) > 1:
        why = "has outputs whose rows do not align with those of its activation"
    if why:
        raise ArgumentError(
            "statistics",
            got=f"{key!r}, which reads {statistic.reads}, for the site {site.name!r}, which {why}",
            expected="statistics that every selected site can give",
            fix="Leave the site out of `where` (see `tree.without`), or the statistic.",
        )


def _observe_shapes(traced: Traced, names: Sequence[str]) -> dict[str, SiteShapes]:
    """Run the captured call abstractly, to see what observers get."""
    seen: dict[str, SiteShapes] = {}

    def look(site: Site, state: tuple[()], activation: Any, output: Any) -> tuple[()]:
        shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (activation, output))
        activation, output = shapes
        seen[site.name] = SiteShapes(site=site, activation=activation, output=output)
        return state

    layers = {name: [make_observe_layer(look)] for name in names}
    cells = dict.fromkeys(names, ())
    check_observers(traced, dict.fromkeys(names, look), cells)
    args = [var.aval for var in traced.program.invars]
    jax.eval_shape(lambda *args: run_layers(traced, args, layers, cells, fills=True)[1], *args)
    return {name: seen[name] for name in names}


def _share_states(
    seen: Mapping[str, SiteShapes], wanted: Mapping[str, Mapping[str, Statistic]]
) -> Keyed:
    """Let sites that read one activation in one way share what depends on nothing else."""
    owners: Keyed = {}
    first: dict[Any, str] = {}
    for name, keys in wanted.items():
        identity = _identify_rows(seen[name])
        for key, statistic in keys.items():
            shared = identity is not None and set(statistic.reads) <= {"input", "channels"}
            owner = first.setdefault((key, identity), name) if shared else name
            owners.setdefault(name, {})[key] = owner
    return owners


def _identify_rows(seen: SiteShapes) -> Any:
    """Describe what a site reads and how it makes rows of it; `None` if that cannot be said.

    Branches and loops may run a site when another one with the same activation does not run, and
    the rows of a `ragged_dot` depend on the sizes of its groups too.
    """
    site = seen.site
    conditional = any(label.startswith(("cond", "while")) for label in site.scope)
    if conditional or seen.activation.shape != site.activation.shape:
        return None
    layouts = tuple(
        str(jax.make_jaxpr(form)(seen.activation)) for form in (site.rows, site.channels)
    )
    return site.source, site.scope, site.stack, layouts


def _explain_nothing_selected(
    traced: Traced, params: tree.Params, where: tree.Where
) -> SelectionError:
    # A `where` that selects no leaf at all: this raises, and names the nearest paths.
    path = next(iter(tree.select(params, where)))
    why = graph.trace(traced).why_no_site(path)
    return SelectionError(
        "where",
        got=f"{where!r}, which selects no site, but {path!r}, which {why}",
        expected="a `where` that selects leaves that fn contracts or looks up",
        fix=suggest_sites(traced),
    )


def lead(plan: StatisticPlan, name: str, statistic: Statistic) -> tuple[int, ...]:
    """Give the axes that keep states apart at a site: `(*stack, *batch)`."""
    return (*plan.seen[name].site.stack, *batch_shape(plan.seen[name], statistic))


def batch_shape(seen: SiteShapes, statistic: Statistic) -> tuple[int, ...]:
    """Give the axes that the rows of one run have before tokens and features: experts."""
    return row_shapes(seen, statistic)[0][:-2]
