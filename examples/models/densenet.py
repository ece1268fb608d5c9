"""DenseNet (Huang et al., arXiv:1608.06993) in Flax NNX."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class NormConv(nnx.Module):
    """BatchNorm, ReLU, convolution: the order of the paper."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, *, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(inputs, momentum=0.9, rngs=rngs)
        self.conv = nnx.Conv(inputs, outputs, (kernel_size,) * 2, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, h, w, inputs) to (batch, h, w, outputs)."""
        return self.conv(nnx.relu(self.norm(x)))


class DenseNet(nnx.Module):
    """Blocks in which every layer reads all earlier ones, with halving transitions between.

    Args:
        blocks: Layers of each block.
        growth: Channels that each layer adds.
        stem: Channels after the first convolution.
        classes: Number of classes.
        rngs: Seeds the weights.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (6, 12, 24, 16),
        *,
        growth: int = 32,
        stem: int = 64,
        classes: int = 1000,
        rngs: nnx.Rngs,
    ):
        self.stem = nnx.Conv(3, stem, (3, 3), use_bias=False, rngs=rngs)
        width, layers, transitions = stem, [], []
        for block, depth in enumerate(blocks):
            widths = [width + growth * i for i in range(depth)]
            layers.append(nnx.List([NormConv(w, growth, 3, rngs=rngs) for w in widths]))
            width += growth * depth
            if block < len(blocks) - 1:
                transitions.append(NormConv(width, width // 2, 1, rngs=rngs))
                width //= 2
        self.blocks = nnx.List(layers)
        self.transitions = nnx.List(transitions)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.linear = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, h, w, 3) to logits (batch, classes)."""
        x = self.stem(x)
        for block, layers in enumerate(self.blocks):
            for layer in layers:
                x = jnp.concatenate([x, layer(x)], axis=-1)
            if block < len(self.transitions):
                x = nnx.avg_pool(self.transitions[block](x), (2, 2), (2, 2))
        x = jnp.mean(nnx.relu(self.norm(x)), axis=(1, 2))  # (batch, h, w, c) -> (batch, c)
        return self.linear(x)
