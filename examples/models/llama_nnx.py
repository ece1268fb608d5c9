"""The Llama-style decoder of `llama.py` in Flax NNX, its layers created and scanned as a stack."""

import jax
import jax.numpy as jnp
from flax import nnx
from models.llama import LlamaConfig, rope


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c, self.config = config, config
        types = {"dtype": c.dtype, "param_dtype": c.dtype, "use_bias": False}
        dense = lambda heads: nnx.LinearGeneral(c.dim, (heads, c.head_dim), rngs=rngs, **types)
        self.q, self.k, self.v = dense(c.heads), dense(c.kv_heads), dense(c.kv_heads)
        self.o = nnx.LinearGeneral((c.heads, c.head_dim), c.dim, axis=(-2, -1), rngs=rngs, **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, time, dim) to the same shape."""
        c = self.config
        q, k, v = rope(self.q(x), theta=c.theta), rope(self.k(x), theta=c.theta), self.v(x)
        # (b, t, heads, d) -> (b, t, kv_heads, group, d): keys are shared without being repeated
        q = q.reshape(*q.shape[:2], c.kv_heads, -1, c.head_dim)
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k).astype(jnp.float32) / c.head_dim**0.5
        visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
        out = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v)
        return self.o(out.reshape(*x.shape[:2], c.heads, c.head_dim))


class Block(nnx.Module):
    """Attention and a gated MLP, each after RMSNorm and added to what came in."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c = config
        types = {"dtype": c.dtype, "param_dtype": c.dtype, "rngs": rngs}
        self.norm1 = nnx.RMSNorm(c.dim, **types)
        self.attention = Attention(c, rngs=rngs)
        self.norm2 = nnx.RMSNorm(c.dim, **types)
        self.gate = nnx.Linear(c.dim, c.hidden, use_bias=False, **types)
        self.up = nnx.Linear(c.dim, c.hidden, use_bias=False, **types)
        self.down = nnx.Linear(c.hidden, c.dim, use_bias=False, **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, time, dim) to the same shape."""
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
    """Tokens to logits of the next token; the head is never tied, the layers always scanned.

    Args:
        config: Sizes.
        rngs: Seeds the weights.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c = config
        types = {"dtype": c.dtype, "param_dtype": c.dtype, "rngs": rngs}

        @nnx.split_rngs(splits=c.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(c, rngs=rngs)

        self.embed = nnx.Embed(c.vocab, c.dim, **types)
        self.layers = stack(rngs)
        self.norm = nnx.RMSNorm(c.dim, **types)
        self.head = nnx.Linear(c.dim, c.vocab, use_bias=False, **types)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens (batch, time) to logits (batch, time, vocab)."""

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat(prevent_cse=False)
        def layer(x: jax.Array, block: Block) -> jax.Array:
            return block(x)

        x = layer(self.embed(tokens), self.layers)
        return self.head(self.norm(x))
