"""Ranks, as they are given or as a budget has them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

from jaxcompress import budget as budgets
from jaxcompress import graph, tree
from jaxcompress.errors import ArgumentError, SelectionError
from jaxcompress.lowrank._allocate import Allocation, met_already, unreachable
from jaxcompress.lowrank._candidate import Candidate, Rung, rung, saves, saving
from jaxcompress.lowrank._execute import execute


@dataclass(frozen=True)
class Ranks:
    """Ranks that are given rather than found.

    Attributes:
        by_path: `{path or glob: rank}`, for Tucker-2 a pair; the first that matches a leaf counts,
            and a leaf that none matches stays whole. `LowRankReport.ranks` is one.
    """

    by_path: Mapping[str, int | tuple[int, ...]]


Budget: TypeAlias = budgets.Budget | Ranks


def choose_ranks(
    fn: Callable[..., Any],
    params: tree.Params,
    inputs: Sequence[Any],
    traced: graph.Graph,
    found: Mapping[str, Candidate],
    budget: Budget,
    multiple: int,
) -> tuple[dict[str, tuple[int, ...]], tuple[float, float] | None]:
    """Choose ranks, `{path: ranks}` in traversal order; and seconds, if they are the budget."""
    if isinstance(budget, Ranks):
        return _given(found, budget), None
    ladders = {
        path: [one.dense, *(rung(one, ranks) for ranks in saving(one, multiple))]
        for path, one in found.items()
    }
    if isinstance(budget, budgets.Seconds):
        estimate = functools.partial(_estimate, fn, params, inputs, found, budget.target)
        return _in_time(estimate, traced.flops, ladders, budget)
    unit = type(budget).__name__.lower()
    total = {"params": tree.count, "bytes": tree.nbytes}.get(unit, lambda _: traced.flops)(params)
    limit = budget.limit(total)
    if total <= limit:
        raise met_already(budget, limit, total, unit)
    sized = _in_bytes(ladders, found) if unit == "bytes" else ladders
    quantity = "flops" if unit == "flops" else "params"
    rest = total - sum(getattr(ladder[0], quantity) for ladder in sized.values())
    allocation = Allocation(sized, quantity, rest)
    state = allocation.within(limit)
    if state is None:
        least = allocation.cost(allocation.after(len(allocation.steps)))
        raise unreachable(budget, limit, least, total, unit)
    return _read_ranks(ladders, state), None


def _in_bytes(
    ladders: Mapping[str, Sequence[Rung]], found: Mapping[str, Candidate]
) -> dict[str, list[Rung]]:
    """Count bytes in place of params."""
    return {
        path: [
            r._replace(params=r.params * tree.bits_of(found[path].leaf.dtype) // 8) for r in ladder
        ]
        for path, ladder in ladders.items()
    }


def _read_ranks(
    ladders: Mapping[str, Sequence[Rung]], state: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    return {path: ladders[path][k].ranks for path, k in state.items() if k}


def _in_time(
    estimate: Callable[[Mapping[str, tuple[int, ...]]], float],
    flops: int,
    ladders: Mapping[str, Sequence[Rung]],
    budget: budgets.Seconds,
) -> tuple[dict[str, tuple[int, ...]], tuple[float, float]]:
    """Find the fewest steps after which the target's compiler says that a call is short enough."""
    rest = flops - sum(ladder[0].flops for ladder in ladders.values())
    allocation = Allocation(ladders, "flops", rest)

    @functools.cache
    def seconds(count: int) -> float:
        return estimate(_read_ranks(ladders, allocation.after(count)))

    total = seconds(0)
    limit = budget.limit(total)
    if total <= limit:
        raise met_already(budget, limit, total, "seconds")
    count = budgets.fewest_steps(seconds, len(allocation.steps), limit)
    if count is None:
        raise unreachable(budget, limit, seconds(len(allocation.steps)), total, "seconds")
    return _read_ranks(ladders, allocation.after(count)), (total, seconds(count))


def _estimate(
    fn: Callable[..., Any],
    params: tree.Params,
    inputs: Sequence[Any],
    found: Mapping[str, Candidate],
    target: str,
    ranks: Mapping[str, tuple[int, ...]],
) -> float:
    """Ask a target's compiler how long a call takes with some ranks, from shapes alone."""
    shapes, inputs = jax.eval_shape(lambda *args: args, params, tuple(inputs))
    shapes = tree.map_with_path(
        lambda path, x: found[path].template(ranks[path]) if path in ranks else x, shapes
    )
    run = execute(fn) if ranks else fn
    seconds = graph.cost(run, shapes, *inputs, target=target).seconds
    if seconds is None:
        raise ArgumentError(
            "budget",
            got=f"the target {target!r}, whose compiler gives no time",
            expected="a target with an estimate of seconds",
            fix='Use "tpu-v5e", or budget.Flops.',
        )
    return seconds


def _given(found: Mapping[str, Candidate], budget: Ranks) -> dict[str, tuple[int, ...]]:
    """Read ranks that are given."""
    taken: dict[str, tuple[int, ...]] = {}
    used: set[str] = set()
    for path, one in found.items():
        for where, given in budget.by_path.items():
            if tree.matches(where, path, one.leaf):
                used.add(where)
                ranks = (given,) if isinstance(given, int) else tuple(given)
                _check_ranks(one, ranks)
                taken[path] = ranks
                break
    unused = [where for where in budget.by_path if where not in used]
    if unused or not taken:
        raise SelectionError(
            "budget",
            got=f"Ranks for {tree.shorten(unused)}, which take no leaf that can be factorised",
            expected="keys that each take at least one",
            fix=f"Those that can be are: {tree.shorten(list(found))}.",
        )
    return taken


def _check_ranks(candidate: Candidate, ranks: tuple[int, ...]) -> None:
    top = next(iter(saving(candidate, 1)))
    fits = len(ranks) == len(top) and min(ranks) > 0
    if not fits or not saves(candidate, ranks):
        raise ArgumentError(
            "budget",
            got=f"Ranks with {ranks} for {candidate.path!r}",
            expected=f"{len(top)} rank(s) that save params and FLOPs, such as {top}",
            fix="A factorisation above break-even costs more than the array.",
        )
