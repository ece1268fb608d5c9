"""Weights times the norms of what they multiply."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from jaxcompress import stats
from jaxcompress.errors import ArgumentError
from jaxcompress.structured._groups import Group, Member
from jaxcompress.structured.importance._method import Given, Method
from jaxcompress.structured.importance._seen import (
    Found,
    collect_seen,
    find_place,
    spread_inner,
    spread_outer,
)
from jaxcompress.structured.importance._units import unit_sums


def wanda(w: jax.Array, squares: jax.Array) -> jax.Array:
    r"""Give $|w_{ij}| \|x_i\|_2$ for each entry, from the sums of squares of what it multiplies."""
    return jnp.abs(w) * jnp.sqrt(squares)


@dataclass(frozen=True, kw_only=True)
class Wanda(Method):
    r"""Score by weights times activations: $\sum |W_{ij}| \|x_i\|_2$ over the entries of a unit.

    Summed over the kernels of the group, those that compute the unit and those that read it; the
    norms are over all tokens of all batches. A table's row counts as many ones as it was looked
    up: its activation is one-hot.

    Raises:
        ArgumentError: In `importance`, if no member of a group has a site.

    Reference:
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models,
        arXiv:2306.11695, eq. 1, summed over units.
    """

    def prepare(self, given: Given) -> Found:
        """Collect norms of inputs."""
        given.need(self, "fn", "batches")
        statistics = {"norm": stats.channel_norm(), "rows": stats.lookups()}
        return collect_seen(given, given.fn, statistics, given.weights)

    def parts(self, group: Group, given: Given, prepared: Found) -> list[ArrayLike]:
        """Sum |w| times the norm per unit, for each kernel."""
        return [
            unit_sums(m, given.array(m), _squares(m, given, prepared), of=wanda)
            for m in list_with_sites(group, given, prepared)
        ]


def _squares(member: Member, given: Given, found: Found) -> np.ndarray:
    """Sum the squares of what each entry is multiplied by, beside the leaf."""
    shape = np.shape(given.leaves[member.path])
    total = np.zeros((1,) * len(shape), np.float32)
    for site, results in found[member.path]:
        place = find_place(site, shape)
        if "norm" in results:
            total = total + spread_inner(np.square(results["norm"].l2), place)
        else:
            total = total + spread_outer(results["rows"].counts, place)
    return total


def list_with_sites(group: Group, given: Given, found: Found) -> list[Member]:
    """List the kernels of a group that statistics were collected at; refuse a group of none."""
    members = [m for m in given.weights(group) if found[m.path]]
    if not members:
        raise ArgumentError(
            "groups",
            got=f"{group.name!r}, at no member of which the statistic applies",
            expected="groups with a contraction",
            fix="Leave the group out, or score it by Magnitude or Taylor.",
        )
    return members
