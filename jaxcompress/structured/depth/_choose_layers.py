"""`choose_layers`: which layers to drop for a budget."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxcompress import tree
from jaxcompress.budget import Budget, Bytes, Flops, Params, Seconds, fewest_steps
from jaxcompress.errors import ArgumentError, ArgumentTypeError
from jaxcompress.structured._sizes import measure_call
from jaxcompress.structured.depth._blocks import Analysis, abstract, analyse
from jaxcompress.structured.depth._drop import decide, rebuild_layers
from jaxcompress.structured.depth._dropped import collect_chosen, find_emptied
from jaxcompress.structured.depth._influence import check_scores


def choose_layers(
    fn: Callable[..., Any],
    params: tree.Params,
    scores: Mapping[str, float],
    *inputs: Any,
    budget: Budget | int,
    **kwargs: Any,
) -> tuple[str, ...]:
    """Choose the layers to drop: those of the lowest scores, as few as a budget needs.

    What remains is measured on the shrunk function itself. At least one layer of each stack, and
    one residual block of fn, stays.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        params: Any pytree of arrays; shapes are enough.
        scores: `{unit: score}`, of layers or blocks that `drop_layers` takes; equal ones in the
            order of the mapping.
        *inputs: fn's other arguments; shapes are enough.
        budget: `Params`, `Flops`, `Bytes` or `Seconds`: what may remain. Or how many units go.
        **kwargs: fn's keyword arguments.

    Returns:
        Names for `drop_layers`, lowest score first; empty if the budget is met as it is.

    Raises:
        ArgumentError: If the budget cannot be met (it says the least that can), or a unit cannot
            be dropped.
        NonFiniteError: If a score is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> fn = lambda params, x: (x := x + x @ params["a"]) + x @ params["b"]
        >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
        >>> choose_layers(fn, params, {"a": 0.9, "b": 0.1}, jnp.ones((1, 2)), budget=Params(0.5))
        ('b',)
    """
    if isinstance(budget, bool) or not isinstance(budget, int | Params | Flops | Bytes | Seconds):
        raise ArgumentTypeError(
            "budget",
            got=repr(budget),
            expected="Params, Flops, Bytes or Seconds, or a number of layers",
            fix="Params(0.5) leaves half of the params; 3 drops three layers.",
        )
    shapes = abstract(params)
    analysis = analyse(fn, shapes, inputs, kwargs)
    order = _order(analysis, check_scores(scores))
    if isinstance(budget, int):
        if not 0 <= budget <= len(order):
            raise ArgumentError(
                "budget",
                got=f"{budget} layers",
                expected=f"from 0 to {len(order)}, what can go together",
                fix="One layer of each stack, and one residual block, must stay.",
            )
        return tuple(order[:budget])

    @functools.cache
    def cost(count: int) -> float:
        return _measure_cost(fn, shapes, analysis, order[:count], inputs, kwargs, budget)

    limit = budget.limit(cost(0)) if budget.is_fraction else budget.amount
    count = fewest_steps(cost, len(order), limit)
    if count is None:
        raise ArgumentError(
            "budget",
            got=f"{budget}, at most {limit:g} of {cost(0):g}",
            expected=f"at least {cost(len(order)):g}: what remains with all {len(order)} gone",
            fix="Raise the budget, or shrink widths as well.",
        )
    return tuple(order[:count])


def _order(analysis: Analysis, scores: Mapping[str, float]) -> list[str]:
    """List the units that can go together, lowest score first."""
    ranked = sorted(scores, key=lambda name: scores[name])
    order: list[str] = []
    for name in ranked:
        if find_emptied(analysis, *collect_chosen(analysis, [*order, name])) is None:
            order.append(name)
    return order


def _measure_cost(
    fn: Callable[..., Any],
    params: tree.Params,
    analysis: Analysis,
    names: list[str],
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    budget: Budget,
) -> float:
    """Measure what remains without some units."""
    if names:
        dropped, _ = decide(analysis, names)
        fn, params = rebuild_layers(fn, dropped, params), dropped.apply(params)
    if isinstance(budget, Seconds):  # on the target, wherever the arrays are
        inputs = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x, inputs
        )
    return measure_call(fn, params, inputs, kwargs, budget)
