"""ConvNeXt (Liu et al., arXiv:2201.03545) in Flax Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm, an MLP over channels, and a learned scale.

    Attributes:
        kernel_size: Of the depthwise convolution.
        expansion: Hidden channels per channel.
    """

    kernel_size: int = 7
    expansion: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, h, w, c) to the same shape."""
        width = x.shape[-1]
        y = nn.Conv(width, (self.kernel_size,) * 2, feature_group_count=width, name="depthwise")(x)
        y = nn.LayerNorm(name="norm")(y)
        y = nn.gelu(nn.Dense(width * self.expansion, name="up")(y))
        y = nn.Dense(width, name="down")(y)
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (width,))
        return x + gamma * y


class ConvNeXt(nn.Module):
    """Patches, then stages of blocks with a strided convolution between them.

    Attributes:
        depths: Blocks of each stage.
        widths: Channels of each stage.
        patch: Side of the square patches that the stem reads.
        kernel_size: Of the depthwise convolutions.
        classes: Number of classes.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    patch: int = 4
    kernel_size: int = 7
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, h, w, 3) to logits (batch, classes)."""
        patch = (self.patch, self.patch)
        x = nn.Conv(self.widths[0], patch, patch, padding="VALID", name="stem")(x)
        x = nn.LayerNorm(name="stem_norm")(x)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            if stage > 0:
                x = nn.LayerNorm(name=f"norm{stage}")(x)
                x = nn.Conv(width, (2, 2), (2, 2), padding="VALID", name=f"down{stage}")(x)
            for block in range(depth):
                x = ConvNeXtBlock(self.kernel_size, name=f"stage{stage}_{block}")(x)
        x = nn.LayerNorm(name="norm")(jnp.mean(x, axis=(1, 2)))  # (batch, h, w, c) -> (batch, c)
        return nn.Dense(self.classes, name="linear")(x)
