"""Masks: exact ratios, structure, patterns, targets, intersections, refusals."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress import errors, sparsity, tree
from jaxcompress.sparsity import NM, Block, Channel, Unstructured

pytestmark = pytest.mark.usefixtures("strict_promotion")

KEY = jax.random.key(0)
SCORES = {
    "random": sparsity.random(KEY),
    "l1": sparsity.magnitude(),
    "l2": sparsity.magnitude(order=2),
    "saliency": sparsity.saliency(),
    "taylor": sparsity.taylor(),
    "fisher": sparsity.fisher(),
    "movement": sparsity.movement(),
}
PATTERNS = [Unstructured(), NM(2, 4), Block((4, 2)), Channel()]


def random_tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {
        "conv": {"kernel": draw(1, 3, 4, 6), "bias": draw(6)},
        "dense": {"kernel": draw(8, 4), "bias": draw(4)},
    }


PARAMS, GRADS = random_tree(0), random_tree(1)


def units_of(pattern, mask):
    """The unit mask by plain NumPy, checking that each unit is kept or pruned as a whole."""
    mask = np.asarray(mask)
    if isinstance(pattern, Unstructured):
        return mask.reshape(-1, 1)
    if isinstance(pattern, Channel):
        units = mask.reshape(-1, mask.shape[-1]).T
    else:
        *lead, a, b = mask.shape
        units = mask.reshape(*lead, a // 4, 4, b // 2, 2).swapaxes(-3, -2).reshape(-1, 8)
    assert (units.all(1) == units.any(1)).all()
    return units


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: type(pattern).__name__)
@pytest.mark.parametrize("name", SCORES)
def test_contract(name, pattern):
    """Every score in every pattern: exact ratio, whole units, untouched leaves."""
    amount = None if isinstance(pattern, NM) else 0.3
    make = functools.partial(
        sparsity.make_mask, sparsity=amount, score=SCORES[name], pattern=pattern
    )
    mask = make(PARAMS, grads=GRADS)
    assert mask["conv"]["bias"] is None and mask["dense"]["bias"] is None
    for leaf in (mask["conv"]["kernel"], mask["dense"]["kernel"]):
        if isinstance(pattern, NM):
            groups = np.moveaxis(np.asarray(leaf), -2, -1).reshape(-1, 4)
            assert (groups.sum(1) == 2).all()
        else:
            kept = units_of(pattern, leaf).all(1)
            assert (~kept).sum() == round(0.3 * kept.size)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: type(pattern).__name__)
def test_jit_equals_eager(pattern):
    amount = None if isinstance(pattern, NM) else 0.3
    make = lambda p, g: sparsity.make_mask(
        {"w": p}, sparsity=amount, score=sparsity.taylor(), pattern=pattern, grads={"w": g}
    )["w"]
    p, g = PARAMS["dense"]["kernel"], GRADS["dense"]["kernel"]
    np.testing.assert_array_equal(jax.jit(make)(p, g), make(p, g))


@hypothesis.given(amount=st.floats(0, 1), values=st.sampled_from(["random", "zeros", "ties"]))
def test_ratios_mean_what_they_say(amount, values):
    rng = np.random.default_rng(0)
    w = {"random": rng.normal(size=(5, 7)), "zeros": np.zeros((5, 7)), "ties": np.ones((5, 7))}
    params = {"w": jnp.asarray(w[values], jnp.float32)}
    for scope in ("layer", "global"):
        mask = sparsity.make_mask(params, sparsity=amount, scope=scope)
        assert int((~mask["w"]).sum()) == round(amount * 35)


def test_keeps_the_largest():
    mask = sparsity.make_mask(PARAMS, sparsity=0.5)["dense"]["kernel"]
    w = np.abs(np.asarray(PARAMS["dense"]["kernel"]))
    assert w[mask].min() >= w[~np.asarray(mask)].max()


def test_global_scope_compares_leaves():
    params = {"big": jnp.full((2, 3), 9.0), "small": jnp.full((4, 3), 1.0)}
    mask = sparsity.make_mask(params, sparsity=0.5, scope="global")
    assert mask["big"].all() and int(mask["small"].sum()) == 3


def test_global_units_compare_per_entry_and_never_exceed_the_target():
    params = {"narrow": jnp.full((2, 3), 3.0), "wide": jnp.full((10, 3), 2.0)}
    # 36 entries; half is 18, and one wide channel is 10: only one fits.
    mask = sparsity.make_mask(params, sparsity=0.5, scope="global", pattern=Channel())
    assert mask["narrow"].all()  # larger per entry, though smaller in sum
    np.testing.assert_array_equal(mask["wide"][0], [True, True, False])


def test_targets_per_path_first_match_wins():
    mask = sparsity.make_mask(PARAMS, sparsity={"conv/*": 0.25, "**/kernel": 0.5})
    totals = sparsity.sparsity_of(mask).leaves
    assert totals == {"conv/kernel": 0.25, "dense/kernel": 0.5}
    alone = sparsity.make_mask(PARAMS, sparsity={"dense/*": 0.5})
    assert alone["conv"]["kernel"] is None


def test_threshold():
    params = {"w": jnp.array([[0.5, -0.2], [-0.5, 0.7]])}
    mask = sparsity.make_mask(params, threshold=0.5)["w"]
    np.testing.assert_array_equal(mask, [[True, False], [True, True]])
    channel = sparsity.make_mask(params, threshold=0.46, pattern=Channel())["w"]
    np.testing.assert_array_equal(channel, [[True, False], [True, False]])  # means 0.5, 0.45


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("pattern", [Unstructured(), Channel()], ids=["entries", "channels"])
def test_within(scope, pattern):
    """A subset of the user's mask, whose zeros count towards the sparsity."""
    w = jnp.asarray(np.arange(1.0, 25.0).reshape(4, 6), jnp.float32)
    allowed = jnp.ones((4, 6), bool).at[:, 4:].set(False)  # the largest two columns
    mask = sparsity.make_mask(
        {"w": w}, sparsity=0.5, within={"w": allowed}, scope=scope, pattern=pattern
    )["w"]
    assert not (mask & ~allowed).any() and int(mask.sum()) == 12
    none_left = sparsity.make_mask({"w": w}, sparsity=0.1, within={"w": allowed}, scope=scope)
    np.testing.assert_array_equal(none_left["w"], allowed)


def test_nm_within_counts_what_is_gone():
    w = jnp.array([[4.0], [3.0], [2.0], [1.0]])
    allowed = jnp.array([[False], [True], [True], [True]])
    mask = sparsity.make_mask({"w": w}, pattern=NM(2, 4), within={"w": allowed})["w"]
    np.testing.assert_array_equal(mask[:, 0], [False, True, True, False])


def test_nm_at_a_lower_sparsity():
    mask = sparsity.make_mask(PARAMS, sparsity=0.25, pattern=NM(2, 4))["dense"]["kernel"]
    assert (np.asarray(mask).T.reshape(-1, 4).sum(1) == 3).all()


def test_contraction_axes_turn_the_pattern():
    params = {"query": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2)), jnp.float32)}
    for axes in ({"query": 0}, {"query": (-3,)}, {"**": (0,)}):
        mask = np.asarray(sparsity.make_mask(params, pattern=NM(1, 4), axes=axes)["query"])
        assert (mask.sum(0) == 1).all()
    mask = sparsity.make_mask(params, sparsity=0.5, pattern=Channel(), axes={"query": (0,)})
    assert (np.asarray(mask["query"]).all(0) == np.asarray(mask["query"]).any(0)).all()
    nested = sparsity.coverage({"a": params}, pattern=NM(2, 4), axes={"a": {"query": (0,)}})
    assert nested.touched == ("a/query",)


def test_coverage_names_every_leaf_once():
    params = {
        "w": jnp.ones((8, 2)),
        "odd": jnp.ones((6, 2)),
        "steps": jnp.zeros((4, 4), jnp.int32),
        "scale": jnp.float32(1),
        "empty": jnp.ones((0, 4)),
        "vector": jnp.ones(4),
    }
    covered = sparsity.coverage(params, pattern=NM(2, 4), where=tree.without("**", "vector"))
    assert covered.touched == ("w",) and covered.unselected == ("vector",)
    assert covered.exempt == {
        "odd": "has 6 inputs, which groups of 4 do not divide",
        "steps": "holds int32, not floating point",
        "scale": "is a scalar",
        "empty": "has no entries",
    }
    mask = sparsity.make_mask(params, pattern=NM(2, 4))
    assert mask["odd"] is None and mask["w"] is not None
    with pytest.raises(errors.SelectionError, match="6 inputs"):
        sparsity.make_mask(params, pattern=NM(2, 4), strict=True)


@pytest.mark.parametrize(
    ("pattern", "shape", "reason"),
    [
        (Block((4, 4)), (8, 6), "do not divide"),
        (Block((4, 4)), (8,), "fewer"),
        (Channel(), (8,), "no contraction"),
        (NM(2, 4), (8,), "no contraction"),
    ],
)
def test_shapes_that_do_not_fit(pattern, shape, reason):
    params = {"w": jnp.ones((8, 8)), "x": jnp.ones(shape)}
    assert reason in sparsity.coverage(params, pattern=pattern, where="**").exempt["x"]


def test_channel_without_outputs_is_exempt():
    with pytest.raises(errors.SelectionError, match="no output axis"):
        sparsity.make_mask(
            {"w": jnp.ones((4, 2))}, sparsity=0.5, pattern=Channel(), axes={"w": (0, 1)}
        )


def test_bfloat16_and_bias_only_and_one_leaf():
    mask = sparsity.make_mask(random_tree(0, jnp.bfloat16), sparsity=0.5, scope="global")
    assert sparsity.sparsity_of(mask).total == 0.5
    mask = sparsity.make_mask(PARAMS, sparsity=0.5, where="**/bias")
    assert mask["dense"]["kernel"] is None and int(mask["dense"]["bias"].sum()) == 2
    np.testing.assert_array_equal(
        sparsity.make_mask(jnp.array([[1.0, 2.0]]), sparsity=0.5), [[False, True]]
    )


def test_mixed_dtypes_compete_globally():
    params = {"a": jnp.full((2, 2), 2.0, jnp.bfloat16), "b": jnp.full((2, 2), 1.0, jnp.float32)}
    mask = sparsity.make_mask(params, sparsity=0.5, scope="global")
    assert mask["a"].all() and not mask["b"].any()


def test_nnx_state():
    params = nnx.state(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param)
    mask = sparsity.make_mask(params, sparsity=0.5)
    pruned = sparsity.apply(params, mask)
    assert sparsity.sparsity_of(pruned).total == 0.5
    assert jax.tree.structure(pruned) == jax.tree.structure(params)


def test_vmap_over_an_ensemble():
    ws = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4)), jnp.float32)
    masks = jax.vmap(lambda w: sparsity.make_mask({"w": w}, sparsity=0.5)["w"])(ws)
    np.testing.assert_array_equal(masks[1], sparsity.make_mask({"w": ws[1]}, sparsity=0.5)["w"])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: type(pattern).__name__)
def test_sharded_equals_single_device(pattern, axis_type):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    w = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (8, 6)), jnp.float32)
    scope = "layer" if isinstance(pattern, NM) else "global"
    make = functools.partial(
        sparsity.make_mask,
        sparsity=None if scope == "layer" else 0.5,
        pattern=pattern,
        scope=scope,
    )
    sharded = jax.device_put({"w": w}, NamedSharding(mesh, PartitionSpec("data", "model")))
    with jax.set_mesh(mesh):
        mask = jax.jit(make)(sharded)
    np.testing.assert_array_equal(mask["w"], make({"w": w})["w"])


# --- apply, sparsity_of, check_mask ---------------------------------------------------------------


def test_apply_zeroes_and_passes_through():
    mask = sparsity.make_mask(PARAMS, sparsity=0.5)
    pruned = sparsity.apply(PARAMS, mask)
    m = np.asarray(mask["dense"]["kernel"])
    w = np.asarray(pruned["dense"]["kernel"])
    assert (w[~m] == 0).all() and not np.signbit(w[~m]).any()
    np.testing.assert_array_equal(w[m], np.asarray(PARAMS["dense"]["kernel"])[m])
    assert pruned["dense"]["bias"] is PARAMS["dense"]["bias"]


def test_apply_is_differentiable():
    mask = {"w": jnp.array([[True, False]])}
    grads = jax.grad(lambda p: jnp.sum(sparsity.apply(p, mask)["w"] ** 2))({"w": jnp.ones((1, 2))})
    np.testing.assert_array_equal(grads["w"], [[2, 0]])


def test_sparsity_of_counts_exactly():
    params = {"a": jnp.zeros((2, 3)), "b": jnp.ones((2, 2)), "bias": jnp.zeros(5)}
    counted = sparsity.sparsity_of(params)
    assert counted.total == 0.6 and counted.leaves == {"a": 1.0, "b": 0.0}
    assert sparsity.sparsity_of(params, where="bias").total == 1.0
    traced = jax.jit(lambda p: sparsity.sparsity_of(p).total)(params)
    assert traced == np.float32(0.6)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        ({"w": jnp.ones((2, 2), bool), "x": None}, errors.StructureError),
        ({"w": jnp.ones((2, 3), bool)}, errors.StructureError),
        ({"w": jnp.ones((2, 2))}, errors.ArgumentTypeError),
        ([jnp.ones((2, 2), bool)], errors.StructureError),
    ],
)
def test_masks_of_another_structure(mask, error):
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(error, match="mask"):
        sparsity.apply(params, mask)
    with pytest.raises(error, match="within"):
        sparsity.make_mask(params, sparsity=0.5, within=mask)


W = {"w": jnp.ones((4, 4))}


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"sparsity": 1.1}, errors.ArgumentError, "from 0"),
        ({"sparsity": -0.1}, errors.ArgumentError, "from 0"),
        ({"sparsity": float("nan")}, errors.ArgumentError, "from 0"),
        ({}, errors.ArgumentError, "exactly one"),
        ({"sparsity": 0.5, "threshold": 1.0}, errors.ArgumentError, "exactly one"),
        ({"sparsity": 0.5, "scope": "all"}, errors.ArgumentError, "scope"),
        ({"sparsity": {"w": 2.0}}, errors.ArgumentError, "from 0"),
        ({"sparsity": {"w": 0.5}, "scope": "global"}, errors.ArgumentError, "layer"),
        ({"sparsity": {"w": 0.5, "v": 0.5}}, errors.SelectionError, "'v'"),
        ({"sparsity": 0.9, "pattern": NM(2, 4)}, errors.ArgumentError, "at most 0.5"),
        ({"threshold": 0.9, "pattern": NM(2, 4)}, errors.ArgumentError, "N:M"),
        ({"pattern": NM(2, 4), "scope": "global"}, errors.ArgumentError, "N:M"),
        ({"sparsity": 0.5, "where": "v"}, errors.SelectionError, "'w'"),
        ({"sparsity": 0.5, "axes": {"v": (0,)}}, errors.SelectionError, "'v'"),
        ({"sparsity": 0.5, "axes": {"w": (2,)}}, errors.ArgumentError, "2 axes"),
        ({"sparsity": 0.5, "axes": [(0,)]}, errors.StructureError, "axes"),
        (
            {"sparsity": 0.5, "score": sparsity.saliency(), "grads": {}},
            errors.StructureError,
            "grads",
        ),
    ],
)
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        sparsity.make_mask(W, **arguments)


def test_a_rule_that_where_leaves_out():
    with pytest.raises(errors.SelectionError, match="leaves out"):
        sparsity.make_mask(PARAMS, sparsity={"**/kernel": 0.5, "**/bias": 0.5})


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_weights_that_are_not_finite(bad):
    with pytest.raises(errors.NonFiniteError, match="'w'"):
        sparsity.make_mask({"w": jnp.ones((2, 2)).at[0, 0].set(bad)}, sparsity=0.5)


@pytest.mark.parametrize(
    "params",
    [{}, {"w": jnp.ones((2, 2), jnp.int32)}, {"w": jnp.float32(1)}, {"w": jnp.ones((0, 2))}],
)
def test_nothing_to_prune(params):
    with pytest.raises(errors.SelectionError):
        sparsity.make_mask(params, sparsity=0.5)


@pytest.mark.parametrize(
    "make", [lambda: NM(4, 4), lambda: NM(0, 4), lambda: Block((0,)), lambda: Block(())]
)
def test_impossible_patterns(make):
    with pytest.raises(errors.ArgumentError):
        make()


def test_patterns_are_hashable_values():
    assert NM(2, 4) == NM(2, 4) and len(set(itertools.chain(PATTERNS, PATTERNS))) == 4


def test_small_weights_keep_their_order():
    params = {"w": (jnp.ones((4, 4)) * jnp.arange(1.0, 5.0) * 1e-25).astype(jnp.bfloat16)}
    score = sparsity.magnitude(order=2)
    mask = sparsity.make_mask(params, sparsity=0.5, score=score, pattern=sparsity.Channel())
    assert mask["w"][0].tolist() == [False, False, True, True]


def test_thresholds_are_not_rounded_to_the_weights():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    assert not sparsity.make_mask(params, threshold=1.003)["w"].any()
    assert sparsity.make_mask(params, threshold=1.0)["w"].all()
    with pytest.raises(errors.ArgumentError, match="`threshold`"):
        sparsity.make_mask(params, threshold=float("nan"))
