"""Matrices and kernels of low rank against NumPy and what the theorems say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.errors import ArgumentError
from jaxcompress.lowrank import ActivationSVD, Tucker2, activation_svd, spectra, svd, tucker2
from jaxcompress.lowrank._methods import break_even

pytestmark = pytest.mark.usefixtures("strict_promotion")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def skewed(tokens, features, seed=1):
    """Inputs of which some directions are a hundred times as large as others."""
    x = draw(tokens, features, seed=seed) @ draw(features, features, seed=seed + 1)
    return x * np.logspace(0, 2, features, dtype=np.float32)


def product(pair):
    return np.asarray(pair.left, np.float64) @ np.asarray(pair.right, np.float64)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_is_numpy_s(shape, rank):
    w = draw(*shape)
    u, s, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    pair = svd(w, rank)
    np.testing.assert_allclose(product(pair), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-5)
    np.testing.assert_allclose(pair.values, s, rtol=1e-5)
    error = np.square(product(pair) - w).sum()
    np.testing.assert_allclose(error, np.square(s[rank:]).sum(), atol=1e-5)


def test_columns_are_as_long_as_their_rows():
    w, x = draw(7, 5), skewed(40, 7)
    for pair in (svd(w, 4), activation_svd(w, x.T @ x, 4)):
        np.testing.assert_allclose(
            np.linalg.norm(pair.left, axis=0), np.linalg.norm(pair.right, axis=1), rtol=1e-5
        )


def closed_form(w, gram, rank):
    """`S⁻ᵀ (SᵀW)_r`, with the inverse, in float64."""
    s = np.linalg.cholesky(gram)
    u, values, vt = np.linalg.svd(s.T @ w, full_matrices=False)
    return np.linalg.solve(s.T, (u[:, :rank] * values[:rank]) @ vt[:rank]), values


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
@pytest.mark.parametrize("rank", [1, 3])
def test_activation_svd_is_the_closed_form(shape, rank):
    w, x = draw(*shape), skewed(60, shape[0])
    gram = (x.astype(np.float64).T @ x) / len(x)
    damped = gram + 1e-4 * np.trace(gram) / len(gram) * np.eye(len(gram))
    expected, values = closed_form(w, damped, rank)
    pair = activation_svd(w, gram.astype(np.float32), rank)
    off = np.linalg.norm(x @ (product(pair) - expected)) / np.linalg.norm(x @ expected)
    assert off < 1e-3
    np.testing.assert_allclose(pair.values, values, rtol=1e-3, atol=1e-3 * values[0])


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
def test_activation_svd_never_loses_to_plain_svd_on_outputs(damping):
    for seed in range(8):
        w, x = draw(6, 5, seed=seed), skewed(4 + 3 * seed, 6, seed=seed + 9)
        x64, w64 = x.astype(np.float64), w.astype(np.float64)
        gram = (x64.T @ x64).astype(np.float32)
        for rank in (1, 2, 4):
            pairs = activation_svd(w, gram, rank, damping=damping), svd(w, rank)
            mine, plain = (np.linalg.norm(x64 @ (w64 - product(pair))) for pair in pairs)
            assert mine <= plain * (1 + 1e-4) + 1e-4 * np.linalg.norm(x64 @ w64)


def test_inputs_that_are_never_seen():
    """Of a gram of rank 2 only two outputs' directions matter; without inputs it is plain SVD."""
    w, x = draw(6, 5), draw(40, 6)
    x[:, 2:] = 0
    pair = activation_svd(w, x.T @ x, 2, damping=1e-6)
    np.testing.assert_allclose(x @ product(pair), x @ w, atol=1e-2)
    nothing = activation_svd(w, np.zeros((6, 6)), 3)
    np.testing.assert_allclose(product(nothing), product(svd(w, 3)), atol=1e-4)


def test_zero_matrices_stay_zero():
    for pair in (svd(np.zeros((4, 3)), 2), activation_svd(np.zeros((4, 3)), np.eye(4), 2)):
        assert np.isfinite(pair.left).all() and not product(pair).any()


# --- Tucker-2 ------------------------------------------------------------------------------------


def back(parts):
    return np.einsum("ia,hwab,bo->hwio", *(np.asarray(p, np.float64) for p in parts))


def loss(kernel, *ranks, **kwargs):
    return np.square(back(tucker2(kernel, *ranks, **kwargs)) - kernel).sum()


def test_tucker2_finds_a_kernel_of_its_rank():
    made = np.einsum("ia,hwab,bo->hwio", draw(6, 2), draw(3, 3, 2, 3, seed=1), draw(3, 5, seed=2))
    parts = tucker2(made, 2, 3)
    np.testing.assert_allclose(back(parts), made, atol=1e-4)
    np.testing.assert_allclose(parts.left.T @ parts.left, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(parts.right @ parts.right.T, np.eye(3), atol=1e-5)


def test_hosvd_is_numpy_s_and_hooi_improves_it():
    k = draw(3, 3, 6, 5)
    inputs = np.moveaxis(k, 2, 0).reshape(6, -1).astype(np.float64)
    outputs = np.moveaxis(k, 3, 0).reshape(5, -1).astype(np.float64)
    a, s, _ = np.linalg.svd(inputs, full_matrices=False)
    b, t, _ = np.linalg.svd(outputs, full_matrices=False)
    found = spectra(k)
    np.testing.assert_allclose(found.inputs, s**2, rtol=1e-4)
    np.testing.assert_allclose(found.outputs, t**2, rtol=1e-4)
    p, q = a[:, :2] @ a[:, :2].T, b[:, :3] @ b[:, :3].T
    hosvd = np.einsum("hwio,ij,op->hwjp", k, p, q)
    np.testing.assert_allclose(back(tucker2(k, 2, 3, iterations=0)), hosvd, atol=1e-4)
    losses = [loss(k, 2, 3, iterations=n) for n in (0, 1, 10)]
    assert losses[2] <= losses[1] * 1.00001 <= losses[0] * 1.0001
    assert losses[2] < losses[0] * 0.999
    assert losses[0] <= np.sum(s[2:] ** 2) + np.sum(t[3:] ** 2)  # the bound that ranks go by
    core = tucker2(k, 2, 3).core
    np.testing.assert_allclose(losses[2], np.square(k).sum() - np.square(core).sum(), rtol=1e-4)


def test_tucker2_under_vmap_and_jit():
    k = draw(2, 3, 1, 4, 5)
    each = jax.jit(jax.vmap(lambda k: tucker2(k, 2, 2, iterations=2)))(jnp.asarray(k))
    np.testing.assert_allclose(
        back(jax.tree.map(lambda x: x[1], each)), back(tucker2(k[1], 2, 2, iterations=2)), atol=1e-4
    )


# --- Ranks and misuse ----------------------------------------------------------------------------


def test_break_even_is_the_last_rank_that_saves():
    for inner in range(1, 12):
        for outer in range(1, 12):
            saving = [r for r in range(1, 12) if r * (inner + outer) < inner * outer]
            assert break_even(inner, outer) == max(saving, default=0)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: svd(np.ones((2, 3)), 3), "rank"),
        (lambda: svd(np.ones((2, 3)), 0), "rank"),
        (lambda: svd(np.ones(3), 1), "w"),
        (lambda: activation_svd(np.ones((2, 3)), np.eye(3), 1), "gram"),
        (lambda: activation_svd(np.ones((2, 3)), np.eye(2), 1, damping=0.0), "damping"),
        (lambda: tucker2(np.ones(3), 1, 1), "kernel"),
        (lambda: tucker2(np.ones((3, 3, 2, 4)), 3, 1), "rank_in"),
        (lambda: tucker2(np.ones((3, 3, 2, 4)), 1, 5), "rank_out"),
        (lambda: tucker2(np.ones((3, 3, 2, 4)), 1, 1, iterations=-1), "iterations"),
        (lambda: Tucker2(iterations=-1), "iterations"),
        (lambda: ActivationSVD(damping=0.0), "damping"),
    ],
)
def test_misuse(call, argument):
    with pytest.raises(ArgumentError, match=f"^`{argument}`"):
        call()
