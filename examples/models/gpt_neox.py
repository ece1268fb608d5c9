"""GPT-NeoX (Black et al., arXiv:2204.06745) in Flax Linen: QKV fused head by head.

The fused projection reads `(heads, 3, head_dim)`: each head's q, k and v lie together. Positions
rotate the first part of a head only, and attention and MLP read the same stream in parallel.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from models.llama import causal_attention, rope


class Block(nn.Module):
    """Attention and MLP side by side.

    Attributes:
        heads: Attention heads.
        rotary: Entries of a head that positions rotate.
    """

    heads: int
    rotary: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, time, dim) to the same shape."""
        dim = x.shape[-1]
        qkv = nn.Dense(3 * dim, name="qkv")(nn.LayerNorm(name="norm1")(x))
        qkv = qkv.reshape(*x.shape[:2], self.heads, 3, -1)  # (b, t, h * 3 * d) -> (b, t, h, 3, d)
        q, k, v = (qkv[..., i, :] for i in range(3))
        rotate = lambda y: jnp.concatenate(
            [rope(y[..., : self.rotary], theta=10_000.0), y[..., self.rotary :]], axis=-1
        )
        out = causal_attention(rotate(q), rotate(k), v).reshape(
            x.shape
        )  # (b, t, h, d) -> (b, t, h d)
        attention = nn.Dense(dim, name="out")(out)
        hidden = nn.gelu(nn.Dense(4 * dim, name="up")(nn.LayerNorm(name="norm2")(x)))
        return x + attention + nn.Dense(dim, name="down")(hidden)


class GPTNeoX(nn.Module):
    """Tokens to logits of the next token.

    Attributes:
        vocab: Number of tokens.
        dim: Width of the residual stream.
        layers: Number of layers.
        heads: Attention heads.
        rotary: Entries of a head that positions rotate.
    """

    vocab: int = 50_432
    dim: int = 6144
    layers: int = 44
    heads: int = 64
    rotary: int = 24

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens (batch, time) to logits (batch, time, vocab)."""
        x = nn.Embed(self.vocab, self.dim, name="embed")(tokens)
        for layer in range(self.layers):
            x = Block(self.heads, self.rotary, name=f"layers_{layer}")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(self.vocab, use_bias=False, name="head")(x)
