"""`widths`: the new sizes in words, by module."""

import jax
import jax.numpy as jnp
import pytest
from zoo import ZOO

from jaxcompress import structured
from jaxcompress.structured import Width


@pytest.fixture(scope="module")
def llama():
    fn, params, inputs = ZOO["llama_scanned"].build()
    return structured.groups(fn, params, *inputs)


def test_heads_and_widths_are_told_by_module(llama):
    keep = structured.keep(
        llama, {"params/layers/attention/k/kernel": [1], "params/layers/gate/kernel": [0, 2, 3, 5]}
    )
    widths = structured.widths(keep, llama)
    assert str(widths).splitlines() == [
        "params/layers/attention/k: heads 2 -> 1",
        "params/layers/attention/o: heads 4 -> 2",
        "params/layers/attention/q: heads 4 -> 2",
        "params/layers/attention/v: heads 2 -> 1",
        "params/layers/down: inputs 6 -> 4",
        "params/layers/gate: features 6 -> 4",
        "params/layers/up: features 6 -> 4",
    ]
    assert widths["params/layers/down"] == (
        Width(leaf="kernel", axis=1, what="inputs", old=6, new=4),
    )
    assert len(widths) == 7 and "params/norm" not in widths


def test_every_axis_that_shrinks_is_listed_with_its_sizes(llama):
    keep = structured.keep(llama, {name: [0] for name in llama})
    widths = structured.widths(keep, llama)
    axes = {(path, axis) for path, axes in keep.leaves.items() for axis in axes}
    listed = {(f"{m}/{w.leaf}", w.axis) for m, sizes in widths.items() for w in sizes}
    assert listed == axes
    for module, sizes in widths.items():
        for w in sizes:
            path = f"{module}/{w.leaf}"
            if w.what in ("features", "inputs"):
                assert (w.old, w.new) == (keep.shapes[path][w.axis], keep.shape(path)[w.axis])


def test_heads_that_share_an_axis_with_their_features_are_told_beside_it():
    fn, params, inputs = ZOO["gpt_neox"].build()
    groups = structured.groups(fn, params, *inputs)
    (heads,) = (name for name, group in groups.items() if group.role == "heads")
    widths = structured.widths(structured.keep(groups, {heads: [0]}), groups)
    assert str(widths).splitlines() == [
        "params/layers_0/out: heads 2 -> 1, inputs 8 -> 4",
        "params/layers_0/qkv: heads 2 -> 1, features 24 -> 12",
    ]


def test_convolutions_have_channels_and_leaves_without_a_module_are_named():
    def fn(params, x):
        conv = jax.lax.conv_general_dilated(
            x, params["up"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jax.nn.relu(conv + params["bias"]), axis=(1, 2)) @ params["down"]

    params = {"up": jnp.ones((1, 1, 2, 4)), "bias": jnp.ones(4), "down": jnp.ones((4, 3))}
    groups = structured.groups(fn, params, jnp.ones((1, 2, 2, 2)))
    widths = structured.widths(structured.keep(groups, {"up": [0]}), groups)
    assert str(widths) == "fn: bias channels 4 -> 1, down inputs 4 -> 1, up channels 4 -> 1"
