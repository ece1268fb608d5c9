"""An encoder-decoder (Vaswani et al., arXiv:1706.03762) in Flax NNX, one embedding for all."""

import jax
from flax import nnx


class Mlp(nnx.Module):
    """Two linear layers with ReLU between."""

    def __init__(self, dim: int, hidden: int, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(dim, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (..., dim) to the same shape."""
        return self.down(nnx.relu(self.up(x)))


class EncoderLayer(nnx.Module):
    """Self-attention and an MLP, LayerNorm after each as in the paper."""

    def __init__(self, dim: int, heads: int, hidden: int, *, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(heads, dim, decode=False, rngs=rngs)
        self.norm1 = nnx.LayerNorm(dim, rngs=rngs)
        self.mlp = Mlp(dim, hidden, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, time, dim) to the same shape."""
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class DecoderLayer(nnx.Module):
    """Causal self-attention, attention to the encoder's output, and an MLP."""

    def __init__(self, dim: int, heads: int, hidden: int, *, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(heads, dim, decode=False, rngs=rngs)
        self.norm1 = nnx.LayerNorm(dim, rngs=rngs)
        self.cross = nnx.MultiHeadAttention(heads, dim, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, rngs=rngs)
        self.mlp = Mlp(dim, hidden, rngs=rngs)
        self.norm3 = nnx.LayerNorm(dim, rngs=rngs)

    def __call__(self, x: jax.Array, memory: jax.Array) -> jax.Array:
        """Map (batch, time, dim), beside memory (batch, source, dim), to (batch, time, dim)."""
        mask = nnx.make_causal_mask(x[..., 0])
        x = self.norm1(x + self.attention(x, mask=mask))
        x = self.norm2(x + self.cross(x, memory))
        return self.norm3(x + self.mlp(x))


class EncoderDecoder(nnx.Module):
    """Source and target tokens to logits of the next target token.

    The embedding is read by the encoder, read by the decoder, and is the output head.

    Args:
        vocab: Number of tokens.
        dim: Width of the residual streams.
        layers: Layers of the encoder, and of the decoder.
        heads: Attention heads.
        hidden: Width inside the MLPs.
        rngs: Seeds the weights.
    """

    def __init__(
        self,
        vocab: int,
        *,
        dim: int = 512,
        layers: int = 6,
        heads: int = 8,
        hidden: int = 2048,
        rngs: nnx.Rngs,
    ):
        sizes = (dim, heads, hidden)
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        self.encoder = nnx.List([EncoderLayer(*sizes, rngs=rngs) for _ in range(layers)])
        self.decoder = nnx.List([DecoderLayer(*sizes, rngs=rngs) for _ in range(layers)])

    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        """Map tokens (batch, s) and (batch, t) to logits (batch, t, vocab)."""
        memory = self.embed(source)
        for layer in self.encoder:
            memory = layer(memory)
        x = self.embed(target)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.embed.attend(x)
