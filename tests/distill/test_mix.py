"""Mixing a task loss with a distillation loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import distill
from jaxcompress.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("strict_promotion")

TASK, TAUGHT = jnp.array([1.0, 2.0, 4.0]), jnp.array([3.0, 0.0, -4.0])


@pytest.mark.parametrize(
    ("weight", "expected"), [(0, [1, 2, 4]), (1, [3, 0, -4]), (0.25, [1.5, 1.5, 2])]
)
def test_values(weight, expected):
    np.testing.assert_allclose(distill.mix(TASK, TAUGHT, weight=weight), expected)


def test_a_scheduled_weight_and_gradients():
    def total(task, taught, weight):
        return distill.mix(task, taught, weight=weight).sum()

    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(TASK, TAUGHT, jnp.float32(0.25))
    np.testing.assert_allclose(grads[0], 0.75)
    np.testing.assert_allclose(grads[1], 0.25)
    np.testing.assert_allclose(grads[2], (TAUGHT - TASK).sum())


def test_dtypes_meet_in_float32():
    assert distill.mix(TASK.astype(jnp.bfloat16), TAUGHT, weight=0.5).dtype == jnp.float32
    assert distill.mix(jnp.float32(1), jnp.float32(2), weight=0.5) == 1.5


def test_losses_are_never_broadcast():
    with pytest.raises(ArgumentError, match=r"\[3, 1\] beside a task loss of \[3\]"):
        distill.mix(TASK, TAUGHT[:, None], weight=0.5)


@pytest.mark.parametrize("bad", [-0.1, 1.1, np.nan, np.ones(3)])
def test_a_bad_weight_is_refused(bad):
    with pytest.raises(ArgumentError, match=r"`weight`: expected a scalar in \[0, 1\]"):
        distill.mix(TASK, TAUGHT, weight=bad)
