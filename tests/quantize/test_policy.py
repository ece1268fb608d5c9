"""Policies over whole models: Linen dicts, NNX states, Equinox modules."""

import pathlib
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcompress import numerics, quantize, tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError, NonFiniteError, SelectionError
from jaxcompress.numerics import (
    Format,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QArray,
    binary_basis,
    float8_e4m3fn,
    int4,
    int8,
    nf4,
)
from jaxcompress.quantize import Policy, Rule, presets

INT4_G4 = Format(int4, PerGroup(4))
PRESETS = {name: value for name, value in vars(presets).items() if isinstance(value, Policy)}
ALONE = [name for name in PRESETS if "gptq" not in name]


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.relu(nn.Dense(8, name="hidden")(x)))
        return nn.Dense(6, name="head")(x)


@pytest.fixture(scope="module")
def params():
    return Mlp().init(jax.random.key(0), jnp.ones((1, 6)))["params"]


def test_first_match_wins_and_every_leaf_is_named_once(params):
    params = {**params, "step": jnp.zeros((), jnp.int32), "scale": jnp.ones(())}
    policy = Policy(
        (
            Rule(where="head/kernel", weights=None),
            Rule(where="hidden/bias", weights=Format(int8)),
            Rule(where=["**/kernel", "step", "scale"], weights=INT4_G4),
        )
    )
    params["stack"] = {"kernel": jnp.ones((2, 8, 3))}
    covered = quantize.coverage(params, policy)
    assert covered.formats == {"hidden/bias": Format(int8), "stack/kernel": INT4_G4}
    assert covered.excluded == ("head/kernel",)
    assert covered.unselected == ("LayerNorm_0/bias", "LayerNorm_0/scale", "head/bias")
    assert covered.exempt == {
        "hidden/kernel": "has 6 entries along axis -2, which do not divide into groups of 4",
        "scale": "is a scalar",
        "step": "is of dtype int32, not floating point",
    }
    named = [*covered.formats, *covered.excluded, *covered.unselected, *covered.exempt]
    assert sorted(named) == sorted(tree.paths(params))

    packed = quantize.pack(params, policy)
    got = {path for path, leaf in tree.items(packed) if isinstance(leaf, QArray)}
    assert got == set(covered.formats)
    assert all(packed[name] is params[name] for name in ("step", "scale"))
    for function in (quantize.coverage, quantize.pack, quantize.fake_quant):
        with pytest.raises(SelectionError, match="do not divide"):
            function(params, policy, strict=True)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (Policy((Rule(where="**/kernl", weights=Format(int8)),)), "hidden/kernel"),
        (Policy((Rule(weights=Format(int8)), Rule(where="head/kernel", weights=None))), "rule 1"),
        (Policy((Rule(where="head/bias", weights=INT4_G4),)), "without axis -2"),
        (Policy((Rule(weights=None),)), "no leaf a format.*Add a rule with `weights=`"),
    ],
)
def test_policies_that_do_nothing_are_refused(params, policy, says):
    for function in (quantize.coverage, quantize.pack, quantize.fake_quant):
        with pytest.raises(SelectionError, match=says):
            function(params, policy)


def test_misuse_of_policies(params):
    with pytest.raises(ArgumentTypeError, match="numerics.Format"):
        Rule(weights=int8)
    with pytest.raises(ArgumentError, match="quantize.Rule"):
        Policy(())
    with pytest.raises(ArgumentTypeError, match="quantize.Policy"):
        quantize.pack(params, Rule(weights=Format(int8)))
    with pytest.raises(SelectionError):
        quantize.pack({}, presets.int8_weights)
    packed = quantize.pack(params, presets.int8_weights)
    with pytest.raises(SelectionError, match="compressed already"):
        quantize.pack(packed, presets.int8_weights)
    bad = jax.tree.map(lambda x: x.at[...].set(jnp.nan), params)
    for function in (quantize.pack, quantize.fake_quant):
        with pytest.raises(NonFiniteError):
            function(bad, presets.int8_weights)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ALONE])
def test_methods_that_need_activations_are_refused_without(params, name):
    for function in (quantize.pack, quantize.fake_quant):
        with pytest.raises(ArgumentError, match=r"quantize\.ptq"):
            function(params, PRESETS[name])


@pytest.mark.parametrize("name", ALONE)
def test_presets_pack_what_they_fake(name):
    params = {"kernel": jax.random.normal(jax.random.key(0), (128, 3)), "bias": jnp.ones(3)}
    policy = PRESETS[name]
    packed = quantize.pack(params, policy)
    assert tree.nbytes(packed) < tree.nbytes(params) / 2 and packed["bias"] is params["bias"]
    faked = jax.jit(lambda params: quantize.fake_quant(params, policy))(params)
    unpacked = quantize.unpack(packed)
    assert jax.tree.structure(unpacked) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, unpacked, faked)
    error = numerics.relative_error(params["kernel"], packed["kernel"])
    bits = packed["kernel"].format.qtype.bits
    assert error < {1: 0.7, 2: 0.5, 3: 0.3, 4: 0.15, 5: 0.15, 8: 0.05}[bits]


@pytest.mark.parametrize("granularity", [PerTensor(), PerToken()], ids=["tensor", "token"])
@pytest.mark.parametrize(
    ("qtype", "options", "says"),
    [
        (nf4, {}, "`activations`.*integers or floats.*nf4, a Codebook"),
        (binary_basis(2), {}, "`activations`.*integers or floats.*a Basis"),
        (
            int8,
            {"scale_dtype": jnp.float8_e4m3fn, "global_scale": True},
            "`activations`.*global_scale=True",
        ),
    ],
    ids=["codebook", "basis", "global"],
)
def test_activations_that_no_kernel_takes(granularity, qtype, options, says):
    activations = Format(qtype, granularity, **options)
    with pytest.raises(ArgumentError, match=says):
        Rule(weights=Format(int8, PerChannel()), activations=activations)
    Rule(weights=activations)  # weights may have it
    Rule(weights=Format(int8, PerChannel()), activations=Format(float8_e4m3fn, granularity))


def test_coverage_needs_shapes_only(params):
    shapes = jax.eval_shape(lambda: params)
    here = quantize.coverage(params, presets.int8_weights)
    assert quantize.coverage(shapes, presets.int8_weights) == here


def test_linen_trains_through_fake_quant_and_serves_the_same_numbers(params):
    x, y = jax.random.normal(jax.random.key(1), (16, 6)), jnp.ones((16, 6))

    @jax.jit
    def loss(params):
        rounded = quantize.fake_quant(params, presets.int4)
        return jnp.square(Mlp().apply({"params": rounded}, x) - y).mean()

    before = loss(params)
    for _ in range(20):
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
    assert loss(params) < 0.7 * before
    packed = quantize.pack(params, presets.int4)
    apply = jax.jit(lambda packed: Mlp().apply({"params": quantize.unpack(packed)}, x))
    rounded = quantize.fake_quant(params, presets.int4)
    np.testing.assert_allclose(apply(packed), Mlp().apply({"params": rounded}, x), atol=1e-5)


def test_nnx_state():
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    packed = quantize.pack(state, presets.int8_weights)
    assert set(quantize.coverage(state, presets.int8_weights).formats) == {"kernel"}
    rebuilt = nnx.merge(graph, quantize.unpack(packed))
    faked = nnx.merge(graph, quantize.fake_quant(state, presets.int8_weights))
    x = jnp.ones((2, 6))
    np.testing.assert_array_equal(rebuilt(x), faked(x))
    assert not np.array_equal(rebuilt(x), model(x))


def test_equinox_module():
    model = eqx.nn.MLP(6, 4, 8, 1, key=jax.random.key(0))  # holds its activation as a leaf
    packed = quantize.pack(model, presets.int8_weights)
    assert isinstance(packed.layers[0].weight, QArray)
    x = jnp.ones(6)
    unpacked = quantize.unpack(packed)
    faked = quantize.fake_quant(model, presets.int8_weights)
    np.testing.assert_array_equal(unpacked(x), faked(x))


def test_tied_rules_keep_dtypes():
    params = {"a": jnp.ones((4, 2), jnp.bfloat16), "b": jnp.ones((4, 2), jnp.float32)}
    policy = Policy((Rule(where="a", weights=Format(int8, PerChannel())), Rule(weights=INT4_G4)))
    unpacked = quantize.unpack(quantize.pack(params, policy))
    assert jax.tree.map(lambda x: x.dtype, unpacked) == jax.tree.map(lambda x: x.dtype, params)
    assert quantize.unpack(params) == params


def test_the_policy_of_the_page():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "quantization.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, scope := {})
    assert [rule.where for rule in scope["policy"].rules[:2]] == ["head/**", "embed/**"]
