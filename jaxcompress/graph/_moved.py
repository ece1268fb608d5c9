"""Arrays held in parts, moved about entry by entry as a function does the array they stand for.

A quantized kernel in groups is stored `(groups, size, out)`, a factorised one as two thin arrays:
one axis of the array, several of its parts, or one of some parts only. `Parted` says how many
stored axes make up each axis of the array at hand. A transpose permutes them, a reshape splits or
merges the lists, and parts stay parts until a site is reached.
"""

import abc
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress.tree import LeafNode


class Parted(LeafNode):
    """What a variable of fn holds of a leaf in parts; a subclass is a frozen dataclass.

    Invariants: the parts have as many axes as `lengths`, each of its length there or 1, and
    behind them as many of their own as they like; `split` adds up to that number.

    Attributes:
        split: How many stored axes make up each axis of the array at hand.
    """

    split: tuple[int, ...]

    @property
    @abc.abstractmethod
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the stored axes."""

    @abc.abstractmethod
    def moved(self, move: Callable[[Array], Array], **changes: Any) -> Any:
        """Move the entries of every part about, and change fields."""

    @abc.abstractmethod
    def placement(self) -> NamedSharding | None:
        """Say where the array at hand would live; `None` where there are no Explicit axes."""

    def cast(self, dtype: Any) -> Any:
        """Describe the array in another floating dtype."""
        return replace(self, dtype=dtype)  # pyright: ignore[reportArgumentType]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array at hand."""
        return tuple(math.prod(self.lengths[k] for k in axes) for axes in self.stored_axes)

    @property
    def size(self) -> int:
        """Its number of entries."""
        return math.prod(self.lengths)

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.split)

    @property
    def stored_axes(self) -> tuple[tuple[int, ...], ...]:
        """For each axis of the array, the stored axes that make it up, major first."""
        ends = tuple(itertools.accumulate(self.split, initial=0))
        return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends))


Node = TypeVar("Node", bound=Parted)


def sliced(node: Node) -> Node | None:
    """Describe the slices of a node along its first axis, as a scan takes it apart.

    Returns:
        A node whose arrays still have that axis in front; `None` if several make it up.
    """
    if not node.split or node.split[0] != 1:
        return None
    length = node.lengths[0]
    whole = lambda part: jnp.broadcast_to(part, (length, *part.shape[1:]))
    return node.moved(whole, split=node.split[1:])


_Rule = Callable[..., list[Any] | None]
_RULES: dict[str, _Rule] = {}


def _follows(*primitives: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        for name in primitives:
            _RULES[name] = rule
        return rule

    return register


def follow(equation: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Run an equation on a node, if it only moves its entries about.

    Args:
        equation: A `graph.Equation`, or what has its `primitive`, `params` and `bind`.
        operands: Its operands, at least one of them a node.

    Returns:
        Its results as nodes; `None` if it needs the array.
    """
    node, *others = operands
    rule = _RULES.get(equation.primitive.name)
    if rule is None or not isinstance(node, Parted) or any(isinstance(x, Parted) for x in others):
        return None
    return rule(equation.params, node, *others)


@_follows("copy", "name", "sharding_constraint", "reshard", "layout_constraint")
def _as_it_is(params: Any, node: Parted) -> list[Any]:
    """Go on: the parts are placed as the leaf was."""
    return [node]


@_follows("convert_element_type")
def _convert(params: Any, node: Parted) -> list[Any] | None:
    dtype = jnp.dtype(params["new_dtype"])
    return [node.cast(dtype)] if jnp.issubdtype(dtype, jnp.floating) else None


@_follows("transpose")
def _transpose(params: Any, node: Parted) -> list[Any]:
    axes = node.stored_axes
    order = [k for axis in params["permutation"] for k in axes[axis]]
    split = tuple(node.split[axis] for axis in params["permutation"])
    return [
        node.moved(
            lambda part: jnp.transpose(part, [*order, *range(len(order), part.ndim)]), split=split
        )
    ]


@_follows("reshape")
def _reshape(params: Any, node: Parted) -> list[Any] | None:
    return None if params.get("dimensions") else reshaped(node, params["new_sizes"])


@_follows("squeeze")
def _squeeze(params: Any, node: Parted) -> list[Any] | None:
    gone = {k % node.ndim for k in params["dimensions"]}
    return reshaped(node, [n for k, n in enumerate(node.shape) if k not in gone])


@_follows("broadcast_in_dim")
def _broadcast(params: Any, node: Parted) -> list[Any] | None:
    shape = params["shape"]
    return reshaped(node, shape) if math.prod(shape) == node.size else None


def reshaped(node: Parted, shape: Sequence[int]) -> list[Any] | None:
    """Merge and split axes: lists of stored axes are cut anew, stored axes split where needed."""
    own = len(node.lengths)
    left = [[k, n] for k, n in enumerate(node.lengths) if n > 1][::-1]
    pieces: dict[int, list[int]] = {}  # stored axis -> the lengths it is cut into
    split = []
    for size in shape:
        count = 0
        while size > 1:
            if not left:
                return None
            axis, length = left.pop()
            piece = length if size % length == 0 else math.gcd(size, length)
            if piece == 1 or (piece < length and piece != size):
                return None  # the boundaries of old and new axes cross
            pieces.setdefault(axis, []).append(piece)
            if piece < length:
                left.append([axis, length // piece])
            size //= piece
            count += 1
        split.append(count)

    def cut(part: Array) -> Array:
        # A part of length 1 on an axis has 1 for all its pieces; its own axes stay.
        lengths = [piece if part.shape[k] > 1 else 1 for k in sorted(pieces) for piece in pieces[k]]
        return part.reshape(*lengths, *part.shape[own:])

    return [node.moved(cut, split=tuple(split))]


@_follows("slice")
def _slice(params: Any, node: Parted) -> list[Any] | None:
    starts, limits = params["start_indices"], params["limit_indices"]
    if params["strides"] is not None and any(stride != 1 for stride in params["strides"]):
        return None
    sizes = [b - a for a, b in zip(starts, limits, strict=True)]
    return _cut(node, starts, sizes)


@_follows("dynamic_slice")
def _dynamic_slice(params: Any, node: Parted, *starts: Any) -> list[Any] | None:
    return _cut(node, starts, params["slice_sizes"])


@_follows("split")
def _split(params: Any, node: Parted) -> list[Any] | None:
    results, start, axis = [], 0, params["axis"]
    for size in params["sizes"]:
        sizes = [size if k == axis else n for k, n in enumerate(node.shape)]
        cut = _cut(node, [start if k == axis else 0 for k in range(node.ndim)], sizes)
        if cut is None:
            return None
        results += cut
        start += size
    return results


def _cut(node: Parted, starts: Sequence[Any], sizes: Sequence[int]) -> list[Any] | None:
    """Cut a run out of axes; an axis that groups run along is taken whole."""
    if len(sizes) != node.ndim:
        return None
    for axis, size in enumerate(sizes):
        if size == node.shape[axis]:
            continue
        if node.split[axis] != 1:
            return None
        (k,) = node.stored_axes[axis]

        def cut(part: Array, k: int = k, start: Any = starts[axis], size: int = size) -> Array:
            if part.shape[k] == 1:
                return part
            if isinstance(start, int):
                return lax.slice_in_dim(part, start, start + size, axis=k)
            # What is negative here is out of bounds: fn has counted from the end already.
            return lax.dynamic_slice_in_dim(part, start, size, k, allow_negative_indices=False)

        node = node.moved(cut)
    return [node]


# --- Explicit mesh axes --------------------------------------------------------------------------
# There every operation has to know how its result is placed. A kernel sums over axes that the
# equation has in one piece, so it could not say; the equation can.


def placement(part: Any, axes: Sequence[Sequence[int]]) -> NamedSharding | None:
    """Say where an array lives that is stored in pieces.

    Args:
        part: What is stored.
        axes: For each axis of the array the axes of the part that make it up, major first.

    Returns:
        The sharding, by the major pieces; `None` where there are no Explicit axes.
    """
    sharding = getattr(jax.typeof(part), "sharding", None)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    names = (*sharding.spec, *(None,) * part.ndim)
    spec = PartitionSpec(*(names[own[0]] if own else None for own in axes))
    return NamedSharding(sharding.mesh, spec)


def placed(
    kernel: Callable[..., Any], equation: Any, operands: Sequence[Any]
) -> Callable[..., Any]:
    """Run a kernel in the place of an equation.

    Args:
        kernel: `(*operands) -> result`.
        equation: A `graph.Equation`.
        operands: Its operands; some are nodes.

    Returns:
        The kernel, with its result placed as the equation would.
    """
    like = [_like(x) for x in operands]
    if not any(x.sharding for x in like):
        return kernel
    out = jax.eval_shape(equation.bind, *like).sharding
    automatic: Callable[..., Any] = jax.sharding.auto_axes(kernel, out_sharding=out)
    return automatic


def _like(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, Parted):
        where = x.placement()
    else:
        where = placement(x, [(k,) for k in range(jax.typeof(x).ndim)])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
