"""Values that are not differentiated: the straight-through rule."""

import jax
from jax import Array


@jax.custom_jvp
def pass_through(x: Array, rounded: Array) -> Array:
    """Give `rounded`, with the gradient of x (x + stop_gradient(rounded - x) is off by an ulp).

    Args:
        x: What gradients pass to.
        rounded: The value, of x's shape and dtype.

    Returns:
        `rounded`.

    Example:
        >>> import jax.numpy as jnp
        >>> jax.value_and_grad(lambda x: pass_through(2 * x, jnp.round(x)))(jnp.float32(1.3))
        (Array(1., dtype=float32), Array(2., dtype=float32))
    """
    return rounded


@pass_through.defjvp
def _pass_through_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return pass_through(*primals), tangents[0]  # so that it passes in further derivatives, too
