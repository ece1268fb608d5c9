"""The damped factor and the column solver against NumPy in float64, column by column."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import errors, linalg

pytestmark = pytest.mark.usefixtures("strict_promotion")

N, OUT = 12, 5


@pytest.fixture(scope="module")
def hessian():
    x = np.random.default_rng(0).standard_normal((40, N)) @ np.diag(np.linspace(0.3, 2, N))
    x += x[:, :1]  # correlated
    return (x.T @ x / len(x)).astype(np.float32)


@pytest.fixture(scope="module")
def w():
    return np.random.default_rng(1).standard_normal((N, OUT)).astype(np.float32)


def reference_factor(hessian, damping):
    h = hessian.astype(np.float64)
    h[np.diag_indices(N)] += h.diagonal() == 0
    h += damping * h.diagonal().mean() * np.eye(N)
    return np.linalg.cholesky(np.linalg.inv(h)).T


def reference_solve(w, upper, round):
    """Algorithm 1 of GPTQ without blocks: each error goes to all the rows to come."""
    w = w.astype(np.float64)
    for i in range(len(w)):
        value = round(i, w[i])
        error = (w[i] - value) / upper[i, i]
        w[i] = value
        w[i + 1 :] -= np.outer(upper[i, i + 1 :], error)
    return w


def test_the_factor_is_that_of_the_inverse(hessian):
    got = linalg.damped_cholesky(hessian, damping=0.05)
    np.testing.assert_allclose(got.upper, reference_factor(hessian, 0.05), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.added, 0.05 * hessian.diagonal().mean(), rtol=1e-6)
    assert bool(got.succeeded) and float(got.damping) == pytest.approx(0.05)


def test_dead_inputs_stand_alone(hessian):
    hessian = hessian.copy()
    hessian[3], hessian[:, 3] = 0, 0
    got = linalg.damped_cholesky(hessian)
    np.testing.assert_allclose(got.upper, reference_factor(hessian, 0.01), rtol=1e-4, atol=1e-5)
    assert np.count_nonzero(got.upper[3]) == 1 == np.count_nonzero(got.upper[:, 3])


@pytest.mark.parametrize(("shift", "damping"), [(0.0, 0.01), (0.05, 0.1), (0.5, 1.0), (20, None)])
def test_damping_rises_until_it_succeeds(hessian, shift, damping):
    """The smallest eigenvalue is set to `-shift` of the mean diagonal."""
    values, vectors = np.linalg.eigh(hessian.astype(np.float64))
    values[0] = -shift * hessian.diagonal().mean()
    indefinite = (vectors * values) @ vectors.T
    if shift == 20:
        indefinite -= np.diag(indefinite.diagonal()) - 0.01 * np.eye(N)
    got = linalg.damped_cholesky(indefinite.astype(np.float32))
    if damping is None:
        assert not bool(got.succeeded) and float(got.damping) == 0 and not np.any(got.added)
        np.testing.assert_array_equal(got.upper, np.eye(N))
    else:
        assert bool(got.succeeded) and float(got.damping) == pytest.approx(damping)
        upper = reference_factor(indefinite, damping)
        np.testing.assert_allclose(got.upper, upper, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_fails(hessian, bad):
    hessian = hessian.copy()
    hessian[2, 2] = bad
    got = linalg.damped_cholesky(hessian)
    assert not bool(got.succeeded)
    np.testing.assert_array_equal(got.upper, np.eye(N))


def test_factors_of_a_stack_are_those_of_each(hessian):
    bad = -hessian
    stack = jax.vmap(linalg.damped_cholesky)(jnp.stack([hessian, bad, 2 * hessian]))
    assert stack.succeeded.tolist() == [True, False, True]
    for i, one in enumerate((hessian, bad, 2 * hessian)):
        np.testing.assert_allclose(
            stack.upper[i], linalg.damped_cholesky(one).upper, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("block", [1, 4, 5, 12, 99])
def test_blocks_do_not_matter(hessian, w, block):
    upper = reference_factor(hessian, 0.01)
    got, states = jax.jit(
        lambda w, u: linalg.solve_columns(w, u, lambda i, row, _: jnp.round(row), block=block)
    )(w, upper.astype(np.float32))
    assert states is None
    np.testing.assert_array_equal(got, reference_solve(w, upper, lambda i, row: np.round(row)))


@pytest.mark.parametrize(("segment", "block"), [(2, 5), (4, 4), (6, 4), (12, 8), (3, 100)])
def test_segments_start_from_updated_weights(hessian, w, segment, block):
    """Each segment is rounded to a grid of its own largest entry, and its index is seen."""
    upper = reference_factor(hessian, 0.01)

    def start(index, rows, diagonal):
        return index, jnp.abs(rows).max(0) / 4, diagonal

    got, (index, steps, diagonal) = jax.jit(
        lambda w, u: linalg.solve_columns(
            w,
            u,
            lambda i, row, state: jnp.round(row / state[1]) * state[1],
            start=start,
            segment=segment,
            block=block,
        )
    )(w, upper.astype(np.float32))

    current, expected = w.astype(np.float64), []
    for i in range(N):
        if i % segment == 0:
            expected.append(np.abs(current[i : i + segment]).max(0) / 4)
        value = np.round(current[i] / expected[-1]) * expected[-1]
        error = (current[i] - value) / upper[i, i]
        current[i] = value
        current[i + 1 :] -= np.outer(upper[i, i + 1 :], error)
    np.testing.assert_allclose(steps, expected, rtol=1e-4)
    np.testing.assert_allclose(got, current, rtol=1e-4, atol=1e-5)
    assert index.tolist() == list(range(N // segment))
    np.testing.assert_allclose(diagonal.ravel(), upper.diagonal(), rtol=1e-5)


def test_pruning_and_rounding_in_one_pass(hessian, w):
    """SparseGPT's masks, 2 of 4 per output by `w²/diag(U)²` of updated weights; then rounded."""
    upper = reference_factor(hessian, 0.01)

    def start(index, rows, diagonal):
        del index
        return linalg.top_k_mask(jnp.square(rows / diagonal[:, None]), 2, axis=0)

    def round(index, row, mask):
        return jnp.where(mask[index % 4], jnp.round(row), 0)

    got, masks = jax.jit(
        lambda w, u: linalg.solve_columns(w, u, round, start=start, segment=4, block=8)
    )(w, upper.astype(np.float32))

    masked = np.zeros((N, OUT), bool)
    current = w.astype(np.float64)
    for i in range(N):
        if i % 4 == 0:
            score = (current[i : i + 4] / upper.diagonal()[i : i + 4, None]) ** 2
            masked[i : i + 4] = np.argsort(np.argsort(-score, 0), 0) < 2
        value = np.where(masked[i], np.round(current[i]), 0)
        error = (current[i] - value) / upper[i, i]
        current[i] = value
        current[i + 1 :] -= np.outer(upper[i, i + 1 :], error)
    np.testing.assert_array_equal(masks.reshape(N, OUT), masked)
    np.testing.assert_array_equal(got, current)


@pytest.mark.parametrize("block", [1, 5, 12])
def test_descent_is_cyclic_coordinate_descent(hessian, w, block):
    h = hessian.astype(np.float64)
    got = np.round(w)
    expected = got.astype(np.float64)

    def trace(values):
        return np.einsum("io,ij,jo", w - values, h, w - values)

    descend = jax.jit(
        lambda v, w, h: linalg.descend_columns(
            v, w, h, lambda i, row, _: jnp.round(row), block=block
        )
    )
    for _ in range(3):
        before = trace(got)
        got = descend(got, w, hessian)
        for i in range(N):
            expected[i] = np.round(expected[i] + h[i] @ (w - expected) / h[i, i])
        np.testing.assert_array_equal(got, expected)
        assert trace(np.asarray(got)) <= before
    assert trace(np.asarray(got)) < 0.9 * trace(np.round(w))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: linalg.damped_cholesky(jnp.ones((2, 3))), "square"),
        (lambda: linalg.damped_cholesky(jnp.eye(2), damping=0.0), "positive fraction"),
        (lambda: linalg.damped_cholesky(jnp.eye(2), damping=2.0, limit=1.0), "up to `limit`"),
        (lambda: solve(block=0), "1 or more"),
        (lambda: solve(segment=2), "without `start`"),
        (lambda: solve(segment=5, start=lambda i, rows, d: rows), "divisor"),
        (
            lambda: linalg.descend_columns(
                jnp.ones((2, 1)), jnp.ones((2, 1)), jnp.eye(2), lambda i, row, _: row, block=-1
            ),
            "1 or more",
        ),
    ],
)
def test_misuse(call, says):
    with pytest.raises(errors.ArgumentError, match=says):
        call()


def solve(**options):
    return linalg.solve_columns(jnp.ones((4, 1)), jnp.eye(4), lambda i, row, _: row, **options)
