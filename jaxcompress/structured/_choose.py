"""`choose`: which units stay, so that a budget is met exactly."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from jax.typing import ArrayLike

from jaxcompress import tree
from jaxcompress.budget import Budget, Bytes, Flops, Params, fewest_steps
from jaxcompress.errors import (
    ArgumentError,
    NonFiniteError,
    SelectionError,
    StructureError,
    require_one_of,
)
from jaxcompress.structured._groups import Group, Groups, check_keys, find_group, matches_group
from jaxcompress.structured._keep import Keep
from jaxcompress.structured._keep import keep as make_keep
from jaxcompress.structured._shrink import rebuild, slice_params
from jaxcompress.structured._sizes import Sizes, measure_call

Scope: TypeAlias = Literal["global", "isomorphic", "local"]
Bounds: TypeAlias = Mapping[str, tuple[float, float]]
"""`{glob over names of groups, or role: (least, most)}` units, floats being fractions."""


def choose(
    groups: Groups,
    scores: Mapping[str, ArrayLike],
    *,
    budget: Budget,
    scope: Scope = "global",
    bounds: Bounds | None = None,
) -> Keep:
    """Choose which units stay: those with the highest scores that a budget leaves room for.

    Units go one by one (or `round_to` at a time), always the least important next, until the budget
    is met; a cut at any other place would miss it or remove more. What is kept is counted on the
    shrunk function itself.

    Args:
        groups: From `structured.groups`.
        scores: `{group: (size,) or (layers, size)}`, from `importance`; groups that are left out
            stay whole.
        budget: What may remain: `Params(0.5)`, `Flops(2_000_000)`, `Bytes(0.5)`, or
            `Seconds(0.5, "tpu-v5e")`, which compiles a few shrunk functions for that target.
        scope: `"global"` compares the scores of all groups; `"local"` takes the same fraction of
            each group; `"isomorphic"` compares within groups of one kind (the same role and kinds
            of members) and takes the same fraction of each kind (Fang et al. 2024,
            arXiv:2407.04616).
        bounds: Least and most units to keep of some groups, the first match counting:
            `{"heads": (2, 1.0), "**/conv1/*": (0.25, 0.75)}`. At least one unit always stays.

    Returns:
        The decision, for `shrink`.

    Raises:
        SelectionError: If there is no such group, or it is frozen; if a key of `bounds` is
            neither a role nor matches a group.
        StructureError: If scores have other shapes.
        NonFiniteError: If scores hold NaN.
        ArgumentError: If the budget cannot be met; the message says what the least is.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress import structured
        >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
        >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
        >>> found = structured.groups(fn, params, jnp.ones((1, 3)))
        >>> chosen = choose(found, {"up": jnp.arange(8.0)}, budget=structured.Params(0.5))
        >>> chosen["up"].tolist()
        [4, 5, 6, 7]
    """
    ranked = {name: _order_units(groups, name, np.asarray(s)) for name, s in scores.items()}
    if not ranked:
        raise SelectionError(
            "scores",
            got="no groups",
            expected="scores of at least one group",
            fix=f"These can shrink: {tree.shorten(sorted(groups))}.",
        )
    check_keys("bounds", bounds or (), (*groups.values(), *groups.frozen.values()))
    steps = _list_steps(groups, ranked, scope, bounds or {})
    measure_kept = _make_measure(groups, budget)
    dense = measure_kept(_keep_after(groups, ranked, steps, 0), _counts(groups, ranked, steps, 0))
    limit = budget.limit(dense)
    counted = _choose_counter(groups, budget)

    def cost(taken: int) -> float:
        counts = _counts(groups, ranked, steps, taken)
        if counted is not None:
            return counted(counts)
        return measure_kept(_keep_after(groups, ranked, steps, taken), counts)

    taken = fewest_steps(cost, len(steps), limit)
    taken = len(steps) if taken is None else taken
    while True:  # the count by labels is exact for all but odd structures: what is shrunk decides
        chosen = _keep_after(groups, ranked, steps, taken)
        have = measure_kept(chosen, _counts(groups, ranked, steps, taken))
        if have <= limit:
            return chosen
        if taken == len(steps):
            raise ArgumentError(
                "budget",
                got=f"{budget}: {limit:,.6g} of {dense:,.6g}",
                expected=f"at least {have:,.6g}, which is left with the least of each group",
                fix="Raise the budget, lower `bounds` or `round_to`, or score more groups.",
            )
        taken += 1


class _Step(NamedTuple):
    """A step of shrinking: so many units of a group are left after it."""

    key: float
    group: str
    left: int


def _order_units(groups: Groups, name: str, scores: np.ndarray) -> np.ndarray:
    group = find_group(groups, name, "scores")
    want = (*group.layers, group.size)
    if scores.shape != want:
        raise StructureError(
            "scores",
            got=f"shape {scores.shape} for {name!r}",
            expected=f"{want}",
            fix="Take them from `structured.importance` with these groups.",
        )
    if np.isnan(scores).any():
        raise NonFiniteError(
            "scores", got=f"NaN in {name!r}", expected="numbers", fix="Look at params and batches."
        )
    return scores.astype(np.float64)


def _list_steps(
    groups: Groups, ranked: Mapping[str, np.ndarray], scope: Scope, bounds: Bounds
) -> list[_Step]:
    """List all steps, least important first; those of one group come in order."""
    require_one_of("scope", scope, get_args(Scope), fix="Pick one.")
    # The score of the j-th unit to go, over layers that go together.
    ordered = {
        name: np.sort(scores, axis=-1).reshape(-1, scores.shape[-1]).mean(0)
        for name, scores in ranked.items()
    }
    if scope == "isomorphic":
        ordered = _rank_in_kinds(groups, ordered)
    steps = []
    for name, scores in ordered.items():
        size = len(scores)
        local = scope == "local"
        keys = np.arange(1, size + 1) / size if local else np.maximum.accumulate(scores)
        for count in _list_allowed(groups[name], bounds):
            steps.append(_Step(float(keys[size - count - 1]), name, count))
    return sorted(steps, key=lambda step: step.key)  # stable: order within a group stays


def _rank_in_kinds(groups: Groups, ordered: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give, for the j-th unit of a group to go, the fraction of its kind that is gone by then."""
    kinds: dict[tuple, list[str]] = {}
    for name in ordered:
        kinds.setdefault(_classify_group(groups[name]), []).append(name)
    found = dict(ordered)  # in the same order
    for names in kinds.values():
        every = np.concatenate([ordered[name] for name in names])
        rank = np.empty(len(every))
        rank[np.argsort(every, kind="stable")] = np.arange(1, len(every) + 1) / len(every)
        parts = np.split(rank, np.cumsum([len(ordered[name]) for name in names])[:-1])
        found |= dict(zip(names, parts, strict=True))
    return found


def _classify_group(group: Group) -> tuple:
    parts = [
        (m.path.split("/")[-1], m.axis, m.indices.shape[1], m.produces, m.reads)
        for m in group.members
    ]
    return group.role, tuple(sorted(set(parts)))


def _list_allowed(group: Group, bounds: Bounds) -> list[int]:
    """List the numbers of units that can be kept below all, descending."""
    low, high = 1, group.size
    for key, (least, most) in bounds.items():
        if matches_group(key, group):
            low, high = _units(least, group.size), _units(most, group.size)
            break
    if not 0 <= low <= high <= group.size:
        raise ArgumentError(
            "bounds",
            got=f"{low} to {high} units of {group.name!r}",
            expected=f"least <= most <= {group.size}",
            fix="Floats are fractions of a group, integers are units.",
        )
    step = group.round_to
    top = (min(high, group.size - 1) // step) * step
    counts = [n for n in range(top, 0, -step) if n >= max(low, 1)]
    if not counts and high < group.size:
        counts = [max(low, 1)]
    return counts


def _units(bound: float, size: int) -> int:
    return round(bound * size) if isinstance(bound, float) else int(bound)


def _counts(
    groups: Groups, ranked: Mapping[str, np.ndarray], steps: Sequence[_Step], taken: int
) -> dict[str, int]:
    counts = {name: groups[name].size for name in ranked}
    counts |= {step.group: step.left for step in steps[:taken]}
    return counts


def _keep_after(
    groups: Groups, ranked: Mapping[str, np.ndarray], steps: Sequence[_Step], taken: int
) -> Keep:
    indices = {}
    for name, count in _counts(groups, ranked, steps, taken).items():
        if count < groups[name].size:
            # Of equal scores the earlier unit stays.
            order = np.argsort(-ranked[name], axis=-1, kind="stable")[..., :count]
            indices[name] = np.sort(order, axis=-1)
    return make_keep(groups, indices)


def _choose_counter(groups: Groups, budget: Budget) -> Callable[[Mapping[str, int]], float] | None:
    match budget:
        case Params():
            return Sizes(groups).params
        case Bytes():
            return Sizes(groups).bytes
        case Flops():
            return Sizes(groups).flops
    return None


def _make_measure(groups: Groups, budget: Budget) -> Callable[[Keep, Mapping[str, int]], float]:
    """Make what measures a shrunk function, on shapes."""
    known: dict[tuple, float] = {}
    assert groups.fn is not None, "groups come from `structured.groups`"
    fn = groups.fn

    def measure_kept(keep: Keep, counts: Mapping[str, int]) -> float:
        key = tuple(sorted(counts.items()))
        if key not in known:
            smaller, params = rebuild(fn, keep) if keep else fn, slice_params(groups.like, keep)
            known[key] = measure_call(smaller, params, groups.inputs, groups.kwargs, budget)
        return known[key]

    return measure_kept
