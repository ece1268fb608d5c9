"""Bias correction: take the mean of the error that rounded weights cause out of the outputs."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Float

from jaxcompress.errors import ArgumentError
from jaxcompress.linalg import matmul


def bias_shift(
    w: Float[ArrayLike, "in out"],
    w_hat: Float[ArrayLike, "in out"],
    mean: Float[ArrayLike, " in"],
) -> Float[Array, " out"]:
    r"""Compute how far rounded weights shift the mean of the outputs.

    $\mathrm{E}[x \hat W] - \mathrm{E}[x W] = \mathrm{E}[x] (\hat W - W)$: subtract it
    from the bias.

    Args:
        w: Weights, contracted over the first axis; computed in float32.
        w_hat: What they were rounded to.
        mean: The mean of each input.

    Returns:
        The shift of each output, float32.

    Raises:
        ArgumentError: If the shapes do not go together.

    Example:
        >>> w = jnp.asarray([[0.4], [1.0]])
        >>> bias_shift(w, jnp.round(w), jnp.asarray([2.0, 5.0]))
        Array([-0.8], dtype=float32)

    Reference: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction" (arXiv:1906.04721), section 4.2, equation 17; Finkelstein et al., "Fighting
    Quantization Bias With Bias" (arXiv:1906.03193).
    """
    w, w_hat, mean = (jnp.asarray(x).astype(jnp.float32) for x in (w, w_hat, mean))
    if w.shape != w_hat.shape or mean.shape != w.shape[:1]:
        raise ArgumentError(
            "w, w_hat, mean",
            got=f"shapes {w.shape}, {w_hat.shape} and {mean.shape}",
            expected="(in, out), (in, out) and (in,)",
            fix="Dequantize the weights, and give them as a matrix.",
        )
    return matmul(mean, w_hat - w)
