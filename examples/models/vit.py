"""ViT (Dosovitskiy et al., arXiv:2010.11929) in Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx


class EncoderBlock(nnx.Module):
    """Self-attention and an MLP, each after LayerNorm and added to what came in."""

    def __init__(self, dim: int, heads: int, hidden: int, *, dropout: float, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, dim, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)
        self.up = nnx.Linear(dim, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, dim, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, tokens, dim) to the same shape."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm2(x)))))


class ViT(nnx.Module):
    """Images to logits, read at a class token.

    Args:
        patches: Patches of an image.
        patch: Side of the square patches.
        channels: Channels of an image.
        dim: Width of the residual stream.
        layers: Number of layers.
        heads: Attention heads.
        hidden: Width inside the MLP.
        classes: Number of classes.
        dropout: Fraction dropped while training.
        rngs: Seeds the weights and the dropout.
    """

    def __init__(
        self,
        patches: int = 196,
        *,
        patch: int = 16,
        channels: int = 3,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        classes: int = 1000,
        dropout: float = 0.1,
        rngs: nnx.Rngs,
    ):
        sides = (patch, patch)
        self.stem = nnx.Conv(channels, dim, sides, sides, padding="VALID", rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, dim)))
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, patches + 1, dim)))
        self.blocks = nnx.List(
            [EncoderBlock(dim, heads, hidden, dropout=dropout, rngs=rngs) for _ in range(layers)]
        )
        self.norm = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)
        self.head = nnx.Linear(dim, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, h, w, channels) to logits (batch, classes)."""
        x = self.stem(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # (batch, h, w, c) -> (batch, h * w, c)
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
