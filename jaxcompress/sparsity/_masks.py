"""Masks: deciding which entries stay."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike

from jaxcompress import linalg, tree
from jaxcompress.errors import ArgumentError, SelectionError, require_one_of
from jaxcompress.sparsity._apply import check_mask, read_by_path
from jaxcompress.sparsity._patterns import NM, Pattern, Unstructured, keep_count
from jaxcompress.sparsity._scores import Accumulated, Score, magnitude
from jaxcompress.sparsity.schedules import check_fraction

ContractionAxes: TypeAlias = Any
"""Mapping `{where: axes}`, or a tree like params of axis tuples (`None` for the default)."""

Scope: TypeAlias = Literal["layer", "global"]
"""Whether scores compete within each leaf, or over all leaves together."""


def make_mask(
    params: tree.Params,
    *,
    sparsity: float | Mapping[Any, float] | None = None,
    threshold: float | None = None,
    score: Score | None = None,
    pattern: Pattern | None = None,
    scope: Scope = "layer",
    where: tree.Where = tree.weights,
    axes: ContractionAxes = None,
    within: tree.Params | None = None,
    grads: tree.Params | None = None,
    strict: bool = False,
) -> tree.Params:
    """Decide which entries of params stay: those of the highest scores.

    Of the U units of each leaf exactly round(sparsity * U) are pruned (halves round to even);
    ties keep the unit of the lower row-major index. With `scope="global"` units of all leaves
    compete, by score per entry, and entries are counted: exactly round(sparsity * entries) for
    `Unstructured`; with larger units the most whole units that do not exceed it.

    Args:
        params: Any pytree of finite arrays.
        sparsity: Fraction to prune, from 0 to 1; or `{where: fraction}`, of which the first that
            matches a leaf counts and a leaf that none matches is left alone (scope "layer").
            `NM` patterns need none.
        threshold: Instead of `sparsity`: prune the units that score below it.
        score: What is kept, `magnitude()` by default.
        pattern: What lives and dies together, `Unstructured()` by default.
        scope: "layer" or "global".
        where: The leaves to prune.
        axes: Which axes of each leaf are contracted: `{where: axes}` or a tree like params of
            axis tuples. Leaves it leaves out (or all, by default) follow the Flax kernel
            convention: every axis but the last.
        within: A mask that the result must be a subset of; what it prunes counts towards
            `sparsity`. Where it has `None`, everything is allowed.
        grads: For scores that need them: one gradient, or accumulators (see `update_scores`).
        strict: Raise if a selected leaf cannot be pruned, rather than leaving it alone;
            `coverage` tells which and why.

    Returns:
        A tree like params with a bool array (True: keep) per pruned leaf, `None` elsewhere.

    Raises:
        ArgumentError: If the amount is missing, given twice, out of range, or senseless for the
            pattern; or if a gradient is missing.
        SelectionError: If `where`, or a rule of `sparsity` or `axes`, selects nothing.
        StructureError: If `within`, `grads` or `axes` does not mirror params.
        NonFiniteError: If selected leaves or scores hold NaN or infinity.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, -2.0]]), "bias": jnp.ones(2)}
        >>> make_mask(params, sparsity=0.5)
        {'bias': None, 'kernel': Array([[ True, False], [False,  True]], dtype=bool)}
    """
    score, pattern = score or magnitude(), pattern or Unstructured()
    check_amount(sparsity, threshold, pattern, scope)
    targets = None
    if isinstance(sparsity, Mapping):
        targets = _targets(params, sparsity, where)
        where = lambda path, leaf: path in targets
    covered = coverage(params, pattern=pattern, where=where, axes=axes, strict=strict)
    leaves, allowed = read_prunable(params, covered, within)
    masks = choose_masks(
        leaves,
        accumulated=_accumulate(params, leaves, score, grads),
        within=allowed,
        contraction=resolve_axes(params, axes),
        sparsity=targets if targets is not None else sparsity,
        threshold=threshold,
        score=score,
        pattern=pattern,
        scope=scope,
    )
    # A leaf that is not pruned now stays pruned as `within` says.
    return tree.map_with_path(lambda path, p: masks.get(path, allowed.get(path)), params)


def coverage(
    params: tree.Params,
    *,
    pattern: Pattern | None = None,
    where: tree.Where = tree.weights,
    axes: ContractionAxes = None,
    strict: bool = False,
) -> tree.Coverage:
    """Say for every leaf whether it can be pruned in a pattern, and if not, why.

    Args:
        params: Any pytree of arrays; shapes are enough.
        pattern: What lives and dies together, `Unstructured()` by default.
        where: The leaves to prune.
        axes: As in `make_mask`.
        strict: Raise if a selected leaf cannot be pruned.

    Returns:
        The coverage, with at least one leaf touched.

    Raises:
        SelectionError: If no leaf can be pruned, or under `strict` if any cannot.

    Example:
        >>> params = {"a": jnp.ones((8, 2)), "b": jnp.ones((6, 2))}
        >>> dict(coverage(params, pattern=NM(2, 4)).exempt)
        {'b': 'has 6 inputs, which groups of 4 do not divide'}
    """
    contraction = resolve_axes(params, axes)
    chosen = pattern or Unstructured()

    def obstacle(path: str, leaf: Any) -> str | None:
        if isinstance(leaf, tree.LeafNode):
            return f"is a {type(leaf).__name__}: prune before quantizing"
        if not tree.is_floating(leaf):
            return f"holds {getattr(leaf, 'dtype', type(leaf).__name__)}, not floating point"
        if not leaf.shape:
            return "is a scalar"
        if not leaf.size:
            return "has no entries"
        return chosen.obstacle(tuple(leaf.shape), contraction[path])

    return tree.cover(params, where, obstacle, strict=strict)


def read_prunable(
    params: tree.Params, covered: tree.Coverage, within: tree.Params | None
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Read the leaves to prune, which must be finite, and the user's masks, by path.

    Args:
        params: Any pytree of arrays.
        covered: What `coverage` says of them.
        within: The user's mask, or `None`.

    Returns:
        The leaves; and for each leaf of params its mask or `None`, if there is a user's mask.

    Raises:
        NonFiniteError: If a concrete leaf holds NaN or infinity.
        StructureError: If the mask does not mirror params.
        ArgumentTypeError: If it is not boolean.
    """
    leaves = {path: p for path, p in tree.items(params) if path in covered.touched}
    tree.require_finite(leaves, fix="Prune a checkpoint from before training diverged.")
    limit = None if within is None else check_mask(params, within, name="within")
    return leaves, read_by_path(params, limit, name="within")


# --- Choosing, for make_mask and sparsify alike -------------------------------------------------


def choose_masks(
    leaves: Mapping[str, jax.Array],
    *,
    accumulated: Mapping[str, Any],
    within: Mapping[str, jax.Array | None],
    contraction: Mapping[str, tuple[int, ...]],
    sparsity: ArrayLike | Mapping[str, float] | None,
    threshold: ArrayLike | None,
    score: Score,
    pattern: Pattern,
    scope: Scope,
) -> dict[str, jax.Array]:
    """Choose a mask per leaf; every argument is by path, and all may be traced.

    Args:
        leaves: The leaves to prune.
        accumulated: What their scores have accumulated.
        within: Their user masks, or `None`.
        contraction: Their contraction axes.
        sparsity: One fraction, one per path, or `None` for the pattern's own.
        threshold: Instead of it.
        score: What is kept.
        pattern: What lives and dies together.
        scope: "layer" or "global".

    Returns:
        `{path: mask}`.
    """
    units = {
        path: _unit_scores(
            p, accumulated[path], within.get(path), contraction[path], score, pattern
        )
        for path, p in leaves.items()
    }
    if threshold is not None:
        kept = {
            path: (wide := linalg.widen(x)) >= jnp.asarray(threshold, wide.dtype)
            for path, x in units.items()
        }
    elif scope == "global":
        assert not isinstance(sparsity, Mapping) and sparsity is not None
        costs = [pattern.unit_size(p.shape, contraction[path]) for path, p in leaves.items()]
        wanted = keep_count(sum(p.size for p in leaves.values()), sparsity)
        masks = linalg.top_k_masks(list(units.values()), wanted, costs=costs)
        kept = dict(zip(units, masks, strict=True))
    else:
        amounts = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(units, sparsity)
        kept = {
            path: pattern.choose(x, contraction[path], sparsity=amounts[path])
            for path, x in units.items()
        }
    masks = {}
    for path, mask in kept.items():
        mask = pattern.expand(mask, leaves[path].shape, contraction[path])
        allowed = within.get(path)
        masks[path] = _shard_like(leaves[path], mask if allowed is None else mask & allowed)
    return masks


def _shard_like(p: jax.Array, mask: jax.Array) -> jax.Array:
    """Shard a mask as its leaf is, where shardings are part of types (Explicit mesh axes)."""
    sharding = jax.typeof(p).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return mask
    return jax.sharding.reshard(mask, sharding)


def _unit_scores(
    p: jax.Array,
    accumulated: Any,
    within: jax.Array | None,
    contraction: tuple[int, ...],
    score: Score,
    pattern: Pattern,
) -> jax.Array:
    """Score the units of one leaf; what `within` has pruned adds 0, and whole units rank last."""

    def mean(entries: jax.Array) -> jax.Array:
        alive = entries if within is None else jnp.where(within, entries, 0)
        return pattern.mean(alive, contraction)

    if isinstance(pattern, Unstructured):
        units = score.evaluate(accumulated, p)
    elif score.evaluate_units is not None:
        units = score.evaluate_units(accumulated, p, mean)
    else:
        units = mean(score.evaluate(accumulated, p))
    if within is None:
        return units
    alive = pattern.mean(within.astype(jnp.float32), contraction) > 0
    return jnp.where(alive, units, -jnp.inf)


# --- Arguments ----------------------------------------------------------------------------------


def check_amount(sparsity: Any, threshold: float | None, pattern: Pattern, scope: Scope) -> None:
    """Refuse a missing, doubled or senseless amount.

    Args:
        sparsity: A fraction, a mapping of fractions, or `None`.
        threshold: A threshold or `None`.
        pattern: The pattern, which may fix the sparsity itself.
        scope: The scope.

    Raises:
        ArgumentError: With what is wrong.
    """
    require_one_of("scope", scope, ("layer", "global"), fix='Use scope="layer".')
    if threshold is not None and not isinstance(threshold, Tracer) and np.isnan(threshold):
        raise ArgumentError(
            "threshold", got="NaN", expected="a number", fix="Look at the scores it came from."
        )
    fixed = isinstance(pattern, NM)
    if fixed and (threshold is not None or scope == "global"):
        raise ArgumentError(
            "pattern",
            got=f"{pattern} with a threshold or global scope",
            expected="per-layer sparsity: N:M keeps n in each group whatever the scores",
            fix='Drop `threshold`, use scope="layer".',
        )
    if sum(x is not None for x in (sparsity, threshold)) != 1 and not (fixed and sparsity is None):
        raise ArgumentError(
            "sparsity",
            got=f"sparsity={sparsity}, threshold={threshold}",
            expected="exactly one of `sparsity` and `threshold`",
            fix="Say how much to prune, for example sparsity=0.5.",
        )
    if isinstance(sparsity, Mapping) and scope == "global":
        raise ArgumentError(
            "scope",
            got='"global" with a sparsity per path',
            expected='"layer": targets per path leave nothing to compete for',
            fix='Use scope="layer", or one sparsity.',
        )
    if sparsity is None:
        return
    for value in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
        if isinstance(value, Tracer):
            continue
        check_fraction("sparsity", float(value))
        if isinstance(pattern, NM) and keep_count(pattern.m, value) < pattern.n:
            raise ArgumentError(
                "sparsity",
                got=f"{value} with {pattern}",
                expected=f"at most {pattern.sparsity}, which the pattern fixes",
                fix="Leave `sparsity` out.",
            )


def resolve_axes(params: tree.Params, axes: ContractionAxes) -> dict[str, tuple[int, ...]]:
    """Say for each leaf which axes are contracted.

    Args:
        params: Any pytree of arrays.
        axes: `{where: axes}`, a tree like params of axis tuples, or `None`.

    Returns:
        `{path: axes}`, sorted and counted from 0; all but the last where nothing is said.

    Raises:
        SelectionError: If a rule selects nothing.
        StructureError: If the tree does not mirror params.
        ArgumentError: If a leaf has no such axis.
    """
    flat = list(tree.items(params))
    if axes is None:
        given = [None] * len(flat)
    elif isinstance(axes, Mapping) and all(_is_axes(value) for value in axes.values()):
        for rule in axes:
            tree.select(params, rule)
        given = [
            next((axes[rule] for rule in axes if tree.matches(rule, path, leaf)), None)
            for path, leaf in flat
        ]
    else:
        given = tree.flatten_like(params, axes, name="axes")
    return {
        path: _normalise_axes(path, leaf, chosen)
        for (path, leaf), chosen in zip(flat, given, strict=True)
    }


def _is_axes(value: Any) -> bool:
    return isinstance(value, int) or (
        isinstance(value, tuple | list) and all(isinstance(axis, int) for axis in value)
    )


def _normalise_axes(path: str, leaf: Any, axes: Any) -> tuple[int, ...]:
    ndim = len(getattr(leaf, "shape", ()))
    if axes is None:
        return tuple(range(ndim - 1))
    chosen = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -ndim <= axis < ndim for axis in chosen):
        raise ArgumentError(
            "axes",
            got=f"{chosen} for {path!r}, which has {ndim} axes",
            expected="axes of the leaf",
            fix="Count from 0, or from -1 backwards.",
        )
    return tuple(sorted({axis % ndim for axis in chosen}))


def _targets(
    params: tree.Params, rules: Mapping[Any, float], where: tree.Where
) -> dict[str, float]:
    """Resolve `{where: sparsity}` to `{path: sparsity}`; the first match wins."""
    chosen = tree.select(params, where)
    for rule in rules:
        if not set(tree.select(params, rule)) & set(chosen):
            raise SelectionError(
                "sparsity",
                got=f"the rule {rule!r}, which matches only leaves that `where` leaves out",
                expected="rules that match leaves selected by `where`",
                fix="Drop the rule, or widen `where`.",
            )
    matched = {
        path: next((value for rule, value in rules.items() if tree.matches(rule, path, leaf)), None)
        for path, leaf in chosen.items()
    }
    return {path: value for path, value in matched.items() if value is not None}


def _accumulate(
    params: tree.Params, leaves: Mapping[str, jax.Array], score: Score, grads: tree.Params | None
) -> dict[str, Any]:
    """Bring gradients, or what was accumulated of them, into the form that the score reads."""
    if not score.needs_grads:
        return {path: score.init(path, p) for path, p in leaves.items()}
    if grads is None:
        raise ArgumentError(
            "grads",
            got="None",
            expected="a gradient tree or accumulators, which this score needs",
            fix="Pass grads=jax.grad(loss)(params), or accumulate with update_scores.",
        )
    given = read_by_path(params, grads, name="grads")
    accumulated = {}
    for path, p in leaves.items():
        entry = given[path]
        if entry is None:
            raise ArgumentError(
                "grads",
                got=f"None for {path!r}",
                expected="a gradient for every leaf that is pruned",
                fix="Narrow `where` to the leaves that have one.",
            )
        if not isinstance(entry, Accumulated):
            entry = score.update(score.init(path, p), p, entry)
        accumulated[path] = entry
    return accumulated
