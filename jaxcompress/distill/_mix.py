"""Distillation beside the task's own loss."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxcompress.distill._softmax import loss_dtype, read_scalar
from jaxcompress.errors import ArgumentError


def mix(
    task_loss: Float[ArrayLike, "*batch"],
    distill_loss: Float[ArrayLike, "*batch"],
    *,
    weight: ArrayLike,
) -> Float[Array, "*batch"]:
    """Mix a task loss with a distillation loss, `(1 - w) task + w distill`.

    Args:
        task_loss: One value per example, or their mean.
        distill_loss: The same of a distillation loss, of the same shape.
        weight: w in [0, 1]: 0 is the task alone, 1 the teacher alone. May be traced, for a weight
            that follows a schedule.

    Returns:
        The mixture, of the losses' shape, in float32 (or float64).

    Raises:
        ArgumentError: If the shapes differ (they are never broadcast: `(n,)` with `(n, 1)` would
            pair every example with every other), or a concrete weight is outside [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> print(mix(jnp.array([1.0, 2.0]), jnp.array([3.0, 0.0]), weight=0.5))
        [2. 1.]

    Reference:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, arXiv:1503.02531,
        section 2: "a weighted average of two different objective functions".
    """
    task_loss, distill_loss = jnp.asarray(task_loss), jnp.asarray(distill_loss)
    if task_loss.shape != distill_loss.shape:
        raise ArgumentError(
            "distill_loss",
            got=f"{list(distill_loss.shape)} beside a task loss of {list(task_loss.shape)}",
            expected="losses of one shape",
            fix="Reduce both in the same way before mixing them.",
        )
    dtype = loss_dtype(task_loss, distill_loss)
    w = read_scalar(
        weight, dtype, name="weight", valid=lambda w: 0 <= w <= 1, expected="a scalar in [0, 1]"
    )
    return (1 - w) * task_loss.astype(dtype) + w * distill_loss.astype(dtype)
