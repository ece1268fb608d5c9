"""Ranges of activations: extremes, and their moving averages."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxcompress.errors import ArgumentError
from jaxcompress.stats._statistic import Statistic, as_float32


class MinMax(NamedTuple):
    """The smallest and largest entries.

    Attributes:
        low: Smallest entry, per feature or scalar, float32.
        high: Largest entry, likewise.
    """

    low: Array
    high: Array


class MovingAverage(NamedTuple):
    """Moving averages of the extremes of batches.

    Attributes:
        low: Average of the batches' smallest entries, per feature or scalar, float32.
        high: Average of their largest.
        absmax: Average of their largest magnitudes; at least `max(-low, high)`.
    """

    low: Array
    high: Array
    absmax: Array


def absmax(*, per_tensor: bool = False, reads: str = "input") -> Statistic:
    """Track the largest magnitude, `max |x|`: what symmetric quantizers scale by.

    Args:
        per_tensor: One number for the whole array rather than one per feature.
        reads: Which array of the site: "input", "channels" or "output" (see `Statistic`).

    Returns:
        A statistic with result `(features,)` or a scalar, float32; NaN where NaN was seen, 0
        before the first batch.

    Example:
        >>> import jax.numpy as jnp
        >>> s = absmax()
        >>> s.finalize(s.update(s.init(2), jnp.array([[1.0, 2.0], [-3.0, 0.0]])))
        Array([3., 2.], dtype=float32)
    """
    axes = _choose_axes(per_tensor)
    return Statistic(
        init=lambda features: jnp.zeros(_choose_shape(features, per_tensor), jnp.float32),
        update=lambda state, x: jnp.maximum(state, jnp.abs(as_float32(x)).max(axes)),
        finalize=lambda state: state,
        reads=(reads,),
    )


def min_max(*, per_tensor: bool = False, reads: str = "input") -> Statistic:
    """Track the smallest and largest entries: what asymmetric quantizers need.

    Args:
        per_tensor: One pair for the whole array rather than one per feature.
        reads: Which array of the site (see `Statistic`).

    Returns:
        A statistic with result `MinMax`; NaN where NaN was seen, `(inf, -inf)` before the first
        batch.

    Example:
        >>> import jax.numpy as jnp
        >>> s = min_max(per_tensor=True)
        >>> s.finalize(s.update(s.init(2), jnp.array([[1.0, 2.0], [-3.0, 0.0]])))
        MinMax(low=Array(-3., dtype=float32), high=Array(2., dtype=float32))
    """
    axes = _choose_axes(per_tensor)

    def init(features: int) -> MinMax:
        shape = _choose_shape(features, per_tensor)
        return MinMax(jnp.full(shape, jnp.inf), jnp.full(shape, -jnp.inf))

    def update(state: MinMax, x: Array) -> MinMax:
        return MinMax(
            jnp.minimum(state.low, as_float32(x.min(axes))),
            jnp.maximum(state.high, as_float32(x.max(axes))),
        )

    return Statistic(init=init, update=update, finalize=lambda state: state, reads=(reads,))


class _Averages(NamedTuple):
    low: Array
    high: Array
    absmax: Array
    weight: Array  # what the averages' weights add up to: 1 - decay**batches


def moving_average(
    *, decay: float = 0.99, per_tensor: bool = False, reads: str = "input"
) -> Statistic:
    r"""Average the extremes of batches, recent ones weighing most: one outlier does not decide.

    $m_t = d\,m_{t-1} + (1-d)\,v_t$ with v the batch's minimum, maximum or largest magnitude, and
    the result $m_t / (1-d^t)$, which is unbiased from the first batch on. PyTorch's
    `MovingAverageMinMaxObserver(averaging_constant=1-d)` starts from the first batch's extremes
    instead of correcting, so there the first batch weighs $1/(1-d)$ times as much.

    Args:
        decay: d, in [0, 1).
        per_tensor: Average the extremes of whole arrays rather than of each feature. (The
            largest of the features' averages would be smaller.)
        reads: Which array of the site (see `Statistic`).

    Returns:
        A statistic with result `MovingAverage`; NaN before the first batch.

    Raises:
        ArgumentError: If `decay` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> s = moving_average(decay=0.5, per_tensor=True)
        >>> state = s.update(s.init(1), jnp.array([[1.0], [-1.0]]))
        >>> float(s.finalize(s.update(state, jnp.array([[4.0], [0.0]]))).high)
        3.0

    Reference:
        The correction is that of Kingma and Ba, Adam, arXiv:1412.6980, section 3.
    """
    if not 0 <= decay < 1:
        raise ArgumentError("decay", got=decay, expected="a number in [0, 1)", fix="Try 0.99.")
    axes = _choose_axes(per_tensor)

    def init(features: int) -> _Averages:
        zeros = jnp.zeros(_choose_shape(features, per_tensor), jnp.float32)
        return _Averages(zeros, zeros, zeros, jnp.zeros((), jnp.float32))

    def update(state: _Averages, x: Array) -> _Averages:
        x = as_float32(x)
        new = (x.min(axes), x.max(axes), jnp.abs(x).max(axes), jnp.float32(1))
        return _Averages(*(decay * m + (1 - decay) * v for m, v in zip(state, new, strict=True)))

    def finalize(state: _Averages) -> MovingAverage:
        return MovingAverage(*(m / state.weight for m in state[:3]))

    return Statistic(init=init, update=update, finalize=finalize, reads=(reads,))


def _choose_axes(per_tensor: bool) -> tuple[int, ...]:
    return (0, 1) if per_tensor else (0,)


def _choose_shape(features: int, per_tensor: bool) -> tuple[int, ...]:
    return () if per_tensor else (features,)
