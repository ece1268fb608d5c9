r"""One pass over the inputs of a layer, in blocks: the solver of GPTQ and SparseGPT.

Weights are `(in, out)`, so a "column" of the papers is a row here. Both passes below are one
recursion: entry i becomes the rounding of $v_i = b_i - \sum_j A_{ij} e_j$, where the error $e_j$
changes when row j is rounded. Rows look at the errors so far, rather than push theirs on to the
others: one product per block with whole rows of A, one small product per row inside it, and
nothing as large as the weights is written but the result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxcompress.errors import ArgumentError, require_at_least

Round = Callable[[Array, Array, Any], Array]
"""`(index, row (out,), state) -> the numbers that the row becomes`."""

Start = Callable[[Array, Array, Array], Any]
"""`(index of the segment, rows (segment, out), diagonal (segment,)) -> state`."""


def solve_columns(
    w: Float[Array, "n out"],
    upper: Float[Array, "n n"],
    round: Round,
    *,
    start: Start | None = None,
    segment: int | None = None,
    block: int = 128,
) -> tuple[Float[Array, "n out"], Any]:
    r"""Round the rows of w one by one, and change the rows to come to make up for each error.

    Row i becomes $\hat w_i$ = `round(i, w_i, state)`, and then
    $w_k \leftarrow w_k - U_{ik} (w_i - \hat w_i) / U_{ii}$ for $k > i$. Where `round` gives
    numbers of a format this is GPTQ, where it gives zeros for pruned entries SparseGPT, and it may
    do both. Traceable and `vmap`pable; call it under `jit`, since loops around new functions are
    compiled anew.

    Args:
        w: Weights, float32.
        upper: U of `damped_cholesky`.
        round: Called with the index of a row, its current weights `(out,)` and the state of its
            segment. The index may run past the end: rows of padding, whose results are dropped.
        start: Called at the start of each segment with its index, its current weights
            `(segment, out)` and U's diagonal there; returns a pytree of arrays, the state.
        segment: Rows per segment, a divisor of n; with `start` only.
        block: Rows per block, any positive number: a matter of speed alone.

    Returns:
        The new weights, and the states of all segments, stacked along a new first axis
        (`None` without `start`).

    Raises:
        ArgumentError: If `block` is not positive, or `start` and `segment` do not go together.

    Example:
        >>> from jaxcompress.linalg import damped_cholesky
        >>> upper = damped_cholesky(jnp.asarray([[1.0, 0.9], [0.9, 1.0]])).upper
        >>> rows, _ = solve_columns(
        ...     jnp.asarray([[0.4], [0.4]]), upper, lambda index, row, state: jnp.round(row)
        ... )
        >>> rows.tolist()
        [[0.0], [1.0]]

    Reference: Frantar et al., "GPTQ" (arXiv:2210.17323), algorithm 1; Frantar and Alistarh,
    "SparseGPT" (arXiv:2301.00774), algorithm 1.
    """
    n = len(w)
    _check_sizes(n, block, start, segment)
    diagonal = upper.diagonal()
    effect = (upper / diagonal[:, None]).T  # errors still to come are 0

    def visit(index: Array, row: Array, state: Any) -> tuple[Array, Array]:
        value = round(index, row, state)
        return value, row - value

    if start is None:
        sweep = _Sweep(visit=visit, sizes=(block,))
    else:
        assert segment is not None
        begun, size = start, segment

        def begin(index: Array, rows: Array) -> Any:
            return begun(index, rows, lax.dynamic_slice_in_dim(diagonal, index * size, size))

        sizes = (size, block) if size > block else (block - block % size, size)
        sweep = _Sweep(visit=visit, sizes=sizes, segment=size, begin=begin)
    values, states = sweep(w, effect, jnp.zeros_like(w))
    return values, jax.tree.map(lambda state: state[: n // (segment or n)], states)


def descend_columns(
    values: Float[Array, "n out"],
    target: Float[Array, "n out"],
    hessian: Float[Array, "n n"],
    round: Round,
    *,
    block: int = 128,
) -> Float[Array, "n out"]:
    r"""Replace the rows of `values` one by one, each by its best given all the others.

    One pass of cyclic coordinate descent on $\mathrm{tr}(E^T H E)$, $E = W - \hat W$:
    $\hat w_i \leftarrow$ `round` of $\hat w_i + (H E)_i / H_{ii}$. If `round` finds the nearest of
    a set of numbers that holds the present ones, no pass makes the trace larger.

    Args:
        values: $\hat W$, float32: numbers that `round` can give.
        target: W, float32.
        hessian: H, symmetric with a positive diagonal, float32.
        round: As in `solve_columns`; its state is always `None`.
        block: Rows per block, any positive number: a matter of speed alone.

    Returns:
        The new $\hat W$.

    Raises:
        ArgumentError: If `block` is not positive.

    Example:
        >>> descend_columns(
        ...     jnp.asarray([[0.0], [0.0]]),
        ...     jnp.asarray([[0.5], [0.6]]),
        ...     jnp.asarray([[1.0, 0.9], [0.9, 1.0]]),
        ...     lambda index, row, state: jnp.round(row),
        ... ).tolist()
        [[1.0], [0.0]]

    Reference: Behdin et al., "QuantEase" (arXiv:2309.01885), algorithm 1.
    """
    _check_sizes(len(values), block, None, None)
    diagonal = hessian.diagonal()[:, None]

    def visit(index: Array, row: Array, state: Any) -> tuple[Array, Array]:
        value = round(index, row, state)
        return value, lax.dynamic_index_in_dim(values, index, keepdims=False) - value

    sweep = _Sweep(visit=visit, sizes=(block,))
    new, _ = sweep(values, hessian / -diagonal, target - values)
    return new


def _check_sizes(n: int, block: int, start: Start | None, segment: int | None) -> None:
    require_at_least("block", block, 1, fix="128 is usual.")
    if (start is None) != (segment is None) or (
        segment is not None and (segment < 1 or n % segment)
    ):
        raise ArgumentError(
            "segment",
            got=f"{segment} for {n} rows, {'without' if start is None else 'with'} `start`",
            expected="a divisor of the number of rows with `start`, and `None` without",
            fix="Give both or neither.",
        )


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """The recursion of this module, over blocks of blocks of rows.

    Attributes:
        visit: `(index, row, state) -> (value, change of the row's error)`.
        sizes: Rows per block at each level, falling.
        segment: The size at which `begin(index, rows) -> state` is called.
    """

    visit: Callable[[Array, Array, Any], tuple[Array, Array]]
    sizes: tuple[int, ...]
    segment: int | None = None
    begin: Callable[[Array, Array], Any] = lambda index, rows: None

    def __call__(self, base: Array, effect: Array, errors: Array) -> tuple[Array, Any]:
        """Run over all rows, with A = `effect`; the states are stacked, padding's at the end."""
        states = None
        if self.segment is not None:
            count = -(-len(base) // self.sizes[0]) * self.sizes[0] // self.segment
            rows = jax.ShapeDtypeStruct((self.segment, *base.shape[1:]), base.dtype)
            one = jax.eval_shape(self.begin, jax.ShapeDtypeStruct((), jnp.int32), rows)
            states = jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), one)
        values, _, states = self._blocks(base, effect, errors, 0, jnp.int32(0), None, states)
        return values, states

    def _blocks(
        self,
        base: Array,
        effect: Array,
        errors: Array,
        level: int,
        first: Array,
        state: Any,
        states: Any,
    ) -> tuple[Array, Array, Any]:
        """Run over rows `first`, `first + 1`, ..., whose parts of base and effect are given."""
        if level == len(self.sizes):
            return *self._rows(base, effect, first, state), states
        n, size = len(base), self.sizes[level]
        padding = -n % size
        if padding:
            base, errors = (jnp.pad(x, ((0, padding), (0, 0))) for x in (base, errors))
            effect = jnp.pad(effect, ((0, padding), (0, padding)))

        def run(i: Array, carry: Any) -> Any:
            values, errors, states = carry
            at = i * size
            across = lax.dynamic_slice_in_dim(effect, at, size)  # (size, n)
            rows = lax.dynamic_slice_in_dim(base, at, size) - matmul(across, errors)
            inner = state
            if size == self.segment:
                segment = (first + at) // size
                inner = self.begin(segment, rows)
                states = jax.tree.map(
                    lambda all, one: lax.dynamic_update_index_in_dim(all, one, segment, 0),
                    states,
                    inner,
                )
            within = lax.dynamic_slice_in_dim(across, at, size, 1)
            value, change, states = self._blocks(
                rows, within, jnp.zeros_like(rows), level + 1, first + at, inner, states
            )
            error = lax.dynamic_slice_in_dim(errors, at, size) + change
            values = lax.dynamic_update_slice_in_dim(values, value, at, 0)
            return values, lax.dynamic_update_slice_in_dim(errors, error, at, 0), states

        start = (jnp.zeros_like(base), errors, states)
        values, errors, states = lax.fori_loop(0, len(base) // size, run, start)
        return values[:n], errors[:n], states

    def _rows(self, base: Array, effect: Array, first: Array, state: Any) -> tuple[Array, Array]:
        def run(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            values, changes = carry
            across = lax.dynamic_index_in_dim(effect, i)  # (1, n)
            row = lax.dynamic_index_in_dim(base, i) - matmul(across, changes)
            value, change = self.visit(first + i, row[0], state)
            values = lax.dynamic_update_index_in_dim(values, value, i, 0)
            return values, lax.dynamic_update_index_in_dim(changes, change, i, 0)

        return lax.fori_loop(0, len(base), run, (jnp.zeros_like(base), jnp.zeros_like(base)))


def vmap_leading(f: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Map a function of matrices over leading axes.

    Args:
        f: Takes and returns pytrees of arrays.
        count: How many leading axes all its arguments have beyond what it takes.

    Returns:
        The function of arrays with these axes.
    """
    for _ in range(count):
        f = jax.vmap(f)
    return f


def matmul(a: Array, b: Array) -> Array:
    """Multiply matrices at the full precision of their dtype, on every backend.

    Args:
        a: The first matrix.
        b: The second.

    Returns:
        The product.
    """
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
