"""MLP-Mixer (Tolstikhin et al., arXiv:2105.01601), in Flax Linen and in Flax NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class Mlp(nn.Module):
    """Two dense layers with GELU between, over the last axis.

    Attributes:
        hidden: Width between them.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (..., c) to the same shape."""
        y = nn.gelu(nn.Dense(self.hidden, name="up")(x))
        return nn.Dense(x.shape[-1], name="down")(y)


class MixerBlock(nn.Module):
    """An MLP across patches, then an MLP across channels.

    Attributes:
        tokens_hidden: Hidden width of the first.
        channels_hidden: Hidden width of the second.
    """

    tokens_hidden: int
    channels_hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, patches, c) to the same shape."""
        y = jnp.swapaxes(nn.LayerNorm(name="norm1")(x), 1, 2)  # (batch, c, patches)
        x = x + jnp.swapaxes(Mlp(self.tokens_hidden, name="tokens")(y), 1, 2)
        return x + Mlp(self.channels_hidden, name="channels")(nn.LayerNorm(name="norm2")(x))


class Mixer(nn.Module):
    """MLP-Mixer in Linen.

    Attributes:
        width: Channels.
        blocks: Number of mixer blocks.
        tokens_hidden: Hidden width across patches.
        channels_hidden: Hidden width across channels.
        patch: Side of the square patches.
        classes: Number of classes.
    """

    width: int = 512
    blocks: int = 8
    tokens_hidden: int = 256
    channels_hidden: int = 2048
    patch: int = 16
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, h, w, c) to logits (batch, classes)."""
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, padding="VALID", name="stem")(x)
        x = x.reshape(x.shape[0], -1, self.width)  # (batch, h, w, c) -> (batch, h * w, c)
        for block in range(self.blocks):
            hidden = (self.tokens_hidden, self.channels_hidden)
            x = MixerBlock(*hidden, name=f"blocks_{block}")(x)
        x = jnp.mean(nn.LayerNorm(name="norm")(x), axis=1)  # (batch, patches, c) -> (batch, c)
        return nn.Dense(self.classes, name="head")(x)


class NnxMlp(nnx.Module):
    """`Mlp` in NNX."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (..., width) to the same shape."""
        return self.down(nnx.gelu(self.up(x)))


class NnxMixerBlock(nnx.Module):
    """`MixerBlock` in NNX."""

    def __init__(self, patches: int, width: int, hidden: tuple[int, int], *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.tokens = NnxMlp(patches, hidden[0], rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.channels = NnxMlp(width, hidden[1], rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, patches, c) to the same shape."""
        y = jnp.swapaxes(self.norm1(x), 1, 2)  # (batch, c, patches)
        x = x + jnp.swapaxes(self.tokens(y), 1, 2)
        return x + self.channels(self.norm2(x))


class NnxMixer(nnx.Module):
    """`Mixer` in NNX: the same function of leaves with the same names.

    Args:
        patches: Patches of an image.
        channels: Channels of an image.
        width: Channels inside.
        blocks: Number of mixer blocks.
        hidden: Hidden widths across patches and across channels.
        patch: Side of the square patches.
        classes: Number of classes.
        rngs: Seeds the weights.
    """

    def __init__(
        self,
        patches: int = 196,
        *,
        channels: int = 3,
        width: int = 512,
        blocks: int = 8,
        hidden: tuple[int, int] = (256, 2048),
        patch: int = 16,
        classes: int = 1000,
        rngs: nnx.Rngs,
    ):
        sides = (patch, patch)
        self.stem = nnx.Conv(channels, width, sides, sides, padding="VALID", rngs=rngs)
        self.blocks = nnx.List(
            [NnxMixerBlock(patches, width, hidden, rngs=rngs) for _ in range(blocks)]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, h, w, c) to logits (batch, classes)."""
        x = self.stem(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # (batch, h, w, c) -> (batch, h * w, c)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=1))  # (batch, patches, c) -> (batch, c)
