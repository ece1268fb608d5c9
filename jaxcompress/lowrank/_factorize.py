"""`factorize`: leaves of any function as factors of low rank, under a budget."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcompress import budget as budgets
from jaxcompress import graph, stats, tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError, NonFiniteError, SelectionError
from jaxcompress.lowrank._allocate import Allocation, met_already, unreachable
from jaxcompress.lowrank._candidate import (
    Candidate,
    MatrixCandidate,
    Rung,
    errors,
    rung,
    saves,
    saving,
)
from jaxcompress.lowrank._execute import execute
from jaxcompress.lowrank._factors import Factors
from jaxcompress.lowrank._methods import SVD, ActivationSVD, Method
from jaxcompress.lowrank._plan import candidates, checked_methods, placed_like, seen_at
from jaxcompress.lowrank._report import FactorizedLeaf, LowRankReport
from jaxcompress.stats import _by_matrix
from jaxcompress.stats._collect import matching, opened


@dataclass(frozen=True)
class Ranks:
    """Ranks that are given rather than found.

    Attributes:
        by_path: `{path or glob: rank}`, for Tucker-2 a pair; the first that matches a leaf counts,
            and a leaf that none matches stays whole. `LowRankReport.ranks` is one.
    """

    by_path: Mapping[str, int | tuple[int, ...]]


Budget: TypeAlias = budgets.Budget | Ranks


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """What `factorize` gives.

    Attributes:
        params: Params with `Factors` in place of every factorised leaf: what
            `lowrank.execute(fn)` takes.
        report: What was done, leaf by leaf.
    """

    params: tree.Params
    report: LowRankReport


def factorize(
    fn: Callable[..., Any],
    params: tree.Params,
    batches: Iterable[Any],
    *,
    budget: Budget,
    method: Method | Sequence[Method] = SVD(),  # noqa: B008  (frozen, without fields)
    where: tree.Where = tree.weights,
    multiple: int = 1,
    strict: bool = False,
    progress: bool = False,
) -> LowRank:
    r"""Replace leaves by factors of low rank, so that a budget is met at the least loss.

    fn is traced to its sites. Each leaf is brought into matrices by the axes that its sites
    contract (any layout; stacked layers and experts apart, with one rank for all of them), and
    taken where some rank saves both params and FLOPs. Ranks are allocated over all leaves
    together, so that as much as can be is kept of the product of the shares of energy that the
    leaves keep,

    $$\max_r \prod_l \frac{\sum_{i \le r_l} \sigma_{l,i}^2}{\sum_i \sigma_{l,i}^2}
    \quad \text{within the budget,}$$

    by the steps down that lose least of its logarithm per param or FLOP saved, until the budget
    is met; what the last step saved too much is given back. So no leaf could keep one rank
    more, and none costs more than it did whole. $\sigma_l$ are the singular values of a leaf, or
    of what it does to its inputs (`ActivationSVD`). For `Seconds` the steps are those for FLOPs,
    and their number is found by asking the target's compiler at each halving.

    Args:
        fn: `fn(params, *inputs) -> outputs`, pure, as it is used for inference.
        params: Any pytree of arrays.
        batches: An iterable of input tuples; a lone array counts as a one-tuple. Methods without
            data look at the shapes of the first only, which may be `ShapeDtypeStruct`s.
        budget: What may remain: `budget.Params(0.5)`, `Flops`, `Bytes`, `Seconds`; or `Ranks`.
        method: `SVD()`, `ActivationSVD()`, `Tucker2()`, or several of these, of which the first
            that can take a leaf does.
        where: Leaves that may be factorised; see `tree.matches`.
        multiple: Ranks are multiples of it; matrix units like 8, 64 or 128.
        strict: Raise when a selected leaf cannot be factorised, rather than reporting it.
        progress: Show a progress bar, if the output is a terminal.

    Returns:
        The params, and the report.

    Raises:
        SelectionError: If `where` selects nothing, if nothing that it selects can be factorised,
            or under `strict` if any leaf cannot; if a key of `Ranks` matches no such leaf.
        ArgumentError: If the budget cannot be met (it says the least that can be reached), or is
            met already; if a rank of `Ranks` saves nothing; if `multiple` is not positive, or
            there are no batches.
        ArgumentTypeError: If `budget` or `method` are of another type.
        NonFiniteError: If weights or activations that were read are not finite.

    Example:
        >>> from jaxcompress.budget import Params
        >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params = {"up": jax.random.normal(keys[0], (16, 32))}
        >>> params["down"] = jax.random.normal(keys[1], (32, 4))
        >>> x = jax.random.normal(keys[2], (64, 16))
        >>> result = factorize(fn, params, [x], budget=Params(0.5), method=ActivationSVD())
        >>> result.report.params, result.report.params_before
        (320, 640)
        >>> execute(fn)(result.params, x).shape
        (64, 4)
    """
    _check(budget, multiple)
    first, stream = opened(batches)
    traced = graph.trace(fn, params, *first)
    found, coverage = candidates(
        fn,
        params,
        first,
        traced,
        checked_methods(method),
        where=where,
        multiple=multiple,
        strict=strict,
    )
    for path, candidate in found.items():
        _require_finite(path, candidate.leaf)
    _observe(fn, params, (first, stream), found, progress=progress)
    ranks, seconds = _chosen(fn, params, first, traced, found, budget, multiple)
    factored = {
        path: placed_like(found[path].factors(r), found[path].leaf) for path, r in ranks.items()
    }
    result = tree.map_with_path(lambda path, x: factored.get(path, x), params)
    leaves = [_row(found[path], factored[path], ranks[path]) for path in ranks]
    return LowRank(
        params=result,
        report=LowRankReport(
            leaves=tuple(leaves),
            kept=tuple(path for path in coverage.touched if path not in ranks),
            unselected=coverage.unselected,
            exempt=coverage.exempt,
            params_before=tree.count(params),
            params=tree.count(result),
            bytes_before=tree.nbytes(params),
            bytes=tree.nbytes(result),
            flops_before=traced.flops,
            flops=graph.trace(execute(fn), result, *first).flops,
            seconds=seconds,
        ),
    )


def _check(budget: Any, multiple: int) -> None:
    if not isinstance(budget, budgets.Budget | Ranks):
        raise ArgumentTypeError(
            "budget",
            got=repr(budget),
            expected="budget.Params, Flops, Bytes or Seconds, or lowrank.Ranks",
            fix="Params(0.5) leaves at most half of the params.",
        )
    if multiple < 1:
        raise ArgumentError("multiple", got=multiple, expected="1 or more", fix="8 suits GPUs.")


def _require_finite(path: str, leaf: Any) -> None:
    if not bool(jnp.isfinite(leaf).all()):
        raise NonFiniteError(
            "params",
            got=f"NaN or infinity in {path!r}",
            expected="finite weights",
            fix="Find where they come from; factors would spread them over whole matrices.",
        )


def _observe(
    fn: Callable[..., Any],
    params: tree.Params,
    batches: tuple[tuple[Any, ...], Iterable[Any]],
    found: Mapping[str, Candidate],
    *,
    progress: bool,
) -> None:
    """Give XᵀX to the candidates whose method asks for it, in one pass over the batches."""
    wanted = {
        path: one
        for path, one in found.items()
        if isinstance(one, MatrixCandidate) and isinstance(one.method, ActivationSVD)
    }
    if not wanted:
        return
    first, rest = batches
    stream = (batch for part in ([first], matching(iter(rest), first)) for batch in part)
    where = lambda path, _: path in wanted
    collected = stats.collect(
        fn, params, stream, stats.second_moment(), where=where, progress=progress
    )
    for one in wanted.values():
        moments = [
            _by_matrix.by_matrix(collected[site.name], site, one.form)
            for site in seen_at(one.leaf, one.sites, one.form)
        ]
        one.gram = _by_matrix.together(moments).total


# --- Choosing ranks ------------------------------------------------------------------------------


def _chosen(
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
        return _in_time(fn, params, inputs, traced, found, ladders, budget)
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
    return _ranks(ladders, state), None


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


def _ranks(
    ladders: Mapping[str, Sequence[Rung]], state: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    return {path: ladders[path][k].ranks for path, k in state.items() if k}


def _in_time(
    fn: Callable[..., Any],
    params: tree.Params,
    inputs: Sequence[Any],
    traced: graph.Graph,
    found: Mapping[str, Candidate],
    ladders: Mapping[str, Sequence[Rung]],
    budget: budgets.Seconds,
) -> tuple[dict[str, tuple[int, ...]], tuple[float, float]]:
    """Find the fewest steps after which the target's compiler says that a call is short enough."""
    rest = traced.flops - sum(ladder[0].flops for ladder in ladders.values())
    allocation = Allocation(ladders, "flops", rest)
    known: dict[int, float] = {}

    def seconds(count: int) -> float:
        if count not in known:
            ranks = _ranks(ladders, allocation.after(count))
            known[count] = _estimate(fn, params, inputs, found, ranks, budget.target)
        return known[count]

    total = seconds(0)
    limit = budget.limit(total)
    if total <= limit:
        raise met_already(budget, limit, total, "seconds")
    count = budgets.fewest_steps(seconds, len(allocation.steps), limit)
    if count is None:
        raise unreachable(budget, limit, seconds(len(allocation.steps)), total, "seconds")
    return _ranks(ladders, allocation.after(count)), (total, seconds(count))


def _estimate(
    fn: Callable[..., Any],
    params: tree.Params,
    inputs: Sequence[Any],
    found: Mapping[str, Candidate],
    ranks: Mapping[str, tuple[int, ...]],
    target: str,
) -> float:
    """Ask a target's compiler how long a call takes with some ranks, from shapes alone."""
    shapes = tree.map_with_path(
        lambda path, x: found[path].template(ranks[path]) if path in ranks else _shape(x), params
    )
    run = execute(fn) if ranks else fn
    seconds = graph.cost(run, shapes, *jax.tree.map(_shape, tuple(inputs)), target=target).seconds
    if seconds is None:
        raise ArgumentError(
            "budget",
            got=f"the target {target!r}, whose compiler gives no time",
            expected="a target with an estimate of seconds",
            fix='Use "tpu-v5e", or budget.Flops.',
        )
    return seconds


def _shape(x: Any) -> Any:
    if isinstance(x, tree.LeafNode):
        return jax.tree.map(_shape, x)
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    return jax.ShapeDtypeStruct(jnp.shape(x), dtype)


def _given(found: Mapping[str, Candidate], budget: Ranks) -> dict[str, tuple[int, ...]]:
    """Read ranks that are given."""
    chosen: dict[str, tuple[int, ...]] = {}
    used: set[str] = set()
    for path, one in found.items():
        for where, given in budget.by_path.items():
            if tree.matches(where, path, one.leaf):
                used.add(where)
                ranks = (given,) if isinstance(given, int) else tuple(given)
                _check_ranks(one, ranks)
                chosen[path] = ranks
                break
    unused = [where for where in budget.by_path if where not in used]
    if unused or not chosen:
        raise SelectionError(
            "budget",
            got=f"Ranks for {tree.shorten(unused)}, which take no leaf that can be factorised",
            expected="keys that each take at least one",
            fix=f"Those that can be are: {tree.shorten(list(found))}.",
        )
    return chosen


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


def _row(candidate: Candidate, factors: Factors, ranks: tuple[int, ...]) -> FactorizedLeaf:
    before, (params, flops) = candidate.dense, candidate.cost(ranks)
    weight_error, output_error = errors(candidate, factors)
    return FactorizedLeaf(
        path=candidate.path,
        method=type(candidate.method).__name__,
        ranks=ranks,
        break_even=saving(candidate, 1)[0],
        params_before=before.params,
        params=params,
        flops_before=before.flops,
        flops=flops,
        weight_error=weight_error,
        output_error=output_error,
    )
