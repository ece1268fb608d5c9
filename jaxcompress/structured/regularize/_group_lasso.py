"""Group lasso on units: whole units become exactly zero in training."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from jaxcompress import linalg, tree
from jaxcompress.structured._groups import Group, Member
from jaxcompress.structured.importance._units import (
    list_learned,
    spread_units,
    unit_size,
    unit_sums,
)
from jaxcompress.structured.regularize._penalties import (
    Figure,
    check_figure,
    figure_at,
    require_params,
)


class GroupLassoState(NamedTuple):
    """State of `group_lasso`.

    Attributes:
        step: Updates seen so far.
    """

    step: Int[jax.Array, ""]


def shrinkage(squares: jax.Array, threshold: jax.Array) -> jax.Array:
    r"""Give the factor $\max(0, 1 - t / \|w_u\|)$ of each unit, from the square of its norm."""
    norms = jnp.sqrt(squares)
    return jnp.where(norms > threshold, 1 - threshold / jnp.where(norms > 0, norms, 1), 0)


def group_lasso(
    groups: Mapping[str, Group], strength: Figure, *, learning_rate: Figure
) -> optax.GradientTransformationExtraArgs:
    r"""Drive whole units to exactly zero: the proximal step of a group lasso after each update.

    The penalty is $\lambda \sum_u \sqrt{n_u} \|w_u\|_2$, where $w_u$ are all learned entries that
    go with unit u, in every member of its group, and $n_u$ is their number. With v = p + update,

    $$w_u = v_u \max\Big(0, 1 - \frac{\eta \lambda \sqrt{n_u}}{\|v_u\|_2}\Big)$$

    and what is returned is w - p, in float32 or wider, so that `optax.apply_updates` gives w, and
    zero where a unit is zero (an update in the dtype of bfloat16 gradients would not).

    It must be **last in the chain**, `optax.chain(optax.sgd(0.1), group_lasso(groups, 1e-4,
    learning_rate=0.1))`, with the optimizer's own learning rate: anything after it would change
    the update. Where an entry belongs to units of several groups (it computes one and reads
    another), their steps are taken one after the other, in the order of `groups`, as incremental
    proximal methods do: what is zero stays zero.

    Args:
        groups: From `structured.groups`, or a dict of some of them.
        strength: $\lambda$, at least 0: a number, or a function of the update count.
        learning_rate: $\eta$, likewise.

    Returns:
        An optax transformation. Leaves that the optimizer does not see are left out of the norms.

    Raises:
        ArgumentError: If an argument is negative; in `init`, if a group has no leaf that learns;
            in `update`, if `params` is missing.
        StructureError: In `init`, if params are not those of the groups.

    Example:
        >>> import numpy as np
        >>> from jaxcompress import structured
        >>> member = structured.Member(
        ...     path="w", axis=1, indices=np.arange(2)[:, None], produces=True, reads=False)
        >>> group = structured.Group(
        ...     name="w", size=2, role="hidden", description="hidden", members=(member,))
        >>> tx = optax.chain(optax.sgd(1.0), group_lasso({"w": group}, 1.0, learning_rate=1.0))
        >>> params = {"w": jnp.array([[0.6, 6.0], [0.8, 8.0]])}
        >>> grads = jax.tree.map(jnp.zeros_like, params)
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["w"].round(2)
        Array([[0.  , 5.15],
               [0.  , 6.87]], dtype=float32)

    Reference:
        Yuan and Lin, Model selection and estimation in regression with grouped variables, 2006;
        Wen et al., Learning Structured Sparsity in Deep Neural Networks, arXiv:1608.03665, by a
        proximal step instead of a subgradient. Order of overlapping groups: Bertsekas,
        Incremental proximal methods for large scale convex optimization, 2011.
    """
    check_figure("strength", strength, fix="Use a small number, such as 1e-4.")
    check_figure("learning_rate", learning_rate, fix="Use the optimizer's learning rate.")

    def init(params: tree.Params) -> Any:
        list_learned(groups, params)
        return GroupLassoState(step=jnp.zeros((), jnp.int32))

    def update(
        updates: tree.Params, state: Any, params: tree.Params | None = None, **extra: Any
    ) -> tuple[tree.Params, Any]:
        params = require_params(params)
        weight = figure_at(strength, state.step) * figure_at(learning_rate, state.step)
        before = dict(tree.items(params))
        given = dict(zip(before, tree.flatten_like(params, updates, name="updates"), strict=True))
        members = list_learned(groups, params)
        paths = dict.fromkeys(m.path for several in members.values() for m in several)
        moved = {path: _add_widened(before[path], given[path]) for path in paths}
        for several in members.values():
            moved |= _shrink_units(moved, several, weight)
        steps = {path: moved[path] - before[path].astype(moved[path].dtype) for path in paths}
        stepped = tree.map_with_path(lambda path, p, u: steps.get(path, u), params, updates)
        return stepped, GroupLassoState(step=jnp.asarray(optax.safe_increment(state.step)))

    return optax.GradientTransformationExtraArgs(init, update)


def _add_widened(p: jax.Array, u: jax.Array) -> jax.Array:
    """Add in float32 or wider."""
    p, u = linalg.widen(p), linalg.widen(u)
    dtype = linalg.common_float(p.dtype, u.dtype)
    return p.astype(dtype) + u.astype(dtype)


def _shrink_units(
    leaves: dict[str, jax.Array], members: tuple[Member, ...], weight: jax.Array
) -> dict[str, jax.Array]:
    """Take the proximal step of one group, whose units do not overlap."""
    squares = [jnp.asarray(unit_sums(m, leaves[m.path], of=jnp.square)) for m in members]
    entries = sum(unit_size(leaves[m.path].shape, m) for m in members)
    factors = shrinkage(
        jnp.stack(squares).sum(0).astype(jnp.float32), weight * jnp.sqrt(jnp.float32(entries))
    )
    found: dict[str, jax.Array] = {}
    for m in members:
        x = found.get(m.path, leaves[m.path])
        found[m.path] = x * spread_units(factors, m, x.shape, fill=1).astype(x.dtype)
    return found
