"""A quantized leaf on its way to a site: its parts, reshaped and transposed as fn does its array.

A quantized kernel in groups is stored `(groups, size, out)`: one axis of the array, two of its
codes. `Carried` says how many stored axes make up each axis of the array at hand. A transpose
permutes them, a reshape splits or merges the lists, and codes stay codes until a site is reached.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress import numerics
from jaxcompress.numerics import Activation, Format, Int, PerGroup, QArray, Scaled
from jaxcompress.tree import LeafNode

_PLAIN = (jnp.float32, jnp.bfloat16, jnp.float16)
"""Dtypes of scales that go to a site as they are stored."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale", "zero", "activation_scale", "activation_zero", "original"),
    meta_fields=("path", "format", "activation_format", "dtype", "split"),
)
@dataclass(frozen=True, kw_only=True, eq=False)
class Carried(LeafNode):
    """What a variable of fn holds of a quantized leaf.

    Invariants: the parts have as many axes as `values`, each of its length there or 1; `split`
    adds up to that number.

    Attributes:
        values: Codes.
        scale: As stored, or float32 where it is a product of two levels.
        zero: float32 zero point, or `None`.
        activation_scale: Static scale of the activations that it meets, or `None`.
        activation_zero: Static zero point, or `None`.
        original: The array itself, where fn is run on it beside the codes; else `None`.
        path: The leaf's path.
        format: The leaf's format; its granularity is not that of the parts at hand.
        activation_format: The format of the activations that it meets, or `None`.
        dtype: The dtype of the array at hand.
        split: How many axes of `values` make up each axis of the array at hand.
    """

    values: Array
    scale: Array
    zero: Array | None
    activation_scale: Array | None
    activation_zero: Array | None
    original: Array | None
    path: str
    format: Format
    activation_format: Format | None
    dtype: Any
    split: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array at hand."""
        return tuple(math.prod(self.values.shape[k] for k in axes) for axes in self.stored_axes)

    @property
    def size(self) -> int:
        """Its number of entries."""
        return math.prod(self.values.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the parts; not asked for on the way."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    @property
    def stored_axes(self) -> tuple[tuple[int, ...], ...]:
        """For each axis of the array, the axes of `values` that make it up, major first."""
        ends = tuple(itertools.accumulate(self.split, initial=0))
        return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends))

    @property
    def activation(self) -> Activation | None:
        """How activations are rounded that are contracted with it."""
        if self.activation_format is None:
            return None
        return Activation(
            format=self.activation_format, scale=self.activation_scale, zero=self.activation_zero
        )

    def numbers(self, dtype: Any = jnp.float32) -> Array:
        """Give the numbers that the codes stand for, rounded to a dtype, in the shape of `values`.

        A 16-bit scale multiplies integers in its own dtype, if it is the one asked for: the
        product is rounded once either way, and compilers need no wider copy of the scales.
        """
        qtype = self.format.qtype
        if self.scale.dtype == dtype and isinstance(qtype, Int) and dtype != jnp.float32:
            codes = self.values.astype(dtype)
            return (codes if self.zero is None else codes - self.zero.astype(dtype)) * self.scale
        scale = self.scale.astype(jnp.float32)
        return qtype.to_numbers(self.values, scale, self.zero).astype(dtype)

    @property
    def ndim(self) -> int:
        """How many axes the array at hand has."""
        return len(self.split)

    def array(self) -> Array:
        """Give the array that the codes stand for."""
        return self.numbers().reshape(self.shape).astype(self.dtype)


def carried(q: QArray, path: str, original: Array | None = None) -> Carried | None:
    """Start a leaf on its way.

    Args:
        q: The quantized leaf.
        path: Its path.
        original: The array to run fn on beside it, if any.

    Returns:
        The node; `None` where codes and scales do not multiply entry by entry: a `Basis`, or a
        granularity of one's own that blocks axes.
    """
    granularity, ndim = q.format.granularity, len(q.shape)
    if not isinstance(q.format.qtype, Scaled):
        return None
    split = [1] * ndim
    if isinstance(granularity, PerGroup):
        split[granularity.axis % ndim] = 2
    elif q.values.ndim != ndim:
        return None
    static = q.activation

    def stored(part: Array | None) -> Array | None:
        # As many axes as the array -> as many as the codes.
        if part is None:
            return None
        shape = [n for n, parts in zip(part.shape, split, strict=True) for n in (n, 1)[:parts]]
        return part.astype(jnp.float32).reshape(shape)

    node = Carried(
        values=q.values,
        scale=q.scale if q.scale.dtype in _PLAIN else numerics.effective_scale(q),
        zero=None if q.zero is None else q.zero.astype(jnp.float32),
        activation_scale=None if static is None else stored(static.scale),
        activation_zero=None if static is None else stored(static.zero),
        original=original,
        path=path,
        format=q.format,
        activation_format=None if static is None else static.format,
        dtype=jnp.dtype(q.dtype),
        split=tuple(split),
    )
    return _without_single_group(node, axis=split.index(2)) if 2 in split else node


def _without_single_group(node: Carried, *, axis: int) -> Carried:
    """Merge a split axis whose one group is all of it."""
    if node.scale.shape[axis] > 1 or node.values.shape[axis] > 1:
        return node
    split = tuple(1 if k == axis else n for k, n in enumerate(node.split))
    return _moved(node, lambda part: jnp.squeeze(part, axis), split=split)


_PARTS = ("values", "scale", "zero", "activation_scale", "activation_zero")


def _moved(node: Carried, move: Callable[[Array], Array], **changes: Any) -> Carried:
    """Move the entries of every part about."""
    parts = {name: getattr(node, name) for name in _PARTS}
    moved = {name: None if part is None else move(part) for name, part in parts.items()}
    return replace(node, **moved, **changes)


def sliced(node: Carried) -> Carried | None:
    """Describe the slices of a node along its first axis, as a scan takes it apart.

    Returns:
        A node whose arrays still have that axis in front; `None` if groups run along it.
    """
    if not node.split or node.split[0] != 1:
        return None
    length = node.values.shape[0]
    whole = lambda part: jnp.broadcast_to(part, (length, *part.shape[1:]))
    return _moved(node, whole, split=node.split[1:])


# --- Following ---------------------------------------------------------------------------------

_Rule = Callable[..., list[Carried] | None]
_RULES: dict[str, _Rule] = {}


def _follows(*primitives: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        for name in primitives:
            _RULES[name] = rule
        return rule

    return register


def follow(equation: Any, operands: Sequence[Any]) -> list[Carried] | None:
    """Run an equation on a node, if it only moves its entries about.

    Args:
        equation: A `graph.Equation`, or what has its `primitive`, `params` and `bind`.
        operands: Its operands, at least one of them a node.

    Returns:
        Its results as nodes; `None` if it needs the array.
    """
    node, *others = operands
    rule = _RULES.get(equation.primitive.name)
    if rule is None or not isinstance(node, Carried) or any(isinstance(x, Carried) for x in others):
        return None
    nodes = rule(equation.params, node, *others)
    if nodes is None or node.original is None:
        return nodes
    results = equation.bind(node.original, *others)
    originals = results if equation.primitive.multiple_results else [results]
    return [replace(n, original=x) for n, x in zip(nodes, originals, strict=True)]


@_follows("copy", "name", "sharding_constraint", "reshard", "layout_constraint")
def _as_it_is(params: Any, node: Carried) -> list[Carried]:
    """Go on: the parts are placed as the leaf was."""
    return [node]


@_follows("convert_element_type")
def _convert(params: Any, node: Carried) -> list[Carried] | None:
    dtype = jnp.dtype(params["new_dtype"])
    return [replace(node, dtype=dtype)] if jnp.issubdtype(dtype, jnp.floating) else None


@_follows("transpose")
def _transpose(params: Any, node: Carried) -> list[Carried]:
    axes = node.stored_axes
    order = [k for axis in params["permutation"] for k in axes[axis]]
    split = tuple(node.split[axis] for axis in params["permutation"])
    return [_moved(node, lambda part: jnp.transpose(part, order), split=split)]


@_follows("reshape")
def _reshape(params: Any, node: Carried) -> list[Carried] | None:
    return None if params.get("dimensions") else reshaped(node, params["new_sizes"])


@_follows("squeeze")
def _squeeze(params: Any, node: Carried) -> list[Carried] | None:
    gone = {k % node.ndim for k in params["dimensions"]}
    return reshaped(node, [n for k, n in enumerate(node.shape) if k not in gone])


@_follows("broadcast_in_dim")
def _broadcast(params: Any, node: Carried) -> list[Carried] | None:
    shape = params["shape"]
    return reshaped(node, shape) if math.prod(shape) == node.size else None


def reshaped(node: Carried, shape: Sequence[int]) -> list[Carried] | None:
    """Merge and split axes: lists of stored axes are cut anew, stored axes split where needed."""
    left = [[k, n] for k, n in enumerate(node.values.shape) if n > 1][::-1]
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
        # A part of length 1 on an axis has 1 for all its pieces.
        lengths = [piece if part.shape[k] > 1 else 1 for k in sorted(pieces) for piece in pieces[k]]
        return part.reshape(lengths)

    return [_moved(node, cut, split=tuple(split))]


@_follows("slice")
def _slice(params: Any, node: Carried) -> list[Carried] | None:
    starts, limits = params["start_indices"], params["limit_indices"]
    if params["strides"] is not None and any(stride != 1 for stride in params["strides"]):
        return None
    sizes = [b - a for a, b in zip(starts, limits, strict=True)]
    return _cut(node, starts, sizes)


@_follows("dynamic_slice")
def _dynamic_slice(params: Any, node: Carried, *starts: Any) -> list[Carried] | None:
    return _cut(node, starts, params["slice_sizes"])


@_follows("split")
def _split(params: Any, node: Carried) -> list[Carried] | None:
    results, start, axis = [], 0, params["axis"]
    for size in params["sizes"]:
        sizes = [size if k == axis else n for k, n in enumerate(node.shape)]
        cut = _cut(node, [start if k == axis else 0 for k in range(node.ndim)], sizes)
        if cut is None:
            return None
        results += cut
        start += size
    return results


def _cut(node: Carried, starts: Sequence[Any], sizes: Sequence[int]) -> list[Carried] | None:
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

        node = _moved(node, cut)
    return [node]
