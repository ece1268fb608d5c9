"""Gradients by unit: what the loss would change if all that goes with a unit became zero."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.errors import ArgumentError
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


def differentiate(method: Method, given: Given) -> Callable[..., tuple[jax.Array, Any, Any]]:
    """Give `(params, batch) -> (loss, weights, gradients)`, both by path, of the members' leaves.

    The loss is the mean of the per-example losses, or the sum of fn's floating-point outputs.
    """
    given.need(method, "fn or loss", "batches")
    paths = {m.path for members in given.learned.values() for m in members}

    def value(chosen: Mapping[str, Any], params: tree.Params, batch: tuple) -> jax.Array:
        filled = tree.map_with_path(lambda path, x: chosen.get(path, x), params)
        if given.loss is not None:
            return jnp.mean(jnp.asarray(given.loss(filled, *batch)).astype(jnp.float32))
        assert given.fn is not None
        outputs = jax.tree.leaves(given.fn(filled, *batch))
        floats = [x.astype(jnp.float32).sum() for x in outputs if tree.is_floating(x)]
        if not floats:
            raise ArgumentError(
                "fn",
                got="outputs without a floating-point array",
                expected="outputs whose sum can be differentiated",
                fix="Pass loss=: loss(params, *inputs) -> per-example losses.",
            )
        return jnp.stack(floats).sum()

    def gradient(params: tree.Params, batch: tuple) -> tuple[jax.Array, Any, Any]:
        chosen = {path: x for path, x in tree.items(params) if path in paths}
        loss, gradients = jax.value_and_grad(value)(chosen, params, batch)
        return loss, chosen, gradients

    return gradient
