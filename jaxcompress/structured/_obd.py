"""Second-order importance from the diagonal of the Fisher information."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxcompress import stats
from jaxcompress.structured._groups import Group, Member
from jaxcompress.structured._method import Given, Method
from jaxcompress.structured._seen import Found, beside_entries, seen
from jaxcompress.structured._units import unit_sums
from jaxcompress.structured._wanda import with_sites


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
        f = given.loss if given.loss is not None else given.fn
        assert f is not None and given.batches is not None
        paths = [m.path for group in given.groups.values() for m in given.weights(group)]
        return seen(f, given.params, given.batches, {"fisher": stats.fisher()}, paths)

    def parts(self, group: Group, given: Given, prepared: Found) -> list[jax.Array]:
        """Sum saliencies per unit, for each kernel."""
        members = with_sites(group, given, prepared)
        return [
            unit_sums(obd(given.array(m), self._diagonal(m, given, prepared)), m) for m in members
        ]

    def _diagonal(self, member: Member, given: Given, found: Found) -> jax.Array:
        shape = given.array(member).shape
        total = jnp.zeros(shape, jnp.float32)
        for site, results in found[member.path]:
            total = total + beside_entries(results["fisher"].total, site, shape)
        return total
