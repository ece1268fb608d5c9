"""Gradients by unit: what the loss would change if all that goes with a unit became zero."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import stats, tree
from jaxcompress.batches import open_stream
from jaxcompress.structured.importance._method import Given, Method
from jaxcompress.structured.importance._units import unit_sums

Slopes = dict[str, jax.Array]
"""`{group name: (*layers, size)}`: the sum of g w over the entries that go with each unit."""


def slopes(weights: Mapping[str, Any], gradients: Mapping[str, Any], given: Given) -> Slopes:
    """Sum g w per unit over all members that learn.

    An entry that joins two members of a group, at a unit's row and column, counts in each.
    """

    def products(path: str) -> jax.Array:
        w, g = (jnp.asarray(x[path]).astype(jnp.float32) for x in (weights, gradients))
        return w * g

    return {
        name: jnp.stack([jnp.asarray(unit_sums(m, products(m.path))) for m in members]).sum(0)
        for name, members in given.learned.items()
    }


def differentiate(method: Method, given: Given) -> Callable[[tree.Params, tuple], Slopes]:
    """Give `(params, batch) -> slopes` of the members' leaves.

    The loss is the mean of the per-example losses, or the sum of fn's floating-point outputs.
    """
    given.need(method, "fn or loss", "batches")
    paths = {m.path for members in given.learned.values() for m in members}

    def value(chosen: Mapping[str, Any], params: tree.Params, batch: tuple) -> jax.Array:
        filled = tree.map_with_path(lambda path, x: chosen.get(path, x), params)
        if given.loss is not None:
            return jnp.mean(jnp.asarray(given.loss(filled, *batch)).astype(jnp.float32))
        assert given.fn is not None
        fix = "Pass loss=: loss(params, *inputs) -> per-example losses."
        return stats.sum_outputs(given.fn(filled, *batch), fix=fix)

    def slopes_at(params: tree.Params, batch: tuple) -> Slopes:
        chosen = {path: x for path, x in tree.items(params) if path in paths}
        return slopes(chosen, jax.grad(value)(chosen, params, batch), given)

    return slopes_at


def average(
    given: Given,
    measure: Callable[[tree.Params, tuple], Slopes],
    size: Callable[[tuple], int] = lambda batch: 1,
) -> Slopes:
    """Add up what is measured on each batch, and divide by the sum of the batches' sizes."""

    @jax.jit
    def step(totals: Slopes, params: tree.Params, batch: tuple) -> Slopes:
        return jax.tree.map(jnp.add, totals, measure(params, batch))

    totals = {
        name: jnp.zeros((*group.layers, group.size), jnp.float32)
        for name, group in given.groups.items()
    }
    count = 0
    first, rest = open_stream(given.batches)
    for batch in itertools.chain([first], rest):
        count += size(batch)
        jax.block_until_ready(totals)  # one batch at a time on the device
        totals = step(totals, given.params, batch)
    return {name: total / count for name, total in totals.items()}
