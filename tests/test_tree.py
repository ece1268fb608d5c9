"""Paths, where, selection, partition and accounting over every kind of params."""

import re

import equinox as eqx
import flax
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given

from jaxcompress import errors, tree


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4)(x))
        return nn.Dense(2)(x)


class Twin(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])


LINEN = jax.eval_shape(Mlp().init, jax.random.key(0), jnp.ones((1, 3)))
TREES = {
    "linen": (LINEN, "params/Dense_0/kernel"),
    "frozen": (flax.core.freeze(LINEN), "params/Dense_0/kernel"),
    "nnx": (nnx.state(Twin(nnx.Rngs(0))), "layers/0/kernel"),
    "equinox": (
        eqx.filter(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_array),
        "layers/0/weight",
    ),
    "nested": ({"a": [(np.ones((3, 4)), None), np.ones(2)]}, "a/0/0"),
}


@pytest.mark.parametrize("name", TREES)
def test_partition_and_merge_round_trip(name):
    params, path = TREES[name]
    assert path in tree.paths(params)
    chosen, rest = tree.partition(params, path)
    assert tree.paths(chosen) == [path]
    assert sorted([path, *tree.paths(rest)]) == sorted(tree.paths(params))
    merged = tree.merge(chosen, rest)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(tree.leaves(merged), tree.leaves(params), strict=True))


@pytest.mark.parametrize("name", TREES)
def test_map_where_touches_only_the_selected(name):
    params, path = TREES[name]
    mapped = tree.map_where(lambda x: "new", params, path)
    new = [p for p, leaf in tree.items(mapped) if isinstance(leaf, str)]
    assert new == [path]
    assert tree.select(params, path)[path].shape == (3, 4) or name == "equinox"


@pytest.mark.parametrize(
    ("where", "path", "expected"),
    [
        ("**", "a/b", True),
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/b/kernel", True),
        ("**/kernel", "a/my_kernel", False),
        ("*/kernel", "a/kernel", True),
        ("*/kernel", "a/b/kernel", False),
        ("a/**/kernel", "a/kernel", True),
        ("a/**", "a/b/c", True),
        ("layer_?/w", "layer_1/w", True),
        ("layer_?/w", "layer_12/w", False),
        ("layer_[0-2]/w", "layer_2/w", True),
        ("layer_[!0-2]/w", "layer_2/w", False),
        ("{q,k}/w", "k/w", True),
        ("{q,k}/w", "v/w", False),
        ("a.b", "aXb", False),
        (re.compile("kernel$"), "x/kernel", True),
        (re.compile("^kernel"), "x/kernel", False),
        (lambda path, leaf: leaf == 3, "x", True),
        (["no", re.compile("no"), "x"], "x", True),
        ([], "x", False),
    ],
)
def test_matches(where, path, expected):
    assert tree.matches(where, path, 3) is expected


def test_where_of_another_type_is_refused():
    with pytest.raises(errors.ArgumentTypeError, match=r"`where`: expected a glob.*got 7"):
        tree.matches(7, "x")


@pytest.mark.parametrize("function", [tree.select, tree.partition])
def test_a_where_that_matches_nothing_names_the_nearest(function):
    with pytest.raises(errors.SelectionError, match="params/Dense_0/kernel"):
        function(LINEN, "**/kernal")
    with pytest.raises(errors.SelectionError, match="params/Dense_1/bias"):
        function(LINEN, ["params/Dense1/bias"])
    with pytest.raises(errors.SelectionError, match="matches none of 4 leaves"):
        function(LINEN, lambda path, leaf: False)
    with pytest.raises(errors.SelectionError, match="no leaves"):
        function({}, "**")


def test_without():
    where = tree.without("**/kernel", "**/Dense_1/**")
    assert list(tree.select(LINEN, where)) == ["params/Dense_0/kernel"]


def test_weights_takes_matrices_of_floats_only():
    params = {
        "kernel": jnp.ones((2, 2), jnp.bfloat16),
        "bias": jnp.ones(2),
        "query": {"bias": jnp.ones((2, 2))},
        "ids": jnp.ones((2, 2), jnp.int32),
        "key": jax.random.split(jax.random.key(0), (2, 2)),
    }
    assert list(tree.select(params, tree.weights)) == ["kernel"]


def test_other_structure_is_described():
    params = {"a": 1, "b": {"c": 2}}
    with pytest.raises(errors.StructureError, match="`mask`.*no entry for 'b/c'.*unknown 'b/d'"):
        tree.flatten_like(params, {"a": None, "b": {"d": 1}}, name="mask")
    with pytest.raises(errors.StructureError, match="unknown 'z'"):
        tree.merge(params, {"a": 1, "b": {"c": 2}, "z": 1})


def test_map_with_path_hands_over_subtrees_and_none():
    out = tree.map_with_path(
        lambda path, x, mask: (path, x, mask), {"a": 1, "b": [2]}, {"a": None, "b": [{"m": 3}]}
    )
    assert out == {"a": ("a", 1, None), "b": [("b/0", 2, {"m": 3})]}


class Pair(tree.LeafNode):
    """A stand-in for QArray: a node that counts as one leaf."""

    shape, size, nbytes, dtype = (2, 3), 6, 7, np.dtype("float32")

    def __init__(self, x):
        self.x = x


jax.tree_util.register_pytree_node(Pair, lambda p: ((p.x,), None), lambda _, c: Pair(*c))


def test_a_leaf_node_is_one_leaf():
    params = {"q": Pair(jnp.ones((3, 2))), "b": jnp.ones(2)}
    assert tree.paths(params) == ["b", "q"]
    assert tree.nbytes(params) == 8 + 7
    assert tree.count(params) == 2 + 6
    chosen, rest = tree.partition(params, tree.weights)
    assert isinstance(chosen["q"], Pair) and rest["q"] is None
    assert isinstance(tree.merge(chosen, rest)["q"], Pair)


def test_cover_accounts_for_every_leaf():
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((3, 4)), "c": jnp.ones(3)}
    obstacle = lambda path, x: None if x.shape[0] % 2 == 0 else "has an odd size"
    coverage = tree.cover(params, tree.weights, obstacle)
    assert coverage == tree.Coverage(
        touched=("a",), unselected=("c",), exempt={"b": "has an odd size"}
    )
    with pytest.raises(errors.SelectionError, match="1 of 2 selected.*'b' has an odd size"):
        tree.cover(params, tree.weights, obstacle, strict=True)
    with pytest.raises(errors.SelectionError, match="1 of 1 selected"):
        tree.cover(params, "b", obstacle)


@given(st.lists(st.sampled_from(["a", "bc", "layer_1", "kernel"]), min_size=1, max_size=5))
def test_a_path_is_a_glob_of_itself(segments):
    path = "/".join(segments)
    assert tree.matches(path, path)
    assert tree.matches("**", path)
    assert tree.matches("**/" + segments[-1], path)
    assert tree.matches("*/" * (len(segments) - 1) + "*", path)
    assert not tree.matches(path + "x", path)


def test_counts_and_bytes():
    params = {
        "w": jnp.ones((3, 5), jnp.int4),
        "b": jnp.ones(3, jnp.bfloat16),
        "m": jnp.ones(9, bool),
        "e": jnp.ones((0, 4)),
        "k": jax.random.key(0),
    }
    assert tree.count(params) == 15 + 3 + 9 + 0 + 1
    assert tree.nbytes(params) == 8 + 6 + 9 + 0 + 8
