"""How long one call takes."""

import timeit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxcompress.errors import require_at_least


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Wall-clock seconds per call.

    Attributes:
        median: Median over the repeats.
        low: First quartile.
        high: Third quartile.
        repeats: How many calls were timed.
    """

    median: float
    low: float
    high: float
    repeats: int

    @property
    def spread(self) -> float:
        """The interquartile range in seconds: half of all calls lie within it."""
        return self.high - self.low

    def __str__(self) -> str:
        return f"{1e3 * self.median:.3g} ms (spread {1e3 * self.spread:.2g} ms)"


def latency(fn: Callable[..., Any], *args: Any, repeats: int = 30, warmup: int = 3) -> Latency:
    """Time `fn(*args)`: warm, blocked until the result is there, median over repeats.

    The function is called as it is: `jax.jit` it first to time compiled code. It must not donate
    its arguments, which are used again. The garbage collector is paused meanwhile.

    Args:
        fn: What to time.
        *args: Its arguments, already on the device they shall be timed on.
        repeats: Timed calls, at least 1.
        warmup: Calls before that, at least 1: the first one compiles.

    Returns:
        The median and the quartiles, in seconds.

    Raises:
        ArgumentError: If `repeats` or `warmup` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> taken = latency(jax.jit(jnp.sin), jnp.ones(8), repeats=5)
        >>> taken.low <= taken.median <= taken.high
        True
    """
    require_at_least("repeats", repeats, 1, fix="Use 1 or more.")
    require_at_least("warmup", warmup, 1, fix="Use 1 or more.")
    jax.block_until_ready(args)
    call = lambda: jax.block_until_ready(fn(*args))
    for _ in range(warmup):
        call()
    seconds = timeit.repeat(call, number=1, repeat=repeats)  # pauses the collector
    low, median, high = np.percentile(seconds, [25, 50, 75]).tolist()
    return Latency(median=median, low=low, high=high, repeats=repeats)
