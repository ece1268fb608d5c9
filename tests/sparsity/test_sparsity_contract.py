"""One contract for every score with every pattern: jit, vmap, bfloat16, Explicit shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress import errors, sparsity
from jaxcompress.sparsity import NM, Block, Channel, Unstructured

SCORES = {
    "random": sparsity.random(jax.random.key(0)),
    "magnitude": sparsity.magnitude(),
    "magnitude L2": sparsity.magnitude(order=2),
    "saliency": sparsity.saliency(),
    "taylor": sparsity.taylor(),
    "fisher": sparsity.fisher(),
    "movement": sparsity.movement(),
}
PATTERNS = {
    "unstructured": Unstructured(),
    "n:m": NM(2, 4),
    "block": Block((2, 2)),
    "channel": Channel(),
}
W, G = np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32)


def masks(score, w, g):
    """Give the mask that each pattern makes of one leaf, beside a scalar that has none."""
    params, grads = {"w": w, "scalar": jnp.ones(())}, {"w": g, "scalar": jnp.ones(())}
    made = {
        name: sparsity.make_mask(params, sparsity=0.5, score=score, pattern=pattern, grads=grads)
        for name, pattern in PATTERNS.items()
    }
    assert all(mask["scalar"] is None for mask in made.values())
    return {name: mask["w"] for name, mask in made.items()}


@pytest.fixture(params=SCORES, scope="module")
def score(request):
    return SCORES[request.param]


@pytest.fixture(scope="module")
def eager(score):
    return masks(score, W, G)


def test_half_is_kept_in_the_shape_of_the_leaf(eager):
    for mask in eager.values():
        assert mask.shape == W.shape and mask.dtype == bool and mask.mean() == 0.5


def test_jit_and_vmap(score, eager):
    both = jax.jit(jax.vmap(lambda w, g: masks(score, w, g)))(
        jnp.stack([W, -2 * W[::-1]]), jnp.stack([G, G[::-1]])
    )
    other = masks(score, -2 * W[::-1], G[::-1])
    for name, mask in both.items():
        np.testing.assert_array_equal(mask[0], eager[name])
        np.testing.assert_array_equal(mask[1], other[name])


def test_bfloat16(score):
    narrow = [x.astype(jnp.bfloat16) for x in (W, G)]
    for mask in jax.jit(lambda w, g: masks(score, w, g))(*narrow).values():
        assert mask.dtype == bool and mask.mean() == 0.5


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded(score, eager, axis_type):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda w, g: masks(score, w, g))(*jax.device_put((W, G), sharding))
    for name, mask in got.items():
        np.testing.assert_array_equal(mask, eager[name])
        if axis_type is AxisType.Explicit:
            assert mask.sharding.is_equivalent_to(sharding, 2)


def test_an_empty_tree_is_refused(score):
    with pytest.raises(errors.SelectionError):
        sparsity.make_mask({}, sparsity=0.5, score=score, grads={})
