"""`shrink_state`: the state of an optimizer made smaller beside its params."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import optax

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, StructureError
from jaxcompress.structured._keep import Keep
from jaxcompress.structured._shrink import slice_leaf

_KeyPath: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class StateReport:
    """What became of each array of an optimizer's state.

    Attributes:
        sliced: Those that lost the same indices as the leaf of params that they belong to.
        kept: Those that stay as they were: counts, and what belongs to leaves that do not shrink.
        reset: Those that `tx.init` made anew, each with the reason.
    """

    sliced: tuple[str, ...]
    kept: tuple[str, ...]
    reset: Mapping[str, str]

    def __str__(self) -> str:
        lines = [
            f"state: {len(self.sliced)} sliced, {len(self.kept)} kept, {len(self.reset)} reset"
        ]
        return "\n".join([*lines, *(f"  {path}: {why}" for path, why in self.reset.items())])


def shrink_state(
    tx: optax.GradientTransformation | optax.MultiSteps,
    state: Any,
    params: tree.Params,
    keep: Keep,
    *,
    under: str = "",
) -> tuple[Any, StateReport]:
    """Shrink an optax state as `shrink` does params, so that training goes on.

    What lies in the state under the path of a leaf of params, and has its shape, loses the same
    indices: moments, averages, masks, accumulated gradients and scores, in whatever wrappers. What
    has another shape than its leaf and changes size, such as the rows and columns of a factored
    second moment, cannot be sliced: it is what `tx.init` gives for the smaller params. So are then
    its siblings in the same named tuple: a count that went on beside new moments would correct
    them for steps that they have not seen.

    Args:
        tx: The optimizer, made as for params at full size.
        state: Its state, for params at full size; shapes (`ShapeDtypeStruct`) stay shapes.
        params: What `tx.init` got, at full size. It may be a part of what keep was chosen for.
        keep: What is kept.
        under: Where params stand in those that keep was chosen for: `"params"` if tx sees only
            that collection of Linen's variables.

    Returns:
        `(state', report)`; state' has the structure and shapes of `tx.init(params')`.

    Raises:
        ArgumentError: If params, or what the state holds, have other shapes.
        StructureError: If state is not one of tx for these params.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress import structured
        >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
        >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
        >>> groups = structured.groups(fn, params, jnp.ones((1, 3)))
        >>> keep, tx = structured.keep(groups, {"up": [0, 2, 5]}), optax.adam(1e-3)
        >>> state, report = shrink_state(tx, tx.init(params), params, keep)
        >>> state[0].mu["up"].shape, report.kept
        ((3, 3), ('0/count',))
    """
    smaller = tree.map_with_path(
        lambda path, x: slice_leaf(_join_paths(under, path), x, keep), params
    )
    before, after = (jax.eval_shape(tx.init, p) for p in (params, smaller))
    _check_optimizer_state(state, before)
    owners = _Owners(params, under)
    have = dict(jax.tree_util.tree_flatten_with_path(state)[0])
    wanted, treedef = jax.tree_util.tree_flatten_with_path(after)
    results: dict[_KeyPath, Any] = {}
    lost: dict[_KeyPath, str] = {}
    sliced: list[str] = []
    for where, want in wanted:
        results[where] = old = have.get(where)
        owner, shape = owners.find(where), getattr(want, "shape", ())
        if old is not None and getattr(old, "shape", ()) == shape:
            continue
        if owner is not None and _can_slice(old, shape, owner, keep):
            results[where] = slice_leaf(owner, old, keep)
            sliced.append(tree.path_str(where))
        else:
            lost[where] = _explain_reset(old, shape, owner, keep)
    if lost:
        lost = _add_siblings(state, owners, lost, [where for where, _ in wanted])
        abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))
        fresh = after if abstract else tx.init(smaller)
        anew = dict(jax.tree_util.tree_flatten_with_path(fresh)[0])
        results |= {where: anew[where] for where in lost}
    reset = {tree.path_str(where): why for where, why in lost.items()}
    names = [tree.path_str(where) for where, _ in wanted]
    report = StateReport(
        sliced=tuple(name for name in sliced if name not in reset),
        kept=tuple(name for name in names if name not in sliced and name not in reset),
        reset=reset,
    )
    return jax.tree.unflatten(treedef, [results[where] for where, _ in wanted]), report


def _join_paths(under: str, path: str) -> str:
    return "/".join(part for part in (under.strip("/"), path) if part)


def _check_optimizer_state(state: Any, expected: Any) -> None:
    if jax.tree.structure(state) != jax.tree.structure(expected):
        raise StructureError(
            "state",
            got=tree.shorten(tree.paths(state)),
            expected=f"a state of tx for these params, {tree.shorten(tree.paths(expected))}",
            fix="Give tx, its state and the params that `tx.init` got, all at full size.",
        )
    for (path, have), (_, want) in zip(tree.items(state), tree.items(expected), strict=True):
        shapes = tuple(tuple(getattr(x, "shape", ())) for x in (have, want))
        if shapes[0] != shapes[1]:
            raise ArgumentError(
                "state",
                got=f"{path!r} of shape {shapes[0]}",
                expected=f"{shapes[1]}, as `tx.init(params)` gives",
                fix="Shrink the state from full size, once.",
            )


class _Owners:
    """Finds the leaf of params that an array of a state belongs to, by its path."""

    def __init__(self, params: tree.Params, under: str):
        flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=tree.is_leaf)[0]
        self._names = {keys: _join_paths(under, tree.path_str(keys)) for keys, _ in flat}
        self._lengths = sorted({len(keys) for keys in self._names}, reverse=True)

    def _span(self, where: _KeyPath) -> tuple[int, int] | None:
        # Not only at the end: a score may keep several arrays for each leaf.
        for length in self._lengths:
            for start in range(len(where) - length, -1, -1):
                if where[start : start + length] in self._names:
                    return start, start + length
        return None

    def find(self, where: _KeyPath) -> str | None:
        """Give the path of the leaf, in the params that keep was chosen for."""
        span = self._span(where)
        return None if span is None else self._names[where[slice(*span)]]

    def find_above(self, where: _KeyPath) -> _KeyPath:
        """Give the part of the path that leads to the tree that mirrors params."""
        span = self._span(where)
        return where[:-1] if span is None else where[: span[0]]


def _can_slice(old: Any, shape: Sequence[int], owner: str, keep: Keep) -> bool:
    fits = tuple(getattr(old, "shape", ())) == keep.shapes[owner]
    return fits and tuple(shape) == keep.shape(owner)


def _explain_reset(old: Any, shape: Sequence[int], owner: str | None, keep: Keep) -> str:
    new = f"made anew with shape {tuple(shape)}"
    if old is None:
        return f"{new}: the state at full size has no such array"
    if owner is None:
        return f"{new}: it is under no leaf's path, and had shape {tuple(old.shape)}"
    return f"{new}: it had shape {tuple(old.shape)} for {owner!r} of {keep.shapes[owner]}"


def _add_siblings(
    state: Any, owners: _Owners, lost: Mapping[_KeyPath, str], wheres: Sequence[_KeyPath]
) -> dict[_KeyPath, str]:
    """Add what is in the same named tuples as what is lost, but not in others inside them."""
    homes = {where: _home(state, owners.find_above(where)) for where in wheres}
    emptied = {homes[where] for where in lost}
    return {
        where: lost.get(where, "made anew beside others of its state that could not be sliced")
        for where in wheres
        if where in lost or (homes[where] is not None and homes[where] in emptied)
    }


def _home(state: Any, above: _KeyPath) -> _KeyPath | None:
    """Find the innermost named tuple that a path leads through."""
    home: _KeyPath | None = None
    node: Any = state
    for k in range(len(above) + 1):
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            home = above[:k]
        if k == len(above):
            break
        key: Any = above[k]
        if isinstance(key, jax.tree_util.GetAttrKey):
            node = getattr(node, key.name, None)
        elif isinstance(key, jax.tree_util.SequenceKey):
            node = node[key.idx]
        elif isinstance(key, jax.tree_util.DictKey):
            node = node[key.key]
        else:
            break
    return home
