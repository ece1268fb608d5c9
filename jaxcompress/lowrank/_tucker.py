"""Tucker-2: a convolution between fewer channels, with a projection before it and one after."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Float

from jaxcompress.errors import ArgumentError, require_at_least
from jaxcompress.linalg import matmul
from jaxcompress.lowrank._svd import _check_rank


class Tucker(NamedTuple):
    """A kernel as three: `kernel[h, w, i, o] ≈ Σ left[i, a] core[h, w, a, b] right[b, o]`.

    Attributes:
        left: `(in, rank_in)` with orthonormal columns, float32.
        core: `(*window, rank_in, rank_out)`, float32.
        right: `(rank_out, out)` with orthonormal rows, float32.
    """

    left: Array
    core: Array
    right: Array


class ChannelSpectra(NamedTuple):
    """How much of a kernel lies in each direction of its channels, largest first.

    Attributes:
        inputs: `(in,)` squared singular values of the kernel with input channels as its rows.
        outputs: `(out,)`, the same of its output channels.
    """

    inputs: Array
    outputs: Array


def tucker2(
    kernel: Float[ArrayLike, "*window in out"],
    rank_in: int,
    rank_out: int,
    *,
    iterations: int = 10,
) -> Tucker:
    r"""Find a kernel between `rank_in` and `rank_out` channels that stands for a given one.

    $\min \|K - C \times_3 L \times_4 R^T\|_F$ with orthonormal L and R. They start from the
    leading singular vectors of the kernel's unfoldings (HOSVD); each iteration then solves for
    one with the other fixed (HOOI), which never raises the error.

    Args:
        kernel: K, any number of window axes in front; computed in float32.
        rank_in: Input channels to keep, from 1 to all.
        rank_out: Output channels to keep, from 1 to all.
        iterations: Rounds of HOOI; 0 is plain HOSVD.

    Returns:
        The three kernels; $\|K\|^2 - \|C\|^2$ is the squared error.

    Raises:
        ArgumentError: If K has fewer than two axes, a rank is out of range, or `iterations` is
            negative.

    Example:
        >>> kernel = jnp.ones((3, 3, 4, 6))
        >>> parts = tucker2(kernel, 1, 1)
        >>> back = jnp.einsum("ia,hwab,bo->hwio", *parts)
        >>> bool(jnp.allclose(back, kernel, atol=1e-5)), parts.core.shape
        (True, (3, 3, 1, 1))

    Reference: Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low
    Power Mobile Applications" (arXiv:1511.06530), section 3; De Lathauwer et al., On the Best
    Rank-1 and Rank-(R1, R2, ..., RN) Approximation of Higher-Order Tensors, 2000.
    """
    k = jnp.asarray(kernel).astype(jnp.float32)
    if k.ndim < 2:
        raise ArgumentError(
            "kernel",
            got=f"shape {k.shape}",
            expected="a kernel (*window, in, out)",
            fix="Tucker-2 is for convolutions; svd factors matrices.",
        )
    _check_rank("rank_in", rank_in, k.shape[-2])
    _check_rank("rank_out", rank_out, k.shape[-1])
    require_at_least("iterations", iterations, 0, fix="10 is plenty.")
    return _tucker2(k, rank_in, rank_out, iterations)


def spectra(kernel: Float[ArrayLike, "*window in out"]) -> ChannelSpectra:
    """Find the squared singular values of a kernel's unfoldings, by which ranks are chosen.

    What the values beyond the ranks add up to bounds the squared error of `tucker2`.

    Args:
        kernel: Any number of window axes in front; computed in float32.

    Returns:
        Both spectra.

    Example:
        >>> spectra(jnp.ones((1, 1, 2, 3))).inputs.round(4).tolist()
        [6.0, 0.0]
    """
    k = jnp.asarray(kernel).astype(jnp.float32)
    return _spectra(k)


@jax.jit
def _spectra(k: Array) -> ChannelSpectra:
    values = [jnp.linalg.eigvalsh(g)[::-1] for g in (_gram(k, -2), _gram(k, -1))]
    return ChannelSpectra(*(jnp.maximum(v, 0) for v in values))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _tucker2(k: Array, rank_in: int, rank_out: int, iterations: int) -> Tucker:
    exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    left, right = _leading(_gram(k, -2), rank_in), _leading(_gram(k, -1), rank_out)

    def improve(_: Any, factors: tuple[Array, Array]) -> tuple[Array, Array]:
        _, right = factors
        left = _leading(_gram(exact("...io,ob->...ib", k, right), -2), rank_in)
        right = _leading(_gram(exact("...io,ia->...ao", k, left), -1), rank_out)
        return left, right

    left, right = lax.fori_loop(0, iterations, improve, (left, right))
    return Tucker(left, exact("...io,ia,ob->...ab", k, left, right), right.T)


def _gram(k: Array, axis: int) -> Array:
    """Multiply an unfolding, the axis as its rows, with itself."""
    rows = jnp.moveaxis(k, axis, 0).reshape(k.shape[axis], -1)
    return matmul(rows, rows.T)


def _leading(gram: Array, rank: int) -> Array:
    _, vectors = jnp.linalg.eigh(gram)  # ascending
    return vectors[:, ::-1][:, :rank]
