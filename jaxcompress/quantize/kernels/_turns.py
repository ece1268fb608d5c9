"""Sums of groups one after the other, for backends that write out every batch of a matmul."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.quantize.kernels._codes import Operand

_ROWS = 128
"""Rows that are summed together: what is added up should stay in the cache."""


def in_turn(how: Any, acts: Operand, weights: Operand, dtype: Any) -> Array:
    """Contract codes group by group, scaling and adding each group's sums as they come.

    Args:
        how: The arrangement (`_dot.Arrangement`): groups, no batch axes.
        acts: The cut activation, without zero points; its scale is left to the caller.
        weights: The weights, without zero points.
        dtype: What products of codes are summed in.

    Returns:
        float32, `(*free)` in the order of the result.
    """
    (x_groups, w_groups), (x_summed, w_summed) = how.groups, how.summed
    groups = math.prod(weights.codes.shape[k] for k in w_groups)
    depth = math.prod(weights.codes.shape[k] for k in w_summed)
    x = jnp.transpose(acts.codes, (*how.x_free, *x_groups, *x_summed))
    w = jnp.transpose(weights.codes, (*w_groups, *w_summed, *how.w_free))
    scale = jnp.transpose(weights.scale, (*w_groups, *w_summed, *how.w_free))
    x_free, w_free = x.shape[: len(how.x_free)], w.shape[len(w_groups) + len(w_summed) :]
    ones = (1,) * len(w_summed)
    scale = jnp.broadcast_to(scale, (*scale.shape[: len(w_groups)], *ones, *w_free))
    w = w.reshape(groups, depth, -1)
    scale = scale.reshape(groups, 1, -1)
    rows, tile = math.prod(x_free), _ROWS
    tile = tile if rows % tile == 0 else rows
    x = x.reshape(rows // tile, tile, groups, depth)

    def add(total: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, w, scale = group
        sums = lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
        return total + sums.astype(jnp.float32) * scale, None

    def of_tile(x: Array) -> Array:
        start = jnp.zeros((tile, w.shape[-1]), jnp.float32)
        return lax.scan(add, start, (jnp.swapaxes(x, 0, 1), w, scale))[0]

    sums = lax.map(of_tile, x).reshape(*x_free, *w_free)
    if not how.first:
        return sums
    after = len(x_free)
    return jnp.transpose(sums, (*range(after, sums.ndim), *range(after)))
