"""Params as an addressed set of leaves: paths, and trees read side by side."""

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax

from jaxcompress.errors import StructureError

Params: TypeAlias = Any
"""Any pytree of arrays."""


class LeafNode(abc.ABC):
    """Base class of pytree nodes that every function here counts as one leaf.

    A `QArray` is one: it stands where an array stood, keeps its path, and is selected, counted
    and written as a whole.

    Attributes:
        dtype: The dtype of the array that it stands for.
    """

    dtype: Any

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that it stands for."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """How many entries that array has."""

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """The bytes that XLA keeps for it."""


def is_leaf(x: Any) -> bool:
    """Tell whether a node counts as one leaf: the `is_leaf` of `jax.tree.map` and others.

    Args:
        x: Any node of a tree.

    Returns:
        Whether it is a `LeafNode`.
    """
    return isinstance(x, LeafNode)


def path_str(keypath: tuple[Any, ...]) -> str:
    """Write a JAX key path as text, `encoder/layer_0/mlp/kernel`.

    The `.value` that an `nnx.State` puts after each of its dictionary keys is left out, so that
    an NNX leaf has the path its Linen twin has.

    Args:
        keypath: A key path of `jax.tree_util.tree_flatten_with_path`.

    Returns:
        The path; the empty string for a tree that is itself one leaf.

    Example:
        >>> path_str((jax.tree_util.DictKey("mlp"), jax.tree_util.SequenceKey(0)))
        'mlp/0'
    """
    keys = list(keypath)
    if (
        len(keys) > 1
        and isinstance(keys[-1], jax.tree_util.GetAttrKey)
        and keys[-1].name == "value"
        and isinstance(keys[-2], jax.tree_util.DictKey)
    ):
        keys.pop()
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def items(params: Params) -> Iterator[tuple[str, Any]]:
    """Iterate over `(path, leaf)` in traversal order (dictionaries by sorted key).

    Args:
        params: Any pytree of arrays.

    Returns:
        An iterator of pairs; `None` leaves are skipped.

    Example:
        >>> [path for path, _ in items({"b": {"kernel": 1.0}, "a": [2.0, None]})]
        ['a/0', 'b/kernel']
    """
    for keypath, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)[0]:
        yield path_str(keypath), leaf


def paths(params: Params) -> list[str]:
    """List the paths of all leaves, in traversal order.

    Args:
        params: Any pytree of arrays.

    Returns:
        One path per leaf.
    """
    return [path for path, _ in items(params)]


def leaves(params: Params) -> list[Any]:
    """List all leaves, in traversal order, a `LeafNode` counting as one.

    Args:
        params: Any pytree of arrays.

    Returns:
        One entry per leaf.
    """
    return jax.tree.leaves(params, is_leaf=is_leaf)


def map_with_path(f: Callable[..., Any], params: Params, *rest: Params) -> Params:
    """Map `f(path, leaf, *others)` over params.

    Args:
        f: Called once per leaf with its path, the leaf, and the entries of `rest` there.
        params: Any pytree of arrays.
        *rest: Trees with the structure of params; where params has a leaf, an entry may be
            `None` or a whole subtree, and is handed over as it is.

    Returns:
        A tree with the structure of params and f's results for leaves.

    Raises:
        StructureError: If a tree of `rest` has another structure.

    Example:
        >>> map_with_path(lambda path, x: f"{path}={x}", {"a": 1, "b": [2]})
        {'a': 'a=1', 'b': ['b/0=2']}
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    columns = [flatten_like(params, tree, name=f"rest[{i}]") for i, tree in enumerate(rest)]
    results = [
        f(path_str(keypath), leaf, *others)
        for (keypath, leaf), *others in zip(flat, *columns, strict=True)
    ]
    return jax.tree.unflatten(treedef, results)


def flatten_like(params: Params, other: Params, *, name: str) -> list[Any]:
    """List `other`'s entries at the leaves of params: the way to read a mask beside params.

    Args:
        params: The tree that gives the structure.
        other: A tree that mirrors it; an entry may be `None` or a subtree, and a `None` may also
            stand for a whole subtree of params.
        name: What to call `other` in an error.

    Returns:
        One entry per leaf of params.

    Raises:
        StructureError: If `other` does not mirror params.

    Example:
        >>> flatten_like({"a": 1, "b": 2}, {"a": None, "b": True}, name="mask")
        [None, True]
        >>> flatten_like({"a": {"b": 1, "c": 2}}, {"a": None}, name="mask")
        [None, None]
    """
    treedef = jax.tree.structure(params, is_leaf=is_leaf)
    try:
        return treedef.flatten_up_to(_spread_none(other, params))
    except (ValueError, TypeError) as error:
        raise StructureError(
            name,
            got=describe_difference(params, other),
            expected="a tree that mirrors params, leaf for leaf",
            fix="Build it from the same params (with None for untouched leaves).",
        ) from error


def _spread_none(other: Params, params: Params) -> Params:
    """Write `None` at each leaf of a subtree for which `other` has but one."""

    def spread(entry: Any, subtree: Params) -> Any:
        return jax.tree.map(lambda _: None, subtree, is_leaf=is_leaf) if entry is None else entry

    try:
        return jax.tree.map(spread, other, params, is_leaf=lambda x: x is None)
    except (ValueError, TypeError):  # entries that are subtrees, or another structure
        return other


def describe_difference(params: Params, other: Params) -> str:
    def names(tree: Params) -> set[str]:
        flat = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda x: x is None or is_leaf(x)
        )[0]
        return {path_str(keypath) for keypath, _ in flat}

    missing, extra = sorted(names(params) - names(other)), sorted(names(other) - names(params))
    parts = []
    if missing:
        parts.append(f"no entry for {shorten(missing)}")
    if extra:
        parts.append(f"entries for unknown {shorten(extra)}")
    return "; ".join(parts) or f"a tree of other node types ({type(other).__name__})"


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Write a list of names for a message.

    Args:
        names: The names.
        most: How many to write; of the others only the number is given.

    Returns:
        The quoted names, separated by commas.

    Example:
        >>> shorten(["a", "b", "c"], most=2)
        "'a', 'b' and 1 more"
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
