"""Growing regularisation: the units that are to go are pushed out by a rising L2 penalty."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import ArrayLike, Int

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, NonFiniteError, StructureError
from jaxcompress.structured._groups import Group
from jaxcompress.structured.importance._units import list_learned, spread_units
from jaxcompress.structured.regularize._penalties import add_penalty, check_figure, require_params


class GrowingState(NamedTuple):
    """State of `growing_regularization`.

    Attributes:
        step: Updates seen so far.
        penalties: `{group name: (*layers, size)}`: the penalty of each unit, 0 for those that
            stay.
    """

    step: Int[jax.Array, ""]
    penalties: dict[str, jax.Array]


def choose_lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """Choose so many of the lowest along the last axis, the first of equal ones: a bool array."""
    order = np.argsort(scores, axis=-1, kind="stable")
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, order[..., :count], True, axis=-1)
    return chosen


def growing_regularization(
    groups: Mapping[str, Group],
    scores: Mapping[str, ArrayLike],
    *,
    fraction: float | Mapping[str, float],
    increment: float = 1e-4,
    every: int = 10,
    ceiling: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Push the units of the lowest scores to zero by a growing L2 penalty: $g + \lambda_t w$.

    $\lambda_t = \min(\tau, \delta\,(1 + \lfloor t / k \rfloor))$ at update t for the lowest units
    of each group, 0 for the others; w are all learned entries that go with a unit. The units to
    go are chosen once, from the scores, and are small by the time they are removed. Chain it
    *before* the optimizer, and not before one that divides by the size of gradients, such as
    Adam: `optax.chain(growing_regularization(groups, scores, fraction=0.5), optax.sgd(0.01))`.

    Args:
        groups: From `structured.groups`, or a dict of some of them.
        scores: From `importance`, for each of these groups.
        fraction: How many units go, rounded down: of each group (and each layer of a stack), in
            [0, 1], or `{group name: fraction}`.
        increment: $\delta$, what is added to the penalty every `every` updates.
        every: k, at least 1.
        ceiling: $\tau$, where the penalty stops.

    Returns:
        An optax transformation.

    Raises:
        ArgumentError: If an argument is out of range or no unit is chosen; in `init`, if a group
            has no leaf that learns; in `update`, if `params` is missing.
        NonFiniteError: If scores are not finite.
        StructureError: If scores are not those of the groups; in `init`, if params are not.

    Example:
        >>> from jaxcompress import structured
        >>> member = structured.Member(
        ...     path="w", axis=1, indices=np.arange(2)[:, None], produces=True, reads=False)
        >>> group = structured.Group(
        ...     name="w", size=2, role="hidden", description="hidden", members=(member,))
        >>> tx = growing_regularization(
        ...     {"w": group}, {"w": jnp.array([1.0, 2.0])}, fraction=0.5, increment=0.1)
        >>> params = {"w": jnp.array([[1.0, 2.0]])}
        >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        >>> updates["w"]
        Array([[0.1, 0. ]], dtype=float32)

    Reference:
        Wang et al., Neural Pruning via Growing Regularization, arXiv:2012.09243, algorithm 1
        (GReg-1), on all members of a group.
    """
    _check_growth(increment, every, ceiling)
    chosen = _choose_units(groups, scores, fraction)

    def init(params: tree.Params) -> Any:
        list_learned(groups, params)
        penalties = {name: jnp.zeros(units.shape, jnp.float32) for name, units in chosen.items()}
        return GrowingState(step=jnp.zeros((), jnp.int32), penalties=penalties)

    def update(
        updates: tree.Params, state: Any, params: tree.Params | None = None, **extra: Any
    ) -> tuple[tree.Params, Any]:
        params = require_params(params)
        leaves = dict(tree.items(params))
        more = jnp.where(state.step % every == 0, jnp.float32(increment), jnp.float32(0))
        grown = {
            name: jnp.where(units, jnp.minimum(state.penalties[name] + more, ceiling), 0)
            for name, units in chosen.items()
        }
        total: dict[str, jax.Array] = {}
        for name, members in list_learned(groups, params).items():
            for m in members:
                beside = spread_units(grown[name], m, leaves[m.path].shape, fill=0)
                total[m.path] = total[m.path] + beside if m.path in total else beside
        step = jnp.asarray(optax.safe_increment(state.step))
        penalised = add_penalty(updates, params, total, lambda p: p)
        return penalised, GrowingState(step=step, penalties=grown)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_growth(increment: float, every: int, ceiling: float) -> None:
    check_figure("increment", increment, fix="The paper's is 1e-4.")
    check_figure("ceiling", ceiling, fix="The paper's is 1.")
    if every < 1:
        raise ArgumentError(
            "every", got=f"{every}", expected="at least 1", fix="Use every=10 for every 10 updates."
        )


def _choose_units(
    groups: Mapping[str, Group],
    scores: Mapping[str, ArrayLike],
    fraction: float | Mapping[str, float],
) -> dict[str, np.ndarray]:
    """Choose the units that are to go, by group."""
    found = {}
    for name, group in groups.items():
        shape = (*group.layers, group.size)
        values = np.asarray(scores[name]) if name in scores else None
        if values is None or values.shape != shape:
            raise StructureError(
                "scores",
                got=f"{'none' if values is None else values.shape} for {name!r}",
                expected=f"an array of shape {shape}, one score per unit",
                fix="Pass structured.importance(groups, params).",
            )
        if not np.isfinite(values).all():
            raise NonFiniteError(
                "scores",
                got=f"NaN or infinity for {name!r}",
                expected="finite scores",
                fix="Score a checkpoint from before training diverged.",
            )
        share = fraction.get(name, 0.0) if isinstance(fraction, Mapping) else fraction
        if not 0 <= share <= 1:
            raise ArgumentError(
                "fraction", got=f"{share}", expected="from 0 to 1", fix="Use 0.5 for half."
            )
        # A little more than the product: 0.3 of 10 is 3, though 0.3 * 10 may round below.
        found[name] = choose_lowest(values, int(share * group.size + 1e-6))
    unknown = sorted(set(fraction) - set(groups)) if isinstance(fraction, Mapping) else []
    if unknown or not any(units.any() for units in found.values()):
        raise ArgumentError(
            "fraction",
            got=f"{fraction}" + (f", which names no group by {unknown}" if unknown else ""),
            expected="a fraction that some group has a unit for",
            fix=f"The groups are {tree.shorten(list(groups))}.",
        )
    return found
