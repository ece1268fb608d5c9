"""Layer-adaptive magnitude: scores that compare across layers without a budget for each."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxcompress.structured.importance._magnitude import Magnitude


@jax.jit
def lamp(scores: jax.Array) -> jax.Array:
    r"""Divide each score by the sum of those that are not below it: $s_u / \sum_{v \ge u} s_v$.

    Along the last axis, in ascending order; ties in the order of their indices. Zero stays zero.
    """
    order = jnp.argsort(scores, axis=-1, stable=True)
    ascending = jnp.take_along_axis(scores, order, axis=-1)
    rest = jnp.cumsum(ascending[..., ::-1], axis=-1)[..., ::-1]
    ratios = ascending / jnp.where(rest > 0, rest, 1)
    return jnp.take_along_axis(ratios, jnp.argsort(order, axis=-1), axis=-1)


@dataclass(frozen=True, kw_only=True)
class LAMP(Magnitude):
    r"""Score a unit by its share of all units that score no less: $s_u / \sum_{v \ge u} s_v$.

    s are the scores of `Magnitude`, in ascending order; the largest unit of each group scores 1
    and goes last. It does not see the scale of a group, so `normalize` changes nothing here.

    Attributes:
        p: 1 or 2, as in `Magnitude`; the paper's is 2.

    Reference:
        Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, arXiv:2010.07611,
        eq. 4, on the units of a group rather than on entries.
    """

    def finish(self, scores: jax.Array) -> jax.Array:
        """Divide by what is not below."""
        return lamp(scores)
