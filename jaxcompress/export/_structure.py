"""The shape of a pytree as JSON, with a record where each leaf stood.

A mapping is a JSON object, `null` stands for `None`, and other nodes are lists that start with
their kind: `"l"` list, `"t"` tuple, `"d"` mapping with keys that are not all text, `"n"` node with
named attributes (a NamedTuple, a dataclass, an Equinox module, an `nnx` variable). A record, the
list of a leaf, starts with another letter.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from jaxcompress import tree
from jaxcompress.errors import ArgumentTypeError

KeyPath = tuple[Any, ...]


def describe_tree(params: Any, leaf: Callable[[KeyPath, Any], Any], path: KeyPath = ()) -> Any:
    """Describe a pytree.

    Args:
        params: The pytree.
        leaf: Gives the record of a leaf; called in traversal order.
        path: Where params stands in a larger tree.

    Returns:
        What `json` can write.

    Raises:
        ArgumentTypeError: If a mapping has keys that are neither text nor integers.
    """
    if params is None:
        return None
    one_level = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: x is not params or isinstance(x, tree.LeafNode)
    )[0]
    if len(one_level) == 1 and not one_level[0][0]:
        return leaf(path, params)
    inner = [(keys[0], describe_tree(child, leaf, (*path, *keys))) for keys, child in one_level]
    # `None` children are no leaves, yet hold a place in lists and tuples.
    if isinstance(params, list | tuple) and not hasattr(params, "_fields"):
        found = {key.idx: child for key, child in inner}
        return ["t" if isinstance(params, tuple) else "l", *map(found.get, range(len(params)))]
    if isinstance(params, dict):
        # In JAX's order, which the leaves have; those without leaves at the end.
        found = dict(_name_children(inner))
        return _mapping([*found.items(), *((k, None) for k in params if k not in found)], path)
    if all(isinstance(key, DictKey) for key, _ in inner):
        return _mapping(_name_children(inner), path)
    if all(isinstance(key, SequenceKey) for key, _ in inner):
        return ["l", *(child for _, child in inner)]
    return ["n", *(part for name, child in _name_children(inner) for part in (str(name), child))]


def _name_children(inner: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Read `(name, child)` off JAX's keys, whichever kind they are."""
    pairs = []
    for key, child in inner:
        name = next(getattr(key, a) for a in ("name", "key", "idx") if hasattr(key, a))
        pairs.append((name, child))
    return pairs


def _mapping(pairs: list[tuple[Any, Any]], path: KeyPath) -> Any:
    if all(type(key) is str for key, _ in pairs):
        return dict(pairs)
    for key, _ in pairs:
        if type(key) not in (str, int):
            raise ArgumentTypeError(
                "params",
                got=f"the key {key!r} in the mapping at {tree.path_str(path)!r}",
                expected="mappings whose keys are text or integers",
                fix="Rename the key.",
            )
    return ["d", *(part for pair in pairs for part in pair)]


@dataclass(frozen=True)
class LoadedLeaf:
    """A leaf that was read, with its mask and where it stands."""

    path: KeyPath
    leaf: Any
    mask: Any


def walk(
    node: Any, leaf: Callable[[KeyPath, list[Any]], LoadedLeaf], path: KeyPath = ()
) -> Iterator[LoadedLeaf]:
    """Read the leaves of a description, in the order in which they were written.

    Args:
        node: What `describe_tree` gave.
        leaf: Reads one leaf from its record.
        path: Where the node stands.

    Yields:
        The leaves.
    """
    if _is_record(node):
        yield leaf(path, node)
    else:
        for key, child in children(node):
            yield from walk(child, leaf, (*path, key))


def rebuild_tree(node: Any, leaves: Iterator[Any]) -> Any:
    """Build the containers of a description around leaves.

    Nodes with named attributes come back as dictionaries, `nnx` variables as their value.

    Args:
        node: What `describe_tree` gave.
        leaves: One entry per leaf, in order.

    Returns:
        The pytree.
    """
    if node is None:
        return None
    if _is_record(node):
        return next(leaves)
    inner = [(key, rebuild_tree(child, leaves)) for key, child in children(node)]
    if isinstance(node, list) and node[0] == "l":
        return [child for _, child in inner]
    if isinstance(node, list) and node[0] == "t":
        return tuple(child for _, child in inner)
    if isinstance(node, list) and node[0] == "n" and [k.name for k, _ in inner] == ["value"]:
        return inner[0][1]
    return {getattr(key, "name", getattr(key, "key", None)): child for key, child in inner}


def children(node: Any) -> list[tuple[Any, Any]]:
    """List the children of a container's description with JAX's keys for them.

    Args:
        node: What `describe_tree` gave; no record.

    Returns:
        Pairs of key and child.

    Raises:
        ValueError: If it is no such description.
    """
    if node is None:
        return []
    if isinstance(node, dict):
        return [(DictKey(key), child) for key, child in node.items()]
    if not isinstance(node, list) or not node or node[0] not in ("l", "t", "d", "n"):
        raise ValueError(f"its structure holds {str(node)[:40]!r}")
    kind, *parts = node
    if kind in "lt":
        return [(SequenceKey(i), child) for i, child in enumerate(parts)]
    make = DictKey if kind == "d" else GetAttrKey
    return [(make(key), child) for key, child in zip(parts[::2], parts[1::2], strict=True)]


def _is_record(node: Any) -> bool:
    return isinstance(node, list) and bool(node) and node[0] in ("a", "q", "k", "p")
