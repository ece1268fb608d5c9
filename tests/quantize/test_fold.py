import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from zoo import ZOO
from zoo_registry import linen, nnx_model, values

from jaxcompress import adapters, graph, quantize, tree
from jaxcompress.errors import ArgumentError, SelectionError

STATISTICS = "it is normalised by its own statistics, which depend on fn's inputs"


class ConvNorm(nn.Module):
    bias: bool = False
    scale: bool = True
    shift: bool = True
    groups: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        conv = nn.Conv(8, (3, 3), use_bias=self.bias, feature_group_count=self.groups, name="conv")
        x = nn.BatchNorm(not train, use_scale=self.scale, use_bias=self.shift, name="bn")(conv(x))
        return nn.relu(x)


class DenseNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(True, name="bn")(nn.Dense(5, name="dense")(x)))
        return nn.LayerNorm(name="ln")(nn.Dense(4, name="head")(x))


class NnxConvNorm(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


IMAGES = values(2, 4, 4, 8)
MODELS = {
    "conv": lambda: linen(ConvNorm(), IMAGES),
    "conv with bias": lambda: linen(ConvNorm(bias=True), IMAGES),
    "grouped conv": lambda: linen(ConvNorm(groups=2), IMAGES),
    "depthwise conv": lambda: linen(ConvNorm(groups=8), IMAGES),
    "dense": lambda: linen(DenseNorm(), values(3, 4)),
    "nnx": lambda: nnx_model(NnxConvNorm, values(2, 4, 4, 4)),
    "scan": lambda: (scanned, STACK, (values(3, 4),)),
} | {name: ZOO[name].build for name in ("resnet_eval", "mobilenet", "efficientnet_block")}
COUNTS = {"resnet_eval": 7, "mobilenet": 10, "efficientnet_block": 3}


def norm(y, p):
    y = (y - p["mean"]) * (jax.lax.rsqrt(p["var"] + 1e-3) * p["scale"])
    return y + p["bias"]


@jax.jit
def scanned(params, x):
    def layer(x, p):
        return jnp.tanh(norm(x @ p["kernel"], p)), None

    return jax.lax.scan(jax.checkpoint(layer), x, params)[0]


STACK = {
    "kernel": values(3, 4, 4),
    "mean": values(3, 4),
    "var": jnp.abs(values(3, 4)) + 0.5,
    "scale": values(3, 4) + 2,
    "bias": -values(3, 4),
}

P = {name: x[0] for name, x in STACK.items()} | {"one": jnp.ones(1)}


def close(got, wanted, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


@functools.cache
def folded(name):
    fn, params, inputs = MODELS[name]()
    return fn, params, inputs, *quantize.fold_norm(fn, params, *inputs)


@pytest.mark.parametrize("name", MODELS)
def test_the_folded_function_is_the_same(name):
    fn, params, inputs, new_fn, new_params = folded(name)
    # new_params suit fn, too: what new_fn leaves out does nothing with them
    run = jax.jit(lambda p, q, x: (fn(p, *x), new_fn(q, *x), fn(q, *x)))
    wanted, got, also = run(params, new_params, inputs)
    close(got, wanted)
    close(also, wanted)
    assert jax.tree.structure(new_params) == jax.tree.structure(params)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(new_params), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_of_the_norms(name):
    fn, params, inputs, new_fn, new_params = folded(name)
    reasons = quantize.foldable(fn, params, *inputs)
    assert list(reasons.values()).count(None) == COUNTS.get(name, 1)
    expected = 1 if name == "dense" else 0  # the LayerNorm's
    assert str(jax.make_jaxpr(new_fn)(new_params, *inputs)).count("rsqrt") == expected
    assert str(jax.make_jaxpr(fn)(params, *inputs)).count("rsqrt") >= COUNTS.get(name, 1)


@pytest.mark.parametrize("name", MODELS)
def test_a_folded_function_can_be_traced(name):
    """With shapes alone and other batches; a bias is what is left of each chain."""
    fn, params, inputs, new_fn, new_params = folded(name)
    shapes = jax.eval_shape(lambda *args: args, new_params, *inputs)
    smaller = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in inputs]
    before = graph.trace(fn, params, *inputs)
    found = graph.trace(new_fn, shapes[0], *smaller)
    assert [site.name for site in found.sites] == [site.name for site in before.sites]
    assert [site.through for site in found.sites] == [site.through for site in before.sites]
    again = graph.affine(new_fn, shapes[0], *smaller)
    for site, reason in quantize.foldable(fn, params, *inputs).items():
        if reason is None:
            assert again[site].leaves == (again[site].bias,) and again[site].unshiftable is None
            A, _ = again[site].affine(new_params)
            np.testing.assert_array_equal(A, jnp.ones_like(A))
    with pytest.raises(SelectionError, match="none of whose"):
        quantize.fold_norm(new_fn, *shapes)


def test_the_arithmetic():
    """Depthwise: `A W` and `B` by NumPy in float64; the scale undoes what the variance does."""
    _, params, _, _, new_params = folded("depthwise conv")
    old, new = (
        {path: np.asarray(x, np.float64) for path, x in tree.items(p)} for p in (params, new_params)
    )
    A = old["params/bn/scale"] / np.sqrt(old["batch_stats/bn/var"] + 1e-5)
    B = old["params/bn/bias"] - old["batch_stats/bn/mean"] * A
    np.testing.assert_allclose(new["params/conv/kernel"], old["params/conv/kernel"] * A, rtol=1e-6)
    np.testing.assert_allclose(new["params/bn/bias"], B, rtol=1e-5, atol=1e-6)
    undone = np.sqrt(old["batch_stats/bn/var"] + 1e-5)
    np.testing.assert_allclose(new["params/bn/scale"], undone, rtol=1e-6)
    assert not new["batch_stats/bn/mean"].any()
    np.testing.assert_array_equal(new["batch_stats/bn/var"], old["batch_stats/bn/var"])


def test_a_channel_with_a_scale_of_zero():
    fn, params, inputs = MODELS["conv"]()
    scale = params["params"]["bn"]["scale"].at[2].set(0.0)
    params = {
        **params,
        "params": {**params["params"], "bn": {**params["params"]["bn"], "scale": scale}},
    }
    new_fn, new_params = quantize.fold_norm(fn, params, *inputs)
    close(new_fn(new_params, *inputs), fn(params, *inputs))
    close(fn(new_params, *inputs), fn(params, *inputs))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_without_a_bias_another_leaf_holds_the_shift(bias, scale):
    fn, params, inputs = linen(ConvNorm(bias=bias, scale=scale, shift=False), IMAGES)
    new_fn, new_params = quantize.fold_norm(fn, params, *inputs)
    close(new_fn(new_params, *inputs), fn(params, *inputs))
    (chain,) = graph.affine(new_fn, new_params, *inputs).values()
    assert chain.leaves == (("params/conv/bias" if bias else "batch_stats/bn/mean"),)
    if scale:  # without one, nothing can undo what the variance does
        close(fn(new_params, *inputs), fn(params, *inputs))


def test_it_can_be_transformed():
    fn, params, (x,), new_fn, new_params = folded("scan")
    close(jax.vmap(new_fn, (None, 0))(new_params, x), fn(params, x))
    close(jax.lax.map(lambda x: new_fn(new_params, x), x), fn(params, x))
    loss = lambda f: jax.jit(jax.grad(lambda p, x: (f(p, x) ** 2).sum(), argnums=(0, 1)))
    by_params, by_x = loss(new_fn)(new_params, x)
    whole, wanted = loss(fn)(new_params, x)
    close(by_x, wanted, rtol=1e-4)
    close(by_params["bias"], whole["bias"], rtol=1e-4)
    close(by_params["kernel"], whole["kernel"], rtol=1e-4)
    assert not any(by_params[name].any() for name in ("mean", "var", "scale"))
    assert by_params["kernel"].any()


def test_gradients_of_a_whole_model():
    fn, params, inputs, new_fn, new_params = folded("efficientnet_block")
    gradient = lambda f, p: jax.jit(jax.grad(lambda x: (f(p, x) ** 2).sum()))(*inputs)
    close(gradient(new_fn, new_params), gradient(fn, params), rtol=1e-4)


def test_in_bfloat16(strict_promotion):
    """A and B are computed in float32, the leaves keep their dtype."""
    params, x = jax.tree.map(lambda x: x.astype(jnp.bfloat16), P), values(3, 4)

    def fn(params, x):
        y = x.astype(jnp.bfloat16) @ params["kernel"]
        return jnp.tanh(y * params["scale"] + params["bias"])

    new_fn, new_params = quantize.fold_norm(fn, params, x)
    assert {leaf.dtype for leaf in new_params.values()} == {jnp.dtype(jnp.bfloat16)}
    product = np.asarray(params["kernel"], np.float32) * np.asarray(params["scale"], np.float32)
    np.testing.assert_array_equal(new_params["kernel"], product.astype(jnp.bfloat16))
    got, wanted = new_fn(new_params, x), fn(params, x)
    np.testing.assert_allclose(got.astype(float), wanted.astype(float), atol=0.03)


def test_where_chooses_and_the_others_stay():
    fn, params, inputs = MODELS["efficientnet_block"]()
    new_fn, new_params = quantize.fold_norm(fn, params, *inputs, where="depthwise/*")
    run = jax.jit(lambda p, q, x: (fn(p, *x), new_fn(q, *x)))
    close(*run(params, new_params, inputs))
    new = dict(tree.items(new_params))
    changed = {path for path, x in tree.items(params) if (new[path] != x).any()}
    assert {path.split("/")[0] for path in changed} == {"depthwise", "depthwise_norm"}
    assert str(jax.make_jaxpr(new_fn)(params, *inputs)).count("rsqrt") == 2


# --- What cannot be folded ------------------------------------------------------------------------


def test_layer_norm_and_training_mode_say_why():
    fn, params, inputs = MODELS["dense"]()
    head = quantize.foldable(fn, params, *inputs)["params/head/kernel"]
    assert head == f"no leaf scales its result: {STATISTICS}"
    fn, params, inputs = ZOO["resnet_train"].build()
    reasons = quantize.foldable(fn, params, *inputs)
    assert set(list(reasons.values())[:-1]) == {f"no leaf scales its result: {STATISTICS}"}
    with pytest.raises(
        SelectionError, match="none of whose 8 sites.*own statistics.*inference mode"
    ):
        quantize.fold_norm(fn, params, *inputs)


OBSTACLES = {
    "its kernel is read at other places as well": lambda p, x: norm(
        jnp.tanh(norm(x @ p["kernel"], p)) @ p["kernel"], p
    ),
    "its kernel is computed, sliced or repeated before it is contracted": lambda p, x: norm(
        x @ jnp.tanh(p["kernel"]), p
    ),
    "bias, added to it, is read at other places as well": lambda p, x: (
        jnp.tanh((x @ p["kernel"]) * p["scale"] + p["bias"]) + p["bias"]
    ),
    "one, added to it, has no entry of its own for each channel": lambda p, x: (
        (x @ p["kernel"]) * p["scale"] + p["one"]
    ),
    "no step adds a leaf to it as it is": lambda p, x: (
        (x @ p["kernel"]) * p["scale"] + jnp.exp(p["bias"])
    ),
    "no leaf is added to its result: its result is what fn returns": lambda p, x: (
        (x @ p["kernel"]) * p["scale"]
    ),
    "it lies inside a custom_jvp": lambda p, x: custom(p, x),
}


@jax.custom_jvp
def custom(p, x):
    return norm(x @ p["kernel"], p)


custom.defjvp(lambda primals, tangents: (custom(*primals), tangents[1] @ primals[0]["kernel"]))


@pytest.mark.parametrize("reason", OBSTACLES)
def test_obstacles(reason):
    fn, x = OBSTACLES[reason], values(3, 4)
    assert quantize.foldable(fn, P, x)["kernel"] == reason
    with pytest.raises(SelectionError) as error:
        quantize.fold_norm(fn, P, x)
    assert f"'kernel': {reason}" in str(error.value)


def test_a_quantized_kernel_is_left_alone():
    params = P | {"kernel": quantize.pack(P, quantize.presets.int8_weights)["kernel"]}
    fn = lambda p, x: norm(x @ quantize.unpack(p)["kernel"], p)
    assert quantize.foldable(fn, params, values(3, 4)) == {
        "kernel": "its kernel is quantized already"
    }


def test_where_must_select_a_kernel():
    fn, params, inputs = MODELS["conv"]()
    with pytest.raises(SelectionError, match=r"selects no kernel.*params/conv/kernel"):
        quantize.fold_norm(fn, params, *inputs, where="**/scale")


def test_another_mode_at_the_call_is_refused():
    """Folded in inference, called in training: there is no chain to leave out any more."""
    _, params, inputs = MODELS["conv"]()
    fn, _ = adapters.from_linen(ConvNorm(), params, mutable=["batch_stats"])
    new_fn, new_params = quantize.fold_norm(fn, params, *inputs, where="**/kernel")
    close(new_fn(new_params, *inputs)[0], fn(params, *inputs)[0])
    with pytest.raises(ArgumentError, match="own statistics"):
        graph.bypass(functools.partial(fn, train=True), ["params/conv/kernel"])(params, *inputs)


# --- A real network -------------------------------------------------------------------------------


@pytest.mark.data
def test_a_pretrained_resnet(data_dir):
    from models.resnet import TORCH_NAMES, CifarResNet

    data = np.load(data_dir / "cifar10.npz")
    x = data["x_test"][:16] / np.float32(255)
    x = jnp.asarray((x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], jnp.float32)
    shapes = jax.eval_shape(CifarResNet().init, jax.random.key(0), x)
    params = adapters.from_torch_state(
        data_dir / "resnet20_cifar10.safetensors", shapes, rename=TORCH_NAMES
    )
    fn, params = adapters.from_linen(CifarResNet(), params)
    reasons = quantize.foldable(fn, params, x)
    assert list(reasons.values()).count(None) == 19 and len(reasons) == 20
    new_fn, new_params = quantize.fold_norm(fn, params, x)
    assert "rsqrt" not in str(jax.make_jaxpr(new_fn)(new_params, x))
    run = jax.jit(lambda p, q: (fn(p, x), new_fn(q, x), fn(q, x)))
    wanted, got, also = run(params, new_params)
    assert (np.argmax(wanted, -1) == data["y_test"][:16]).mean() > 0.8
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(also, wanted, rtol=1e-4, atol=1e-4)
