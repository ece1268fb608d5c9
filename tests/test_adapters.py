"""Linen, NNX and Equinox models become `(fn, params)` and come back; PyTorch weights load."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from safetensors.numpy import save_file

from jaxcompress import adapters, errors, tree


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="bn")(nn.Dense(4, name="fc")(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(3, 4, rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.fc(x))


X = jnp.arange(6.0).reshape(2, 3)


def test_linen():
    module = LinenBlock()
    variables = module.init(jax.random.key(0), X)
    fn, params = adapters.from_linen(module, variables, train=False)
    np.testing.assert_array_equal(fn(params, X), module.apply(variables, X))
    assert params is variables
    fn, params = adapters.from_linen(module, variables, train=True, mutable=["batch_stats"])
    (out, updates), _ = fn(params, X, rngs={"dropout": jax.random.key(1)}), None
    assert out.shape == (2, 4) and list(updates) == ["batch_stats"]
    assert not np.allclose(updates["batch_stats"]["bn"]["mean"], 0)


def test_nnx_is_pure_and_comes_back():
    module = NnxBlock(nnx.Rngs(0))
    module.train()
    fn, params = adapters.from_nnx(module, mutable=nnx.BatchStat)
    out, updates = jax.jit(fn)(params, X)
    assert tree.paths(updates) == ["bn/mean", "bn/var"]
    np.testing.assert_array_equal(module.bn.mean[...], 0)  # the module itself was not touched
    np.testing.assert_allclose(out, module(X), rtol=1e-6)
    np.testing.assert_allclose(tree.select(updates, "bn/mean")["bn/mean"], module.bn.mean[...])

    module.eval()
    fn, params = adapters.from_nnx(module)
    zeroed = tree.map_where(jnp.zeros_like, params, "fc/*")
    rebuilt = adapters.to_nnx(module, zeroed)
    np.testing.assert_array_equal(rebuilt(X), fn(zeroed, X))
    assert not np.allclose(module(X), rebuilt(X))
    with pytest.raises(errors.StructureError, match="params"):
        adapters.to_nnx(module, nnx.state(module.fc))


def test_equinox():
    module = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    fn, params = adapters.from_equinox(module)
    batched = jax.vmap(fn, in_axes=(None, 0))
    np.testing.assert_array_equal(batched(params, X), jax.vmap(module)(X))
    grads = jax.grad(lambda p: batched(p, X).sum())(params)
    assert tree.paths(grads) == tree.paths(params)
    rebuilt = adapters.to_equinox(module, jax.tree.map(jnp.zeros_like, params))
    assert isinstance(rebuilt, eqx.nn.MLP)
    np.testing.assert_array_equal(jax.vmap(rebuilt)(X), 0)


# --- PyTorch ----------------------------------------------------------------------------------


class Converted(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 4, name="embed")(tokens)
        x = nn.Conv(6, (3,), name="conv")(x)
        x = nn.BatchNorm(use_running_average=True, name="bn")(x)
        return nn.DenseGeneral((2, 3), name="heads")(x)


def test_an_nnx_fn_leaves_params_and_module_as_they_are():
    """A module in training mode writes into its variables: not into those it was given."""
    module = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    fn, params = adapters.from_nnx(module, mutable=nnx.BatchStat)
    before = {path: np.array(leaf) for path, leaf in tree.items(params)}
    x = jnp.arange(6.0).reshape(2, 3)
    _, updates = fn(params, x)
    adapters.to_nnx(module, params)(x)
    assert dict(tree.items(updates))["mean"][0] != before["mean"][0]
    for state in (params, nnx.state(module)):
        for path, leaf in tree.items(state):
            np.testing.assert_array_equal(leaf, before[path])


TOKENS = jnp.zeros((1, 7), jnp.int32)
VARIABLES = jax.eval_shape(Converted().init, jax.random.key(0), TOKENS)


@pytest.fixture
def torch_state():
    rng = np.random.default_rng(0)
    shapes = {
        "tok.weight": (5, 4),
        "conv.weight": (6, 4, 3),
        "conv.bias": (6,),
        "norm.weight": (6,),
        "norm.bias": (6,),
        "norm.running_mean": (6,),
        "norm.running_var": (6,),
        "heads.weight": (6, 6),
        "heads.bias": (6,),
    }
    state = {k: rng.random(s, dtype=np.float32) for k, s in shapes.items()}
    return {**state, "norm.num_batches_tracked": np.array(3)}


RENAME = {"^embed$": "tok", "^bn$": "norm"}


def test_torch_layouts(torch_state):
    out = adapters.from_torch_state(torch_state, VARIABLES, rename=RENAME)
    assert jax.tree.structure(out) == jax.tree.structure(VARIABLES)
    params = out["params"]
    np.testing.assert_array_equal(params["embed"]["embedding"], torch_state["tok.weight"])
    for o, i, k in [(0, 1, 2), (5, 3, 0)]:
        assert params["conv"]["kernel"][k, i, o] == torch_state["conv.weight"][o, i, k]
    assert params["heads"]["kernel"].shape == (6, 2, 3)
    assert params["heads"]["kernel"][4, 1, 2] == torch_state["heads.weight"][1 * 3 + 2, 4]
    np.testing.assert_array_equal(params["bn"]["scale"], torch_state["norm.weight"])
    np.testing.assert_array_equal(out["batch_stats"]["bn"]["var"], torch_state["norm.running_var"])


def test_torch_state_from_a_file_and_by_function(torch_state, tmp_path):
    save_file(torch_state, tmp_path / "model.safetensors")
    by_name = {"embed": "tok", "bn": "norm"}
    a = adapters.from_torch_state(
        tmp_path / "model.safetensors", VARIABLES, rename=lambda m: by_name.get(m, m)
    )
    b = adapters.from_torch_state(torch_state, VARIABLES, rename=RENAME)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_torch_errors(torch_state):
    with pytest.raises(errors.StructureError, match=r"'embed.weight' \(for 'params/embed/em"):
        adapters.from_torch_state(torch_state, VARIABLES)
    extra = {**torch_state, "aux.weight": np.ones(3)}
    with pytest.raises(errors.StructureError, match="unused tensors.*aux.weight"):
        adapters.from_torch_state(extra, VARIABLES, rename=RENAME)
    adapters.from_torch_state(extra, VARIABLES, rename=RENAME, ignore="aux.*")
    wrong = {**torch_state, "conv.bias": np.ones(7)}
    with pytest.raises(errors.ArgumentError, match=r"\(6,\), got .conv.bias. of shape \(7,\)"):
        adapters.from_torch_state(wrong, VARIABLES, rename=RENAME)


def test_a_transposed_kernel_is_not_scrambled():
    variables = {"c": {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")}}
    with pytest.raises(errors.ArgumentError, match=r"of shape \(2, 3\), which becomes \(3, 2\)"):
        adapters.from_torch_state({"c.weight": np.arange(6.0).reshape(2, 3)}, variables)


def test_torch_weights_into_nnx_leave_random_state_alone():
    module = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    _, params = adapters.from_nnx(module)
    state = {"layers.0.weight": np.ones((2, 3)), "layers.0.bias": np.zeros(2)}
    filled = dict(tree.items(adapters.from_torch_state(state, params)))
    np.testing.assert_array_equal(filled["layers/0/kernel"], np.ones((3, 2)))
    assert jax.dtypes.issubdtype(filled["layers/1/rngs/key"].dtype, jax.dtypes.prng_key)
