"""Residual blocks found in graphs: where they are, what they are called, what is none."""

import jax
import jax.numpy as jnp
import pytest
from depth_models import X, draw, scanned, stacked_params, unrolled, unrolled_params
from zoo import ZOO

from jaxcompress import structured, tree
from jaxcompress.structured.depth._residuals import layers_of, names_of

# By hand, from the models' source: the blocks of each model, and its layers.
FOUND = {
    "resnet_train": (["params/layer1_0"], ["params/layer1_0"]),
    "resnet_eval": (["params/layer1_0"], ["params/layer1_0"]),
    "mobilenet": (["params/stage0_0", "params/stage1_1"],) * 2,
    "efficientnet_block": (["expand+depthwise+gate+project"],) * 2,
    "convnext": (["params/stage0_0", "params/stage1_0"],) * 2,
    "mixer": (
        [f"params/blocks_{k}/{name}" for k in (0, 1) for name in ("tokens", "channels")],
        ["params/blocks_0", "params/blocks_1"],
    ),
    "mixer_nnx": (
        [f"blocks/{k}/{name}" for k in (0, 1) for name in ("tokens", "channels")],
        ["blocks/0", "blocks/1"],
    ),
    "vit": (["blocks/0/attention", "blocks/0/up+down"], ["blocks/0"]),
    "gpt2": (["blocks/0/qkv+out", "blocks/0/up+down"], ["blocks/0"]),
    "gpt_neox": (["params/layers_0/qkv+out", "params/layers_0/up+down"], ["params/layers_0"]),
    "llama": (
        [f"params/layers_{k}/{name}" for k in (0, 1) for name in ("attention", "gate+up+down")],
        ["params/layers_0", "params/layers_1"],
    ),
    "llama_scanned": (
        ["params/layers/attention", "params/layers/gate+up+down"],
        ["params/layers"],
    ),
    "llama_scanned_nnx": (["layers/attention", "layers/gate+up+down"], ["layers"]),
    "encoder_decoder": (
        ["encoder/0/attention", "encoder/0/mlp"]
        + [f"decoder/0/{name}" for name in ("attention", "cross", "mlp")],
        ["encoder/0", "decoder/0"],
    ),
    "moe": (["params"], ["params"]),
    "moe_nnx": (["router+up+down"],) * 2,
    "moe_ragged": (["router+up+down"],) * 2,
}


@pytest.mark.parametrize("name", ZOO)
def test_the_blocks_of_the_zoo(name):
    fn, params, inputs = ZOO[name].build()
    found = structured.blocks(fn, params, *inputs)
    blocks, layers = FOUND.get(name, ([], []))
    assert list(found) == blocks
    assert list(found.layers) == layers
    assert [b for layer in found.layers.values() for b in layer.blocks] == blocks
    assert all(
        found[b].layer == layer.name for layer in found.layers.values() for b in layer.blocks
    )


def test_a_shortcut_that_changes_shape_is_no_block():
    fn, params, inputs = ZOO["resnet_eval"].build()
    rejected = structured.blocks(fn, params, *inputs).rejected
    assert dict(rejected) == {
        "params/layer2_0": "its shortcut changes shape, from (2, 8, 8, 2) to (2, 4, 4, 4)",
        "params/layer3_0": "its shortcut changes shape, from (2, 4, 4, 4) to (2, 2, 2, 8)",
    }


def test_leaves_of_a_block_are_those_that_nothing_else_reads():
    fn, params, inputs = ZOO["encoder_decoder"].build()
    found = structured.blocks(fn, params, *inputs)
    below = lambda path: tuple(p for p in tree.paths(params) if p.startswith(path))
    assert found["decoder/0/mlp"].leaves == below("decoder/0/mlp")
    # Nothing but the cross-attention reads the encoder.
    assert set(found["decoder/0/cross"].leaves) == {*below("decoder/0/cross"), *below("encoder")}
    assert found["decoder/0/cross"].shape == (2, 5, 4)


def test_state_of_a_block_goes_with_it():
    fn, params, inputs = ZOO["resnet_train"].build()
    found = structured.blocks(fn, params, *inputs)
    inside = tuple(p for p in tree.paths(params) if "/layer1_0/" in p)
    assert found["params/layer1_0"].leaves == inside


def test_a_stack_of_layers():
    found = structured.blocks(scanned, stacked_params(), X)
    assert found.layers["layers"].length == 3
    assert found["layers"].stack == (3,)
    assert found["layers"].sites == ("layers/up", "layers/down")


def test_a_scan_over_time_is_no_stack():
    def fn(params, x):  # (time, batch, features): an Euler step of a network at each time
        step = lambda h, u: (h + jnp.tanh(h @ params["w"] + u), None)
        return jax.lax.scan(step, x[0], x)[0]

    found = structured.blocks(fn, {"w": jnp.eye(4)}, jnp.ones((3, 5, 4)))
    assert list(found) == ["w"] and found["w"].stack == (3,)
    assert found.layers["w"].length is None


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: f])
def test_through_the_borders_of_calls(wrap):
    branch = wrap(lambda p, x: jnp.tanh(x @ p).astype(jnp.float32))

    def fn(params, x):
        x = wrap(lambda x: x + branch(params["a"], x.astype(jnp.float32)))(x)
        return (branch(params["b"], x) + jax.lax.optimization_barrier(x)) @ params["head"]

    params = {"a": jnp.eye(4), "b": jnp.eye(4), "head": jnp.eye(4)}
    assert list(structured.blocks(fn, params, X)) == ["a", "b"]


def test_what_looks_like_a_block_and_is_none():
    def fn(params, x):
        h = x @ params["w"]
        h = h + 0.044715 * h**3  # no contraction inside
        twice = h + h
        other = twice @ params["v"] + jnp.ones_like(h) @ params["u"]  # no common input
        return other @ params["a"] + other @ params["b"]

    params = {k: jnp.eye(4) for k in ("w", "v", "u", "a", "b")}
    found = structured.blocks(fn, params, X)
    assert list(found) == []
    reason = "its shortcut contracts params, too: neither operand is its input"
    assert dict(found.rejected) == {"a+b": reason}


def test_one_branch_of_two_sums_is_one_block():
    fn = lambda params, x: x + (x @ params["a"] + x @ params["b"])
    found = structured.blocks(fn, {"a": jnp.eye(4), "b": jnp.eye(4)}, X)
    assert list(found) == ["a+b"] and not found.rejected


def test_a_block_in_a_block():
    def fn(params, x):
        y = x + x @ params["in"]["a"]
        return x + (y @ params["out"]) @ params["in"]["b"]

    params = {"in": {"a": jnp.eye(4), "b": jnp.eye(4)}, "out": jnp.eye(4)}
    found = structured.blocks(fn, params, X)
    assert len(found) == 2
    inner, outer = found.values()
    assert inner.leaves == ("in/a",) and set(outer.leaves) == {"in/a", "in/b", "out"}


def test_shapes_are_enough():
    shapes = jax.eval_shape(unrolled_params)
    found = structured.blocks(unrolled, shapes, jax.ShapeDtypeStruct((5, 4), jnp.float32))
    assert list(found) == ["layer_0", "layer_1", "layer_2"]


def test_names_tell_apart():
    groups = [["b/0/q/w", "b/0/o/w"], ["b/0/up/w"], ["w"], ["w"], [f"m/{k}" for k in "abcdef"]]
    assert names_of(groups) == ["b/0/q+o", "b/0/up", "w", "w#1", "m"]
    assert names_of([[f"{k}/w" for k in "abcdef"]]) == ["a+b+...+f"]


def test_layers_have_names_of_their_own():
    """Two slices of a stacked leaf before the scan over it: three layers of one path."""

    def fn(p, x):
        for k in (0, 1):
            x = x + jnp.tanh(x @ p["w"][k])
        return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, p["w"][2:])[0]

    found = structured.blocks(fn, {"w": jnp.ones((5, 2, 2))}, jnp.ones((3, 2)))
    assert list(found.layers) == ["w", "w#1", "w#2"] and found.layers["w#2"].length == 3


def test_layers_share_a_numbered_path():
    groups = [["s1/0/a/w"], ["s1/0/b/w"], ["s1/1/a/w"], ["s1/1/b/w"], ["head_1/w"]]
    names = [group[0].removesuffix("/w") for group in groups]
    assert layers_of(groups, names) == [("s1/0", [0, 1]), ("s1/1", [2, 3]), ("head_1", [4])]
    # Blocks that are numbered siblings are layers on their own.
    groups = [["stage1/0/w"], ["stage1/1/w"], ["stage2/0/w"]]
    assert [numbers for _, numbers in layers_of(groups, ["a", "b", "c"])] == [[0], [1], [2]]


def test_stacked_draws_agree():
    """The two ways to write the model by hand are one function."""
    assert jnp.allclose(scanned(stacked_params(), X), unrolled(unrolled_params(), X), atol=1e-6)
    assert not jnp.allclose(draw(0, 2), draw(1, 2))
