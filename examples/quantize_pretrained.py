"""Quantize pretrained networks without training: two CIFAR ResNets and a character LSTM.

    python examples/quantize_pretrained.py            # all tables
    python examples/quantize_pretrained.py --quick    # a few formats each, two minutes

Reads `cifar10.npz`, `resnet20_cifar10.safetensors`, `resnet32_cifar10.safetensors`,
`charrnn_shakespeare.safetensors` with its vocabulary, and `tinyshakespeare.txt` from
`$JAXCOMPRESS_DATA`, by default `../shared/data` from the project's root.
"""

import os
import pathlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from models import char_lstm
from models.resnet import TORCH_NAMES, CifarResNet
from side_by_side import SideBySide, remarks

from jaxcompress import adapters, quantize, report, train
from jaxcompress.numerics import MSE, Format, PerChannel, int4
from jaxcompress.quantize import GPTQ, ClipSearch, Policy, Rule, presets
from jaxcompress.train import augment

ROOT = pathlib.Path(__file__).parents[1]
MEAN, STD = jnp.array([0.485, 0.456, 0.406]), jnp.array([0.229, 0.224, 0.225])
WINDOW, WARM = 256, 32


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to run.

    Attributes:
        quick: A few formats and calibration examples, to see that everything works.
        images: Augmented training images that methods and ranges see.
        windows: Windows of 256 characters of the training text that methods see.
        seed: Seeds the augmentation and the bootstrap.
        out: Where to write the packed files and the report.
        data: The folder with the data sets and the pretrained networks.
    """

    quick: bool = False
    images: int = 4000
    windows: int = 128
    seed: int = 0
    out: pathlib.Path = pathlib.Path("quantize-pretrained")
    data: pathlib.Path = field(
        default_factory=lambda: pathlib.Path(
            os.environ.get("JAXCOMPRESS_DATA", ROOT.parent / "shared" / "data")
        )
    )


def normalise(pixels: jax.Array) -> jax.Array:
    return (pixels / 255.0 - MEAN) / STD
