"""CIFAR-10 and the pretrained ResNets of data/README, as the examples use them."""

import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from models.resnet import TORCH_NAMES, CifarResNet

from jaxcompress import adapters, distill, train
from jaxcompress.train import augment

ROOT = pathlib.Path(__file__).parents[1]
MEAN, STD = jnp.array([0.485, 0.456, 0.406]), jnp.array([0.229, 0.224, 0.225])
TEMPERATURE = 4.0


def data_folder() -> pathlib.Path:
    """Give `$JAXCOMPRESS_DATA`, by default `../shared/data` from the project's root."""
    return pathlib.Path(os.environ.get("JAXCOMPRESS_DATA", ROOT.parent / "shared" / "data"))


def normalise(pixels: jax.Array) -> jax.Array:
    """Map pixels (0 to 255) to what the networks take."""
    return (pixels / 255.0 - MEAN) / STD


def augmented(pixels: np.ndarray, *, batch_size: int = 250, seed: int = 0) -> list[jax.Array]:
    """Give batches of images as they were augmented in training, for calibration.

    The networks know the plain training images by heart; augmented, they lead to activations
    that are nearer to those of new images.
    """
    key = jax.random.key(seed)
    return [
        normalise(augment.pad_crop_flip(jax.random.fold_in(key, i), part))
        for i, part in enumerate(np.split(pixels, len(pixels) // batch_size))
    ]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A pretrained network as functions of its params.

    Attributes:
        params: Linen variables: params and batch_stats.
        forward: `(params, images) -> logits`, with running statistics.
        forward_train: `(params, images) -> (logits, new batch_stats)`, with batch statistics.
    """

    params: Any
    forward: Callable[..., jax.Array]
    forward_train: Callable[..., Any]


def load_network(folder: pathlib.Path, *, depth: int = 20) -> Network:
    """Read the pretrained ResNet of 20 or 32 layers."""
    module = CifarResNet(blocks=(depth - 2) // 6)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    path = folder / f"resnet{depth}_cifar10.safetensors"
    variables = adapters.from_torch_state(path, shapes, rename=TORCH_NAMES)
    forward, params = adapters.from_linen(module, variables, train=False)
    forward_train, _ = adapters.from_linen(module, variables, train=True, mutable=["batch_stats"])
    return Network(params=params, forward=forward, forward_train=forward_train)


def distil(
    teacher: Network,
    forward_train: Callable[..., Any],
    params: Any,
    data: train.Data,
    *,
    steps: int,
    learning_rate: float,
    wrap: Callable[[optax.GradientTransformation], Any] = lambda tx: tx,
    seen: Callable[[Any], Any] = lambda params: params,
    seed: int = 0,
) -> train.State:
    """Train params to answer as the teacher does on augmented images, by SGD with a cosine.

    Args:
        teacher: The dense network.
        forward_train: `(params, images) -> (logits, new batch_stats)` of the student.
        params: Where the student starts.
        data: Batches with "pixels".
        steps: How many.
        learning_rate: The first; it falls to 0.
        wrap: What goes around the optimizer, such as `sparsity.sparsify`.
        seen: What the student makes of its params, such as `quantize.fake_quant`.
        seed: Seeds the augmentation.

    Returns:
        The state after the last step.
    """

    def loss(params: Any, batch: Any, key: jax.Array) -> Any:
        images = normalise(augment.pad_crop_flip(key, batch["pixels"], pad=4))
        logits, updates = forward_train(seen(params), images)
        target = teacher.forward(teacher.params, images)
        return distill.kl(logits, target, temperature=TEMPERATURE), train.Aux(state=updates)

    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    tx = wrap(train.optimizer("nesterov", learning_rate=schedule, clip_norm=5.0))
    state = train.init(params, tx, key=jax.random.key(seed))
    state, _ = train.fit(state, train.make_step(loss, tx), data, steps=steps)
    return state
