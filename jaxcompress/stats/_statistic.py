"""What a statistic is, and the arithmetic that all of them share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.errors import ArgumentError, ArgumentTypeError

READS = ("input", "channels", "output", "input_grad", "output_grad", "indices")
"""The arrays of a site that a statistic can read; see `Statistic.reads`."""


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A quantity that streams over batches: pure functions `(init, update, finalize)`.

    Invariants: the functions are pure and traceable, a state is a pytree of arrays whose shapes
    and dtypes `update` keeps, and updating batch by batch gives what one update with all rows
    gives, up to rounding (moving averages, which weigh batches by age, excepted).

    Attributes:
        init: `(*sizes) -> state`, one feature count per array read (for "indices", the number
            of rows of the table).
        update: `(state, *arrays) -> state`, one 2-D array `(tokens, features)` per entry of
            `reads`, of any float dtype. Accumulation is in float32.
        finalize: `(state) -> result`, a pytree of arrays.
        reads: Which arrays of a site it sees. The names are

            * "input": the activation as the weight contracts it (`Site.rows`; a convolution's
              as patches), the default;
            * "channels": the same without patches (`Site.channels`);
            * "output": the result, before any bias (`Site.output_rows`), row by row that of
              "input";
            * "output_grad": the gradient of fn's summed outputs with respect to "output";
            * "input_grad": that with respect to "channels", at this one site: an activation
              that several sites read has one gradient for each;
            * "indices": the rows looked up, at the sites of embeddings only.

    Raises:
        ArgumentError: If `reads` is empty or names anything else.

    Example:
        The largest row sum:

        >>> import jax.numpy as jnp
        >>> largest = Statistic(
        ...     init=lambda features: jnp.float32(-jnp.inf),
        ...     update=lambda state, x: jnp.maximum(state, x.sum(1).max()),
        ...     finalize=lambda state: state,
        ... )
        >>> largest.finalize(largest.update(largest.init(2), jnp.array([[1.0, 2.0], [0.0, 4.0]])))
        Array(4., dtype=float32)
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    finalize: Callable[[Any], Any]
    reads: tuple[str, ...] = ("input",)

    def __post_init__(self):
        if not self.reads or not set(self.reads) <= set(READS):
            raise ArgumentError(
                "reads",
                got=repr(self.reads),
                expected=f"a tuple of one or more of {', '.join(READS)}",
                fix='For example reads=("input", "output_grad").',
            )

    @property
    def needs_gradients(self) -> bool:
        """Whether it reads a gradient, which costs a backward pass."""
        return any(read.endswith("_grad") for read in self.reads)


class Counter(NamedTuple):
    """A count in two words, exact to 2**64: int32 ends at 2**31, and float32 stalls at 2**24."""

    low: Array
    high: Array


class _RowSums(NamedTuple):
    totals: tuple[Array, ...]
    tokens: Counter


def sum_rows(
    shapes: Callable[..., Sequence[tuple[int, ...]]],
    terms: Callable[..., Sequence[Array]],
    result: Callable[..., Any],
    reads: tuple[str, ...],
) -> Statistic:
    """Make a statistic of sums over all rows.

    Args:
        shapes: `(*sizes) -> the shapes of the sums`, given what `Statistic.init` is.
        terms: `(*rows) -> what a batch adds to each sum`.
        result: `(*sums, tokens) -> result`.
        reads: See `Statistic.reads`.

    Returns:
        The statistic; its sums are float32, and it counts the rows of the first array.
    """

    def init(*sizes: int) -> _RowSums:
        return _RowSums(tuple(jnp.zeros(s, jnp.float32) for s in shapes(*sizes)), counter())

    def update(state: _RowSums, *rows: Array) -> _RowSums:
        totals = zip(state.totals, terms(*rows), strict=True)
        tokens = add_count(state.tokens, len(rows[0]))
        return _RowSums(tuple(total + more for total, more in totals), tokens)

    def finalize(state: _RowSums) -> Any:
        return result(*state.totals, read_count(state.tokens))

    return Statistic(init=init, update=update, finalize=finalize, reads=reads)


def counter(shape: tuple[int, ...] = ()) -> Counter:
    return Counter(jnp.zeros(shape, jnp.uint32), jnp.zeros(shape, jnp.uint32))


def add_count(total: Counter, more: int | Array) -> Counter:
    """Add up to 2**32 - 1."""
    low = total.low + jnp.asarray(more, jnp.uint32)
    return Counter(low, total.high + (low < total.low).astype(jnp.uint32))


def add_counters(a: Counter, b: Counter) -> Counter:
    low, high = add_count(Counter(a.low, a.high), b.low)
    return Counter(low, high + b.high)


def read_count(total: Counter) -> Array:
    """Give the count as float32: exact below 2**24, and to seven digits beyond."""
    return total.high.astype(jnp.float32) * 2.0**32 + total.low.astype(jnp.float32)


def as_float32(x: Array) -> Array:
    """Widen an activation; a complex one has no order, and no one square to sum."""
    if jnp.iscomplexobj(x):
        raise ArgumentTypeError(
            "where",
            got=f"a site with {x.dtype} activations",
            expected="real activations",
            fix="Leave it out, with `tree.without`.",
        )
    return jnp.asarray(x).astype(jnp.float32)


def products(a: Array, b: Array) -> Array:
    """Compute `aᵀ b` over the rows in float32.

    Products of bfloat16 or float16 entries are exact in float32, so the entries are left as
    they are, which the matrix units are fastest at; wider entries are multiplied at the highest
    precision (TPUs would round float32 to bfloat16 first).
    """
    if a.dtype == b.dtype and a.dtype in (jnp.bfloat16, jnp.float16):
        return jax.lax.dot_general(
            a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
    return jnp.matmul(as_float32(a).T, as_float32(b), precision=jax.lax.Precision.HIGHEST)
