"""Fisher importance: the expected second-order change of the loss, from examples' gradients."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from jaxcompress import tree
from jaxcompress.errors import ArgumentError
from jaxcompress.structured._groups import Group
from jaxcompress.structured.importance._method import Given, Method
from jaxcompress.structured.importance._slopes import Slopes, average, differentiate


@dataclass(frozen=True, kw_only=True)
class Fisher(Method):
    r"""Score by the empirical Fisher information of a unit's gate.

    $\frac{1}{2N} \sum_n (\sum g_n w)^2$ for N examples. The inner sum is over all learned entries
    that go with a unit, $g_n$ the gradient of the loss of example n alone: fn or `loss` is run on
    batches of one, so that it must not look across examples (BatchNorm in inference mode).

    Attributes:
        at_once: How many examples' gradients are held at a time; with 1, fn is not vmapped.

    Raises:
        ArgumentError: If `at_once` is not positive.

    Reference:
        Theis et al., Faster gaze prediction with dense networks and Fisher pruning,
        arXiv:1801.05787, eq. 11, with the gate on all members of a group.
    """

    joint = True
    at_once: int = 8

    def __post_init__(self):
        if self.at_once < 1:
            raise ArgumentError("at_once", got=self.at_once, expected="1 or more", fix="Use 8.")

    def prepare(self, given: Given) -> Slopes:
        """Sum squares over examples."""
        slopes_at = differentiate(self, given)

        def sum_squares(params: tree.Params, batch: tuple) -> Slopes:
            def of_example(example: tuple) -> Slopes:
                alone = jax.tree.map(lambda x: x[None], example)
                return jax.tree.map(jnp.square, slopes_at(params, alone))

            # One by one there is no vmap, which some primitives lack.
            several = jax.lax.map(
                of_example, batch, batch_size=self.at_once if self.at_once > 1 else None
            )
            return jax.tree.map(lambda found: found.sum(0), several)

        return average(given, sum_squares, lambda batch: 2 * batch_size(batch))

    def parts(self, group: Group, given: Given, prepared: Slopes) -> list[ArrayLike]:
        """Look the group up."""
        return [prepared[group.name]]


def batch_size(batch: Any) -> int:
    """Give the leading size of a batch's arrays, which must be one."""
    shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ArgumentError(
            "batches",
            got=f"arrays of shapes {shapes}",
            expected="arrays that all lead with the examples of the batch",
            fix="Close over what is no batch of examples.",
        )
    return sizes.pop()  # pyright: ignore[reportReturnType]
