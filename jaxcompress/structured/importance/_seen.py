"""Statistics of sites, written beside the leaves that they were seen at."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import ArrayLike

from jaxcompress import graph, stats, tree
from jaxcompress.batches import open_stream
from jaxcompress.errors import ArgumentError
from jaxcompress.graph import Site
from jaxcompress.graph.sites import Form, form_of
from jaxcompress.structured._groups import Group, Member
from jaxcompress.structured.importance._method import Given

Found = Mapping[str, tuple[tuple[Site, Any], ...]]
"""`{path: ((site, {key: result}), ...)}`."""


def collect_seen(
    given: Given,
    fn: Callable[..., Any] | None,
    statistics: Mapping[str, stats.Statistic],
    members: Callable[[Group], Iterable[Member]],
) -> Found:
    """Collect statistics at all sites of members; a leaf without any has an empty entry."""
    assert fn is not None and given.batches is not None, "see `Given.need`"
    paths = dict.fromkeys(m.path for group in given.groups.values() for m in members(group))
    first, rest = open_stream(given.batches)
    traced = graph.trace(fn, given.params, *first)
    wanted = [path for path in paths if traced.sites_of(path)]
    crooked = [path for path in wanted if not all(s.aligned for s in traced.sites_of(path))]
    if crooked:
        raise ArgumentError(
            "groups",
            got=f"members that fn slices, joins or permutes before it contracts them: "
            f"{tree.shorten(crooked)}",
            expected="leaves whose entries line up with what their sites see",
            fix="Score by Magnitude, Taylor or Fisher, which need no statistics of sites.",
        )
    chosen = frozenset(wanted)
    if not chosen:
        return dict.fromkeys(paths, ())
    collected = stats.collect(
        fn,
        given.params,
        itertools.chain([first], rest),
        statistics,
        where=lambda path, leaf: path in chosen,
    )
    return {
        path: tuple((s, collected[s.name]) for s in traced.sites_of(path) if s.name in collected)
        for path in paths
    }


# --- Beside leaves ----------------------------------------------------------------------------


class LeafPlace(NamedTuple):
    """Where what a site has seen belongs in a leaf; static to jit.

    Attributes:
        form: The leaf's matrices at the site.
        source: The leaf's axis that each leading axis of a result is, `None` for one that takes
            no axis apart, such as time.
    """

    form: Form
    source: tuple[int | None, ...]

    def lead(self, sums: Any, *, tail: int) -> Any:
        """Give sums, whose last `tail` axes are features, the lead axes of the matrices.

        Scans that share the leaf are added up; what a site does not tell apart has length 1.
        """
        sums = sums.sum(tuple(k for k, axis in enumerate(self.source) if axis is None))
        source = [axis for axis in self.source if axis is not None]
        return stats.place_leading(sums, source, self.form, tail=tail)


def find_place(site: Site, shape: Sequence[int], *, window: bool = True) -> LeafPlace:
    """Find where a site's results belong; without `window`, as if convolutions had none."""
    sizes = [1 if k in site.axes.spatial and not window else n for k, n in enumerate(shape)]
    form = form_of(sizes, site.axes, site.feature_groups)
    return LeafPlace(form, (*site.layers, *site.axes.batch))


def spread_inner(sums: ArrayLike, place: LeafPlace) -> np.ndarray:
    """Write sums for each contracted entry, `(*lead, features)`, beside the leaf.

    Returns:
        An array that broadcasts to the leaf (to the leaf without its window).
    """
    form = place.form
    x = place.lead(np.asarray(sums), tail=1)
    lead, inner = x.shape[: len(form.lead)], [form.shape[k] for k in form.inner]
    outer = [1] * len(form.outer)
    if form.feature_groups > 1:  # outputs tell the groups apart: (*lead, groups, in)
        x = np.repeat(np.moveaxis(x, -2, -1), outputs_of_group(form), axis=-1)
        outer = [form.shape[k] for k in form.outer]
    x = x.reshape(*lead, *inner, *outer)
    return x.transpose(np.argsort((*form.lead, *form.inner, *form.outer)))


def spread_outer(sums: ArrayLike, place: LeafPlace) -> np.ndarray:
    """Write sums for each output, `(*lead, outputs)`, or row of a table likewise.

    Returns:
        An array that broadcasts to the leaf.
    """
    form = place.form
    x = place.lead(np.asarray(sums), tail=1)  # feature groups, and in each its outputs
    lead, outer = x.shape[: len(form.lead)], [form.shape[k] for k in form.outer]
    x = x.reshape(*lead, *[1] * len(form.inner), *outer)
    return x.transpose(np.argsort((*form.lead, *form.inner, *form.outer)))


def outputs_of_group(form: Form) -> int:
    """Count the outputs of each feature group."""
    return math.prod(form.shape[k] for k in form.outer) // form.feature_groups
