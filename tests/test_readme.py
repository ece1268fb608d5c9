"""The README's code runs as it is written."""

import contextlib
import doctest
import io
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
import zoo_registry
from flax import linen as nn

from jaxcompress import adapters, distill, export, quantize, sparsity, structured

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
from models.llama import LLAMA_1B, Llama, LlamaConfig

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
LOOP, PTQ, AWARE, SHRINK, SUMMARY, SITES, SESSION = re.findall(
    r"```python\n(.*?)```", README, re.DOTALL
)
TABLE = re.search(r"```\n(site or leaf .*?)\n```", README, re.DOTALL)


@pytest.fixture(scope="module")
def names():
    module = nn.Sequential([nn.Dense(100), nn.relu, nn.Dense(10)])
    x = jax.random.normal(jax.random.key(1), (8, 128))
    fn, params = adapters.from_linen(module, module.init(jax.random.key(0), x))
    return {"fn": fn, "params": params, "batches": [x] * 3}


def test_the_training_loop(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Three batches stand for the thousand steps of the schedule.
    exec(LOOP.replace("end=1000", "end=1").replace("every=50", "every=1"), scope := dict(names))
    loaded = export.load("model.safetensors")
    assert sparsity.sparsity_of(quantize.unpack(loaded.params)).total == pytest.approx(
        0.8, abs=0.05
    )
    assert not jnp.array_equal(
        names["params"]["params"]["layers_0"]["kernel"],
        scope["params"]["params"]["layers_0"]["kernel"],
    )


class ConvNet(nn.Module):
    """A convolution, BatchNorm, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x)).mean((1, 2))
        return nn.Dense(3)(x)


def test_quantizing_a_trained_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = jax.random.normal(jax.random.key(0), (16, 6, 6, 3))
    shapes = jax.eval_shape(ConvNet().init, jax.random.key(0), images)
    variables = zoo_registry.randomised(shapes)
    fn, params = adapters.from_linen(ConvNet(), variables)
    scope = {"fn": fn, "params": params, "images": images, "batches": [images]}
    scope |= {"jax": jax, "quantize": quantize, "export": export}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(PTQ, scope)
    before = fn(params, images)
    assert jnp.linalg.norm(scope["logits"] - before) < 0.05 * jnp.linalg.norm(before)
    assert "int8 PerTensor static" in printed.getvalue()
    loaded = export.load("model.safetensors").params
    again = jax.jit(quantize.execute(scope["fn"]))(loaded, images)
    assert jnp.array_equal(again, scope["logits"])


def test_training_with_rounded_activations(names):
    scope = {**names, "teacher": names["params"], "distill": distill, "jax": jax, "optax": optax}
    exec(AWARE.replace("start=100", "start=1"), scope)
    kernel = scope["packed"]["params"]["layers_0"]["kernel"]
    assert kernel.activation.is_static and kernel.format.qtype.name == "int4"
    assert scope["state"].params["quantizers"]["steps"] == 3 and scope["metrics"]["loss"] > 0


def test_shrinking_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    shapes = jax.eval_shape(ConvNet().init, jax.random.key(0), images)
    fn, params = adapters.from_linen(ConvNet(), zoo_registry.randomised(shapes))
    scope = {"fn": fn, "params": params, "images": images}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(SHRINK, scope)
    assert printed.getvalue().startswith("certificate: holds")
    assert scope["fewer"]["params"]["Conv_0"]["kernel"].shape == (3, 3, 3, 4)
    again = structured.rebuild(fn, structured.Keep.load("keep.json"))
    assert jnp.array_equal(again(scope["fewer"], images), scope["small"](scope["fewer"], images))


def test_the_summary_of_llama(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, tokens = Llama(LLAMA_1B), jax.ShapeDtypeStruct((1, 512), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), tokens)
    fn, params = adapters.from_linen(module, variables)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(SUMMARY, {"fn": fn, "params": params, "tokens": tokens})
    assert TABLE is not None and printed.getvalue().rstrip() == TABLE[1]
    assert (tmp_path / "graph.svg").exists()


def test_what_sites_are_for():
    config = LlamaConfig(vocab=8, dim=8, layers=2, heads=2, kv_heads=1, head_dim=4, hidden=12)
    tokens = jnp.arange(3)[None]
    module = Llama(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)
    fn, params = adapters.from_linen(module, zoo_registry.randomised(shapes))
    scope = {"fn": fn, "params": params, "tokens": tokens, "sparsity": sparsity}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(f"from jaxcompress import graph\n{SITES.replace('tpu-v5e', 'cpu')}", scope)
    mask = scope["mask"]["params"]
    # Two of any four along the contraction, in each layer and for each output.
    assert mask["layers"]["down"]["kernel"].shape == (2, 12, 8)
    groups = mask["layers"]["down"]["kernel"].reshape(2, 3, 4, 8)
    assert (groups.sum(2) == 2).all()
    assert mask["layers"]["norm1"]["scale"] is None
    assert scope["features"]["params/layers/down/kernel"].shape == (2, 1, 3, 8)
    assert "compiled program" in printed.getvalue()


def test_the_session(names):
    parsed = doctest.DocTestParser().get_doctest(
        SESSION, {"quantize": quantize, **names}, "README", None, None
    )
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(parsed)
    assert result.attempted == 1 and result.failed == 0
