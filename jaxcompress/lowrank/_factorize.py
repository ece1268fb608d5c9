"""`factorize`: leaves of any function as factors of low rank, under a budget."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxcompress import budget as budgets
from jaxcompress import graph, stats, tree
from jaxcompress.batches import open_stream
from jaxcompress.errors import ArgumentTypeError, require_at_least
from jaxcompress.graph.sites import list_observed
from jaxcompress.lowrank._candidate import Candidate, errors, saving
from jaxcompress.lowrank._choose import Budget, Ranks, choose_ranks
from jaxcompress.lowrank._execute import execute
from jaxcompress.lowrank._factors import Factors
from jaxcompress.lowrank._matrix_leaf import MatrixCandidate
from jaxcompress.lowrank._methods import SVD, ActivationSVD, Method
from jaxcompress.lowrank._plan import find_candidates, place_factors, read_methods
from jaxcompress.lowrank._report import FactorizedLeaf, LowRankReport
from jaxcompress.stats import by_matrix, merge_results


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
        >>> import jax, jax.numpy as jnp
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
    _check_arguments(budget, multiple)
    first, rest = open_stream(batches)
    call = graph.capture(fn, params, *first)
    traced = graph.trace(call)
    found, coverage = find_candidates(
        fn,
        params,
        first,
        traced,
        read_methods(method),
        where=where,
        multiple=multiple,
        strict=strict,
    )
    tree.require_finite(
        {path: one.leaf for path, one in found.items()},
        fix="Find where they come from; factors would spread them over whole matrices.",
    )
    _collect_grams(call, params, (first, rest), found, progress=progress)
    ranks, seconds = choose_ranks(fn, params, first, traced, found, budget, multiple)
    factored = {
        path: place_factors(found[path].factors(r), found[path].leaf) for path, r in ranks.items()
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


def _check_arguments(budget: Any, multiple: int) -> None:
    if not isinstance(budget, budgets.Budget | Ranks):
        raise ArgumentTypeError(
            "budget",
            got=repr(budget),
            expected="budget.Params, Flops, Bytes or Seconds, or lowrank.Ranks",
            fix="Params(0.5) leaves at most half of the params.",
        )
    require_at_least("multiple", multiple, 1, fix="8 suits GPUs.")


def _collect_grams(
    call: graph.Traced,
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
    stream = itertools.chain([first], rest)
    where = lambda path, _: path in wanted
    collected = stats.collect(
        call, params, stream, stats.second_moment(), where=where, progress=progress
    )
    for one in wanted.values():
        moments = [
            by_matrix(collected[site.name], site, one.form)
            for site in list_observed(one.sites, one.form)
        ]
        one.gram = merge_results(moments).total


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
