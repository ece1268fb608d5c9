"""Decoupled distillation against NumPy, and the identity that gives it its name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxcompress import distill
from jaxcompress.errors import ArgumentError, ArgumentTypeError

pytestmark = pytest.mark.usefixtures("strict_promotion")

RNG = np.random.default_rng(1)
STUDENT, TEACHER = (2 * RNG.normal(size=(2, 6, 5))).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 4, 0], np.int32)


def by_loop(student, teacher, labels, *, alpha, beta, temperature):
    """Equations 1 to 7 of the paper, one example at a time."""
    out = []
    for s, t, label in zip(student.astype(float), teacher.astype(float), labels, strict=True):
        p, q = (scipy.special.softmax(x / temperature) for x in (t, s))
        binary_p, binary_q = ([x[label], 1 - x[label]] for x in (p, q))
        other_p, other_q = (np.delete(x, label) / (1 - x[label]) for x in (p, q))
        target = scipy.special.rel_entr(binary_p, binary_q).sum()
        others = scipy.special.rel_entr(other_p, other_q).sum()
        out.append(temperature**2 * (alpha * target + beta * others))
    return np.array(out)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (1.0, 8.0)])
def test_against_numpy(alpha, beta, temperature):
    weights = {"alpha": alpha, "beta": beta, "temperature": temperature}
    ours = distill.decoupled(STUDENT, TEACHER, LABELS, **weights)
    np.testing.assert_allclose(ours, by_loop(STUDENT, TEACHER, LABELS, **weights), rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_is_tckd_plus_one_minus_p_times_nckd(temperature):
    def part(alpha, beta):
        return distill.decoupled(
            STUDENT, TEACHER, LABELS, alpha=alpha, beta=beta, temperature=temperature
        )

    confidence = np.take_along_axis(
        scipy.special.softmax(TEACHER / temperature, -1), LABELS[:, None], -1
    )[:, 0]
    whole = distill.kl(STUDENT, TEACHER, temperature=temperature)
    np.testing.assert_allclose(part(1.0, 0.0) + (1 - confidence) * part(0.0, 1.0), whole, rtol=1e-4)


def test_defaults_are_the_papers():
    paper = by_loop(STUDENT, TEACHER, LABELS, alpha=1, beta=8, temperature=4)
    np.testing.assert_allclose(distill.decoupled(STUDENT, TEACHER, LABELS), paper, rtol=1e-4)


def test_a_sure_teacher_still_teaches_the_other_classes():
    teacher = np.array([60.0, 2.0, 0.0], np.float32)  # 1 - p is 0 in float32
    ours = distill.decoupled(jnp.zeros(3), teacher, jnp.array(0), alpha=0.0, temperature=1.0)
    p = scipy.special.softmax([2.0, 0.0])
    np.testing.assert_allclose(ours, 8 * scipy.special.rel_entr(p, [0.5, 0.5]).sum(), rtol=1e-5)


def test_two_classes_have_no_others_to_compare():
    binary = distill.decoupled(STUDENT[:, :2], TEACHER[:, :2], LABELS % 2, alpha=0.0)
    np.testing.assert_array_equal(binary, 0)


def test_weights_may_be_traced():
    f = jax.jit(lambda a, b: distill.decoupled(STUDENT, TEACHER, LABELS, alpha=a, beta=b))
    np.testing.assert_allclose(
        f(jnp.float32(2), jnp.float32(3)),
        distill.decoupled(STUDENT, TEACHER, LABELS, alpha=2.0, beta=3.0),
        rtol=1e-5,
    )


@pytest.mark.parametrize("bad", [-1, 5])
def test_a_label_out_of_range_is_refused_and_is_nan_under_jit(bad):
    labels = np.array([0, bad, 2, 3, 4, 0])
    with pytest.raises(ArgumentError, match=r"`labels`: expected class indices from 0 to 4"):
        distill.decoupled(STUDENT, TEACHER, labels)
    loss = jax.jit(distill.decoupled)(STUDENT, TEACHER, labels)
    np.testing.assert_array_equal(np.isnan(loss), labels == bad)


def test_a_padded_example_can_be_dropped_after_the_loss():
    labels, kept = np.array([0, -1, 2, 3, 4, 0]), np.array([1, 0, 1, 1, 1, 1], bool)

    @jax.jit
    @jax.grad
    def grad(student, labels):
        loss = distill.decoupled(student, TEACHER, labels)
        return jnp.mean(loss, where=kept)

    result = grad(STUDENT, labels)
    assert np.all(np.isfinite(result)) and np.all(result[1] == 0) and np.any(result[0] != 0)


def test_labels_must_be_indices_of_the_examples():
    with pytest.raises(ArgumentTypeError, match="one-hot labels, take jnp.argmax"):
        distill.decoupled(STUDENT, TEACHER, np.ones((6, 5), np.float32))
    with pytest.raises(ArgumentError, match=r"got \[5\] beside logits of \[6, 5\]"):
        distill.decoupled(STUDENT, TEACHER, LABELS[:5])
    with pytest.raises(ArgumentError, match="two classes or more"):
        distill.decoupled(STUDENT[:, :1], TEACHER[:, :1], LABELS)
