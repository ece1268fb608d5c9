"""Scores by redundancy: how far a unit's weights are from those of the others."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from jaxcompress.meshes import call_with_auto_axes
from jaxcompress.structured._groups import Group, Member
from jaxcompress.structured.importance._method import Given, Method
from jaxcompress.structured.importance._units import unit_entries


def distances_to_others(rows: jax.Array) -> jax.Array:
    r"""Sum the Euclidean distances of each row to all others, $\sum_v \|w_u - w_v\|_2$.

    `(*layers, units, entries)` to `(*layers, units)`. Squared distances come from the Gram matrix
    of the centred rows, so that what all rows share costs no digits.
    """
    rows = rows - rows.mean(-2, keepdims=True)
    gram = jnp.matmul(rows, jnp.swapaxes(rows, -1, -2), precision=jax.lax.Precision.HIGHEST)
    # The diagonal rather than the sum of squares: equal rows are then at distance 0 exactly.
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
    gaps = squares[..., :, None] + squares[..., None, :] - 2 * gram
    return jnp.sqrt(jnp.maximum(gaps, 0)).sum(-1)


@dataclass(frozen=True, kw_only=True)
class FPGM(Method):
    r"""Score by the distance to the other units, $\sum_v \|w_u - w_v\|_2$: the median goes first.

    A unit near the geometric median of all units can be expressed by those that stay. Summed
    over the kernels of the group, each of which is compared by itself.

    Reference:
        He et al., Filter Pruning via Geometric Median, arXiv:1811.00250, eq. 8.
    """

    def parts(self, group: Group, given: Given, prepared: Any) -> list[ArrayLike]:
        """Sum distances per unit, for each kernel."""
        return [_distances(given.array(m), m) for m in given.weights(group)]


def _distances(w: jax.Array, member: Member) -> jax.Array:
    indices = tuple(map(tuple, member.indices.tolist()))
    return _sum_distances(w, kept=(*member.layers, member.axis), indices=indices)


@functools.partial(jax.jit, static_argnames=("kept", "indices"))
def _sum_distances(
    w: jax.Array, *, kept: tuple[int, ...], indices: tuple[tuple[int, ...], ...]
) -> jax.Array:
    by_unit = np.asarray(indices)
    return call_with_auto_axes(lambda w: distances_to_others(unit_entries(w, kept, by_unit)), w)
