"""Mixture-of-experts layers: batched expert matmuls in Linen and NNX, ragged ones in NNX.

Each token goes to its best expert (Switch Transformer, arXiv:2101.03961). The batched form gives
every expert a fixed number of places and drops the tokens that find none; the ragged one sorts
tokens by expert and drops nothing.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


def places(probabilities: jax.Array, *, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Send every token to its best expert, first come first served.

    Args:
        probabilities: Router's choice, (tokens, experts).
        capacity: Places of an expert.

    Returns:
        `(dispatch, combine)`, both (tokens, experts, capacity): one where a token sits, and the
        expert's probability there.
    """
    experts = probabilities.shape[-1]
    chosen = jax.nn.one_hot(jnp.argmax(probabilities, axis=-1), experts)  # (t, e)
    place = (jnp.cumsum(chosen, axis=0) - 1) * chosen
    # A place beyond the capacity gives a row of zeros.
    dispatch = chosen[..., None] * jax.nn.one_hot(place.astype(jnp.int32), capacity)  # (t, e, c)
    return dispatch, dispatch * probabilities[..., None]


def run_experts(
    x: jax.Array, probabilities: jax.Array, up: jax.Array, down: jax.Array, *, capacity: int
) -> jax.Array:
    """Gather tokens (tokens, dim) by expert, run all experts at once, and put them back."""
    dispatch, combine = places(probabilities, capacity=capacity)
    y = jnp.einsum("td,tec->ecd", x, dispatch)
    y = jax.nn.relu(jnp.einsum("ecd,edf->ecf", y, up))
    y = jnp.einsum("ecf,efd->ecd", y, down)
    return jnp.einsum("ecd,tec->td", y, combine)


class MoE(nn.Module):
    """Experts with a fixed capacity, in Linen.

    Attributes:
        experts: Number of experts.
        hidden: Width inside an expert.
        capacity: Places of an expert.
    """

    experts: int
    hidden: int
    capacity: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, time, dim) to the same shape."""
        dim = x.shape[-1]
        init = nn.initializers.lecun_normal(batch_axis=0)
        up = self.param("up", init, (self.experts, dim, self.hidden))
        down = self.param("down", init, (self.experts, self.hidden, dim))
        tokens = x.reshape(-1, dim)  # (b, t, d) -> (b * t, d)
        chosen = nn.softmax(nn.Dense(self.experts, use_bias=False, name="router")(tokens))
        return x + run_experts(tokens, chosen, up, down, capacity=self.capacity).reshape(x.shape)


class NnxMoE(nnx.Module):
    """`MoE` in NNX: the same function of leaves with the same names."""

    def __init__(self, dim: int, experts: int, hidden: int, *, capacity: int, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.capacity = capacity
        self.router = nnx.Linear(dim, experts, use_bias=False, rngs=rngs)
        self.up = nnx.Param(init(rngs.params(), (experts, dim, hidden)))
        self.down = nnx.Param(init(rngs.params(), (experts, hidden, dim)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, time, dim) to the same shape."""
        tokens = x.reshape(-1, x.shape[-1])  # (b, t, d) -> (b * t, d)
        chosen = nnx.softmax(self.router(tokens))
        y = run_experts(tokens, chosen, self.up[...], self.down[...], capacity=self.capacity)
        return x + y.reshape(x.shape)


class RaggedMoE(nnx.Module):
    """Experts without a capacity: tokens sorted by expert, multiplied by `jax.lax.ragged_dot`."""

    def __init__(self, dim: int, experts: int, hidden: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.router = nnx.Linear(dim, experts, use_bias=False, rngs=rngs)
        self.up = nnx.Param(init(rngs.params(), (experts, dim, hidden)))
        self.down = nnx.Param(init(rngs.params(), (experts, hidden, dim)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, time, dim) to the same shape."""
        tokens = x.reshape(-1, x.shape[-1])  # (b, t, d) -> (b * t, d)
        probabilities = nnx.softmax(self.router(tokens))
        expert = jnp.argmax(probabilities, axis=-1)
        order = jnp.argsort(expert, stable=True)
        sizes = jnp.bincount(expert, length=probabilities.shape[-1]).astype(jnp.int32)
        y = nnx.relu(jax.lax.ragged_dot(tokens[order], self.up[...], sizes))
        y = jax.lax.ragged_dot(y, self.down[...], sizes)[jnp.argsort(order)]
        return x + (y * jnp.max(probabilities, axis=-1, keepdims=True)).reshape(x.shape)
