"""Scores by how large the activations of a unit are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import ArrayLike

from jaxcompress import graph, stats
from jaxcompress.errors import ArgumentError, require_one_of
from jaxcompress.graph import Site
from jaxcompress.graph.sites import check_side
from jaxcompress.structured._groups import Group, Member
from jaxcompress.structured.importance._method import Given, Method
from jaxcompress.structured.importance._seen import (
    Found,
    collect_seen,
    find_place,
    outputs_of_group,
    spread_inner,
    spread_outer,
)


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
        require_one_of("order", self.order, (1, 2), fix="Use order=1.")
        check_side(self.at)

    def prepare(self, given: Given) -> Found:
        """Collect norms of channels."""
        given.need(self, "fn", "batches")
        reads = "channels" if self.at == "input" else "output"
        statistics = {"norm": stats.channel_norm(reads=reads)}
        members = lambda group: self._members(group, given)
        return collect_seen(given, given.fn, statistics, members)

    def parts(self, group: Group, given: Given, prepared: Found) -> list[ArrayLike]:
        """Average over tokens, for each member with a site."""
        members = [m for m in self._members(group, given) if self._sites(m, prepared)]
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

    def _sites(self, member: Member, found: Found) -> list[tuple[Site, stats.ChannelNorm]]:
        """List the sites that read the units, or compute them: a tied leaf has both."""

        def fits(axes: graph.Axes) -> bool:
            if self.at == "input":
                return member.axis in (*axes.contract, *axes.group)
            return member.axis in axes.output

        return [(site, seen["norm"]) for site, seen in found[member.path] if fits(site.axes)]

    def _norms(self, member: Member, given: Given, found: Found) -> ArrayLike:
        shape = np.shape(given.leaves[member.path])
        sizes = [shape[k] for k in member.layers]
        total, tokens = np.zeros((*sizes, len(member.indices)), np.float32), np.float32(0)
        for site, norm in self._sites(member, found):
            sums = np.asarray(norm.l1 if self.order == 1 else np.square(norm.l2))
            place = find_place(site, shape, window=False)
            inner = (self.at == "input") != bool(site.axes.lookup)
            beside = spread_inner(sums, place) if inner else spread_outer(sums, place)
            if inner and place.form.feature_groups > 1:  # each channel once, not once an output
                beside = beside / np.float32(outputs_of_group(place.form))
            total += _per_unit(beside, shape, member)
            time = tuple(k for k, axis in enumerate(site.layers) if axis is None)
            tokens += np.max(np.asarray(norm.tokens).sum(time))
        mean = total / np.maximum(tokens, 1)
        return mean if self.order == 1 else np.sqrt(mean)


def _per_unit(beside: np.ndarray, shape: Sequence[int], member: Member) -> np.ndarray:
    """Sum what stands beside a leaf over each unit; layers that it does not tell apart share it."""
    kept = (*member.layers, member.axis)
    sums = beside.sum(tuple(k for k in range(beside.ndim) if k not in kept))
    sums = sums.transpose([sorted(kept).index(k) for k in kept])  # (*layers, n)
    sums = np.broadcast_to(sums, [shape[k] for k in kept])
    return np.take(sums, member.indices, axis=-1).sum(-1)
