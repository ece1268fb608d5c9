"""Scores against their formulas, entry by entry and for units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import errors, sparsity

pytestmark = pytest.mark.usefixtures("strict_promotion")

RNG = np.random.default_rng(0)
P = RNG.normal(size=(3, 4)).astype(np.float32)
GS = RNG.normal(size=(5, 3, 4)).astype(np.float32)
PG = (P * GS).mean(0)

ENTRIES = {
    "l1": (sparsity.magnitude(), np.abs(P)),
    "l2": (sparsity.magnitude(order=2), np.abs(P)),
    "saliency": (sparsity.saliency(), np.abs(P * GS.mean(0))),
    "taylor": (sparsity.taylor(), np.abs(PG)),
    "fisher": (sparsity.fisher(), P**2 * (GS**2).mean(0) / 2),
    "movement": (sparsity.movement(), -PG),
}
COLUMNS = {
    "l1": np.abs(P).mean(0),
    "l2": np.sqrt((P**2).mean(0)),
    "saliency": np.abs(P * GS.mean(0)).mean(0),
    "taylor": np.abs(PG.mean(0)),
    "fisher": (P**2 * (GS**2).mean(0) / 2).mean(0),
    "movement": -PG.mean(0),
}


def accumulate(score, p=P, gs=GS):
    accumulated = score.init("w", jnp.asarray(p))
    for g in gs:
        accumulated = score.update(accumulated, jnp.asarray(p), jnp.asarray(g))
    return accumulated


@pytest.mark.parametrize("name", ENTRIES)
def test_entries(name):
    score, expected = ENTRIES[name]
    got = score.evaluate(accumulate(score), jnp.asarray(P))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ENTRIES)
def test_units(name):
    score, _ = ENTRIES[name]
    mean = lambda entries: entries.mean(0)
    accumulated, p = accumulate(score), jnp.asarray(P)
    if score.evaluate_units:
        got = score.evaluate_units(accumulated, p, mean)
    else:
        got = mean(score.evaluate(accumulated, p))
    np.testing.assert_allclose(got, COLUMNS[name], rtol=1e-5, atol=1e-6)


def test_l1_and_l2_differ_once_aggregated():
    w = {"w": jnp.array([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]) + jnp.array([0.0, 0.9])}
    prune = lambda order: sparsity.make_mask(
        w, sparsity=0.5, pattern=sparsity.Channel(), score=sparsity.magnitude(order=order)
    )["w"][0]
    np.testing.assert_array_equal(prune(1), [False, True])  # means 0.67 and 0.9
    np.testing.assert_array_equal(prune(2), [True, False])  # root mean squares 1.15 and 0.9


def test_decay_weighs_the_past_less():
    score = sparsity.movement(decay=0.5)
    got = score.evaluate(accumulate(score, np.ones(1), [[1.0], [3.0]]), jnp.ones(1))
    np.testing.assert_allclose(got, [-(0.5 * 1 + 3) / 1.5], rtol=1e-6)


def test_bfloat16_params_accumulate_in_float32():
    score, p = sparsity.fisher(), jnp.ones((2,), jnp.bfloat16)
    accumulated = score.init("w", p)
    for _ in range(3):
        accumulated = score.update(accumulated, p, jnp.full((2,), 2.0**-8, jnp.bfloat16))
    assert accumulated.total.dtype == jnp.float32
    np.testing.assert_array_equal(accumulated.mean, [2.0**-16] * 2)


def test_nothing_accumulated_scores_zero():
    score = sparsity.saliency()
    np.testing.assert_array_equal(score.evaluate(score.init("w", jnp.ones(2)), jnp.ones(2)), [0, 0])


def test_random_is_distinct_by_path_and_repeatable():
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    draw = lambda seed: sparsity.make_mask(
        params, sparsity=0.5, score=sparsity.random(jax.random.key(seed))
    )
    mask, again, other = draw(0), draw(0), draw(1)
    np.testing.assert_array_equal(mask["a"], again["a"])
    assert (mask["a"] != mask["b"]).any() and (mask["a"] != other["a"]).any()
    raw = sparsity.make_mask(params, sparsity=0.5, score=sparsity.random(jax.random.PRNGKey(0)))
    np.testing.assert_array_equal(raw["a"], mask["a"])


def test_random_masks_are_nested():
    score, params = sparsity.random(jax.random.key(0)), {"a": jnp.ones((8, 8))}
    low, high = (sparsity.make_mask(params, sparsity=s, score=score)["a"] for s in (0.3, 0.7))
    assert not (high & ~low).any()


def test_accumulators_over_a_tree_feed_make_mask():
    params, score = {"w": jnp.asarray(P), "b": jnp.ones(4)}, sparsity.fisher()
    accumulated = sparsity.init_scores(params, score=score)
    assert accumulated["b"] is None
    for g in GS:
        grads = {"w": jnp.asarray(g), "b": jnp.ones(4)}
        accumulated = sparsity.update_scores(accumulated, params, grads, score=score)
    mask = sparsity.make_mask(params, sparsity=0.5, score=score, grads=accumulated)
    assert mask["b"] is None
    expected = ENTRIES["fisher"][1]
    np.testing.assert_array_equal(mask["w"], expected > np.sort(expected.ravel())[5])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: sparsity.magnitude(order=3), "1 or 2"),
        (lambda: sparsity.fisher(decay=2.0), "from 0 to 1"),
        (
            lambda: sparsity.make_mask(
                {"w": jnp.asarray(P)}, sparsity=0.5, score=sparsity.saliency()
            ),
            "gradient",
        ),
        (
            lambda: sparsity.make_mask(
                {"w": jnp.asarray(P)}, sparsity=0.5, score=sparsity.saliency(), grads={"w": None}
            ),
            "'w'",
        ),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(errors.ArgumentError, match=says):
        call()
