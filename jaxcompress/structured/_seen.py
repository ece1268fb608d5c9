"""Statistics of sites, written beside the leaves that they were seen at."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import graph, stats, tree
from jaxcompress.errors import ArgumentError
from jaxcompress.graph import Site
from jaxcompress.graph._forms import Form, form_of
from jaxcompress.stats._collect import opened

Found = Mapping[str, tuple[tuple[Site, Any], ...]]
"""`{path: ((site, {key: result}), ...)}`."""


def seen(
    fn: Callable[..., Any],
    params: tree.Params,
    batches: Iterable[Any],
    statistics: Mapping[str, stats.Statistic],
    paths: Iterable[str],
) -> Found:
    """Collect statistics at all sites of some leaves; a leaf without any has an empty entry."""
    first, rest = opened(batches)
    traced = graph.trace(fn, params, *first)
    wanted = [path for path in dict.fromkeys(paths) if traced.sites_of(path)]
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
        params,
        itertools.chain([first], rest),
        statistics,
        where=lambda path, leaf: path in chosen,
    )
    return {
        path: tuple((s, collected[s.name]) for s in traced.sites_of(path) if s.name in collected)
        for path in dict.fromkeys(paths)
    }


# --- Beside leaves ----------------------------------------------------------------------------


def beside_inputs(sums: jax.Array, site: Site, shape: Sequence[int]) -> jax.Array:
    """Write sums for each contracted entry, `(*stack, *batch, features)`, beside the leaf.

    Returns:
        An array that broadcasts to the leaf.
    """
    form = form_of(shape, site.axes, site.feature_groups)
    return _from_columns(_placed(sums, site, form)[..., None], form)


def beside_channels(sums: jax.Array, site: Site, shape: Sequence[int]) -> jax.Array:
    """Write sums for each input channel likewise, once for the window of a convolution.

    Returns:
        An array that broadcasts to the leaf. What the outputs of a feature group share is divided
        between them, so that sums over the leaf count each channel once.
    """
    window = [1 if k in site.axes.spatial else n for k, n in enumerate(shape)]
    form = form_of(window, site.axes, site.feature_groups)
    shared = 1 if form.feature_groups == 1 else _outputs_of_group(form)
    return _from_columns(_placed(sums, site, form)[..., None], form) / shared


def beside_outputs(sums: jax.Array, site: Site, shape: Sequence[int]) -> jax.Array:
    """Write sums for each output, `(*stack, *batch, outputs)`, beside the leaf.

    Returns:
        An array that broadcasts to the leaf.
    """
    form = form_of(shape, site.axes, site.feature_groups)
    sums = _placed(sums, site, form)
    if site.axes.lookup:  # its matrices are (features, rows)
        return form.to_leaf(sums[..., None])
    return form.to_leaf(sums[..., None, :], ones=True)


def beside_rows(counts: jax.Array, site: Site, shape: Sequence[int]) -> jax.Array:
    """Write counts of each row of a table, `(*stack, rows)`, beside the leaf.

    Returns:
        An array that broadcasts to the leaf.
    """
    form = form_of(shape, site.axes, site.feature_groups)
    return form.to_leaf(_placed(counts, site, form)[..., None, :], ones=True)


def beside_entries(sums: jax.Array, site: Site, shape: Sequence[int]) -> jax.Array:
    """Write sums for each entry, `(*stack, *batch, features, outputs)`, as the leaf has them.

    Returns:
        An array like the leaf.
    """
    form = form_of(shape, site.axes, site.feature_groups)
    return form.to_leaf(_placed(sums, site, form, tail=2))


def _placed(sums: jax.Array, site: Site, form: Form, *, tail: int = 1) -> jax.Array:
    """Give sums the lead axes of the leaf's matrices, adding up scans that share the leaf."""
    loose = [k for k, axis in enumerate(site.layers) if axis is None]
    sums = sums.sum(loose)
    source = [*(axis for axis in site.layers if axis is not None), *site.axes.batch]
    # A lead axis of one entry is none to the form.
    sums = jnp.squeeze(sums, [i for i, axis in enumerate(source) if axis not in form.lead])
    source = [axis for axis in source if axis in form.lead]
    known = [axis for axis in form.lead if axis in source]
    rest = range(len(source), sums.ndim)
    sums = jnp.transpose(sums, [*(source.index(axis) for axis in known), *rest])
    lead = [form.shape[k] if k in known else 1 for k in form.lead]
    groups, features = form.matrices[len(form.lead) :], sums.shape[sums.ndim - tail :]
    sums = sums.reshape(*lead, *groups, *features)
    # What a site does not tell apart has seen the same.
    return jnp.broadcast_to(sums, (*form.matrices, *features))


def _outputs_of_group(form: Form) -> int:
    return math.prod(form.shape[k] for k in form.outer) // form.feature_groups


def _from_columns(columns: jax.Array, form: Form) -> jax.Array:
    """Bring `(*matrices, in, 1)` beside the leaf; feature groups are told apart by outputs."""
    if form.feature_groups > 1:
        wide = (*columns.shape[:-1], _outputs_of_group(form))
        columns = jnp.broadcast_to(columns, wide)
    return form.to_leaf(columns)
