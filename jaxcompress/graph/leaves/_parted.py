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
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress.graph.program import ARRANGES, PLACES, Equation, Rules, arrange
from jaxcompress.meshes import find_explicit_mesh
from jaxcompress.tree import LeafNode


class Parted(LeafNode):
    """What a variable of fn holds of a leaf in parts.

    A subclass is a frozen dataclass, registered as a pytree: the parts are its data fields, an
    absent one `None`; `path`, `split` and others are static. It has an attribute or a property
    `dtype`, that of the array at hand, and says in `array` what the parts stand for.

    Invariants: the parts have as many axes as `lengths`, each of its length there or 1, and
    behind them as many of their own as they like; `split` adds up to that number.

    Attributes:
        path: The leaf's path.
        split: How many stored axes make up each axis of the array at hand.
    """

    path: str
    split: tuple[int, ...]

    @abc.abstractmethod
    def array(self) -> Array:
        """Give the array at hand, for what takes no parts."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the stored axes."""
        shapes = [part.shape for part in jax.tree.leaves(self)]
        return tuple(max(shape[k] for shape in shapes) for k in range(sum(self.split)))

    def moved(self, move: Callable[[Array], Array], **changes: Any) -> Self:
        """Move the entries of every part about, and change fields."""
        return replace(jax.tree.map(move, self), **changes)

    def placement(self) -> NamedSharding | None:
        """Say where the array at hand would live; `None` where there are no Explicit axes."""
        found = [_find_placement(part, self.stored_axes) for part in jax.tree.leaves(self)]
        places = [place for place in found if place is not None]
        if not places:
            return None
        padded = ((*place.spec, *(None,) * self.ndim)[: self.ndim] for place in places)
        spec: list[Any] = []
        for names in zip(*padded, strict=True):
            left = (name for name in names if name is not None and name not in spec)
            spec.append(next(left, None))
        return NamedSharding(places[0].mesh, PartitionSpec(*spec))

    def cast(self, dtype: Any) -> Self:
        """Describe the array in another floating dtype."""
        return replace(self, dtype=dtype)  # pyright: ignore[reportArgumentType]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array at hand."""
        lengths = self.lengths
        return tuple(math.prod(lengths[k] for k in axes) for axes in self.stored_axes)

    @property
    def size(self) -> int:
        """Its number of entries."""
        return math.prod(self.lengths)

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.split)

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.nbytes for part in jax.tree.leaves(self))

    @property
    def stored_axes(self) -> tuple[tuple[int, ...], ...]:
        """For each axis of the array, the stored axes that make it up, major first."""
        ends = tuple(itertools.accumulate(self.split, initial=0))
        return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends))


Node = TypeVar("Node", bound=Parted)


def slice_node(node: Node) -> Node | None:
    """Describe the slices of a node along its first axis, as a scan takes it apart.

    Args:
        node: The node.

    Returns:
        A node whose arrays still have that axis in front; `None` if several make it up.
    """
    if not node.split or node.split[0] != 1:
        return None
    length = node.lengths[0]
    whole = lambda part: jnp.broadcast_to(part, (length, *part.shape[1:]))
    return node.moved(whole, split=node.split[1:])


_REPEATED = (-1,)
"""What stands for an axis along which entries are repeated."""
_Rule = Callable[..., list[Any] | None]
_RULES: Rules[_Rule] = Rules()


def follow_move(equation: Equation, operands: Sequence[Any]) -> list[Any] | None:
    """Run an equation on a node, if it only moves its entries about.

    Args:
        equation: The equation.
        operands: Its operands, at least one of them a node.

    Returns:
        Its results as nodes; `None` if it needs the array.
    """
    node, *others = operands
    rule = _RULES.get(equation.primitive.name)
    if rule is None or not isinstance(node, Parted) or any(isinstance(x, Parted) for x in others):
        return None
    return rule(equation, node, *others)


@_RULES.register(*PLACES)
def _as_it_is(equation: Equation, node: Parted) -> list[Any]:
    """Go on: the parts are placed as the leaf was."""
    return [node]


@_RULES.register("convert_element_type")
def _convert_parts(equation: Equation, node: Parted) -> list[Any] | None:
    dtype = jnp.dtype(equation.params["new_dtype"])
    return [node.cast(dtype)] if jnp.issubdtype(dtype, jnp.floating) else None


@_RULES.register(*ARRANGES)
def _arrange_parts(equation: Equation, node: Parted) -> list[Any] | None:
    """Permute the lists of stored axes, or cut them anew; entries are not repeated."""
    if equation.primitive.name == "reshape":
        params = equation.params
        return None if params.get("dimensions") else _reshape_parts(node, params["new_sizes"])
    axes = arrange(equation.eqn, node.stored_axes, lambda size: () if size == 1 else _REPEATED)
    if axes is None or _REPEATED in axes:
        return None
    order = [k for stored in axes for k in stored]
    gone = [k for k in range(len(node.lengths)) if k not in order]  # of length 1

    def permute(part: Array) -> Array:
        own = range(len(node.lengths), part.ndim)
        part = jnp.transpose(part, [*gone, *order, *own])
        return part.reshape(part.shape[len(gone) :])

    return [node.moved(permute, split=tuple(len(stored) for stored in axes))]


def _reshape_parts(node: Parted, shape: Sequence[int]) -> list[Any] | None:
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


@_RULES.register("slice")
def _slice_parts(equation: Equation, node: Parted) -> list[Any] | None:
    params = equation.params
    starts, limits = params["start_indices"], params["limit_indices"]
    if params["strides"] is not None and any(stride != 1 for stride in params["strides"]):
        return None
    sizes = [b - a for a, b in zip(starts, limits, strict=True)]
    return _cut(node, starts, sizes)


@_RULES.register("dynamic_slice")
def _slice_parts_at(equation: Equation, node: Parted, *starts: Any) -> list[Any] | None:
    return _cut(node, starts, equation.params["slice_sizes"])


@_RULES.register("split")
def _split_parts(equation: Equation, node: Parted) -> list[Any] | None:
    results, start, axis = [], 0, equation.params["axis"]
    for size in equation.params["sizes"]:
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


# --- Where parts and results live ----------------------------------------------------------------


def place_parts(parts: Any, leaf: Any, axes: Callable[[Any], Sequence[int | None]]) -> Any:
    """Shard the parts of a leaf like the array that they replace.

    Args:
        parts: A tree of arrays.
        leaf: The array.
        axes: As in `part_shardings`.

    Returns:
        The tree, placed; as it is where the array has no sharding over a mesh.
    """
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return parts
    return jax.device_put(parts, part_shardings(parts, sharding, axes))


def part_shardings(
    parts: Any, sharding: NamedSharding, axes: Callable[[Any], Sequence[int | None]]
) -> Any:
    """Say where the parts of a leaf live, if the leaf lived there.

    Args:
        parts: A tree of arrays (shapes are enough).
        sharding: The leaf's sharding.
        axes: `part -> axes`: for each axis of a part the axis of the leaf that it stands for, or
            for the major part of; `None` for one of its own. There may be more behind them.

    Returns:
        A tree of shardings: each axis split as the leaf's was where its length divides.
    """
    mesh, spec = sharding.mesh, sharding.spec

    def shard(part: Any) -> NamedSharding:
        given = (spec[k] if k is not None and k < len(spec) else None for k in axes(part))
        names = [
            name if name is not None and n > 1 and n % _count_ways(mesh, name) == 0 else None
            for n, name in zip(part.shape, given, strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map(shard, parts)


def _count_ways(mesh: Any, names: Any) -> int:
    names = (names,) if isinstance(names, str) else names
    return math.prod(mesh.shape[name] for name in names)


# With Explicit mesh axes every operation has to know how its result is placed. A kernel sums over
# axes that the equation has in one piece, so it could not say; the equation can.


def _find_placement(part: Any, axes: Sequence[Sequence[int]]) -> NamedSharding | None:
    """Say where an array lives that is stored in pieces.

    Args:
        part: What is stored.
        axes: For each axis of the array the axes of the part that make it up, major first.

    Returns:
        The sharding, by the major pieces; `None` where there are no Explicit axes.
    """
    mesh = find_explicit_mesh(part)
    if mesh is None:
        return None
    names = (*jax.typeof(part).sharding.spec, *(None,) * part.ndim)
    spec = PartitionSpec(*(names[own[0]] if own else None for own in axes))
    return NamedSharding(mesh, spec)


def place_result(
    kernel: Callable[..., Any], equation: Equation, operands: Sequence[Any]
) -> Callable[..., Any]:
    """Place the result of a kernel as the equation would in whose place it runs.

    Args:
        kernel: `(*operands) -> result`.
        equation: The equation.
        operands: Its operands; some are nodes.

    Returns:
        The kernel, with its result placed.
    """
    like = [_describe_operand(x) for x in operands]
    if not any(x.sharding for x in like):
        return kernel
    out = jax.eval_shape(equation.bind, *like).sharding
    automatic: Callable[..., Any] = jax.sharding.auto_axes(kernel, out_sharding=out)
    return automatic


def _describe_operand(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, Parted):
        where = x.placement()
    else:
        where = _find_placement(x, [(k,) for k in range(jax.typeof(x).ndim)])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
