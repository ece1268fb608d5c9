"""Norms, second moments and covariances.

Sums are kept rather than running means: both round each step to 2**-24 of the accumulated
value, so that after T batches the relative error is of the order of sqrt(T) 2**-24 (2e-5 after
100,000) for either, and a sum costs one pass less over the matrix. Numbers of tokens are counted
exactly. Squares of entries up to 1e14 sum over 1e9 tokens before float32 overflows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.errors import ArgumentError
from jaxcompress.stats._statistic import (
    Counter,
    Statistic,
    add_count,
    as_float32,
    counter,
    products,
    read_count,
    sum_rows,
)


class ChannelNorm(NamedTuple):
    """Norms of features over all tokens.

    Attributes:
        l1: `Σ|x|` per feature, `(features,)`, float32.
        l2: `sqrt(Σx²)` per feature: the norm in Wanda's score.
        tokens: How many rows were seen, float32.
    """

    l1: Array
    l2: Array
    tokens: Array


class SecondMoment(NamedTuple):
    """The Gram matrix of the rows seen.

    Attributes:
        total: XᵀX, `(features, features)`, or `(blocks, block, block)`, float32.
        tokens: How many rows were seen, float32.
    """

    total: Array
    tokens: Array

    @property
    def mean(self) -> Array:
        """XᵀX / tokens, of the shape of `total`: GPTQ's Hessian is twice this."""
        inner = (None,) * (self.total.ndim - self.tokens.ndim)
        return self.total / jnp.maximum(self.tokens, 1)[..., *inner]


class MeanCovariance(NamedTuple):
    """Mean and spread of the rows seen.

    Attributes:
        mean: `(features,)`, float32.
        covariance: `Σ(x-mean)(x-mean)ᵀ / tokens`, `(features, features)`, float32; its diagonal
            alone, `(features,)`, where that was asked for. Divided by the number of tokens, as
            BatchNorm does, not by one less.
        tokens: How many rows were seen, float32.
    """

    mean: Array
    covariance: Array
    tokens: Array


def channel_norm(*, reads: str = "input") -> Statistic:
    """Accumulate the L1 and L2 norm of each feature over all tokens.

    Args:
        reads: Which array of the site (see `Statistic`): "input" for Wanda's score, whose
            columns are the weight's contracted entries; "channels" or "output" for whole
            channels of convolutions.

    Returns:
        A statistic with result `ChannelNorm`.

    Example:
        >>> import jax.numpy as jnp
        >>> s = channel_norm()
        >>> s.finalize(s.update(s.init(2), jnp.array([[3.0, 0.0], [-4.0, 1.0]]))).l2
        Array([5., 1.], dtype=float32)

    Reference:
        Sun et al., A Simple and Effective Pruning Approach for LLMs, arXiv:2306.11695, eq. 1.
    """

    def terms(x: Array) -> tuple[Array, Array]:
        x = as_float32(x)
        return jnp.abs(x).sum(0), jnp.square(x).sum(0)

    result = lambda l1, squares, tokens: ChannelNorm(l1, jnp.sqrt(squares), tokens)
    return sum_rows(lambda features: [(features,)] * 2, terms, result, (reads,))


def second_moment(*, block: int | None = None, reads: str = "input") -> Statistic:
    """Accumulate XᵀX over all tokens: the layer-wise Hessian of GPTQ and SparseGPT, up to 2.

    Args:
        block: Keep only diagonal blocks of so many features, which must divide their number:
            `features * block` floats instead of `features²`. `None` keeps everything.
        reads: Which array of the site (see `Statistic`).

    Returns:
        A statistic with result `SecondMoment`. bfloat16 and float16 entries are multiplied as
        they are and accumulated in float32, wider ones multiplied at the highest precision.

    Raises:
        ArgumentError: If `block` is not positive; from `init`, if it does not divide the number
            of features.

    Example:
        >>> import jax.numpy as jnp
        >>> s = second_moment()
        >>> s.finalize(s.update(s.init(2), jnp.array([[1.0, 2.0], [0.0, 1.0]]))).total
        Array([[1., 2.],
               [2., 5.]], dtype=float32)

    Reference:
        Frantar et al., GPTQ, arXiv:2210.17323, section 3.
    """
    if block is not None and block < 1:
        raise ArgumentError("block", got=block, expected="1 or more, or None", fix="Try 128.")

    def shapes(features: int) -> list[tuple[int, ...]]:
        if block is None:
            return [(features, features)]
        if features % block:
            raise ArgumentError(
                "block",
                got=f"blocks of {block} for {features} features",
                expected="a divisor of the number of features",
                fix="Choose another block, or select sites that it divides by `where`.",
            )
        return [(features // block, block, block)]

    def terms(x: Array) -> list[Array]:
        if block is None:
            return [products(x, x)]
        blocks = x.reshape(len(x), -1, block)  # (tokens, blocks, block)
        return [jax.vmap(products, in_axes=1)(blocks, blocks)]

    return sum_rows(shapes, terms, SecondMoment, (reads,))


class _Spread(NamedTuple):
    origin: Array  # the mean of the first batch: all else is relative to it
    mean: Array
    spread: Array  # Σ(x-mean)(x-mean)ᵀ, or its diagonal
    tokens: Counter


def mean_covariance(*, diagonal: bool = False, reads: str = "input") -> Statistic:
    r"""Accumulate mean and covariance, stably: features far from zero lose no digits.

    With $n_a$ tokens so far, $n_b$ in the batch, $n = n_a + n_b$ and $\delta = m_b - m_a$:
    $m = m_a + \delta n_b / n$ and $M = M_a + M_b + \delta\delta^T n_a n_b / n$, where M are the
    centred second moments. Everything is relative to the first batch's mean, so that a float32
    mean far from zero does not round what it is compared with.

    Args:
        diagonal: Keep variances only.
        reads: Which array of the site (see `Statistic`).

    Returns:
        A statistic with result `MeanCovariance`.

    Example:
        >>> import jax.numpy as jnp
        >>> s = mean_covariance(diagonal=True)
        >>> result = s.finalize(s.update(s.init(1), jnp.array([[1e6 - 1], [1e6 + 1]])))
        >>> result.mean.tolist(), result.covariance.tolist()
        ([1000000.0], [1.0])

    Reference:
        Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances, 1979.
    """

    def init(features: int) -> _Spread:
        shape = (features,) if diagonal else (features, features)
        zeros = jnp.zeros(features, jnp.float32)
        return _Spread(zeros, zeros, jnp.zeros(shape, jnp.float32), counter())

    def update(state: _Spread, x: Array) -> _Spread:
        before, tokens = read_count(state.tokens), add_count(state.tokens, len(x))
        origin = jnp.where(before == 0, as_float32(x).mean(0), state.origin)
        x = as_float32(x) - origin
        mean = x.mean(0)
        centred, delta = x - mean, mean - state.mean
        share = len(x) / read_count(tokens)
        if diagonal:
            spread, shift = jnp.square(centred).sum(0), jnp.square(delta)
        else:
            spread, shift = products(centred, centred), jnp.outer(delta, delta)
        spread += state.spread + shift * (before * share)
        return _Spread(origin, state.mean + delta * share, spread, tokens)

    def finalize(state: _Spread) -> MeanCovariance:
        tokens = read_count(state.tokens)
        covariance = state.spread / jnp.maximum(tokens, 1)
        return MeanCovariance(state.origin + state.mean, covariance, tokens)

    return Statistic(init=init, update=update, finalize=finalize, reads=(reads,))
