"""GPT-2 (Radford et al., 2019) in Flax NNX: fused QKV, learned positions, a tied embedding."""

import jax
import jax.numpy as jnp
from flax import nnx
from models.llama import causal_attention


class Block(nnx.Module):
    """Attention and an MLP, each after LayerNorm and added to what came in."""

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm1 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.qkv = nnx.Linear(dim, 3 * dim, rngs=rngs)
        self.out = nnx.Linear(dim, dim, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.down = nnx.Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, time, dim) to the same shape."""
        # The fused axis reads (3, heads, d): all of q, then all of k, then all of v.
        parts = jnp.split(self.qkv(self.norm1(x)), 3, axis=-1)
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in parts)  # (b, t, h, d)
        x = x + self.out(causal_attention(q, k, v).reshape(x.shape))  # (b, t, h, d) -> (b, t, h d)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT2(nnx.Module):
    """Tokens to logits of the next token.

    Args:
        vocab: Number of tokens.
        positions: Longest sequence.
        dim: Width of the residual stream.
        layers: Number of layers.
        heads: Attention heads.
        rngs: Seeds the weights.
    """

    def __init__(
        self,
        vocab: int = 50_257,
        positions: int = 1024,
        *,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
        rngs: nnx.Rngs,
    ):
        self.wte = nnx.Embed(vocab, dim, rngs=rngs)
        self.wpe = nnx.Embed(positions, dim, rngs=rngs)
        self.blocks = nnx.List([Block(dim, heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens (batch, time) to logits (batch, time, vocab)."""
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.wte.attend(self.norm(x))
