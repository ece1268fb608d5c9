"""The divergences against NumPy, optax, scipy and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.spatial.distance
import scipy.special

from jaxcompress import distill

pytestmark = pytest.mark.usefixtures("strict_promotion")

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (3 * RNG.normal(size=(2, 5, 7))).astype(np.float32)


def softmax(logits, temperature=1.0):
    return scipy.special.softmax(logits.astype(np.float64) / temperature, axis=-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_both_ways_against_scipy(temperature):
    p, q = softmax(TEACHER, temperature), softmax(STUDENT, temperature)
    forward = temperature**2 * scipy.special.rel_entr(p, q).sum(-1)
    backward = temperature**2 * scipy.special.rel_entr(q, p).sum(-1)
    kl = distill.kl(STUDENT, TEACHER, temperature=temperature)
    np.testing.assert_allclose(kl, forward, rtol=1e-5)
    reverse = distill.reverse_kl(STUDENT, TEACHER, temperature=temperature)
    np.testing.assert_allclose(reverse, backward, rtol=1e-5)


def test_kl_is_the_one_of_optax():
    log_q, log_p = jax.nn.log_softmax(STUDENT), jax.nn.log_softmax(TEACHER)
    theirs = optax.losses.kl_divergence_with_log_targets(log_q, log_p)
    np.testing.assert_allclose(distill.kl(STUDENT, TEACHER), theirs, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_of_kl_in_closed_form(temperature):
    grad = jax.grad(lambda s: distill.kl(s, TEACHER, temperature=temperature).sum())(STUDENT)
    p, q = softmax(TEACHER, temperature), softmax(STUDENT, temperature)
    np.testing.assert_allclose(grad, temperature * (q - p), rtol=1e-4, atol=1e-6)


def test_hot_kl_is_half_the_mean_squared_difference_of_centred_logits():
    centred = [x - x.mean(-1, keepdims=True) for x in (STUDENT, TEACHER)]
    limit = ((centred[0] - centred[1]) ** 2).mean(-1) / 2
    with jax.enable_x64(True):
        hot = distill.kl(STUDENT.astype(np.float64), TEACHER, temperature=1e4)
    np.testing.assert_allclose(hot, limit, rtol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_jensen_shannon_against_scipy(temperature):
    p, q = softmax(TEACHER, temperature), softmax(STUDENT, temperature)
    theirs = scipy.spatial.distance.jensenshannon(p, q, axis=-1) ** 2 * temperature**2
    ours = distill.jensen_shannon(STUDENT, TEACHER, temperature=temperature)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_jensen_shannon_is_symmetric_and_bounded():
    there, back = distill.jensen_shannon(STUDENT, TEACHER), distill.jensen_shannon(TEACHER, STUDENT)
    np.testing.assert_allclose(there, back, rtol=1e-5)
    apart = distill.jensen_shannon(jnp.array([1e4, -1e4]), jnp.array([-1e4, 1e4]))
    np.testing.assert_allclose(apart, np.log(2), rtol=1e-6)


def test_soft_cross_entropy_against_optax():
    theirs = optax.losses.safe_softmax_cross_entropy(STUDENT, jax.nn.softmax(TEACHER))
    np.testing.assert_allclose(distill.soft_cross_entropy(STUDENT, TEACHER), theirs, rtol=1e-5)


def test_soft_cross_entropy_is_kl_plus_entropy():
    p = softmax(TEACHER, 2.0)
    entropy = 4 * scipy.special.entr(p).sum(-1)
    kl = distill.kl(STUDENT, TEACHER, temperature=2.0)
    soft = distill.soft_cross_entropy(STUDENT, TEACHER, temperature=2.0)
    np.testing.assert_allclose(soft, kl + entropy, rtol=1e-5)


def test_logit_mse_against_numpy():
    expected = ((STUDENT.astype(np.float64) - TEACHER) ** 2).mean(-1)
    np.testing.assert_allclose(distill.logit_mse(STUDENT, TEACHER), expected, rtol=1e-5)


def test_mask_on_one_side_only():
    half = jnp.array([0.0, -jnp.inf])
    both = jnp.array([0.0, 0.0])
    # The teacher puts mass where the student cannot, and the reverse.
    assert distill.kl(half, both) == jnp.inf
    assert distill.reverse_kl(both, half) == jnp.inf
    # Where the weighting side has no mass, nothing is asked of the other.
    np.testing.assert_allclose(distill.kl(both, half), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(distill.reverse_kl(half, both), np.log(2), rtol=1e-6)
    assert 0 < distill.jensen_shannon(half, both) < np.log(2)
    assert distill.logit_mse(half, both) == jnp.inf
    grad = jax.grad(distill.kl)(both, half)
    np.testing.assert_allclose(grad, [-0.5, 0.5], rtol=1e-6)


def test_small_divergences_keep_their_digits():
    student = TEACHER + 1e-3 * RNG.normal(size=TEACHER.shape).astype(np.float32)
    p, q = softmax(TEACHER), softmax(student)
    exact = scipy.special.rel_entr(p, q).sum(-1)
    np.testing.assert_allclose(distill.kl(student, TEACHER), exact, atol=3e-7)
