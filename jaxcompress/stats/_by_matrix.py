"""What was seen at sites, sorted by the matrices of the leaf."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.errors import ArgumentTypeError
from jaxcompress.graph import Site
from jaxcompress.graph.sites import Form
from jaxcompress.stats._moments import ChannelNorm, MeanCovariance, SecondMoment
from jaxcompress.stats._ranges import MinMax


def by_matrix(result: Any, site: Site, form: Form) -> Any:
    """Give the result of a statistic the lead axes of the leaf's matrices.

    Results lead with `(*stack, *batch)`. Scans that do not take the leaf apart (over time, in a
    recurrent layer) are merged; axes that the site does not tell apart have seen the same.

    Args:
        result: What `stats.collect` or `stats.sequential` found at the site.
        site: The site.
        form: The leaf's form.

    Returns:
        The same, its arrays leading with `form.matrices`.
    """
    result = merge_axes(result, [k for k, axis in enumerate(site.layers) if axis is None])
    source = [*(axis for axis in site.layers if axis is not None), *site.axes.batch]

    def place(x: Any) -> Any:
        tail = x.ndim - len(source) - len(form.matrices) + len(form.lead)
        x = place_leading(x, source, form, tail=tail)
        return jnp.broadcast_to(x, (*form.matrices, *x.shape[x.ndim - tail :]))

    return jax.tree.map(place, result)


def place_leading(x: Any, source: Sequence[int], form: Form, *, tail: int) -> Any:
    """Bring leading axes that run along axes of a leaf into the order of its matrices.

    Args:
        x: `(*source, *groups, *features)`.
        source: The leaf's axis along which each leading axis runs.
        form: The leaf's form.
        tail: How many axes are features.

    Returns:
        `(*form.matrices, *features)`, with length 1 for what `source` does not tell apart.
    """
    # A leading axis of one entry is none to the form.
    x = x.squeeze(tuple(i for i, axis in enumerate(source) if axis not in form.lead))
    source = [axis for axis in source if axis in form.lead]
    known = [axis for axis in form.lead if axis in source]
    x = x.transpose([*(source.index(axis) for axis in known), *range(len(source), x.ndim)])
    lead = [form.shape[axis] if axis in known else 1 for axis in form.lead]
    groups = form.matrices[len(form.lead) :]
    return x.reshape(*lead, *groups, *x.shape[x.ndim - tail :])


def merge_results(results: Sequence[Any]) -> Any:
    """Merge what several sites of one leaf have seen.

    Args:
        results: What `by_matrix` gave for each.

    Returns:
        One result.
    """
    if len(results) == 1:
        return results[0]
    return merge_axes(jax.tree.map(lambda *xs: jnp.stack(xs), *results), (0,))


def merge_axes(result: Any, axes: Sequence[int]) -> Any:
    """Merge the results of one statistic along leading axes, as if it had seen all rows there.

    Args:
        result: A result of one of the package's statistics; any other only if `axes` is empty.
        axes: Leading axes.

    Returns:
        The result without these axes.

    Raises:
        ArgumentTypeError: If it is not known how to merge it.
    """
    axes = tuple(axes)
    if not axes:
        return result
    if isinstance(result, SecondMoment):
        return SecondMoment(result.total.sum(axes), result.tokens.sum(axes))
    if isinstance(result, ChannelNorm):
        l2 = jnp.sqrt(jnp.square(result.l2).sum(axes))
        return ChannelNorm(result.l1.sum(axes), l2, result.tokens.sum(axes))
    if isinstance(result, MinMax):
        return MinMax(result.low.min(axes), result.high.max(axes))
    if isinstance(result, MeanCovariance):
        return _merge_means(result, axes)
    raise ArgumentTypeError(
        "method",
        got=f"a statistic with a result of type {type(result).__name__}, at a site that runs "
        "several times with one weight",
        expected="SecondMoment, ChannelNorm, MinMax or MeanCovariance, which can be merged",
        fix="Leave such leaves (recurrent, shared) to another method.",
    )


def _merge_means(result: MeanCovariance, axes: tuple[int, ...]) -> MeanCovariance:
    tokens = result.tokens.sum(axes)
    share = result.tokens / jnp.expand_dims(jnp.maximum(tokens, 1), axes)
    mean = (result.mean * share[..., None]).sum(axes)
    off = result.mean - jnp.expand_dims(mean, axes)
    diagonal = result.covariance.ndim == result.mean.ndim
    spread = jnp.square(off) if diagonal else off[..., None] * off[..., None, :]
    weight = share[..., None] if diagonal else share[..., None, None]
    return MeanCovariance(mean, ((result.covariance + spread) * weight).sum(axes), tokens)
