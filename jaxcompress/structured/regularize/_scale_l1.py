"""Network slimming: an L1 penalty on the norm scales that multiply units."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from jaxcompress import tree
from jaxcompress.structured._groups import Group
from jaxcompress.structured.importance._units import list_learned, spread_units
from jaxcompress.structured.regularize._penalties import (
    Figure,
    add_penalty,
    check_figure,
    figure_at,
    require_params,
)
from jaxcompress.structured.regularize._scales import scale_members


class ScaleL1State(NamedTuple):
    """State of `scale_l1`.

    Attributes:
        step: Updates seen so far.
    """

    step: Int[jax.Array, ""]


def scale_l1(
    groups: Mapping[str, Group], strength: Figure, *, where: tree.Where | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Push norm scales towards zero, $g + \lambda\,\mathrm{sign}(\gamma)$, for `BatchNormScale`.

    The subgradient of $\lambda \sum |\gamma|$ over the scales of all units of the groups; 0 at 0.
    Scales hover around zero rather than reach it. Chain it *before* the optimizer:
    `optax.chain(scale_l1(groups, 1e-4), optax.sgd(0.1))`.

    Args:
        groups: From `structured.groups`, or a dict of some of them.
        strength: $\lambda$, at least 0: a number, or a function of the update count.
        where: Which members are scales, as in `BatchNormScale`.

    Returns:
        An optax transformation.

    Raises:
        ArgumentError: If `strength` is negative; in `init`, if a group has no norm scale; in
            `update`, if `params` is missing.
        StructureError: In `init`, if params are not those of the groups.

    Example:
        >>> import numpy as np
        >>> from jaxcompress import structured
        >>> member = structured.Member(
        ...     path="bn/scale", axis=0, indices=np.arange(3)[:, None],
        ...     produces=False, reads=False)
        >>> group = structured.Group(
        ...     name="conv", size=3, role="channels", description="channels", members=(member,))
        >>> tx = scale_l1({"conv": group}, 0.5)
        >>> params = {"bn": {"scale": jnp.array([2.0, -1.0, 0.0])}}
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> updates["bn"]["scale"]
        Array([1.5, 0.5, 1. ], dtype=float32)

    Reference:
        Liu et al., Learning Efficient Convolutional Networks through Network Slimming,
        arXiv:1708.06519, eq. 1.
    """
    check_figure("strength", strength, fix="Use a small number, such as 1e-4.")

    def init(params: tree.Params) -> Any:
        scale_members(list_learned(groups, params), where, dict(tree.items(params)))
        return ScaleL1State(step=jnp.zeros((), jnp.int32))

    def update(
        updates: tree.Params, state: Any, params: tree.Params | None = None, **extra: Any
    ) -> tuple[tree.Params, Any]:
        params = require_params(params)
        leaves = dict(tree.items(params))
        weight, penalties = figure_at(strength, state.step), {}
        for name, members in scale_members(list_learned(groups, params), where, leaves).items():
            units = jnp.full((*groups[name].layers, groups[name].size), weight)
            for m in members:
                more = spread_units(units, m, leaves[m.path].shape, fill=0)
                # A scale that belongs to two groups is still penalised once.
                penalties[m.path] = jnp.maximum(penalties.get(m.path, more), more)
        penalised = add_penalty(updates, params, penalties, jnp.sign)
        return penalised, ScaleL1State(step=jnp.asarray(optax.safe_increment(state.step)))

    return optax.GradientTransformationExtraArgs(init, update)
