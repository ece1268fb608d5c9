"""Exact top-k against a stable NumPy sort."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress import errors, linalg

pytestmark = pytest.mark.usefixtures("strict_promotion")


def reference(scores, k):
    """The k largest, ties by row-major index, -0 == 0 (ml_dtypes hold exactly in float64)."""
    flat = np.asarray(scores).astype(np.float64).reshape(-1) + 0.0
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:k]] = True
    return mask.reshape(np.shape(scores))


FINITE = st.floats(width=16, allow_nan=False)  # infinities, subnormals and both zeros too
SCORES = st.one_of(
    st.lists(FINITE, min_size=12, max_size=12),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0]), min_size=12, max_size=12),
    st.sampled_from([[0.0] * 12, [-np.inf] * 12, [np.inf] * 11 + [-np.inf]]),
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@hypothesis.given(values=SCORES, k=st.integers(0, 12))
def test_matches_a_stable_sort(dtype, values, k):
    x = jnp.asarray(np.array(values, np.float32).reshape(3, 4)).astype(dtype)
    np.testing.assert_array_equal(linalg.top_k_mask(x, k), reference(x, k))


@hypothesis.given(values=SCORES, k=st.integers(0, 12))
def test_joint_matches_one_sort_over_all(values, k):
    x = np.array(values, np.float32)
    masks = linalg.top_k_masks([jnp.asarray(x[:4]), jnp.asarray(x[4:].reshape(2, 4))], k)
    assert masks[1].shape == (2, 4)
    np.testing.assert_array_equal(np.concatenate([m.reshape(-1) for m in masks]), reference(x, k))


@hypothesis.given(values=SCORES, k=st.integers(0, 20))
def test_costs_keep_the_fewest_that_reach_k(values, k):
    x, cost = np.array(values, np.float32), np.repeat([2, 1], [8, 4])
    masks = linalg.top_k_masks([jnp.asarray(x[:8]), jnp.asarray(x[8:])], k, costs=[2, 1])
    order = np.argsort(-x, kind="stable")
    fewest = np.searchsorted(np.cumsum(cost[order]), k) + 1 if k else 0
    np.testing.assert_array_equal(np.concatenate(masks), reference(x, fewest))


@pytest.mark.parametrize("axis", [0, 1, (0, 1), (1, 2), -1])
def test_along_axes_each_row_competes_alone(axis):
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 3, (3, 4, 5)).astype(np.float32)  # ties abound
    mask = np.asarray(linalg.top_k_mask(jnp.asarray(x), 2, axis=axis))
    axes = tuple(np.atleast_1d(axis) % 3)
    size = int(np.prod([x.shape[a] for a in axes]))
    order = [a for a in range(3) if a not in axes] + list(axes)
    rows, got = (a.transpose(order).reshape(-1, size) for a in (x, mask))
    np.testing.assert_array_equal(got, [reference(row, 2) for row in rows])


def test_k_per_column():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    ks = jnp.array([[0, 1, 3, 6]])
    np.testing.assert_array_equal(linalg.top_k_mask(x, ks, axis=0).sum(0), [0, 1, 3, 6])


@pytest.mark.parametrize(("size", "k"), [(4, 2), (40, 7)])
@pytest.mark.parametrize("axis", [0, 1])
def test_groups_of_neighbours(size, k, axis):
    """Both ways of ranking: by comparing pairs (4), and by searching (40)."""
    shape = (2 * size, 3) if axis == 0 else (3, 2 * size)
    x = np.random.default_rng(1).integers(-3, 4, shape).astype(np.float32)
    mask = np.asarray(linalg.top_k_in_groups(jnp.asarray(x), k, axis=axis, size=size))
    groups, got = (np.moveaxis(a, axis, -1).reshape(-1, size) for a in (x, mask))
    np.testing.assert_array_equal(got, [reference(row, k) for row in groups])


def test_jit_and_vmap_with_a_traced_k():
    x = jnp.asarray(np.random.default_rng(2).integers(0, 5, (4, 3, 4)), jnp.float32)
    ks = jnp.array([0, 3, 7, 12])
    masks = jax.jit(jax.vmap(linalg.top_k_mask))(x, ks)
    np.testing.assert_array_equal(
        masks, [reference(row, k) for row, k in zip(x, ks.tolist(), strict=True)]
    )


def test_a_traced_k_is_clipped():
    keep = jax.jit(linalg.top_k_mask)
    assert keep(jnp.ones((3, 4)), -3).sum() == 0
    assert keep(jnp.ones((3, 4)), 99).sum() == 12


def test_float64_keeps_its_precision():
    with jax.enable_x64(True):
        x = 1 + jnp.arange(5, dtype=jnp.float64) * 2.0**-50  # equal in float32
        np.testing.assert_array_equal(linalg.top_k_mask(x, 2), [False, False, False, True, True])


def test_sizes_zero_and_one():
    assert linalg.top_k_mask(jnp.ones((0, 3)), 0).shape == (0, 3)
    assert bool(linalg.top_k_mask(jnp.float32(2), 1))
    assert linalg.top_k_masks([], 0) == []
    masks = linalg.top_k_masks([jnp.ones((0, 2)), jnp.ones(2)], 1)
    np.testing.assert_array_equal(masks[1], [True, False])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_equals_single_device(axis_type):
    """Same masks, sharded like the scores, and nothing larger than the counts is gathered."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    x = jnp.asarray(np.random.default_rng(3).integers(-9, 9, (8, 6)), jnp.float32)
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    y = jax.device_put(x, sharding)

    def select(x):
        return (
            *linalg.top_k_masks([x, 2 * x], 31),
            linalg.top_k_mask(x, 3, axis=0),
            linalg.top_k_in_groups(x, 2, axis=0, size=4),  # groups cross the shards
        )

    with jax.set_mesh(mesh):
        compiled = jax.jit(select).lower(y).compile()
        masks = compiled(y)
    for mask, expected in zip(masks, select(x), strict=True):
        np.testing.assert_array_equal(mask, expected)
    assert all(mask.sharding.is_equivalent_to(sharding, 2) for mask in masks[:3])

    joint = jax.jit(lambda x: linalg.top_k_mask(x, 31))
    with jax.set_mesh(mesh):
        text = joint.lower(y).compile().as_text()
    assert "all-to-all" not in text
    gathered = [line for line in text.splitlines() if "all-gather(" in line]
    assert gathered and all("[8,6]" not in line for line in gathered)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: linalg.top_k_mask(jnp.arange(4), 1), errors.ArgumentTypeError, "int32"),
        (lambda: linalg.top_k_mask(jnp.ones(4), 5), errors.ArgumentError, "from 0 to 4"),
        (lambda: linalg.top_k_mask(jnp.ones(4), 1.5), errors.ArgumentError, "integer"),
        (lambda: linalg.top_k_mask(jnp.ones(4), 1, axis=2), errors.ArgumentError, "axes"),
        (lambda: linalg.top_k_mask(jnp.array([1, jnp.nan]), 1), errors.NonFiniteError, "NaN"),
        (lambda: linalg.top_k_masks([jnp.ones(2)], 1, costs=[0]), errors.ArgumentError, "positive"),
        (
            lambda: linalg.top_k_in_groups(jnp.ones(6), 2, axis=0, size=4),
            errors.ArgumentError,
            "divisor",
        ),
        (
            lambda: jax.eval_shape(
                lambda x: linalg.top_k_mask(x, 1),
                jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32),
            ),
            errors.ArgumentError,
            "2\\*\\*31",
        ),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()
