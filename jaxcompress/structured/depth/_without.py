"""Trees without some of their leaves."""

import collections
from collections.abc import Mapping
from typing import Any

import jax

from jaxcompress import tree


class _Gone:
    """Marks a leaf to be taken out."""

    def __repr__(self) -> str:
        return "GONE"


GONE = _Gone()


def drop_marked(marked: Any) -> Any:
    """Take the leaves that are `GONE` out of a tree.

    Args:
        marked: Any pytree.

    Returns:
        The tree without them: entries of dictionaries go, and a dictionary that is emptied goes
        as well; in other containers `None` stands in their place.

    Example:
        >>> drop_marked({"a": {"b": GONE}, "c": [GONE, 1]})
        {'c': [None, 1]}
    """
    result = _drop_marked(marked)
    if result is not GONE:
        return result
    return _like(marked, {}) if isinstance(marked, Mapping) else None


def _drop_marked(node: Any) -> Any:
    leaves = jax.tree.leaves(node, is_leaf=tree.is_leaf)
    gone = sum(leaf is GONE for leaf in leaves)
    if not gone:
        return node
    if gone == len(leaves):
        return GONE
    if isinstance(node, Mapping):
        inside = {key: _drop_marked(value) for key, value in node.items()}
        return _like(node, {key: value for key, value in inside.items() if value is not GONE})
    if isinstance(node, tuple | list):
        inside = [None if (x := _drop_marked(value)) is GONE else x for value in node]
        kind: Any = type(node)
        return kind(*inside) if hasattr(node, "_fields") else kind(inside)
    return jax.tree.map(lambda x: None if x is GONE else x, node, is_leaf=tree.is_leaf)


def _like(node: Mapping[Any, Any], entries: dict[Any, Any]) -> Any:
    kind: Any = type(node)
    if isinstance(node, collections.defaultdict):
        return kind(node.default_factory, entries)
    return kind(entries)
