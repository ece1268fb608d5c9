"""Following a leaf through reshapes, casts and slices: which of its axes a variable's axes hold.

A rule says, for one primitive, what its result shows of the leaves that its operands show. Rules
are registered by primitive name; the built-in ones below use the same door as yours.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from jaxcompress.graph.program._primitives import ELEMENTWISE, arrange
from jaxcompress.graph.program._rules import Rules


class Factor(NamedTuple):
    """A factor of one axis of a variable: the leaf axes that it runs along, its size and stride.

    Attributes:
        axes: The leaf axes that it enumerates; none for a broadcast.
        size: Its length.
        stride: Its step along that leaf axis, in entries.
        exact: Whether it runs through the leaf's entries in their order, none left out; not so
            for slices, padding, permutations, and axes that a reshape has mixed up.
    """

    axes: tuple[int, ...]
    size: int
    stride: int = 1
    exact: bool = True


AxisFactors: TypeAlias = tuple[Factor, ...]
"""One axis of a variable, major factor first; reshapes leave axes of size one empty."""


@dataclass(frozen=True)
class View:
    """What a variable shows of one leaf.

    Attributes:
        path: The leaf's path.
        axes: For each axis of the variable, the factors that it is made of.
        stacked: Leaf axes that enclosing scans have taken apart.
        through: The primitives passed since the leaf.
        layers: `(leaf axis, entry of Site.stack)` of the scans that take a whole axis of the
            leaf apart in its order.
    """

    path: str
    axes: tuple[AxisFactors, ...]
    stacked: tuple[int, ...] = ()
    through: tuple[str, ...] = ()
    layers: tuple[tuple[int, int], ...] = ()

    def leaf_axes(self, axes: Sequence[int]) -> tuple[int, ...]:
        """List the leaf axes that these axes of the variable hold, in the leaf's order.

        Args:
            axes: Axes of the variable.

        Returns:
            Sorted axes of the leaf.
        """
        return tuple(sorted({k for i in axes for f in self.axes[i] for k in f.axes}))

    def passed(self, primitive: str, axes: Sequence[AxisFactors]) -> "View":
        """Describe the result of a primitive that shows the same leaf.

        Args:
            primitive: Its name.
            axes: The factors of each axis of the result.

        Returns:
            The result's view.
        """
        return replace(self, axes=tuple(axes), through=(*self.through, primitive))


def whole(path: str, shape: Sequence[int]) -> View:
    """View a leaf as it is.

    Args:
        path: Its path.
        shape: Its shape.

    Returns:
        A view whose every axis is the leaf's own.
    """
    return View(path, tuple((Factor((k,), n),) for k, n in enumerate(shape)))


def parts_of(path: str, leaf: Any) -> list[View]:
    """View the arrays of a leaf: one for an array, values and scales for a `QArray`.

    Args:
        path: The leaf's path.
        leaf: An array or a `LeafNode`.

    Returns:
        A view per array, in flattening order. Values that are stored in blocks show the axes of
        the array that the leaf stands for.
    """
    shapes = [tuple(part.shape) for part in jax.tree.leaves(leaf)]
    values = max(shapes, key=elements, default=())
    if values == tuple(leaf.shape):
        shown = list(whole(path, values).axes)
    else:
        shown = split_factors([Factor((k,), n) for k, n in enumerate(leaf.shape)], values)
    if shown is None:
        return [whole(path, shape) for shape in shapes]
    views = []
    for shape in shapes:
        axes: list[AxisFactors] = [() if n == 1 else (Factor((), n),) for n in shape]
        for k, n in enumerate(shape if len(shape) == len(values) else ()):
            axes[k] = shown[k] if n == values[k] else axes[k]
        views.append(View(path, tuple(axes)))
    return views


ViewRule: TypeAlias = Callable[[Any, Sequence[View | None], int], Sequence[View | None]]
"""`(eqn, views of the operands, k) -> for each operand, what the k-th result shows of it`."""

_RULES: Rules[ViewRule] = Rules()


def register_view(*primitives: str) -> Callable[[ViewRule], ViewRule]:
    """Say how a leaf is followed through a primitive.

    The rule gets the equation, one view per operand (`None` where an operand shows no leaf) and
    the number of the result, and returns one view of that result per operand, `None` where the
    leaf can be followed no further: it is then reported as used there.

    Args:
        *primitives: Names of primitives.

    Returns:
        A decorator that registers the rule and returns it.
    """
    return _RULES.register(*primitives)


def view_rule(primitive: str) -> ViewRule | None:
    return _RULES.get(primitive)


def _shape_of(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


@register_view(*ELEMENTWISE, "bitcast_convert_type")
def _elementwise(eqn: Any, views: Sequence[View | None], k: int) -> list[View | None]:
    """Follow operands of full shape; what only scales or shifts them is used here, and ends."""
    shape = _shape_of(eqn.outvars[k])
    pairs = zip(eqn.invars, views, strict=True)
    fitting = [view if _shape_of(atom) == shape else None for atom, view in pairs]
    spread = lambda view: any(not f.axes for axis in view.axes for f in axis)
    whole = [None if view is None or spread(view) else view for view in fitting]
    # Without any, nothing outranks a broadcast operand.
    followed = whole if any(whole) else fitting
    return [view and view.passed(eqn.primitive.name, view.axes) for view in followed]


@register_view("select_n")
def _follow_select(eqn: Any, views: Sequence[View | None], k: int) -> list[View | None]:
    """Follow the cases; what chooses among them is used here, and ends."""
    return list(_elementwise(eqn, [None, *views[1:]], k))


def _single(
    rule: Callable[[Any, View, tuple[int, ...]], Sequence[AxisFactors] | None],
) -> ViewRule:
    """Make a rule from one for the first operand; a leaf among the others (an index) ends.

    The latter gets the equation, the view and the shape of a result, and gives its axes.
    """

    def apply(eqn: Any, views: Sequence[View | None], k: int) -> list[View | None]:
        first, *rest = views
        axes = None if first is None else rule(eqn, first, _shape_of(eqn.outvars[k]))
        shown = None if first is None or axes is None else first.passed(eqn.primitive.name, axes)
        return [shown, *([None] * len(rest))]

    return apply


def resize_axis(axis: AxisFactors, size: int) -> AxisFactors:
    """Describe part of an axis, or a longer axis of which it is part."""
    if size == math.prod(f.size for f in axis):
        return axis
    held = tuple(sorted({k for f in axis for k in f.axes}))
    return (Factor(held, size, exact=False),)


def fit_view(view: View, shape: Sequence[int]) -> View:
    """View a part, or a whole, of what a view shows: a shard, from inside a `shard_map`.

    Args:
        view: A view.
        shape: The shape of the variable that it is to be a view of, of the same rank.

    Returns:
        The view with axes of these sizes.
    """
    axes = tuple(resize_axis(axis, n) for axis, n in zip(view.axes, shape, strict=True))
    return view if axes == view.axes else replace(view, axes=axes)


def _arrange_axes(eqn: Any, view: View, shape: tuple[int, ...]) -> Sequence[AxisFactors] | None:
    return arrange(eqn, view.axes, lambda n: () if n == 1 else (Factor((), n),))


def _reshape(eqn: Any, view: View, shape: tuple[int, ...]) -> list[AxisFactors] | None:
    order = eqn.params.get("dimensions") or range(len(view.axes))
    return split_factors([f for k in order for f in view.axes[k]], shape)


def split_factors(factors: Sequence[Factor], shape: Sequence[int]) -> list[AxisFactors] | None:
    """Cut a row-major run of factors into axes of the given sizes, splitting where needed."""
    left, axes = [f for f in reversed(factors) if f.size > 1], []
    for size in shape:
        axis: list[Factor] = []
        while size > 1:
            if not left:
                return None
            factor = left.pop()
            if size % factor.size == 0:
                axis.append(factor)
                size //= factor.size
            elif (common := math.gcd(size, factor.size)) > 1:
                # The major part stays here, the minor goes on.
                minor = factor.size // common
                axis.append(factor._replace(size=common, stride=factor.stride * minor))
                left.append(factor._replace(size=minor))
                size //= common
            elif left:  # no boundary in common: the two axes cannot be told apart from here on
                minor = left.pop()
                together = tuple(sorted({*factor.axes, *minor.axes}))
                left.append(Factor(together, factor.size * minor.size, exact=False))
            else:
                return None
        axes.append(tuple(axis))
    return axes


def _resize_axes(eqn: Any, view: View, shape: tuple[int, ...]) -> list[AxisFactors]:
    return [resize_axis(axis, n) for axis, n in zip(view.axes, shape, strict=True)]


def _inexact(axis: AxisFactors) -> AxisFactors:
    return tuple(factor._replace(exact=False) for factor in axis)


def _flip_axes(eqn: Any, view: View, shape: tuple[int, ...]) -> list[AxisFactors]:
    flipped = eqn.params["dimensions"]
    return [_inexact(axis) if k in flipped else axis for k, axis in enumerate(view.axes)]


def _all_gather(eqn: Any, view: View, shape: tuple[int, ...]) -> list[AxisFactors]:
    if eqn.params["tiled"]:
        return _resize_axes(eqn, view, shape)
    axes, shards = list(view.axes), Factor((), eqn.params["axis_size"])
    axes.insert(eqn.params["all_gather_dimension"], (shards,))
    return axes


def _drop_axes(eqn: Any, view: View, shape: tuple[int, ...]) -> list[AxisFactors]:
    gone = eqn.params["axes"] if "axes" in eqn.params else (eqn.params["axis"],)
    return [axis for k, axis in enumerate(view.axes) if k not in gone]


def _repeat_axes(eqn: Any, view: View, shape: tuple[int, ...]) -> list[AxisFactors]:
    """Follow the copies of a leaf: a copied axis has a factor that enumerates them."""
    pairs = zip(eqn.params["reps"], view.axes, strict=True)
    return [(Factor((), n), *axis) if n > 1 else axis for n, axis in pairs]


def _pick(eqn: Any, view: View, shape: tuple[int, ...]) -> list[AxisFactors]:
    """Follow a leaf picked from by constant indices; picked axes merge into the index axes."""
    numbers = eqn.params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for k, axis in enumerate(view.axes) if k not in gone]
    picked = view.leaf_axes(sorted(gone))
    axes: list[AxisFactors] = [(Factor(picked, n, exact=False),) for n in shape]
    for target, axis in zip(numbers.offset_dims, kept, strict=True):
        axes[target] = resize_axis(axis, shape[target])
    return axes


register_view("broadcast_in_dim", "squeeze", "transpose")(_single(_arrange_axes))
register_view("reshape")(_single(_reshape))
register_view("slice", "dynamic_slice", "pad", "split")(_single(_resize_axes))
register_view("rev")(_single(_flip_axes))
register_view("all_gather")(_single(_all_gather))
register_view("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")(
    _single(_drop_axes)
)
register_view("unstack")(_single(_drop_axes))
register_view("tile")(_single(_repeat_axes))
register_view("gather")(_single(_pick))


@register_view("concatenate", "dynamic_update_slice")
def _follow_join(eqn: Any, views: Sequence[View | None], k: int) -> list[View | None]:
    """Follow every part of what is put together; indices end."""
    name, shape = eqn.primitive.name, _shape_of(eqn.outvars[k])
    return [
        view.passed(name, _resize_axes(eqn, view, shape))
        if view is not None and len(view.axes) == len(shape)
        else None
        for view in views
    ]


@register_view("stack")
def _follow_stack(eqn: Any, views: Sequence[View | None], k: int) -> list[View | None]:
    """Follow every part of a stack: the new axis shows one index of each."""
    axis = eqn.params["axis"]

    def stacked(view: View) -> View:
        axes = list(view.axes)
        axes.insert(axis, (Factor((), len(views)),) if len(views) > 1 else ())
        return view.passed("stack", axes)

    return [None if view is None else stacked(view) for view in views]


def elements(shape: Sequence[Any]) -> int:
    """Count entries; a symbolic dimension of `jax.export` counts as one."""
    return math.prod(int(n) if isinstance(n, int | np.integer) else 1 for n in shape)
