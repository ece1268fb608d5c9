"""U-Net (Ronneberger et al., arXiv:1505.04597) in Flax NNX, with GroupNorm and same padding."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class DoubleConv(nnx.Module):
    """Twice: 3x3 convolution, GroupNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, *, groups: int, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(inputs, outputs, (3, 3), rngs=rngs)
        self.norm1 = nnx.GroupNorm(outputs, num_groups=groups, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), rngs=rngs)
        self.norm2 = nnx.GroupNorm(outputs, num_groups=groups, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, h, w, inputs) to (batch, h, w, outputs)."""
        x = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(x)))


class UNet(nnx.Module):
    """Halve the image level by level, then double it again beside the skipped features.

    Args:
        widths: Channels of each level, finest first.
        inputs: Channels of the image.
        outputs: Channels of the map it gives.
        groups: Groups of every GroupNorm.
        rngs: Seeds the weights.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        inputs: int = 3,
        outputs: int = 2,
        groups: int = 8,
        rngs: nnx.Rngs,
    ):
        block = lambda a, b: DoubleConv(a, b, groups=groups, rngs=rngs)
        pairs = list(itertools.pairwise(widths))
        self.down = nnx.List([block(a, b) for a, b in itertools.pairwise([inputs, *widths])])
        # "SAME" pads a 2x2 transposed convolution of stride 2 to exactly twice the size.
        self.up = nnx.List([nnx.ConvTranspose(b, a, (2, 2), (2, 2), rngs=rngs) for a, b in pairs])
        self.merge = nnx.List([block(2 * a, a) for a, _ in pairs])
        self.head = nnx.Conv(widths[0], outputs, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, h, w, inputs) to (batch, h, w, outputs)."""
        *levels, bottom = self.down
        skipped = []
        for level in levels:
            skipped.append(level(x))
            x = nnx.max_pool(skipped[-1], (2, 2), (2, 2))
        x = bottom(x)
        for i in reversed(range(len(levels))):
            x = jnp.concatenate([skipped[i], self.up[i](x)], axis=-1)
            x = self.merge[i](x)
        return self.head(x)
