"""The upper Cholesky factor of a damped Hessian's inverse."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Float

from jaxcompress.errors import ArgumentError


class Damped(NamedTuple):
    """The factor of a damped Hessian's inverse, or the identity if that failed.

    With the identity, a second-order method treats every entry alone: GPTQ rounds to nearest.

    Attributes:
        upper: U with `inv(H + diag(added)) = Uᵀ U`, upper triangular, `(n, n)`, float32.
        added: What was added to H's diagonal, `(n,)`, float32; 0 if it failed.
        damping: The fraction of the mean diagonal that was added; 0 if it failed.
        succeeded: Whether the factorization did.
    """

    upper: Array
    added: Array
    damping: Array
    succeeded: Array


def damped_cholesky(
    hessian: Float[ArrayLike, "n n"], *, damping: float = 0.01, limit: float = 10.0
) -> Damped:
    r"""Factor $(H + \lambda \bar h I)^{-1} = U^T U$, with $\bar h$ the mean of H's diagonal.

    Entries $H_{ii} = 0$ ("dead" inputs, whose rows are zero) are set to 1 first. If the
    factorization fails, $\lambda$ is raised tenfold and it is tried again, up to `limit`.

    U comes from one Cholesky factorization: with the order of rows and columns reversed,
    $H = R R^T$ for an upper triangular R, and $U = R^{-1}$. H is never inverted.

    Args:
        hessian: H, symmetric; computed in float32.
        damping: The first $\lambda$, positive.
        limit: The last $\lambda$ to try, at least `damping`.

    Returns:
        The factor, and how it went; see `Damped`. A Hessian with NaN or infinity fails at once.

    Raises:
        ArgumentError: If H is not square, or `damping` and `limit` are not as said.

    Example:
        >>> result = damped_cholesky(jnp.diag(jnp.asarray([3.0, 1.0, 0.0])), damping=0.6)
        >>> result.upper.diagonal().tolist()
        [0.5, 0.7071067690849304, 0.7071067690849304]

    Reference: Frantar et al., "GPTQ" (arXiv:2210.17323), section 3.3, step 3; the authors' code
    for dead inputs.
    """
    h = jnp.asarray(hessian).astype(jnp.float32)
    if h.ndim != 2 or h.shape[0] != h.shape[1]:
        raise ArgumentError(
            "hessian", got=f"shape {h.shape}", expected="a square matrix", fix="Pass XᵀX / tokens."
        )
    if not 0 < damping <= limit:
        raise ArgumentError(
            "damping",
            got=f"{damping} with limit={limit}",
            expected="a positive fraction up to `limit`",
            fix="0.01 is usual.",
        )
    return _factor(h, damping, limit)


@jax.jit
def _factor(h: Array, damping: ArrayLike, limit: ArrayLike) -> Damped:
    n = len(h)
    eye = jnp.eye(n, dtype=h.dtype)
    dead = (h.diagonal() == 0).astype(h.dtype)
    h += eye * dead
    mean = h.diagonal().mean()
    finite = jnp.isfinite(h).all()

    def attempt(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, fraction, _ = state
        fraction *= 10
        reverse = (h + eye * (fraction * mean))[::-1, ::-1]
        lower = lax.linalg.cholesky(reverse, symmetrize_input=False)
        return lower, fraction, jnp.isfinite(lower.diagonal()).all()

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, fraction, succeeded = state
        return finite & ~succeeded & (fraction * 10 <= limit * (1 + 1e-6))

    # Carries are made from h, so that under `shard_map` or `vmap` they vary as it does.
    start = (jnp.zeros_like(h), mean * 0 + jnp.float32(damping) / 10, finite & ~finite)
    lower, fraction, succeeded = lax.while_loop(unfinished, attempt, start)
    factor = jnp.where(succeeded, lower[::-1, ::-1], eye)
    upper = lax.linalg.triangular_solve(factor, eye, left_side=True, lower=False)
    fraction = jnp.where(succeeded, fraction, 0)
    added = jnp.where(succeeded, dead + fraction * mean, 0)
    return Damped(upper, added, fraction, succeeded)
