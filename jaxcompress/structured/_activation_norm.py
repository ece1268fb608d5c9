"""Scores by how large the activations of a unit are."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import stats
from jaxcompress.errors import ArgumentError
from jaxcompress.structured._groups import Group, Member
from jaxcompress.structured._method import Given, Method
from jaxcompress.structured._seen import Found, beside_channels, beside_outputs, seen
from jaxcompress.structured._units import unit_sums


@dataclass(frozen=True, kw_only=True)
class ActivationNorm(Method):
    r"""Score by the size of a unit's activations.

    $\mathrm{mean}_t |x_t|$, or $\sqrt{\mathrm{mean}_t x_t^2}$ for order 2: where the members read
    the units (after the nonlinearity), or where they compute them, over all tokens of all
    batches and positions of feature maps. The features of a unit (a head's) are summed, squares
    before the root; so are the sites that read it, and the layers of a stack that share units.

    Attributes:
        order: 1 for the mean of absolute values, 2 for the root of the mean of squares.
        at: "input": where members contract the units; "output": where they compute them, before
            bias and nonlinearity.

    Raises:
        ArgumentError: If `order` or `at` is neither; in `importance`, if no member of a group
            has a site there.

    Reference:
        Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference,
        arXiv:1611.06440, section 2.2 (activation criteria).
    """

    order: Literal[1, 2] = 1
    at: Literal["input", "output"] = "input"

    def __post_init__(self):
        if self.order not in (1, 2):
            raise ArgumentError("order", got=self.order, expected="1 or 2", fix="Use order=1.")
        if self.at not in ("input", "output"):
            raise ArgumentError(
                "at", got=repr(self.at), expected='"input" or "output"', fix='Use at="input".'
            )

    def prepare(self, given: Given) -> Found:
        """Collect norms of channels."""
        given.need(self, "fn", "batches")
        assert given.fn is not None and given.batches is not None
        reads = "channels" if self.at == "input" else "output"
        statistics = {"norm": stats.channel_norm(reads=reads)}
        paths = [m.path for group in given.groups.values() for m in self._members(group, given)]
        return seen(given.fn, given.params, given.batches, statistics, paths)

    def parts(self, group: Group, given: Given, prepared: Found) -> list[jax.Array]:
        """Average over tokens, for each member with a site."""
        members = [m for m in self._members(group, given) if prepared[m.path]]
        if not members:
            verb = "reads" if self.at == "input" else "computes"
            raise ArgumentError(
                "groups",
                got=f"{group.name!r}, of which no member at a site {verb} the units",
                expected=f"groups with sites at their {self.at}",
                fix='Leave the group out, or try the other one of at="input" and at="output".',
            )
        return [self._norms(m, given, prepared) for m in members]

    def _members(self, group: Group, given: Given) -> list[Member]:
        learned = given.learned[group.name]
        return [m for m in learned if (m.reads if self.at == "input" else m.produces)]

    def _norms(self, member: Member, given: Given, found: Found) -> jax.Array:
        shape = np.shape(given.leaves[member.path])
        beside = beside_channels if self.at == "input" else beside_outputs
        total = jnp.zeros((*(shape[k] for k in member.layers), len(member.indices)), jnp.float32)
        tokens = jnp.zeros((), jnp.float32)
        for site, results in found[member.path]:
            norm: stats.ChannelNorm = results["norm"]
            sums = norm.l1 if self.order == 1 else jnp.square(norm.l2)
            total += unit_sums(beside(sums, site, shape), member)
            time = [k for k, axis in enumerate(site.layers) if axis is None]
            tokens += jnp.max(norm.tokens.sum(time))
        mean = total / jnp.maximum(tokens, 1)
        return mean if self.order == 1 else jnp.sqrt(mean)
