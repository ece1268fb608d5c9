import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.errors import ArgumentError
from jaxcompress.train import augment

SHAPE = (24, 5, 6, 3)


@pytest.fixture(scope="module")
def images():
    # Distinct pixels, so that a crop tells where it came from.
    return np.arange(1, np.prod(SHAPE) + 1, dtype=np.float32).reshape(SHAPE)


def reference(image, *, pad, value, top, left, flip):
    canvas = np.empty((image.shape[0] + 2 * pad, image.shape[1] + 2 * pad, image.shape[2]))
    canvas[:] = value
    canvas[pad : pad + image.shape[0], pad : pad + image.shape[1]] = image
    crop = canvas[top : top + image.shape[0], left : left + image.shape[1]]
    return crop[:, ::-1] if flip else crop


def find(out, image, *, pad, value):
    """Which crop and flip gave `out`: exactly one must."""
    offsets = range(2 * pad + 1)
    return [
        (top, left, flip)
        for top in offsets
        for left in offsets
        for flip in (False, True)
        if np.array_equal(
            out, reference(image, pad=pad, value=value, top=top, left=left, flip=flip)
        )
    ]


@pytest.mark.parametrize(("pad", "value"), [(2, 0.0), (1, (-1.0, -2.0, -3.0))])
def test_every_image_is_a_padded_crop_perhaps_flipped(images, pad, value):
    out = np.asarray(augment.pad_crop_flip(jax.random.key(0), images, pad=pad, value=value))
    draws = [find(out[i], images[i], pad=pad, value=value) for i in range(SHAPE[0])]
    assert all(len(found) == 1 for found in draws)
    tops, lefts, flips = zip(*(found[0] for found in draws), strict=True)
    # Each image has its own draws, and every draw its own spread.
    assert set(tops) == set(lefts) == set(range(2 * pad + 1))
    assert set(flips) == {False, True}
    assert len(set(zip(tops, lefts, strict=True))) > 2 * pad + 1


def test_the_key_decides(images):
    crop = functools.partial(augment.pad_crop_flip, images=images, pad=2)
    a, b, other = (crop(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, other)


@pytest.mark.usefixtures("strict_promotion")
def test_without_padding_only_flips_remain(images):
    out = np.asarray(augment.pad_crop_flip(jax.random.key(0), images, pad=0))
    same = [np.array_equal(a, b) for a, b in zip(out, images, strict=True)]
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(out, images, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True)) and 0 < sum(same) < SHAPE[0]


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16])
def test_keeps_dtype_and_shape_when_traced(images, dtype):
    x = jax.ShapeDtypeStruct(SHAPE, dtype)
    out = jax.eval_shape(augment.pad_crop_flip, jax.random.key(0), x)
    assert (out.dtype, out.shape) == (dtype, SHAPE)


@pytest.mark.parametrize(
    ("shape", "pad", "match"), [((4, 4, 3), 1, "batch, height"), (SHAPE, -1, "`pad`")]
)
def test_bad_arguments_are_refused(shape, pad, match):
    with pytest.raises(ArgumentError, match=match):
        augment.pad_crop_flip(jax.random.key(0), np.zeros(shape), pad=pad)
