"""Exact top-k selection without a sort.

Sorting 16M scores to learn which million are the largest does far too much work, and `sort`,
`top_k` and `cumsum` gather sharded arrays (and raise on Explicit mesh axes). Here the k-th
largest score is *searched for*: floats are mapped to integers of the same order, and each pass
over the scores counts how many lie above each of seven thresholds, which narrows the answer by
three bits. A second search, over the row-major index, breaks ties. Only elementwise operations,
iotas and reductions are used, and arrays stay N-dimensional, so nothing is ever gathered.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxcompress.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from jaxcompress.meshes import call_with_auto_axes

_WAYS = 8
"""Each pass splits the bracket so many ways. More ways: fewer passes, larger programs."""

_MOST_COMPARISONS = 32
"""Groups up to this size are ranked by comparing all pairs, larger ones by searching."""


def top_k_mask(
    scores: Float[ArrayLike, "..."],
    k: int | Int[ArrayLike, "..."],
    *,
    axis: int | tuple[int, ...] | None = None,
) -> Bool[jax.Array, "..."]:
    """Mark the k largest scores, exactly k of them.

    `mask[i] = rank(scores[i]) < k`, in the order of falling scores; equal scores rank by row-major
    index, and -0 equals 0. Under jit, where NaN cannot be refused, it ranks beyond the infinity
    of its sign.

    Args:
        scores: Floating-point array of any shape; finite or infinite, not NaN.
        k: How many to keep, from 0 to the number of scores compared; may be traced (it is then
            clipped to that range). With `axis` it may be an array that broadcasts against the
            scores with `axis` reduced to size 1.
        axis: The axes along which scores compete; `None` for all. With `axis=0` each column of
            a matrix keeps its own k.

    Returns:
        A mask of the shape of `scores`, sharded like it.

    Raises:
        ArgumentTypeError: If the scores are not floating point.
        ArgumentError: If k is out of range, or more than 2**31 - 1 scores compete in 32 bits.
        NonFiniteError: If the scores hold NaN.

    Example:
        >>> top_k_mask(jnp.array([3.0, 1.0, 3.0, 2.0]), 2)
        Array([ True, False,  True, False], dtype=bool)
        >>> top_k_mask(jnp.array([[0.0, 2.0], [1.0, 1.0]]), 1, axis=0)
        Array([[False,  True],
               [ True, False]], dtype=bool)
    """
    x = _to_sortable(scores)
    axes = _sort_axes(axis, x.ndim)
    compared = math.prod(x.shape[a] for a in axes)
    return _row_mask(x, _check_k(k, compared), axes=axes)


def top_k_masks(
    scores: Sequence[Float[ArrayLike, "..."]],
    k: int | Int[ArrayLike, ""],
    *,
    costs: Sequence[int] | None = None,
) -> list[Bool[jax.Array, "..."]]:
    """Mark the k largest scores over several arrays together.

    With `costs`, each score of array a stands for `costs[a]` entries, and the highest-ranking
    scores are kept until they make at least k entries: the fewest that do, so k is exceeded by
    less than one cost, and not at all where all costs are 1. Ties rank by array, then by
    row-major index.

    Args:
        scores: Floating-point arrays of any shapes (and dtypes: compared in the widest).
        k: How many entries to keep, from 0 to their number; may be traced (then clipped).
        costs: Entries per score, one positive number per array; all 1 by default.

    Returns:
        One mask per array.

    Raises:
        ArgumentTypeError: If scores are not floating point.
        ArgumentError: If k is out of range, costs are not positive or not one per array, or more
            than 2**31 - 1 entries compete in 32 bits.
        NonFiniteError: If scores hold NaN.

    Example:
        >>> top_k_masks([jnp.array([1.0, 4.0]), jnp.array([[3.0], [2.0]])], 2)
        [Array([False,  True], dtype=bool), Array([[ True],
               [False]], dtype=bool)]
    """
    arrays = [_to_sortable(x) for x in scores]
    weights = tuple(costs) if costs is not None else (1,) * len(arrays)
    if len(weights) != len(arrays) or any(w < 1 for w in weights):
        raise ArgumentError(
            "costs",
            got=f"{list(weights)} for {len(arrays)} arrays",
            expected="one positive integer per array",
            fix="Give the number of entries that one score of each array stands for.",
        )
    compared = sum(w * x.size for w, x in zip(weights, arrays, strict=True))
    if not compared:
        return [jnp.zeros(x.shape, bool) for x in arrays]
    widest = common_float(*(x.dtype for x in arrays))
    xs = [x.astype(widest) for x in arrays]
    return _joint_masks(xs, _check_k(k, compared), costs=weights)


def top_k_in_groups(
    scores: Float[ArrayLike, "..."], k: int | Int[ArrayLike, ""], *, axis: int, size: int
) -> Bool[jax.Array, "..."]:
    """Mark the k largest scores of every `size` neighbours along an axis: N:M selection.

    Small groups are ranked by comparing all pairs, which needs no passes at all.

    Args:
        scores: Floating-point array, not NaN.
        k: How many to keep per group, from 0 to `size`; may be traced (then clipped).
        axis: The axis that is cut into groups of neighbours.
        size: Scores per group; divides the axis.

    Returns:
        A mask of the shape of `scores`.

    Raises:
        ArgumentTypeError: If the scores are not floating point.
        ArgumentError: If `size` does not divide the axis, or k is out of range.
        NonFiniteError: If the scores hold NaN.

    Example:
        >>> top_k_in_groups(jnp.array([1.0, 2.0, 0.0, 3.0]), 1, axis=0, size=2)
        Array([False,  True, False,  True], dtype=bool)
    """
    x = _to_sortable(scores)
    (axis,) = _sort_axes(axis, x.ndim)
    if size < 1 or x.shape[axis] % size:
        raise ArgumentError(
            "size",
            got=f"{size} for an axis of {x.shape[axis]}",
            expected="a positive divisor of the axis",
            fix="Choose another group size, or pad the axis.",
        )
    return _group_mask(x, _check_k(k, size), axis=axis, size=size)


def common_float(*dtypes: Any) -> Any:
    """Choose a float dtype that holds all of the given ones exactly, without implicit promotion.

    Args:
        *dtypes: Floating-point dtypes.

    Returns:
        The dtype itself where all are one, else float64 if there is one, else float32.

    Example:
        >>> common_float(jnp.bfloat16, jnp.float16)
        dtype('float32')
    """
    distinct = {jnp.dtype(dtype) for dtype in dtypes}
    if len(distinct) == 1:
        return distinct.pop()
    return jnp.dtype(jnp.float64 if jnp.dtype(jnp.float64) in distinct else jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """Cast an array to float32, unless it is wider already.

    Args:
        x: An array of any real dtype.

    Returns:
        It in float32 or float64.
    """
    return x.astype(common_float(x.dtype, jnp.float32))


# --- Checks -----------------------------------------------------------------------------------


def _to_sortable(scores: ArrayLike) -> jax.Array:
    x = jnp.asarray(scores)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ArgumentTypeError(
            "scores", got=str(x.dtype), expected="a floating-point array", fix="Cast it to float32."
        )
    if x.dtype.itemsize == 1:  # float8 has no integer ALU twin, and converts exactly
        x = x.astype(jnp.bfloat16)
    if not isinstance(x, Tracer) and bool(jnp.isnan(x).any()):
        raise NonFiniteError(
            "scores",
            got="NaN among them",
            expected="scores that can be ordered",
            fix="Look for NaN in the weights or gradients they were computed from.",
        )
    return x


def _check_k(k: ArrayLike, compared: int) -> ArrayLike:
    if isinstance(k, Tracer):
        return k
    values = np.asarray(k)
    if not np.issubdtype(values.dtype, np.integer) or ((values < 0) | (values > compared)).any():
        raise ArgumentError(
            "k", got=f"{k}", expected=f"an integer from 0 to {compared}", fix="Clip or round it."
        )
    return k


def _count_dtype(compared: int) -> Any:
    """Choose the integers that count `compared` entries without overflow."""
    if compared < 2**31:
        return jnp.int32
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ArgumentError(
            "scores",
            got=f"{compared} entries compared with each other",
            expected="fewer than 2**31, which is what 32-bit integers can count",
            fix="Compare per layer, or set jax_enable_x64.",
        )
    return jnp.int64


def _sort_axes(axis: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    axes = range(ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    if any(not -ndim <= a < ndim for a in axes) or len({a % ndim for a in axes}) < len(axes):
        raise ArgumentError(
            "axis",
            got=f"{axis} for {ndim} axes",
            expected="distinct axes of the scores",
            fix="Count from 0, or from -1 backwards.",
        )
    return tuple(sorted(a % ndim for a in axes))


# --- Selection --------------------------------------------------------------------------------


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Map floats to signed integers of the same order, -0 and 0 to 0; the lowest is never met.

    The bits of positive floats already ascend; those of negative ones descend from the lowest
    integer, and are mirrored.
    """
    integer = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    bits = lax.bitcast_convert_type(x, integer)
    return jnp.where(bits < 0, jnp.iinfo(integer).min - bits, bits)


def _row_major(shape: tuple[int, ...], axes: tuple[int, ...], start: jax.Array) -> jax.Array:
    """Number the entries along `axes` from `start` in row-major order: an iota over axes."""
    index, stride = lax.broadcast(start, shape), 1
    for axis in reversed(axes):
        iota = lax.broadcasted_iota(start.dtype, shape, axis)
        index += iota * jnp.asarray(stride, start.dtype)
        stride *= shape[axis]
    return index


Bracket = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""`(low, high, above_low, above_high)`: two thresholds, and how much lies above each."""


def _search(
    count_above: Callable[[list[jax.Array]], list[jax.Array]], k: jax.Array, bracket: Bracket
) -> Bracket:
    """Narrow a bracket with `above_low >= k` until `above_low == k` or `high - low == 1`.

    The thresholds may be arrays: then one search per entry, all in step.
    """
    unsigned = jnp.dtype(f"uint{8 * bracket[0].dtype.itemsize}")

    def width(low: jax.Array, high: jax.Array) -> jax.Array:
        return high.astype(unsigned) - low.astype(unsigned)  # wraps to the true difference

    def unfinished(state: Bracket) -> jax.Array:
        low, high, above_low, _ = state
        return jnp.any((above_low > k) & (width(low, high) > 1))

    def narrow(state: Bracket) -> Bracket:
        low, high, above_low, above_high = state
        span = width(low, high)
        step = (span // _WAYS) + (span % _WAYS > 0).astype(unsigned)

        def threshold(i: Any) -> jax.Array:
            offset = jnp.minimum(jnp.asarray(i, unsigned) * step, span)
            return (low.astype(unsigned) + offset).astype(low.dtype)

        counts = count_above([threshold(i) for i in range(1, _WAYS)])
        reached = [count >= k for count in counts]  # true, then false, as thresholds rise
        steps = functools.reduce(jnp.add, [r.astype(jnp.int32) for r in reached])
        for count, enough in zip(counts, reached, strict=True):
            above_low = jnp.where(enough, jnp.minimum(above_low, count), above_low)
            above_high = jnp.where(enough, above_high, jnp.maximum(above_high, count))
        return threshold(steps), threshold(steps + 1), above_low, above_high

    return lax.while_loop(unfinished, narrow, bracket)


def _count_flags(flags: list[jax.Array], axes: tuple[int, ...], dtype: Any) -> list[jax.Array]:
    """Count the true entries of several arrays in one pass, keeping the axes at size 1.

    One reduction of several operands: on CPU XLA vectorises it, at ten times the speed of the
    reductions one by one.
    """
    totals = lax.reduce(
        [flag.astype(dtype) for flag in flags],
        [jnp.zeros((), dtype)] * len(flags),
        lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
        axes,
    )
    return [lax.expand_dims(total, axes) for total in totals]


def _mark_largest(
    xs: list[jax.Array],
    axes: list[tuple[int, ...]],
    add_up: Callable[[list[list[jax.Array]]], list[jax.Array]],
    k: jax.Array,
    compared: int,
) -> list[jax.Array]:
    """Search the k-th largest key, then the index at which its ties are cut.

    `add_up` takes, per array, what `_count_flags` gives for each threshold; it adds over arrays.
    """

    def ranks(after: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        # Were keys and indices constant in the loops, XLA would compute them once, ahead of the
        # loops, into arrays as large as the scores. Seeming to depend on the loop's state, they
        # are fused into each pass instead, which is twice as fast and takes no memory.
        inputs, origin, _ = lax.optimization_barrier((xs, jnp.zeros((), dtype), after))
        starts = np.cumsum([0, *[x.size for x in xs]])
        return [_ordered_bits(x) for x in inputs], [
            -_row_major(x.shape, along, origin + jnp.asarray(start, dtype))
            for x, along, start in zip(xs, axes, starts[:-1], strict=True)
        ]

    def totals(flags: Callable[..., list[jax.Array]], *columns: list[jax.Array]) -> list[jax.Array]:
        return add_up(
            [
                _count_flags(flags(*entries), along, dtype)
                for *entries, along in zip(*columns, axes, strict=True)
            ]
        )

    def key_counts(thresholds: list[jax.Array]) -> list[jax.Array]:
        keys, _ = ranks(thresholds[0])
        return totals(lambda key: [key > t for t in thresholds], keys)

    def tie_counts(thresholds: list[jax.Array]) -> list[jax.Array]:
        keys, indices = ranks(thresholds[0])
        return totals(
            lambda key, index: [(key == cut) & (index > t) for t in thresholds], keys, indices
        )

    dtype = _count_dtype(compared)
    k = jnp.clip(k.astype(dtype), 0, compared)
    integer = _ordered_bits(xs[0]).dtype
    lowest, highest = jnp.iinfo(integer).min, jnp.iinfo(integer).max
    # Loop carries are made from a count (of nothing), for they must be sharded as counts will be.
    nothing = totals(lambda x: [jnp.zeros_like(x, bool)], xs)[0]
    everything = jnp.full_like(nothing, compared)
    start = (
        jnp.full_like(nothing, lowest, integer),
        jnp.full_like(nothing, highest, integer),
        everything,
        nothing,
    )
    low, high, above_low, above_high = _search(key_counts, k, start)
    exact = above_low == k
    cut = jnp.where(exact, low, high)

    # Of the entries equal to the cut, `wanted` more are kept; none, and no pass, if it is exact.
    wanted = jnp.where(exact, 0, k - above_high)
    ties = jnp.where(exact, 0, above_low - above_high)
    last = jnp.where(exact, 0, jnp.full_like(nothing, -compared))
    last = _search(tie_counts, wanted, (last, jnp.zeros_like(last), ties, jnp.zeros_like(last)))[0]
    keys, indices = ranks(last)
    return [
        (key > cut) | ((key == cut) & (index > last))
        for key, index in zip(keys, indices, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="axes")
def _row_mask(x: jax.Array, k: ArrayLike, *, axes: tuple[int, ...]) -> jax.Array:
    if not x.size:
        return jnp.zeros(x.shape, bool)
    # Reductions over leading axes are slow on CPU, so the axes that compete come last.
    order = [*(a for a in range(x.ndim) if a not in axes), *axes]
    last = tuple(range(x.ndim - len(axes), x.ndim))
    k = jnp.asarray(k)
    k = k.transpose(order) if k.ndim == x.ndim else k
    compared = math.prod(x.shape[a] for a in axes)
    (mask,) = _mark_largest([x.transpose(order)], [last], lambda sums: sums[0], k, compared)
    return mask.transpose(np.argsort(order))


@functools.partial(jax.jit, static_argnames="costs")
def _joint_masks(xs: list[jax.Array], k: ArrayLike, *, costs: tuple[int, ...]) -> list[jax.Array]:
    def add_up(sums: list[list[jax.Array]]) -> list[jax.Array]:
        return [
            functools.reduce(
                jnp.add,
                [
                    s.reshape(()) * jnp.asarray(cost, s.dtype)
                    for s, cost in zip(row, costs, strict=True)
                ],
            )
            for row in zip(*sums, strict=True)
        ]

    axes = [tuple(range(x.ndim)) for x in xs]
    compared = sum(cost * x.size for cost, x in zip(costs, xs, strict=True))
    return _mark_largest(xs, axes, add_up, jnp.asarray(k), compared)


@functools.partial(jax.jit, static_argnames=("axis", "size"))
def _group_mask(x: jax.Array, k: ArrayLike, *, axis: int, size: int) -> jax.Array:
    split = (*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])

    def mask(x: jax.Array, limit: jax.Array) -> jax.Array:
        grouped = x.reshape(split)  # (..., groups, size, ...)
        if size <= _MOST_COMPARISONS:
            return (_rank_neighbours(grouped, axis + 1) < limit).reshape(x.shape)
        return _row_mask(grouped, limit, axes=(axis + 1,)).reshape(x.shape)

    limit = jnp.clip(jnp.asarray(k), 0, size)
    return without_explicit_axes(mask, x, limit, shape=x.shape)


def _rank_neighbours(x: jax.Array, axis: int) -> jax.Array:
    """Count, for each entry, the entries along `axis` that come before it in falling order."""
    key = _ordered_bits(x)
    mine, other = jnp.expand_dims(key, axis + 1), jnp.expand_dims(key, axis)
    shape = jnp.broadcast_shapes(mine.shape, other.shape)  # (..., mine, other, ...)
    my_index, other_index = (lax.broadcasted_iota(jnp.int32, shape, axis + i) for i in (0, 1))
    ahead = (other > mine) | ((other == mine) & (other_index < my_index))
    return jnp.sum(ahead, axis=axis + 1, dtype=jnp.int32)


def without_explicit_axes(
    f: Callable[..., jax.Array], x: jax.Array, *rest: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Call `f(x, *rest)`, leaving the sharding inside to XLA where the mesh axes are Explicit.

    There, a reshape that cuts a sharded axis raises. The result is sharded like x on every axis
    that still divides, and replicated on the others.

    Args:
        f: What to call; it may reshape freely.
        x: The array to call it with.
        *rest: Further arguments for f; closing over arrays would mix the two kinds of axes.
        shape: The shape of f's result: as many axes as x has.

    Returns:
        `f(x, *rest)`.

    Example:
        >>> double = lambda x: 2 * x
        >>> without_explicit_axes(double, jnp.ones((2, 2)), shape=(2, 2)).shape
        (2, 2)
    """
    sharding = jax.typeof(x).sharding

    def ways(names: str | tuple[str, ...] | None) -> int:
        names = (names,) if isinstance(names, str) else names or ()
        return math.prod(sharding.mesh.shape[name] for name in names)

    names = (*sharding.spec, *(None,) * len(shape))  # a spec may be shorter than the shape
    spec = [a if n % ways(a) == 0 else None for a, n in zip(names, shape, strict=False)]
    return call_with_auto_axes(f, x, *rest, spec=jax.sharding.PartitionSpec(*spec))
