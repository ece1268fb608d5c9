"""Sparse training as one optax transformation."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import ArrayLike, Int

from jaxcompress import linalg, tree
from jaxcompress.errors import ArgumentError, StructureError, require_at_least
from jaxcompress.sparsity._apply import check_mask, read_by_path
from jaxcompress.sparsity._masks import (
    ContractionAxes,
    Scope,
    check_amount,
    choose_masks,
    coverage,
    read_prunable,
    resolve_axes,
)
from jaxcompress.sparsity._patterns import Pattern, Unstructured
from jaxcompress.sparsity._scores import Score, magnitude
from jaxcompress.sparsity.schedules import Schedule


class SparsifyState(NamedTuple):
    """State of `sparsify`: arrays only, shaped (and to be sharded) like params.

    Attributes:
        step: Updates seen so far.
        mask: The mask in force: a bool array per pruned leaf, `None` elsewhere.
        inner: State of the inner transformation.
        scores: What the score accumulates, per pruned leaf.
        within: The user's mask, or `None`.
        leaked: Entries that should have been zero but were not when the mask was last updated;
            never more than 0 where `sparsify` is outermost. See `check`.
    """

    step: Int[jax.Array, ""]
    mask: tree.Params
    inner: Any
    scores: tree.Params
    within: tree.Params | None
    leaked: Int[jax.Array, ""]


def sparsify(
    inner: optax.GradientTransformation,
    *,
    schedule: float | ArrayLike | Schedule | None = None,
    every: int = 1,
    until: int | None = None,
    score: Score | None = None,
    pattern: Pattern | None = None,
    scope: Scope = "layer",
    where: tree.Where = tree.weights,
    axes: ContractionAxes = None,
    within: tree.Params | None = None,
    strict: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Prune while training: wrap an optimizer so that its params stay exactly masked.

    At update t = 0, `every`, 2 `every`, ... the mask is chosen anew at sparsity schedule(t), from
    the incoming params. The inner optimizer sees the gradient of the masked model (zero where
    pruned), and the update returned is `where(mask, u, -p)`, in the wider dtype of u and p, so
    that `optax.apply_updates` gives exactly zero where the mask prunes.

    It must be **outermost**: anything chained after it changes the updates, and the zeros with
    them. Wrappers that hand updates on unchanged (`optax.MultiSteps`, `apply_if_finite`,
    `multi_transform`) may surround it. `check` detects the mistake. An inner
    optimizer that keeps an iterate of its own (`schedule_free`) keeps it dense: put `sparsify`
    inside it. Params become masked by the first update; `apply` the mask (see `get_mask`) to
    evaluate before it. The sparsity reached is the schedule's at the last choice of a mask.

    With a score that depends on p alone, pruned entries score lowest and stay pruned while the
    sparsity does not fall.

    Args:
        inner: The optimizer.
        schedule: Fraction to prune, from 0 to 1: a number, or a function of the update count
            (see `schedules`). May be left out for `NM`, which fixes it.
        every: Updates from one choice of mask to the next.
        until: The last update at which the mask is chosen, whatever `every` is; it is fixed then.
        score: What is kept, `magnitude()` by default. Gradient scores accumulate at each update.
        pattern: What lives and dies together, `Unstructured()` by default.
        scope: "layer" or "global", as in `make_mask`.
        where: The leaves to prune.
        axes: Contraction axes, as in `make_mask`.
        within: A mask that all masks must be subsets of.
        strict: Raise in `init` if a selected leaf cannot be pruned.

    Returns:
        An optax transformation; its state is a `SparsifyState`.

    Raises:
        ArgumentError: If an argument is out of range; in `update`, if `params` is missing.
        SelectionError: In `init`, if no leaf can be pruned.
        NonFiniteError: In `init`, if concrete weights are not finite.

    Example:
        >>> params = {"kernel": jnp.array([[1.0, 4.0], [3.0, 2.0]])}
        >>> tx = sparsify(optax.sgd(0.1), schedule=0.5)
        >>> grads = {"kernel": jnp.ones((2, 2))}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"]
        Array([[0. , 3.9],
               [2.9, 0. ]], dtype=float32)

    Reference:
        "To prune, or not to prune" (arXiv:1710.01878), with its masked forward pass replaced by
        masked params, which is the same function.
    """
    score, pattern = score or magnitude(), pattern or Unstructured()
    # What a function will return is only known under jit, where it is clipped to [0, 1].
    check_amount(0.0 if callable(schedule) else schedule, None, pattern, scope)
    require_at_least("every", every, 1, fix="Use every=100 for every 100 steps.")
    require_at_least("until", until, 0, fix="Use until=None for no end.", optional=True)
    inner = optax.with_extra_args_support(inner)
    choose = functools.partial(
        choose_masks, threshold=None, score=score, pattern=pattern, scope=scope
    )

    def init(params: tree.Params) -> Any:
        covered = coverage(params, pattern=pattern, where=where, axes=axes, strict=strict)
        leaves, allowed = read_prunable(params, covered, within)
        unused = [path for path, m in allowed.items() if m is not None and path not in leaves]
        if unused:
            raise ArgumentError(
                "within",
                got=f"masks for leaves that are not pruned here: {unused[:5]}",
                expected="masks for leaves that `where` selects and the pattern fits",
                fix="Widen `where`, or leave them out of `within`.",
            )
        # Copies: the state owns its buffers, so that a step may be donated all of them.
        mask = {
            path: jnp.ones_like(p, bool) if allowed.get(path) is None else jnp.copy(allowed[path])
            for path, p in leaves.items()
        }
        return SparsifyState(
            step=jnp.zeros((), jnp.int32),
            mask=_as_tree(params, mask),
            inner=inner.init(params),
            scores=_as_tree(params, {path: score.init(path, p) for path, p in leaves.items()}),
            within=None if within is None else jax.tree.map(jnp.copy, _as_tree(params, allowed)),
            leaked=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: tree.Params, state: Any, params: tree.Params | None = None, **extra: Any
    ) -> tuple[tree.Params, Any]:
        if params is None:
            raise ArgumentError(
                "params",
                got="None",
                expected="the params that the updates are for",
                fix="Call tx.update(grads, state, params).",
            )
        old = read_by_path(params, state.mask, name="state.mask", absent=False)
        leaves = {path: p for path, p in tree.items(params) if path in old}
        scores = read_by_path(params, state.scores, name="state.scores")
        grads = read_by_path(params, updates, name="updates")
        scores = {path: score.update(scores[path], p, grads[path]) for path, p in leaves.items()}

        def choose_anew() -> tuple[dict[str, jax.Array], jax.Array]:
            chosen = choose(
                leaves,
                accumulated=scores,
                within=read_by_path(params, state.within, name="within"),
                contraction=resolve_axes(params, axes),
                sparsity=schedule(state.step) if callable(schedule) else schedule,
            )
            # Before the first update, nothing has been masked yet.
            return chosen, jnp.where(state.step > 0, _leaks(leaves, old), 0)

        due = _is_due(state.step, every, until)
        masks, leaked = lax.cond(due, choose_anew, lambda: (old, state.leaked))
        free, inner_state = inner.update(_freeze(updates, masks), state.inner, params, **extra)
        return _pin(free, params, masks), SparsifyState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            mask=_as_tree(params, masks),
            inner=inner_state,
            scores=_as_tree(params, scores),
            within=state.within,
            leaked=leaked,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def get_mask(opt_state: Any) -> tree.Params:
    """Find the mask in any optax state that holds a `SparsifyState`.

    Args:
        opt_state: The state of an optimizer with `sparsify` somewhere in it. Where several
            partitions of `optax.multi_transform` are sparsified, their masks are overlaid.

    Returns:
        The mask: a tree like params, `None` for untouched leaves; and for whole subtrees that
        `multi_transform` gave to other transformations, which `apply` and `check` understand.

    Raises:
        StructureError: If there is none.

    Example:
        >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        >>> tx = optax.MultiSteps(sparsify(optax.adam(1e-3), schedule=0.5), 4)
        >>> get_mask(tx.init(params))["kernel"].shape
        (2, 2)
    """
    states = list(_states(opt_state))
    if not states:
        raise StructureError(
            "opt_state",
            got="no SparsifyState in it",
            expected="the state of an optimizer that contains sparsify(...)",
            fix="Wrap the optimizer: tx = sparsity.sparsify(tx, ...).",
        )

    return _overlay([state.mask for state in states])


def check(params: tree.Params, opt_state: Any) -> None:
    """Refuse params that the optimizer has not kept masked; call it now and then, outside jit.

    It looks at params themselves (after at least one update), at the leak that `sparsify` saw
    when it last chose a mask, and for transformations chained after `sparsify`.

    Args:
        params: The params that `optax.apply_updates` gave.
        opt_state: The optimizer's state, concrete.

    Raises:
        ArgumentError: If pruned entries are not zero, or something is chained after `sparsify`.
        StructureError: If there is no `SparsifyState`.
    """
    mask = check_mask(params, get_mask(opt_state))
    fix = "Make sparsify outermost: sparsify(optax.chain(...), ...), nothing chained after it."
    if _goes_on_after(opt_state):
        raise ArgumentError(
            "opt_state",
            got="a chain that goes on after sparsify",
            expected="sparsify as the last transformation of a chain",
            fix=fix,
        )
    states = list(_states(opt_state))
    started = any(int(state.step) > 0 for state in states)
    masks = read_by_path(params, mask, name="mask", absent=False)
    leaves = {path: p for path, p in tree.items(params) if path in masks}
    now = int(_leaks(leaves, masks)) if started else 0
    before = sum(int(state.leaked) for state in states)
    if now or before:
        raise ArgumentError(
            "params",
            got=f"{now} entries that are not zero though pruned ({before} at the last mask update)",
            expected="params that sparsify keeps masked",
            fix=fix,
        )


# --- Parts --------------------------------------------------------------------------------------


def _is_due(count: jax.Array, every: int, until: int | None) -> jax.Array:
    due = count % every == 0
    return due if until is None else (due & (count < until)) | (count == until)


def _freeze(updates: tree.Params, masks: dict[str, jax.Array]) -> tree.Params:
    """Zero the gradient of pruned entries: the gradient of the masked model."""

    def freeze_leaf(path: str, g: Any) -> Any:
        return jnp.where(masks[path], g, jnp.zeros((), g.dtype)) if path in masks else g

    return tree.map_with_path(freeze_leaf, updates)


def _pin(updates: tree.Params, params: tree.Params, masks: dict[str, jax.Array]) -> tree.Params:
    """Replace the update u of pruned entries by -p, in a dtype wide enough for p + (-p) = 0."""

    def pin_leaf(path: str, p: Any, u: Any) -> Any:
        if path not in masks:
            return u
        wide = linalg.common_float(u.dtype, p.dtype)
        return jnp.where(masks[path], u.astype(wide), -p.astype(wide))

    return tree.map_with_path(pin_leaf, params, updates)


def _leaks(leaves: dict[str, jax.Array], masks: dict[str, jax.Array]) -> jax.Array:
    """Count entries that are not zero where the mask prunes."""
    counts = [jnp.sum(~masks[path] & (p != 0), dtype=jnp.int32) for path, p in leaves.items()]
    return sum(counts, start=jnp.zeros((), jnp.int32))


def _as_tree(params: tree.Params, entries: dict[str, Any]) -> tree.Params:
    """Write `{path: entry}` as a tree that mirrors params, `None` where there is no entry."""
    return tree.map_with_path(lambda path, p: entries.get(path), params)


def _overlay(nodes: Sequence[Any]) -> tree.Params:
    """Merge masks where each holds nothing (`None`, or a `MaskedNode` for a subtree) for others."""
    present = [x for x in nodes if x is not None and not isinstance(x, optax.MaskedNode)]
    if not present:
        return None
    flat = [jax.tree.flatten(node, is_leaf=lambda x, node=node: x is not node) for node in present]
    children, treedefs = zip(*flat, strict=True)  # of the first level only
    if jax.tree_util.treedef_is_leaf(treedefs[0]):
        return present[0]
    return treedefs[0].unflatten(_overlay(column) for column in zip(*children, strict=True))


def _states(opt_state: Any) -> Iterator[SparsifyState]:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, SparsifyState))
    return (node for node in nodes if isinstance(node, SparsifyState))


def _goes_on_after(node: Any) -> bool:
    """Tell whether, in some chain's state (a plain tuple), states follow the SparsifyState."""
    if isinstance(node, SparsifyState) or not isinstance(node, tuple | list | dict):
        return False
    children = list(node.values()) if isinstance(node, dict) else list(node)
    if type(node) is tuple and any(next(_states(child), None) for child in children[:-1]):
        return True
    return any(_goes_on_after(child) for child in children)
