"""`importance`: a score per unit of each group, over all its members."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError, NonFiniteError, require_one_of
from jaxcompress.structured._groups import Group
from jaxcompress.structured.importance._magnitude import Magnitude
from jaxcompress.structured.importance._method import Given, Method
from jaxcompress.structured.importance._units import check_members, list_learned

Normalize: TypeAlias = Literal["mean", "max", "sum"] | None
"""What the scores of a group are divided by, so that groups compare."""

Reduce: TypeAlias = Literal["sum", "mean", "max"]
"""How the scores that members give a unit become one."""


def importance(
    groups: Mapping[str, Group],
    params: tree.Params,
    *,
    method: Method | None = None,
    normalize: Normalize = "mean",
    reduce: Reduce = "sum",
    fn: Callable[..., Any] | None = None,
    batches: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
) -> dict[str, jax.Array]:
    r"""Score each unit of each group by how much it would be missed, over all its members.

    $$I_u = \frac{\sum_m s_m(u)}{\mathrm{mean}_v \sum_m s_m(v)}$$

    where $s_m(u)$ is what the method makes of the entries of unit u in member m. Dividing by the
    group's mean lets units of different groups compare. Units of stacked layers are scored and
    normalised layer by layer, as if the layers were written out.

    Args:
        groups: From `structured.groups`, or a dict of some of them.
        params: The params that they are of; everything is computed in float32.
        method: What counts: `Magnitude()` by default.
        normalize: What scores are divided by: the "mean", "max" or "sum" of the group's (of each
            layer's), or `None`. A group of zeros stays so.
        reduce: How members are put together: "sum", "mean" or "max".
        fn: `fn(params, *inputs)`, for methods that observe activations. Where gradients are
            taken and there is no `loss`, fn's summed outputs are differentiated.
        batches: An iterable of input tuples, read once, for methods that need data.
        loss: `loss(params, *inputs) -> per-example losses, or their mean`, for methods that need
            gradients; batches are then its inputs.

    Returns:
        `{group name: scores}`, float32, of shape `(*group.layers, group.size)`, none negative;
        the lowest go first.

    Raises:
        ArgumentError: If a method needs what was not given, `normalize` or `reduce` is unknown,
            or a group has no member that the method counts.
        StructureError: If params are not those of the groups.
        NonFiniteError: If weights, gradients or activations are not finite; it names the group.

    Example:
        >>> from jaxcompress import structured
        >>> params = {"up": jnp.array([[1.0, 3.0]]), "down": jnp.array([[1.0], [1.0]])}
        >>> member = lambda path, axis: structured.Member(
        ...     path=path, axis=axis, indices=np.arange(2)[:, None],
        ...     produces=path == "up", reads=path == "down")
        >>> group = structured.Group(
        ...     name="up", size=2, role="hidden", description="hidden units",
        ...     members=(member("up", 1), member("down", 0)))
        >>> importance({"up": group}, params, method=structured.Magnitude(p=1))
        {'up': Array([0.6666667, 1.3333334], dtype=float32)}

    Reference:
        Fang et al., DepGraph: Towards Any Structural Pruning, arXiv:2301.12900, section 3.3.
    """
    method = Magnitude() if method is None else method
    _check_importance_options(method, normalize, reduce)
    leaves = dict(tree.items(params))
    check_members(groups, leaves)
    groups = {group.name: group for group in groups.values()}
    given = Given(
        groups=groups,
        params=params,
        leaves=leaves,
        learned=list_learned(groups, params),
        fn=fn,
        batches=batches,
        loss=loss,
    )
    prepared = method.prepare(given)
    scores = {}
    for name, group in groups.items():
        together = _reduce_parts(method.parts(group, given, prepared), reduce)
        _check_scores(together, group, given)
        scores[name] = method.finish(jnp.asarray(_normalize(together, normalize)))
    return scores


def _reduce_parts(parts: list[ArrayLike], how: Reduce) -> np.ndarray:
    stacked = np.stack([np.asarray(part, np.float32) for part in parts])
    return {"sum": np.sum, "mean": np.mean, "max": np.max}[how](stacked, axis=0)


def _normalize(scores: np.ndarray, how: Normalize) -> np.ndarray:
    if how is None:
        return scores
    whole = {"sum": np.sum, "mean": np.mean, "max": np.max}[how](scores, axis=-1, keepdims=True)
    return scores / np.where(whole > 0, whole, np.ones_like(whole))


def _check_importance_options(method: Any, normalize: Any, reduce: Any) -> None:
    if not isinstance(method, Method):
        raise ArgumentTypeError(
            "method",
            got=f"{method!r}",
            expected="a method of structured, called",
            fix="For example structured.Magnitude(p=1).",
        )
    require_one_of("normalize", normalize, ("mean", "max", "sum", None), fix='Use "mean".')
    require_one_of("reduce", reduce, get_args(Reduce), fix='Use "sum".')
    if method.joint and reduce != "sum":
        raise ArgumentError(
            "reduce",
            got=f"{reduce!r} with {type(method).__name__}, which takes a group's members together",
            expected='"sum"',
            fix="Leave `reduce` out.",
        )


def _check_scores(scores: np.ndarray, group: Group, given: Given) -> None:
    if np.isfinite(scores).all():
        return
    bad = [m.path for m in group.members if not bool(jnp.isfinite(given.leaves[m.path]).all())]
    raise NonFiniteError(
        "params" if bad else "batches",
        got=f"NaN or infinity in {bad[0]!r}" if bad else f"scores of {group.name!r} not finite",
        expected="finite weights" if bad else "gradients and activations in float32's range",
        fix="Use a checkpoint from before training diverged."
        if bad
        else "Look at the loss on these batches; scale inputs or losses that overflow.",
    )
