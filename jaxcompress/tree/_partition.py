"""Splitting params by `where`, overlaying the parts again, and mapping over some leaves."""

from collections.abc import Callable
from typing import Any

import jax

from jaxcompress.errors import StructureError
from jaxcompress.tree._paths import Params, describe_difference, is_leaf, map_with_path
from jaxcompress.tree._where import Where, select


def partition(params: Params, where: Where) -> tuple[Params, Params]:
    """Split params into the leaves that `where` selects and the rest.

    Args:
        params: Any pytree of arrays.
        where: See `matches`.

    Returns:
        `(selected, rest)`: both have the containers of params, with `None` for the leaves that
        went to the other. `merge` undoes it.

    Raises:
        SelectionError: If nothing matches.

    Example:
        >>> partition({"kernel": 1.0, "bias": 2.0}, "kernel")
        ({'bias': None, 'kernel': 1.0}, {'bias': 2.0, 'kernel': None})
    """
    chosen = select(params, where)
    return (
        map_with_path(lambda path, leaf: leaf if path in chosen else None, params),
        map_with_path(lambda path, leaf: None if path in chosen else leaf, params),
    )


def merge(*trees: Params) -> Params:
    """Overlay trees of one structure: at each place the first entry that is not `None`.

    Args:
        *trees: Trees of one structure, `None` standing for a missing leaf.

    Returns:
        The merged tree.

    Raises:
        StructureError: If the structures differ.

    Example:
        >>> merge({"a": None, "b": 2}, {"a": 1, "b": None})
        {'a': 1, 'b': 2}
    """
    try:
        return jax.tree.map(
            lambda *xs: next((x for x in xs if x is not None), None),
            *trees,
            is_leaf=lambda x: x is None or is_leaf(x),
        )
    except (ValueError, TypeError) as error:
        raise StructureError(
            "trees",
            got=describe_difference(trees[0], trees[-1]),
            expected="trees of one structure",
            fix="Merge what `partition` gave for the same params.",
        ) from error


def map_where(f: Callable[[Any], Any], params: Params, where: Where) -> Params:
    """Apply `f` to the leaves that `where` selects; the others pass through untouched.

    Args:
        f: `leaf -> leaf`.
        params: Any pytree of arrays.
        where: See `matches`.

    Returns:
        Params with the selected leaves replaced.

    Raises:
        SelectionError: If nothing matches.

    Example:
        >>> map_where(lambda x: 10 * x, {"kernel": 1.0, "bias": 2.0}, "bias")
        {'bias': 20.0, 'kernel': 1.0}
    """
    chosen = select(params, where)
    return map_with_path(lambda path, leaf: f(leaf) if path in chosen else leaf, params)
