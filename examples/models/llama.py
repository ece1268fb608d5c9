"""A Llama-style decoder (Touvron et al., arXiv:2302.13971; GQA: arXiv:2305.13245) in Flax Linen.

RMSNorm before each half, rotary positions, grouped-query attention, a gated MLP. Layers are
written out one by one, or scanned over stacked weights with rematerialisation, as `scan` says.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of a Llama-style model.

    Attributes:
        vocab: Number of tokens.
        dim: Width of the residual stream.
        layers: Number of layers.
        heads: Query heads.
        kv_heads: Key and value heads; `heads / kv_heads` queries share one.
        head_dim: Width of a head.
        hidden: Width inside the gated MLP.
        theta: Base of the rotary wavelengths.
        tied: Whether the output head is the embedding.
        scan: Whether layers are scanned over stacked weights, each rematerialised.
        dtype: Of the weights and of the computation.
    """

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    theta: float = 500_000.0
    tied: bool = False
    scan: bool = True
    dtype: Any = jnp.float32


LLAMA_1B = LlamaConfig(
    vocab=128_256,
    dim=2048,
    layers=16,
    heads=32,
    kv_heads=8,
    head_dim=64,
    hidden=8192,
    tied=True,
    dtype=jnp.bfloat16,
)
LLAMA_8B = LlamaConfig(
    vocab=128_256,
    dim=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    hidden=14_336,
    dtype=jnp.bfloat16,
)


def rope(x: jax.Array, *, theta: float) -> jax.Array:
    """Rotate pairs (i, i + d/2) of each head by `position * theta**(-2 i / d)`.

    Args:
        x: Heads, (batch, time, heads, d).
        theta: Base of the wavelengths.

    Returns:
        The rotated heads, in the dtype of x (arXiv:2104.09864, pairs as in GPT-NeoX).
    """
    time, dim = x.shape[1], x.shape[-1]
    frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle = jnp.arange(time, dtype=jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]  # (1, t, 1, d / 2)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention to this and earlier positions; all are (batch, time, heads, d)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / q.shape[-1] ** 0.5
    visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, time, dim) to the same shape."""
        c = self.config
        types = {"dtype": c.dtype, "param_dtype": c.dtype, "use_bias": False}
        q = nn.DenseGeneral((c.heads, c.head_dim), name="q", **types)(x)
        k = nn.DenseGeneral((c.kv_heads, c.head_dim), name="k", **types)(x)
        v = nn.DenseGeneral((c.kv_heads, c.head_dim), name="v", **types)(x)
        q, k = rope(q, theta=c.theta), rope(k, theta=c.theta)
        # (b, t, kv_heads, d) -> (b, t, heads, d): query head h reads key head h // (heads / kv)
        k, v = (jnp.repeat(y, c.heads // c.kv_heads, axis=2) for y in (k, v))
        out = causal_attention(q, k, v)
        return nn.DenseGeneral(c.dim, axis=(-2, -1), name="o", **types)(out)


class Block(nn.Module):
    """Attention and a gated MLP, each after RMSNorm and added to what came in."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, time, dim) to the same shape."""
        c = self.config
        types = {"dtype": c.dtype, "param_dtype": c.dtype}
        dense = lambda width, name: nn.Dense(width, use_bias=False, name=name, **types)
        x = x + Attention(c, name="attention")(nn.RMSNorm(name="norm1", **types)(x))
        y = nn.RMSNorm(name="norm2", **types)(x)
        y = nn.silu(dense(c.hidden, "gate")(y)) * dense(c.hidden, "up")(y)
        return x + dense(c.dim, "down")(y)


class Llama(nn.Module):
    """Tokens to logits of the next token.

    Attributes:
        config: Sizes. With `scan`, layer weights are stacked under `layers`, layer first;
            without, layer i is `layers_i`.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens (batch, time) to logits (batch, time, vocab)."""
        c = self.config
        types = {"dtype": c.dtype, "param_dtype": c.dtype}
        embed = nn.Embed(c.vocab, c.dim, name="embed", **types)
        x = embed(tokens)
        if c.scan:
            layers = nn.scan(
                nn.remat(lambda block, x: (block(x), None), prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=c.layers,
            )
            x, _ = layers(Block(c, name="layers"), x)
        else:
            for layer in range(c.layers):
                x = Block(c, name=f"layers_{layer}")(x)
        x = nn.RMSNorm(name="norm", **types)(x)
        if c.tied:
            return embed.attend(x)
        return nn.Dense(c.vocab, use_bias=False, name="head", **types)(x)
