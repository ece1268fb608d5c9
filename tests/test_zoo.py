"""The zoo's models run, its declarations cover every leaf, and twins in two libraries agree."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from zoo import ZOO
from zoo_sequences import LLAMA

from jaxcompress import tree

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
from models.convnext import ConvNeXt
from models.gpt2 import GPT2
from models.llama import LLAMA_1B, LLAMA_8B, Llama, LlamaConfig
from models.mixer import Mixer
from models.mobilenet import MobileNetV2
from models.vit import ViT

# Leaves that change nothing here though fn computes with them: a constant that softmax or the next
# LayerNorm takes away, and the branch not taken.
SILENT = {
    "mixer": ["params/blocks_0/tokens/down/bias", "params/blocks_1/tokens/down/bias"],
    "mixer_nnx": ["blocks/0/tokens/down/bias", "blocks/1/tokens/down/bias"],
    "vit": ["blocks/0/attention/key/bias"],
    "encoder_decoder": [
        "encoder/0/attention/key/bias",
        "decoder/0/attention/key/bias",
        "decoder/0/cross/key/bias",
    ],
    "control_flow": ["branch/direct"],
}


@pytest.mark.parametrize("name", ZOO)
def test_runs_and_declares_every_leaf(name):
    model = ZOO[name]
    fn, params, inputs = model.build()
    assert model.build()[1] is params
    declared = [*model.sites, *model.elsewhere, *model.unused]
    assert sorted(declared) == sorted(tree.paths(params))
    assert model.flops > 0 and min(model.sites.values()) > 0

    fn = jax.jit(fn)
    outputs = jax.tree.leaves(fn(params, *inputs))
    assert all(np.isfinite(x).all() for x in outputs)
    silent = set()
    for path, leaf in tree.items(params):
        if not tree.is_floating(leaf):
            assert path in model.unused
            continue
        other = np.asarray(leaf) + np.random.default_rng(7).uniform(0, 1, leaf.shape)
        other = jnp.asarray(other, leaf.dtype)
        moved = tree.map_where(lambda _, other=other: other, params, path)
        pairs = zip(outputs, jax.tree.leaves(fn(moved, *inputs)), strict=True)
        if all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs):
            silent.add(path)
    random_state = {path for path in model.unused if "rngs" in path}
    assert silent == {*SILENT.get(name, ()), *model.unused} - random_state


def in_both(linen: str, nnx_name: str):
    """The Linen model's function, and the NNX twin's params under the Linen paths."""
    fn, params, inputs = ZOO[linen].build()
    twin, state, _ = ZOO[nnx_name].build()
    leaves = {f"params/{path}".replace("blocks/", "blocks_"): x for path, x in tree.items(state)}
    return fn, tree.map_with_path(lambda path, _: leaves.pop(path), params), twin, state, inputs


@pytest.mark.parametrize(("linen", "name"), [("mixer", "mixer_nnx"), ("moe", "moe_nnx")])
def test_twins_agree(linen, name):
    fn, params, twin, state, inputs = in_both(linen, name)
    np.testing.assert_allclose(fn(params, *inputs), twin(state, *inputs), rtol=1e-5, atol=1e-6)


def test_llamas_agree():
    """NNX scanned, Linen scanned and Linen unrolled are one function."""
    twin, state, inputs = ZOO["llama_scanned_nnx"].build()
    expected = jax.jit(twin)(state, *inputs)
    stacked = {"params": jax.tree.map(lambda x: x, nnx.to_pure_dict(state))}
    scanned = jax.jit(Llama(LlamaConfig(**LLAMA)).apply)(stacked, *inputs)
    np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-6)
    params = dict(stacked["params"])
    layers = params.pop("layers")
    params |= {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(2)}
    unrolled = jax.jit(ZOO["llama"].build()[0])({"params": params}, *inputs)
    np.testing.assert_allclose(unrolled, expected, rtol=1e-5, atol=1e-6)


IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((1, 8), jnp.int32)


@pytest.mark.parametrize(
    ("module", "inputs", "published"),
    [
        pytest.param(Llama(LLAMA_1B), TOKENS, 1_235_814_400, id="llama-3.2-1b"),
        pytest.param(Llama(LLAMA_8B), TOKENS, 8_030_261_248, id="llama-3-8b"),
        pytest.param(MobileNetV2(), IMAGE, 3_504_872, id="mobilenet-v2"),
        pytest.param(ConvNeXt(), IMAGE, 28_589_128, id="convnext-t"),
        pytest.param(Mixer(), IMAGE, 18_528_264, id="mixer-s16"),
    ],
)
def test_published_sizes(module, inputs, published):
    variables = jax.eval_shape(module.init, jax.random.key(0), inputs)
    assert tree.count(variables["params"]) == published


@pytest.mark.parametrize(
    ("build", "published"),
    [
        pytest.param(GPT2, 124_439_808, id="gpt2"),
        pytest.param(ViT, 86_567_656, id="vit-b16"),
    ],
)
def test_published_sizes_of_nnx(build, published):
    module = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    assert tree.count(nnx.state(module, nnx.Param)) == published
