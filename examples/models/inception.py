"""The Inception block (Szegedy et al., arXiv:1409.4842, figure 2b) in Flax Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Inception(nn.Module):
    """Four branches over the same input, concatenated along channels.

    Attributes:
        narrow: Channels of the 1x1 branch.
        middle: Channels of the 3x3 branch, before and after its wide convolution.
        wide: Channels of the 5x5 branch, likewise.
        pooled: Channels of the branch that pools first.
    """

    narrow: int
    middle: tuple[int, int]
    wide: tuple[int, int]
    pooled: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, h, w, c) to (batch, h, w, narrow + middle[1] + wide[1] + pooled)."""

        def conv(x: jax.Array, width: int, size: int, name: str) -> jax.Array:
            return nn.relu(nn.Conv(width, (size, size), name=name)(x))

        branches = [
            conv(x, self.narrow, 1, "narrow"),
            conv(conv(x, self.middle[0], 1, "middle_in"), self.middle[1], 3, "middle_out"),
            conv(conv(x, self.wide[0], 1, "wide_in"), self.wide[1], 5, "wide_out"),
            conv(nn.max_pool(x, (3, 3), padding="SAME"), self.pooled, 1, "pooled"),
        ]
        return jnp.concatenate(branches, axis=-1)
