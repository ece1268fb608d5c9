"""CIFAR ResNets (He et al., arXiv:1512.03385, section 4.2) in Flax Linen.

Three stages of `blocks` basic blocks with 16, 32 and 64 channels: ResNet-20 has 3 a stage,
ResNet-32 has 5. Shortcuts are option A: stride-2 subsampling, then zero channels on both sides.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and an identity (option A) shortcut.

    Attributes:
        width: Output channels.
        stride: 2 at the start of a stage, else 1.
    """

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map (batch, h, w, c) to (batch, h / stride, w / stride, width)."""
        # Padding (1, 1) and not "SAME": with stride 2 the latter is off by one pixel.
        conv = lambda stride, name: nn.Conv(
            self.width, (3, 3), stride, padding=1, use_bias=False, name=name
        )
        norm = lambda name: nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name=name)
        y = nn.relu(norm("bn1")(conv(self.stride, "conv1")(x)))
        y = norm("bn2")(conv(1, "conv2")(y))
        if self.stride != 1 or x.shape[-1] != self.width:
            extra = (self.width - x.shape[-1]) // 2
            x = x[:, :: self.stride, :: self.stride]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra, extra)))
        return nn.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet-(6 * blocks + 2) for 32x32 images.

    Attributes:
        blocks: Basic blocks a stage.
        width: Channels of the first stage; the next two have 2 and 4 times as many.
        classes: Number of classes.
    """

    blocks: int = 3
    width: int = 16
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Map normalised images (batch, 32, 32, 3) to logits (batch, classes)."""
        x = nn.Conv(self.width, (3, 3), padding=1, use_bias=False, name="conv1")(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="bn1")(x))
        for stage in range(3):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"layer{stage + 1}_{block}"
                x = BasicBlock(self.width * 2**stage, stride, name=name)(x, train=train)
        x = jnp.mean(x, axis=(1, 2))  # (batch, h, w, c) -> (batch, c)
        return nn.Dense(self.classes, name="linear")(x)


# From our module paths to those of akamaster/pytorch_resnet_cifar10.
TORCH_NAMES = {r"layer(\d)_(\d)": r"layer\1.\2"}
