"""Masks: applying, checking and measuring them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import ArrayLike, Float, Int

from jaxcompress import numerics, tree
from jaxcompress.errors import ArgumentTypeError, StructureError


def apply(params: tree.Params, mask: tree.Params) -> tree.Params:
    """Zero what the mask prunes: p where mask, else +0.

    Args:
        params: Any pytree of arrays.
        mask: A tree like params, from `make_mask` or `get_mask`: bool arrays, `None` for untouched
            leaves and subtrees.

    Returns:
        Params, with the leaves that have no mask passed through.

    Raises:
        StructureError: If the mask does not mirror params, in structure or shapes.
        ArgumentTypeError: If a mask is not boolean.

    Example:
        >>> apply({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})
        {'w': Array([1., 0.], dtype=float32)}
    """

    def zero(path: str, p: Any, m: Any) -> Any:
        return p if m is None else jnp.where(m, p, jnp.zeros((), p.dtype))

    return tree.map_with_path(zero, params, check_mask(params, mask))


def check_mask(params: tree.Params, mask: tree.Params, *, name: str = "mask") -> tree.Params:
    """Refuse a mask that does not fit params; works on tracers and shapes.

    Args:
        params: Any pytree of arrays.
        mask: What should be a mask for it; `None` may stand for a whole subtree.
        name: What to call it in an error.

    Returns:
        The mask, with `None` at every untouched leaf.

    Raises:
        StructureError: If it does not mirror params, in structure or shapes.
        ArgumentTypeError: If it is not boolean.
    """
    entries = tree.flatten_like(params, mask, name=name)
    for (path, p), m in zip(tree.items(params), entries, strict=True):
        if m is None:
            continue
        if not jnp.issubdtype(getattr(m, "dtype", object), jnp.bool_):
            raise ArgumentTypeError(
                name,
                got=f"{getattr(m, 'dtype', type(m).__name__)} at {path!r}",
                expected="bool arrays, and None for untouched leaves",
                fix="Build it with make_mask, or compare: mask = p != 0.",
            )
        if m.shape != p.shape or isinstance(p, tree.LeafNode):
            raise StructureError(
                name,
                got=f"shape {m.shape} at {path!r}, where params has {type(p).__name__} {p.shape}",
                expected="a mask of the shape of each array",
                fix="Build it from the same params, before they are packed or shrunk.",
            )
    return tree.map_with_path(lambda path, p, m: m, params, mask)


class Sparsity(NamedTuple):
    """Zeros counted, per leaf.

    Attributes:
        zeros: `{path: zeros}`, integer scalars.
        entries: `{path: entries}`.
    """

    zeros: dict[str, Int[jax.Array, ""]]
    entries: dict[str, int]

    @property
    def leaves(self) -> dict[str, ArrayLike]:
        """The fraction of zeros in each leaf."""
        return {path: _ratio([self.zeros[path]], n) for path, n in self.entries.items()}

    @property
    def total(self) -> float | Float[jax.Array, ""]:
        """The fraction of zeros among all entries counted; an array under jit."""
        return _ratio(list(self.zeros.values()), sum(self.entries.values()))


def sparsity_of(params: tree.Params, *, where: tree.Where | None = None) -> Sparsity:
    """Count zeros, in params or in a mask (where a pruned entry is a zero too).

    Args:
        params: Any pytree of arrays (packed ones count what they dequantize to), or a mask.
        where: The leaves to count; by default the weights (`tree.weights`) and masks.

    Returns:
        The counts; `.total` and `.leaves` are fractions.

    Raises:
        SelectionError: If nothing is selected.

    Example:
        >>> params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 0.0]]), "bias": jnp.zeros(2)}
        >>> sparsity_of(params).total
        0.75
    """
    chosen = tree.select(params, _is_countable if where is None else where)
    return Sparsity(
        zeros={path: _zeros(leaf) for path, leaf in chosen.items()},
        entries={path: leaf.size for path, leaf in chosen.items()},
    )


def _zeros(leaf: Any) -> jax.Array:
    values = numerics.dequantize(leaf) if isinstance(leaf, numerics.QArray) else leaf
    return jnp.sum(values == jnp.zeros((), values.dtype), dtype=jnp.int32)


def _is_countable(path: str, leaf: Any) -> bool:
    return tree.weights(path, leaf) or jnp.issubdtype(getattr(leaf, "dtype", object), jnp.bool_)


def _ratio(zeros: list[jax.Array], entries: int) -> Any:
    if any(isinstance(count, Tracer) for count in zeros):
        return sum(count.astype(jnp.float32) for count in zeros) / max(entries, 1)
    return sum(int(count) for count in zeros) / max(entries, 1)


def read_by_path(
    params: tree.Params, other: tree.Params | None, *, name: str, absent: bool = True
) -> dict[str, Any]:
    """Read a tree that mirrors params by path, with or without the entries that are `None`."""
    if other is None:
        return {}
    entries = zip(tree.paths(params), tree.flatten_like(params, other, name=name), strict=True)
    return {path: entry for path, entry in entries if absent or entry is not None}
