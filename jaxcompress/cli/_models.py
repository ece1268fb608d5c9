"""The demo's data and teachers: scikit-learn's digits, a small convolutional net or ViT."""

from typing import NamedTuple

import jax
import numpy as np

from jaxcompress.cli._commands import ModelName
from jaxcompress.errors import explain_missing

with explain_missing("The demo", package="flax"):
    import flax.linen as nn


class ConvNet(nn.Module):
    """Two convolutions and two dense layers, 151,306 parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, 8, 8, 1) to logits (batch, 10)."""
        x = nn.relu(nn.Conv(32, (3, 3), name="conv1")(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2, name="conv2")(x))
        x = x.reshape(x.shape[0], -1)  # (batch, 4, 4, 64) -> (batch, 1024)
        x = nn.relu(nn.Dense(128, name="hidden")(x))
        return nn.Dense(10, name="head")(x)


class ViT(nn.Module):
    """A vision transformer (arXiv:2010.11929) on 2x2 patches: 16 tokens, two pre-norm blocks.

    Attributes:
        width: Channels per token.
        blocks: Number of blocks.
        heads: Attention heads per block.
    """

    width: int = 64
    blocks: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, 8, 8, 1) to logits (batch, 10)."""
        x = nn.Conv(self.width, (2, 2), strides=2, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)  # (batch, 4, 4, width) -> (batch, 16, width)
        init = nn.initializers.normal(0.02)
        x = x + self.param("position", init, (1, x.shape[1], self.width))
        for i in range(self.blocks):
            y = nn.LayerNorm(name=f"norm1_{i}")(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads, name=f"attention_{i}")(y)
            y = nn.LayerNorm(name=f"norm2_{i}")(x)
            y = nn.gelu(nn.Dense(2 * self.width, name=f"up_{i}")(y))
            x = x + nn.Dense(self.width, name=f"down_{i}")(y)
        x = nn.LayerNorm(name="norm")(x).mean(axis=1)  # (batch, 16, width) -> (batch, width)
        return nn.Dense(10, name="head")(x)


MODELS: dict[ModelName, type[nn.Module]] = {"conv": ConvNet, "vit": ViT}


class Split(NamedTuple):
    """Images with their labels.

    Attributes:
        images: (examples, 8, 8, 1) float32, from 0 to 1.
        labels: (examples,) int32, from 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray


def load_digits(seed: int) -> tuple[Split, Split]:
    """Split scikit-learn's 1,797 digits into 1,297 to train on and 500 to test on.

    Args:
        seed: Seeds the split, which has the same class proportions on both sides.

    Returns:
        `(train, test)`.

    Raises:
        MissingExtraError: If scikit-learn is not installed.
    """
    with explain_missing("The demo", package="scikit-learn", extra="demo"):
        from sklearn import datasets, model_selection
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    train, test = model_selection.train_test_split(
        np.arange(len(labels)), test_size=500, stratify=labels, random_state=seed
    )
    labels = labels.astype(np.int32)
    return Split(images[train], labels[train]), Split(images[test], labels[test])
