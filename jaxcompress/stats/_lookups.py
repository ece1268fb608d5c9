"""How often each row of an embedding is looked up."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxcompress.stats._statistic import (
    Counter,
    Statistic,
    add_count,
    add_counters,
    counter,
    read_count,
)


class Lookups(NamedTuple):
    """How often each row was looked up.

    Attributes:
        counts: Per row, `(rows,)`, float32: the diagonal of XᵀX for the one-hot activation that
            a lookup stands for.
        tokens: How many lookups there were, float32.
    """

    counts: Array
    tokens: Array


class _Seen(NamedTuple):
    counts: Counter
    tokens: Counter


def lookups() -> Statistic:
    """Count how often each row of a table is looked up: rare tokens, and dead ones.

    It applies to lookups only, whose activation is an array of indices; there the statistics of
    activations do not apply. Indices out of range count as lookups, but for no row.

    Returns:
        A statistic with result `Lookups`.

    Example:
        >>> import jax.numpy as jnp
        >>> s = lookups()
        >>> s.finalize(s.update(s.init(3), jnp.array([[2], [0], [2]]))).counts
        Array([1., 0., 2.], dtype=float32)
    """

    def init(rows: int) -> _Seen:
        return _Seen(counter((rows,)), counter())

    def update(state: _Seen, indices: Array) -> _Seen:
        rows = state.counts.low.size
        flat = indices.reshape(-1)
        # Negative indices would wrap; what is beyond the end is dropped.
        flat = jnp.where(flat < 0, rows, flat)
        more = jnp.zeros(rows, jnp.uint32).at[flat].add(jnp.uint32(1), mode="drop")
        counts = add_counters(state.counts, Counter(more, jnp.zeros_like(more)))
        return _Seen(counts, add_count(state.tokens, flat.size))

    def finalize(state: _Seen) -> Lookups:
        return Lookups(read_count(state.counts), read_count(state.tokens))

    return Statistic(init=init, update=update, finalize=finalize, reads=("indices",))
