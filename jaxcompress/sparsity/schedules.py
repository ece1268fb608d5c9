"""How sparsity grows over training: plain functions `step -> sparsity`, for use under jit.

`sparsify` calls them with its own step counter, which starts at 0. Any function of that kind
will do; so does an optax schedule.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float

from jaxcompress.errors import ArgumentError

Schedule: TypeAlias = Callable[[ArrayLike], Float[jax.Array, ""]]
"""Maps a step, counted from 0, to the sparsity wanted there, from 0 to 1."""


def constant(sparsity: float) -> Schedule:
    """Keep one sparsity throughout: s(t) = s.

    Args:
        sparsity: Fraction of entries (or units) to prune, from 0 to 1.

    Returns:
        The schedule.

    Example:
        >>> float(constant(0.5)(7))
        0.5
    """
    check_fraction("sparsity", sparsity)
    return lambda step: jnp.full(jnp.shape(step), sparsity, jnp.float32)


def one_shot(sparsity: float, *, step: int) -> Schedule:
    """Stay dense, then prune at once: s(t) = s if t >= step else 0.

    Args:
        sparsity: Fraction to prune from `step` on, from 0 to 1.
        step: The first pruned step.

    Returns:
        The schedule.

    Example:
        >>> schedule = one_shot(0.5, step=10)
        >>> float(schedule(9)), float(schedule(10))
        (0.0, 0.5)
    """
    check_fraction("sparsity", sparsity)
    return lambda t: jnp.where(jnp.asarray(t) >= step, jnp.float32(sparsity), jnp.float32(0))


def linear(sparsity: float, *, end: int, begin: int = 0, initial: float = 0.0) -> Schedule:
    """Grow in proportion to the steps: s(t) = s_i + (s_f - s_i) x, x = (t - begin)/(end - begin).

    x is clipped to [0, 1], as in the other gradual schedules.

    Args:
        sparsity: s_f, the fraction pruned from `end` on, from 0 to 1.
        end: The step at which `sparsity` is reached.
        begin: The step at which growth starts.
        initial: s_i, the fraction pruned up to `begin`.

    Returns:
        The schedule.

    Example:
        >>> float(linear(0.8, end=100)(50))
        0.4000000059604645
    """
    return _gradual(lambda x: x, sparsity, initial, begin, end)


def cubic(sparsity: float, *, end: int, begin: int = 0, initial: float = 0.0) -> Schedule:
    """Grow fast, then ever slower: s(t) = s_f + (s_i - s_f)(1 - x)^3.

    Here x = (t - begin)/(end - begin). "To prune, or not to prune" (Zhu & Gupta,
    arXiv:1710.01878, eq. 1), where the denominator is written n dt; dt is `every` in `sparsify`.

    Args:
        sparsity: s_f, the fraction pruned from `end` on, from 0 to 1.
        end: The step at which `sparsity` is reached.
        begin: The step at which growth starts.
        initial: s_i, the fraction pruned up to `begin`.

    Returns:
        The schedule.

    Example:
        >>> [round(float(cubic(0.8, end=100)(t)), 3) for t in (0, 50, 100)]
        [0.0, 0.7, 0.8]
    """
    return _gradual(lambda x: 1 - (1 - x) ** 3, sparsity, initial, begin, end)


def cosine(sparsity: float, *, end: int, begin: int = 0, initial: float = 0.0) -> Schedule:
    """Grow along half a cosine: s(t) = s_i + (s_f - s_i)(1 - cos(pi x))/2.

    Args:
        sparsity: s_f, the fraction pruned from `end` on, from 0 to 1.
        end: The step at which `sparsity` is reached.
        begin: The step at which growth starts.
        initial: s_i, the fraction pruned up to `begin`.

    Returns:
        The schedule.

    Example:
        >>> [round(float(cosine(0.8, end=100)(t)), 3) for t in (0, 50, 100)]
        [0.0, 0.4, 0.8]
    """
    return _gradual(lambda x: (1 - jnp.cos(jnp.pi * x)) / 2, sparsity, initial, begin, end)


def check_fraction(argument: str, value: float) -> None:
    """Refuse a concrete fraction outside [0, 1].

    Args:
        argument: What to call it in the error.
        value: The fraction.

    Raises:
        ArgumentError: If it lies outside, or is NaN.
    """
    if not 0 <= value <= 1:
        raise ArgumentError(
            argument,
            got=f"{value}",
            expected="a fraction from 0 (dense) to 1 (all pruned)",
            fix="Write 80 % as 0.8.",
        )


def _gradual(
    progress: Callable[[jax.Array], jax.Array],
    sparsity: float,
    initial: float,
    begin: int,
    end: int,
) -> Schedule:
    check_fraction("sparsity", sparsity)
    check_fraction("initial", initial)
    if end <= begin:
        raise ArgumentError(
            "end",
            got=f"{end}, with begin={begin}",
            expected="a step after `begin`",
            fix="Use one_shot to prune at a single step.",
        )

    def schedule(step: ArrayLike) -> jax.Array:
        elapsed = (jnp.asarray(step) - begin).astype(jnp.float32)
        grown = progress(jnp.clip(elapsed / (end - begin), 0, 1))
        return initial * (1 - grown) + sparsity * grown  # exact at both ends

    return schedule
