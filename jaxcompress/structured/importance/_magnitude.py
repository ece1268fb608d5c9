"""Scores by the size of weights."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import ArrayLike

from jaxcompress.errors import require_one_of
from jaxcompress.structured._groups import Group
from jaxcompress.structured.importance._method import Given, Method
from jaxcompress.structured.importance._units import unit_sums


@dataclass(frozen=True, kw_only=True)
class Magnitude(Method):
    r"""Score by size: $\sum |w|^p$ over the entries that go with a unit.

    Summed over all kernels of the group, those that compute the unit and those that read it. No
    root is taken: the score is the norm of the unit to the power p. Biases, norm scales
    and running statistics are left out: their size does not say whether a unit is needed.

    Attributes:
        p: 1 or 2.

    Raises:
        ArgumentError: If `p` is neither.

    Reference:
        Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710, section 3.1 (p = 1,
        one kernel); Fang et al., DepGraph, arXiv:2301.12900, section 3.3 (p = 2, the group).
    """

    p: Literal[1, 2] = 2

    def __post_init__(self):
        require_one_of("p", self.p, (1, 2), fix="Use p=1 for L1.")

    def parts(self, group: Group, given: Given, prepared: Any) -> list[ArrayLike]:
        """Sum |w|^p per unit, for each kernel."""
        power = jnp.abs if self.p == 1 else jnp.square
        return [unit_sums(m, given.array(m), of=power) for m in given.weights(group)]
