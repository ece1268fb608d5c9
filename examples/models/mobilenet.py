"""MobileNetV2 (Sandler et al., arXiv:1801.04381) in Flax Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel by a 3x3 depthwise convolution, project by 1x1.

    Attributes:
        width: Output channels.
        expansion: Hidden channels per input channel.
        stride: Of the depthwise convolution. A block that keeps the shape has a shortcut.
    """

    width: int
    expansion: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map (batch, h, w, c) to (batch, h / stride, w / stride, width)."""
        norm = lambda name: nn.BatchNorm(not train, momentum=0.9, name=name)
        hidden = x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = nn.Conv(hidden, (1, 1), use_bias=False, name="expand")(y)
            y = nn.relu6(norm("expand_bn")(y))
        depthwise = nn.Conv(
            hidden,
            (3, 3),
            self.stride,
            padding=1,
            feature_group_count=hidden,
            use_bias=False,
            name="depthwise",
        )
        y = nn.relu6(norm("depthwise_bn")(depthwise(y)))
        y = nn.Conv(self.width, (1, 1), use_bias=False, name="project")(y)
        y = norm("project_bn")(y)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """A stem, rows of inverted residuals, a 1x1 convolution and a linear head.

    Attributes:
        stages: One `(expansion, width, blocks, stride)` a row, as in the paper's table 2.
        stem: Channels after the first convolution.
        head: Channels before the mean over positions.
        classes: Number of classes.
    """

    stages: tuple[tuple[int, int, int, int], ...] = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    stem: int = 32
    head: int = 1280
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images (batch, h, w, 3) to logits (batch, classes)."""
        norm = lambda name: nn.BatchNorm(not train, momentum=0.9, name=name)
        x = nn.Conv(self.stem, (3, 3), 2, padding=1, use_bias=False, name="stem")(x)
        x = nn.relu6(norm("stem_bn")(x))
        for row, (expansion, width, blocks, first) in enumerate(self.stages):
            for block in range(blocks):
                stride = first if block == 0 else 1
                name = f"stage{row}_{block}"
                x = InvertedResidual(width, expansion, stride, name=name)(x, train=train)
        x = nn.Conv(self.head, (1, 1), use_bias=False, name="head")(x)
        x = nn.relu6(norm("head_bn")(x))
        x = jnp.mean(x, axis=(1, 2))  # (batch, h, w, c) -> (batch, c)
        return nn.Dense(self.classes, name="linear")(x)
