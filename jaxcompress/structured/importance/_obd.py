"""Second-order importance from the diagonal of the Fisher information."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from jaxcompress import stats
from jaxcompress.structured._groups import Group, Member
from jaxcompress.structured.importance._method import Given, Method
from jaxcompress.structured.importance._seen import Found, LeafPlace, collect_seen, find_place
from jaxcompress.structured.importance._units import unit_sums
from jaxcompress.structured.importance._wanda import list_with_sites


def obd(w: jax.Array, h: jax.Array) -> jax.Array:
    r"""Give the saliency $h w^2 / 2$ of each entry, h the diagonal of the Hessian."""
    return h * jnp.square(w) / 2


@dataclass(frozen=True, kw_only=True)
class OBD(Method):
    r"""Score by the second-order change of the loss, $\frac12 \sum h_{ij} w_{ij}^2$ per unit.

    h is the diagonal of the empirical Fisher information in place of the Hessian's, token by
    token (`stats.fisher`): $h_{ij} = \sum_t x_{ti}^2 g_{tj}^2$ over all batches. Unlike `Fisher`
    it neglects that the entries of a unit go together. Summed over the kernels of the group that
    are contracted; those that are only looked up have no such statistic and are left out. What is
    differentiated is the sum of what `loss` (or else fn) returns.

    Reference:
        LeCun et al., Optimal Brain Damage, 1989, eq. 5, with the Fisher information for the
        Hessian as in arXiv:1801.05787.
    """

    def prepare(self, given: Given) -> Found:
        """Collect the diagonal Fisher."""
        given.need(self, "fn or loss", "batches")
        fn = given.loss if given.loss is not None else given.fn
        return collect_seen(given, fn, {"fisher": stats.fisher()}, given.weights)

    def parts(self, group: Group, given: Given, prepared: Found) -> list[ArrayLike]:
        """Sum saliencies per unit, for each kernel."""
        return [_scores(m, given, prepared) for m in list_with_sites(group, given, prepared)]


def _scores(member: Member, given: Given, found: Found) -> ArrayLike:
    w = given.array(member)
    places = tuple(find_place(site, w.shape) for site, _ in found[member.path])
    totals = tuple(results["fisher"].total for _, results in found[member.path])
    return unit_sums(member, w, _diagonal(totals, places=places), of=obd)


@functools.partial(jax.jit, static_argnames="places")
def _diagonal(totals: tuple[jax.Array, ...], *, places: tuple[LeafPlace, ...]) -> jax.Array:
    """Add up what the sites of a leaf have seen of each entry, as an array like the leaf."""

    def entries(total: jax.Array, place: LeafPlace) -> jax.Array:
        x = place.lead(total, tail=2)
        return place.form.to_leaf(jnp.broadcast_to(x, (*place.form.matrices, *x.shape[-2:])))

    return sum(map(entries, totals[1:], places[1:]), start=entries(totals[0], places[0]))
