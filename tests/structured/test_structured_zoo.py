"""Every model of the zoo shrinks: groups by hand, a certificate, gradients, tied leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import ZOO

from jaxcompress import graph, structured, tree

# What the residual stream is, where there is one; or why it is frozen.
RESIDUAL = {
    "resnet_train": 2, "resnet_eval": 2, "mobilenet": 2, "convnext": 2, "mixer": 1,
    "mixer_nnx": 1, "vit": 1, "gpt2": 1, "gpt_neox": 1, "llama": 1, "llama_scanned": 1,
    "llama_scanned_nnx": 1, "encoder_decoder": 1,
}  # fmt: skip
FROZEN_RESIDUAL = {"efficientnet_block": "project/kernel", "control_flow": "shared"}
HEADS = {
    "vit": 1, "gpt2": 1, "gpt_neox": 1, "llama": 2, "llama_scanned": 1, "llama_scanned_nnx": 1,
    "encoder_decoder": 3,
}  # fmt: skip
HIDDEN = ("hidden", "channels", "state")


def half_of(groups, seed=0):
    rng = np.random.default_rng(seed)
    indices = {}
    for group in groups.values():
        count, layers = (group.size + 1) // 2, int(np.prod(group.layers))
        drawn = [np.sort(rng.permutation(group.size)[:count]) for _ in range(layers)]
        indices[group.name] = np.reshape(drawn, (*group.layers, count))
    return structured.keep(groups, indices)


def gradients(fn, params, inputs):
    floats, rest = tree.partition(params, lambda path, leaf: tree.is_floating(leaf))

    def loss(floats):
        outputs = fn(tree.merge(floats, rest), *inputs)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(outputs))

    return tree.merge(jax.jit(jax.grad(loss))(floats), rest)


@pytest.mark.parametrize("name", ZOO)
def test_shrinks(name):
    fn, params, inputs = ZOO[name].build()
    groups = structured.groups(fn, params, *inputs)
    roles = [group.role for group in groups.values()]
    assert any(role in HIDDEN for role in roles)
    assert roles.count("residual") >= RESIDUAL.get(name, 0)
    assert roles.count("heads") == HEADS.get(name, 0)
    if name in FROZEN_RESIDUAL:
        reason = groups.frozen[FROZEN_RESIDUAL[name]].frozen
        assert "output 0" in reason or "input 0" in reason

    keep = half_of(groups)
    smaller_fn, smaller, certificate = structured.shrink(fn, params, keep, *inputs)
    assert certificate.holds, certificate
    assert certificate.after.params < certificate.before.params
    for path, leaf in tree.items(smaller):
        assert leaf.shape == keep.shape(path)
    # A leaf is one leaf wherever fn reads it: tied ones stay tied.
    assert tree.paths(smaller) == tree.paths(params)
    if not ZOO[name].differentiable:
        return
    masked = certificate.random.weights.relative <= certificate.tolerance
    reference = fn if masked else graph.remask(fn, keep.leaves)
    # State that comes out is cut in one and not in the other: its own zeros add nothing.
    expected = gradients(reference, structured.mask_params(params, keep), inputs)
    result = gradients(smaller_fn, smaller, inputs)
    scale = max(float(jnp.max(jnp.abs(x), initial=0)) for x in floats_of(expected))
    for x, y in zip(
        floats_of(result), floats_of(structured.slice_params(expected, keep)), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=2e-4 * scale, rtol=2e-3)


def floats_of(params):
    return [leaf for leaf in tree.leaves(params) if tree.is_floating(leaf)]


def members(groups, name):
    return {(m.path, m.axis): m.indices.tolist() for m in groups[name].members}


def groups_of(name, **options):
    fn, params, inputs = ZOO[name].build()
    return structured.groups(fn, params, *inputs, **options)


def test_neox_heads_take_their_part_of_the_fused_kernel():
    """(H, 3, D): a head is 12 columns in a row, and 4 rows of the output's kernel."""
    found = members(groups_of("gpt_neox"), "params/layers_0/qkv/kernel")
    assert found["params/layers_0/qkv/kernel", 1] == [[*range(12)], [*range(12, 24)]]
    assert found["params/layers_0/out/kernel", 0] == [[*range(4)], [*range(4, 8)]]


def test_gpt2_heads_take_three_parts_of_the_fused_kernel():
    """(3, H, D): a head is 2 columns in each third."""
    found = members(groups_of("gpt2"), "blocks/0/qkv/kernel")
    assert found["blocks/0/qkv/kernel", 1] == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_key_heads_take_their_queries():
    found = members(groups_of("llama"), "params/layers_0/attention/k/kernel")
    assert found["params/layers_0/attention/k/kernel", 1] == [[0], [1]]
    assert found["params/layers_0/attention/q/kernel", 1] == [[0, 1], [2, 3]]
    assert found["params/layers_0/attention/o/kernel", 0] == [[0, 1], [2, 3]]


def test_heads_are_kept_whole_unless_asked():
    whole, parts = groups_of("llama"), groups_of("llama", whole_heads=False)
    assert {g.role for g in whole.values()} == {"residual", "heads", "hidden"}
    reasons = {g.frozen for g in whole.frozen.values()}
    assert {
        "heads are kept whole",
        "the number of query heads for each key head is kept",
    } <= reasons
    # Rotary halves are pairs: two features of a head are one unit, which is no choice; values'
    # features are not turned.
    assert sum(g.role == "head size" for g in parts.values()) == 2  # of values, in two layers


def test_option_a_shortcuts_split_the_stream():
    """Stage 2 pads one channel on each side of stage 1's two: these are one group, not the same."""
    found = groups_of("resnet_eval")
    inner = members(found, "params/conv1/kernel")
    assert inner["params/layer2_0/conv2/kernel", 3] == [[1], [2]]
    assert inner["params/layer3_0/conv2/kernel", 3] == [[3], [4]]
    outer = members(found, "params/layer2_0/conv2/kernel")
    assert outer["params/layer2_0/conv2/kernel", 3] == [[0], [3]]


def test_lstm_gates_go_together():
    found = members(groups_of("char_lstm"), "params/cell_0/gates/kernel")
    assert found["params/cell_0/gates/kernel", 1] == [[k, k + 3, k + 6, k + 9] for k in range(3)]
    assert found["params/cell_0/gates/kernel", 0] == [[3], [4], [5]]


def test_layers_of_a_scan_keep_their_own_hidden_units():
    groups = groups_of("llama_scanned")
    assert groups["params/layers/gate/kernel"].layers == (2,)
    assert groups["params/embed/embedding"].layers == ()
    keep = structured.keep(groups, {"params/layers/gate/kernel": [[0, 2], [3, 5]]})
    fn, params, inputs = ZOO["llama_scanned"].build()
    _, smaller, certificate = structured.shrink(fn, params, keep, *inputs)
    assert certificate.holds
    up, small = params["params"]["layers"]["up"]["kernel"], smaller["params"]["layers"]["up"]
    np.testing.assert_array_equal(small["kernel"][0], up[0][:, [0, 2]])
    np.testing.assert_array_equal(small["kernel"][1], up[1][:, [3, 5]])


def test_experts_are_frozen_with_the_true_reason():
    groups = groups_of("moe")
    reasons = [g.frozen for g in groups.frozen.values() if g.role == "experts"]
    assert reasons == ["argmax gives positions along it"]


def test_state_outputs_shrink():
    fn, params, inputs = ZOO["resnet_train"].build()
    groups = structured.groups(fn, params, *inputs)
    smaller_fn, smaller, _ = structured.shrink(fn, params, half_of(groups), *inputs)
    _, updates = smaller_fn(smaller, *inputs)
    shapes = jax.tree.map(jnp.shape, updates["batch_stats"])
    assert shapes == jax.tree.map(jnp.shape, smaller["batch_stats"])
