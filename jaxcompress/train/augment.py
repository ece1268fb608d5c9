"""Augmentation on the device, in batches, from an explicit key."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Shaped

from jaxcompress.errors import ArgumentError, explain_missing, require_at_least


def pad_crop_flip(
    key: jax.Array, images: ArrayLike, *, pad: int = 4, value: ArrayLike = 0
) -> Shaped[Array, "batch height width channels"]:
    """Pad each image, crop it back to size at random, and mirror it left to right half the time.

    Args:
        key: A random key; each image has its own draws.
        images: `(batch, height, width, channels)`, of any dtype.
        pad: Pixels added on each side, 0 or more.
        value: What they hold: a scalar, or one value per channel. Black is 0 in pixels but
            `-mean / std` after normalisation.

    Returns:
        Images of the same shape and dtype.

    Raises:
        ArgumentError: If images do not have four axes, or `pad` is negative.
        MissingExtraError: If dm-pix is not installed.

    Example:
        >>> images = jnp.ones((8, 6, 6, 3))
        >>> pad_crop_flip(jax.random.key(0), images, pad=2).shape
        (8, 6, 6, 3)

    Reference: the CIFAR augmentation of "Deep Residual Learning" (arXiv:1512.03385, section 4.2).
    """
    images = jnp.asarray(images)
    if images.ndim != 4:
        raise ArgumentError(
            "images",
            got=f"shape {images.shape}",
            expected="(batch, height, width, channels)",
            fix="Add the missing axes; vmap over any further ones.",
        )
    require_at_least("pad", pad, 0, fix="Use 0 not to crop.")
    return _pad_crop_flip(key, images, jnp.asarray(value, images.dtype), pad)


@functools.partial(jax.jit, static_argnums=3)
def _pad_crop_flip(key: jax.Array, images: Array, value: Array, pad: int) -> Array:
    batch, height, width, channels = images.shape
    canvas = jnp.broadcast_to(value, (batch, height + 2 * pad, width + 2 * pad, channels))
    canvas = canvas.at[:, pad : pad + height, pad : pad + width].set(images)

    with explain_missing("Augmentation", package="dm-pix"):
        import dm_pix

    def crop_flip(key: jax.Array, image: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        cropped = dm_pix.random_crop(crop_key, image, (height, width, channels))
        return jnp.asarray(dm_pix.random_flip_left_right(flip_key, cropped))

    return jax.vmap(crop_flip)(jax.random.split(key, batch), canvas)
