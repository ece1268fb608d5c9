"""The nearest matrix of low rank: to the weights (SVD), or to what they do to their inputs."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Float

from jaxcompress.errors import ArgumentError
from jaxcompress.linalg import damped_cholesky, matmul


class Pair(NamedTuple):
    """Two thin matrices whose product stands for one.

    The columns of `left` and the rows of `right` come in order of weight, so that the first k of
    them are the pair of rank k; each column is as long as its row.

    Attributes:
        left: `(in, rank)`, float32.
        right: `(rank, out)`, float32.
        values: All singular values, largest first: the squares of those from `rank` on add up to
            the squared error.
    """

    left: Array
    right: Array
    values: Array


def svd(w: Float[ArrayLike, "in out"], rank: int) -> Pair:
    r"""Find the matrix of rank `rank` that is nearest to W.

    $\min \|W - LR\|_F$, by the singular value decomposition $W = U \Sigma V^T$:
    $L = U_r \Sigma_r^{1/2}$, $R = \Sigma_r^{1/2} V_r^T$.

    Args:
        w: W; computed in float32.
        rank: r, from 1 to the smaller of W's sides.

    Returns:
        The pair, and W's singular values.

    Raises:
        ArgumentError: If W is no matrix, or the rank is out of range.

    Example:
        >>> w = jnp.array([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> pair = svd(w, 1)
        >>> (pair.left @ pair.right).round(6).tolist(), pair.values.tolist()
        ([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [3.0, 1.0])

    Reference: Eckart and Young, The Approximation of One Matrix by Another of Lower Rank, 1936.
    """
    w = _matrix(w)
    _check_rank("rank", rank, min(w.shape))
    return _svd(w, rank)


def activation_svd(
    w: Float[ArrayLike, "in out"],
    gram: Float[ArrayLike, "in in"],
    rank: int,
    *,
    damping: float = 1e-4,
) -> Pair:
    r"""Find the matrix of rank `rank` that does most nearly to inputs X what W does.

    $\min \|X(W - LR)\|_F^2 + \lambda \|W - LR\|_F^2$, with $\lambda$ a small part of the mean
    diagonal of $X^T X$. With the Cholesky factor $X^T X + \lambda I = S S^T$ it is the nearest
    matrix to $S^T W = U \Sigma V^T$, taken back by $S^{-T}$. As
    $S^{-T} U_r \Sigma_r V_r^T = W V_r V_r^T$, nothing is inverted here. Since plain SVD has the
    least second term, the first is never more than it is there, whatever the damping; inputs
    that were always zero follow plain SVD.

    Args:
        w: W; computed in float32.
        gram: $X^T X$ over all inputs seen, or its mean (`stats.second_moment`).
        rank: r, from 1 to the smaller of W's sides.
        damping: $\lambda$ as a fraction of the mean diagonal, positive. It is raised tenfold
            where the factorization fails.

    Returns:
        The pair, and the singular values of $S^T W$.

    Raises:
        ArgumentError: If W is no matrix, `gram` does not fit it, the rank is out of range, or
            `damping` is not positive.

    Example:
        >>> w = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> pair = activation_svd(w, jnp.diag(jnp.array([1.0, 100.0])), 1)
        >>> (pair.left @ pair.right).round(4).tolist()
        [[0.0, 0.0], [0.0, 1.0]]

    Reference: Wang et al., "SVD-LLM" (arXiv:2403.07378), section 3.1; Yuan et al., "ASVD"
    (arXiv:2312.05821) scales rows by their inputs' magnitudes instead, the diagonal of S.
    """
    w, gram = _matrix(w), jnp.asarray(gram).astype(jnp.float32)
    _check_rank("rank", rank, min(w.shape))
    if gram.shape != (len(w), len(w)):
        raise ArgumentError(
            "gram",
            got=f"shape {gram.shape} for weights of shape {w.shape}",
            expected=f"XᵀX of the {len(w)} inputs",
            fix="W is (in, out): transpose it if it is the other way round.",
        )
    if not damping > 0:
        raise ArgumentError("damping", got=damping, expected="a positive number", fix="Try 1e-4.")
    return _activation_svd(w, gram, rank, damping)


@functools.partial(jax.jit, static_argnums=1)
def _svd(w: Array, rank: int) -> Pair:
    u, values, vt = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(values[:rank])
    return Pair(u[:, :rank] * root, root[:, None] * vt[:rank], values)


@functools.partial(jax.jit, static_argnums=2)
def _activation_svd(w: Array, gram: Array, rank: int, damping: ArrayLike) -> Pair:
    # λ goes on every entry first: entries of 0 would be set to 1, which is no part of the mean.
    added = damping * gram.diagonal().mean() * jnp.eye(len(gram), dtype=gram.dtype)
    # (XᵀX + λI)⁻¹ = UᵀU, so that S = U⁻¹ and SᵀW solves Uᵀ Y = W.
    upper = damped_cholesky(gram + added, damping=1e-7).upper
    whitened = lax.linalg.triangular_solve(upper, w, left_side=True, transpose_a=True)
    _, values, vt = jnp.linalg.svd(whitened, full_matrices=False)
    right = vt[:rank]
    left = matmul(w, right.T)
    # Rows of `right` have length 1: share the lengths of the columns.
    length = jnp.linalg.norm(left, axis=0)
    root = jnp.sqrt(length)
    return Pair(left / jnp.where(root > 0, root, 1), root[:, None] * right, values)


def _matrix(w: ArrayLike) -> Array:
    w = jnp.asarray(w).astype(jnp.float32)
    if w.ndim != 2:
        raise ArgumentError(
            "w", got=f"shape {w.shape}", expected="a matrix (in, out)", fix="Merge its axes."
        )
    return w


def _check_rank(name: str, rank: int, most: int) -> None:
    if not 1 <= rank <= most:
        raise ArgumentError(
            name, got=rank, expected=f"a rank from 1 to {most}", fix="The full rank loses nothing."
        )
