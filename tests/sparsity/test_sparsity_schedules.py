"""Schedules against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import errors
from jaxcompress.sparsity import schedules

pytestmark = pytest.mark.usefixtures("strict_promotion")

STEPS = np.arange(0, 50)
PROGRESS = np.clip((STEPS - 10) / 30, 0, 1)
GRADUAL = {
    schedules.linear: PROGRESS,
    schedules.cubic: 1 - (1 - PROGRESS) ** 3,
    schedules.cosine: (1 - np.cos(np.pi * PROGRESS)) / 2,
}


@pytest.mark.parametrize("kind", GRADUAL, ids=lambda kind: kind.__name__)
def test_gradual_schedules(kind):
    schedule = kind(0.8, begin=10, end=40, initial=0.2)
    got = jax.jit(jax.vmap(schedule))(jnp.asarray(STEPS))
    np.testing.assert_allclose(got, 0.2 + 0.6 * GRADUAL[kind], atol=1e-6)
    assert got.dtype == jnp.float32
    assert got[0] == np.float32(0.2) and got[-1] == np.float32(0.8)  # exact at both ends
    assert float(schedule(25)) == pytest.approx(float(got[25]), abs=1e-6)


def test_cubic_is_zhu_and_gupta_equation_1():
    s_i, s_f, t_0, n, dt = 0.1, 0.9, 5, 4, 10
    schedule = schedules.cubic(s_f, initial=s_i, begin=t_0, end=t_0 + n * dt)
    for t in (5, 15, 25, 35, 45):
        expected = s_f + (s_i - s_f) * (1 - (t - t_0) / (n * dt)) ** 3
        assert float(schedule(t)) == pytest.approx(expected, abs=1e-6)


def test_constant_and_one_shot():
    steps = jnp.array([0, 2, 3, 9])
    for schedule, expected in (
        (schedules.constant(0.25), [0.25] * 4),
        (schedules.one_shot(0.5, step=3), [0, 0, 0.5, 0.5]),
    ):
        np.testing.assert_array_equal(schedule(steps), expected)
        np.testing.assert_array_equal(jax.jit(jax.vmap(schedule))(steps), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda: schedules.constant(1.5),
        lambda: schedules.one_shot(float("nan"), step=1),
        lambda: schedules.linear(0.5, end=0),
        lambda: schedules.cubic(80, end=10),
        lambda: schedules.cosine(0.5, end=10, initial=-0.1),
    ],
)
def test_bad_input(call):
    with pytest.raises(errors.ArgumentError):
        call()
