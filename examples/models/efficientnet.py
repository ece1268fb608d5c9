"""EfficientNet's block, MBConv (Tan and Le, arXiv:1905.11946), in Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx


class SqueezeExcite(nnx.Module):
    """Scale each channel by a gate read from all channels' means (arXiv:1709.01507)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.reduce = nnx.Conv(width, hidden, (1, 1), rngs=rngs)
        self.expand = nnx.Conv(hidden, width, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, h, w, width) to the same shape."""
        gate = jnp.mean(x, axis=(1, 2), keepdims=True)  # (batch, 1, 1, width)
        gate = self.expand(nnx.silu(self.reduce(gate)))
        return x * nnx.sigmoid(gate)


class MBConv(nnx.Module):
    """Inverted residual with squeeze-and-excitation.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        expansion: Hidden channels per input channel.
        kernel_size: Of the depthwise convolution.
        stride: Of the depthwise convolution. A block that keeps the shape has a shortcut.
        squeeze: Channels of the gate's hidden layer, as a fraction of the inputs.
        rngs: Seeds the weights.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        expansion: int = 6,
        kernel_size: int = 3,
        stride: int = 1,
        squeeze: float = 0.25,
        rngs: nnx.Rngs,
    ):
        hidden = inputs * expansion
        norm = lambda width: nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.expand = nnx.Conv(inputs, hidden, (1, 1), use_bias=False, rngs=rngs)
        self.expand_norm = norm(hidden)
        self.depthwise = nnx.Conv(
            hidden,
            hidden,
            (kernel_size, kernel_size),
            stride,
            feature_group_count=hidden,
            use_bias=False,
            rngs=rngs,
        )
        self.depthwise_norm = norm(hidden)
        self.gate = SqueezeExcite(hidden, max(1, round(inputs * squeeze)), rngs=rngs)
        self.project = nnx.Conv(hidden, outputs, (1, 1), use_bias=False, rngs=rngs)
        self.project_norm = norm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, h, w, inputs) to (batch, h / stride, w / stride, outputs)."""
        y = nnx.silu(self.expand_norm(self.expand(x)))
        y = nnx.silu(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(self.gate(y)))
        return x + y if x.shape == y.shape else y
