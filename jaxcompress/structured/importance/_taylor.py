"""First-order importance: what the loss changes if all that goes with a unit becomes zero."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, require_one_of
from jaxcompress.structured._groups import Group
from jaxcompress.structured.importance._method import Given, Method
from jaxcompress.structured.importance._slopes import Slopes, average, differentiate, slopes


@dataclass(frozen=True, kw_only=True, eq=False)
class Taylor(Method):
    r"""Score by the squared first-order change of the loss, $\mathrm{mean}_b (\sum g_b w)^2$.

    The sum is over all learned entries that go with a unit (kernels, biases, norm scales), with
    their signs: minus what the loss gains, to first order, if all of them become zero. The mean
    is over batches, of each of which g is the gradient; a mean over all data first would cancel,
    since it is near zero at the end of training.

    Attributes:
        power: 2 for the square, 1 for $|\sum g_b w|$.
        gradients: A gradient to use, a tree like params, instead of computing any; fn, loss and
            batches are then not read.

    Raises:
        ArgumentError: If `power` is neither.

    Reference:
        Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv:1906.10771,
        eq. 8 (the square), on all members of a group rather than on one layer.
    """

    joint = True
    power: int = 2
    gradients: tree.Params | None = None

    def __post_init__(self):
        require_one_of("power", self.power, (1, 2), fix="Use 2.")

    def prepare(self, given: Given) -> Slopes:
        """Average over batches."""

        def effect(change: jax.Array) -> jax.Array:
            return jnp.square(change) if self.power == 2 else jnp.abs(change)

        if self.gradients is not None:
            entries = tree.flatten_like(given.params, self.gradients, name="gradients")
            found = dict(zip(tree.paths(given.params), entries, strict=True))
            _check_present(found, given)
            return jax.tree.map(effect, slopes(given.leaves, found, given))
        slopes_at = differentiate(self, given)
        return average(given, lambda *args: jax.tree.map(effect, slopes_at(*args)))

    def parts(self, group: Group, given: Given, prepared: Slopes) -> list[ArrayLike]:
        """Look the group up."""
        return [prepared[group.name]]


def _check_present(gradients: dict[str, Any], given: Given) -> None:
    members = [m.path for several in given.learned.values() for m in several]
    missing = [path for path in dict.fromkeys(members) if gradients[path] is None]
    if missing:
        raise ArgumentError(
            "gradients",
            got=f"no gradient of {tree.shorten(missing)}",
            expected="one for each learned member of the groups",
            fix="Differentiate with respect to these leaves, too.",
        )
