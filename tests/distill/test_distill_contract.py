"""What every distillation loss promises, run over all of them."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress import distill
from jaxcompress.errors import ArgumentError, ArgumentTypeError

pytestmark = pytest.mark.usefixtures("strict_promotion")

BATCH, CLASSES = (2, 4), 8
SHAPE = (*BATCH, CLASSES)


def decoupled(student, teacher, **kwargs):
    """`decoupled` as a loss of two arguments, for any leading axes."""
    labels = np.arange(math.prod(student.shape[:-1]), dtype=np.int32) % 3
    return distill.decoupled(student, teacher, labels.reshape(student.shape[:-1]), **kwargs)


SOFT = {
    "kl": distill.kl,
    "reverse_kl": distill.reverse_kl,
    "jensen_shannon": distill.jensen_shannon,
    "soft_cross_entropy": distill.soft_cross_entropy,
    "decoupled": decoupled,
}
DIVERGENCES = {name: loss for name, loss in SOFT.items() if name != "soft_cross_entropy"}
ALL = {**SOFT, "logit_mse": distill.logit_mse}

each = lambda losses: pytest.mark.parametrize("loss", losses.values(), ids=losses.keys())


@functools.cache
def logits(seed, scale=3.0, shape=SHAPE):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


@each(ALL)
def test_one_value_per_example_under_jit(loss):
    eager = loss(logits(0), logits(1))
    assert eager.shape == BATCH and eager.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(loss)(logits(0), logits(1)), eager, rtol=1e-5, atol=1e-6)


@each(ALL)
def test_vmap_is_the_batch_axis(loss):
    if loss is decoupled:
        loss = lambda s, t: distill.decoupled(s, t, np.zeros(s.shape[:-1], np.int32))
    mapped = jax.jit(jax.vmap(loss))(logits(0), logits(1))
    np.testing.assert_allclose(mapped, loss(logits(0), logits(1)), rtol=1e-5, atol=1e-6)


@each(ALL)
def test_gradient_is_the_difference_quotient(loss):
    student, teacher = logits(0), logits(1)
    total = jax.jit(lambda s: loss(s, teacher).sum())
    direction = logits(2) / 10
    step = 1e-2
    quotient = (total(student + step * direction) - total(student - step * direction)) / (2 * step)
    slope = jnp.vdot(jax.grad(total)(student), direction)
    np.testing.assert_allclose(slope, quotient, rtol=2e-3)


@each(ALL)
def test_no_gradient_into_the_teacher(loss):
    grads = jax.grad(lambda s, t: loss(s, t).sum(), argnums=(0, 1))(logits(0), logits(1))
    assert jnp.any(grads[0] != 0) and not jnp.any(grads[1] != 0)


@each(DIVERGENCES | {"logit_mse": distill.logit_mse})
def test_zero_and_flat_at_the_teacher(loss):
    value, grad = jax.value_and_grad(lambda s: loss(s, logits(1)).sum())(logits(1))
    np.testing.assert_allclose(value, 0, atol=2e-5)
    np.testing.assert_allclose(grad, 0, atol=2e-5)


@each(SOFT)
def test_adding_a_constant_to_the_logits_changes_nothing(loss):
    offset = jnp.asarray([5.0, -7.0, 0.0, 3.0])[:, None]
    shifted = loss(logits(0) + offset, logits(1) - offset)
    np.testing.assert_allclose(shifted, loss(logits(0), logits(1)), rtol=1e-4, atol=1e-5)


@each(ALL)
def test_bfloat16_is_read_and_computed_in_float32(loss):
    student, teacher = logits(0).astype(jnp.bfloat16), logits(1)
    result = loss(student, teacher)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, loss(student.astype(jnp.float32), teacher))
    grad = jax.grad(lambda s: loss(s, teacher).sum())(student)
    assert grad.dtype == jnp.bfloat16 and jnp.all(jnp.isfinite(grad.astype(jnp.float32)))


@each(ALL)
def test_float64_stays(loss):
    with jax.enable_x64(True):
        student, teacher = jnp.zeros(SHAPE, jnp.float64), jnp.zeros(SHAPE, jnp.float32)
        assert jax.eval_shape(loss, student, teacher).dtype == jnp.float64


@each(SOFT)
def test_temperature_may_be_traced_and_learned(loss):
    def of_temperature(t):
        return loss(student, teacher, temperature=t).sum()

    student, teacher = (x.at[..., -1].set(-jnp.inf) for x in (logits(0), logits(1)))
    value, slope = jax.jit(jax.value_and_grad(of_temperature))(jnp.float32(2.0))
    np.testing.assert_allclose(value, of_temperature(2.0), rtol=1e-5)
    quotient = (of_temperature(2.1) - of_temperature(1.9)) / 0.2
    np.testing.assert_allclose(slope, quotient, rtol=0.02)


@functools.cache
def value_and_grad(loss):
    return jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).sum()))


@each(ALL)
@hypothesis.given(
    values=hnp.arrays(
        np.float32,
        (2, *SHAPE),
        elements=st.sampled_from([0.0, 1.0, -1.0, 1e4, -1e4, 88.0, 1e-30, 3e4]),
    )
)
@hypothesis.settings(max_examples=15)
def test_extreme_logits_give_finite_values_and_gradients(loss, values):
    value, grad = value_and_grad(loss)(*values)
    assert np.isfinite(value) and value >= -1e-4
    assert np.all(np.isfinite(grad))


@each(ALL)
def test_classes_masked_on_both_sides_count_for_nothing(loss):
    narrow = [np.asarray(x)[..., :7] for x in (logits(0), logits(1))]
    wide = [
        jnp.asarray(np.pad(x, [(0, 0), (0, 0), (0, 1)], constant_values=-np.inf)) for x in narrow
    ]
    (value, grad), (value_wide, grad_wide) = (value_and_grad(loss)(*x) for x in (narrow, wide))
    np.testing.assert_allclose(value_wide, value, rtol=1e-5)
    np.testing.assert_allclose(grad_wide[..., :7], grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(grad_wide[..., 7], 0)


@each(ALL)
def test_an_example_masked_throughout_counts_zero(loss):
    student, teacher = (x.at[0].set(-jnp.inf) for x in (logits(0), logits(1)))
    per_example = jax.jit(loss)(student, teacher)
    np.testing.assert_array_equal(per_example[0], 0)
    assert np.all(np.asarray(per_example[1]) != 0)
    _, grad = value_and_grad(loss)(student, teacher)
    np.testing.assert_array_equal(grad[0], 0)
    assert np.all(np.isfinite(grad)) and np.any(np.asarray(grad[1]) != 0)


@each(ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_not_swallowed(loss, bad):
    broken = logits(0).at[0, 0, 0].set(bad)
    assert not jnp.isfinite(loss(broken, logits(1))[0, 0])
    assert not jnp.isfinite(loss(logits(1), broken)[0, 0])


@each(ALL)
def test_an_empty_batch_is_an_empty_loss(loss):
    assert loss(jnp.zeros((0, 8)), jnp.zeros((0, 8))).shape == (0,)


@each(ALL)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_equals_single_device(loss, axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    plain = loss(logits(0), logits(1))
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data", None, "model")))
        sharded = jax.jit(loss)(put(logits(0)), put(logits(1)))
        np.testing.assert_allclose(sharded, plain, rtol=1e-5, atol=1e-6)
        assert sharded.sharding.spec[0] == "data"


@each(ALL)
def test_shapes_must_agree(loss):
    with pytest.raises(ArgumentError, match=r"`teacher`.*\[2, 3\] beside a student of \[2, 4\]"):
        loss(jnp.zeros((2, 4)), jnp.zeros((2, 3)))
    scalar = jnp.zeros(())
    with pytest.raises(ArgumentError, match="one shape"):
        distill.decoupled(scalar, scalar, 0) if loss is decoupled else loss(scalar, scalar)


@each(ALL)
def test_class_indices_are_not_logits(loss):
    with pytest.raises(ArgumentTypeError, match="`student`: expected floating-point logits"):
        loss(jnp.zeros((2, 4), jnp.int32), jnp.zeros((2, 4)))


@each(SOFT)
@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan, np.ones(2), jnp.float32(0)])
def test_a_bad_temperature_is_refused(loss, bad):
    with pytest.raises(ArgumentError, match="`temperature`: expected a positive, finite scalar"):
        loss(logits(0), logits(1), temperature=bad)
