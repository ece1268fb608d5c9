"""Blocks and layers dropped: the function, its params, its gradients, its certificate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from depth_models import X, draw, layer, scanned, stacked_params, unrolled, unrolled_params, without
from flax import linen as nn
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from zoo import ZOO
from zoo_sequences import LLAMA, Llama, LlamaConfig, llama_nnx

from jaxcompress import adapters, graph, numerics, quantize, structured, tree
from jaxcompress.errors import (
    ArgumentError,
    ArgumentTypeError,
    FileError,
    SelectionError,
    StructureError,
)
from jaxcompress.structured.depth._blocks import analyse
from jaxcompress.structured.depth._gated import run_gated

KEY = jax.random.key(0)
# One of each model; a layer of a stack where there is one.
DROPPED = {
    "resnet_train": "params/layer1_0",
    "convnext": "params/stage0_0",
    "vit": "blocks/0/attention",
    "gpt_neox": "params/layers_0/qkv+out",
    "llama": "params/layers_0/attention",
    "llama_scanned": "params/layers/attention",
    "llama_scanned_nnx": "layers[0]",
    "encoder_decoder": "decoder/0/cross",
}


@pytest.fixture(scope="module", params=DROPPED)
def zoo_case(request):
    fn, params, inputs = ZOO[request.param].build()
    name = DROPPED[request.param]
    return fn, params, inputs, name, structured.drop_layers(fn, params, name, *inputs)


def test_zoo_certificates_hold(zoo_case):
    fn, params, inputs, name, (_, fewer, certificate) = zoo_case
    assert certificate.holds, str(certificate)
    assert certificate.given.dense.relative > 1e-3  # something was dropped
    before, after = certificate.before, certificate.after
    assert before.params == tree.count(params) and after.params == tree.count(fewer)
    assert after.params < before.params and after.flops < before.flops
    assert not certificate.notes
    if "[" not in name:
        found = structured.blocks(fn, params, *inputs)
        blocks = [name] if name in found else list(found.layers[name].blocks)
        gone = {path for block in blocks for path in found[block].leaves}
        assert set(tree.paths(fewer)) == set(tree.paths(params)) - gone


def test_zoo_gradients_are_those_of_the_gated_function(zoo_case):
    fn, params, inputs, _, (smaller, fewer, _) = zoo_case
    dropped = smaller.dropped
    analysis = analyse(fn, params, inputs, {})

    def gated(params):
        gates = {n: jnp.zeros(analysis.blocks[n].stack) for n in dropped.blocks}
        layers = {
            n: jnp.asarray([i not in gone for i in range(analysis.stacks[n].length)])
            for n, gone in dropped.iterations.items()
        }
        return total(run_gated(analysis, (params, inputs, {}), gates, layers=layers))

    def total(outputs):
        first = jax.tree.leaves(outputs[0] if isinstance(outputs, tuple) else outputs)[0]
        return jnp.sum(jnp.sin(first.astype(jnp.float32)))

    floats = lambda params: jax.tree.map(
        lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, params
    )

    def both(params, fewer):
        grads = (jax.grad(f, allow_int=True) for f in (gated, lambda p: total(smaller(p, *inputs))))
        return [grad(p) for grad, p in zip(grads, (params, fewer), strict=True)]

    expected, found = jax.jit(both)(params, fewer)
    expected = dropped.apply(expected)
    pairs = zip(*(jax.tree.leaves(floats(t)) for t in (found, expected)), strict=True)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(floats(expected)))
    for x, y in pairs:
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, atol=1e-5 * largest)


# --- against functions that never had the layers --------------------------------------------------


@pytest.mark.parametrize("gone", [(0,), (1,), (0, 2)])
def test_unrolled_and_scanned_are_the_loop_without_the_layers(gone):
    params = unrolled_params()
    expected = without(params, *gone)
    smaller, fewer, _ = structured.drop_layers(unrolled, params, [f"layer_{k}" for k in gone], X)
    np.testing.assert_allclose(smaller(fewer, X), expected, rtol=1e-5, atol=1e-6)
    assert set(fewer) == {"head", *(f"layer_{k}" for k in range(3) if k not in gone)}
    smaller, fewer, _ = structured.drop_layers(scanned, stacked_params(), {"layers": gone}, X)
    np.testing.assert_allclose(smaller(fewer, X), expected, rtol=1e-5, atol=1e-6)
    assert fewer["layers"]["up"].shape == (3 - len(gone), 4, 3)
    jaxpr = str(jax.make_jaxpr(smaller)(fewer, X))
    assert f"length={3 - len(gone)}" in jaxpr and "length=3" not in jaxpr


def dropped_without_running(fn, params, name, *inputs):
    """Drop with shapes alone, so that no certificate is measured."""
    smaller, _, _ = structured.drop_layers(fn, jax.eval_shape(lambda: params), name, *inputs)
    return smaller, smaller.dropped.apply(params)


@pytest.mark.parametrize("name", ["llama", "llama_scanned"])
def test_a_llama_with_fewer_layers_is_flax_own(name):
    fn, params, inputs = ZOO[name].build()
    gone = {"llama": "params/layers_0", "llama_scanned": "params/layers[0]"}[name]
    smaller, fewer = dropped_without_running(fn, params, gone, *inputs)
    scan = name == "llama_scanned"
    module = Llama(LlamaConfig(**{**LLAMA, "layers": 1}, scan=scan, tied=scan))
    names = {"layers_1": "layers_0"}
    renamed = {"params": {names.get(k, k): v for k, v in fewer["params"].items()}}
    expected = jax.jit(module.apply)(renamed, *inputs)
    found = jax.jit(smaller)(fewer, *inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_nnx_stack_with_fewer_layers_is_flax_own():
    fn, params, inputs = ZOO["llama_scanned_nnx"].build()
    smaller, fewer = dropped_without_running(fn, params, {"layers": [1]}, *inputs)
    assert isinstance(fewer, nnx.State)
    module = nnx.eval_shape(
        lambda: llama_nnx.Llama(LlamaConfig(**{**LLAMA, "layers": 1}), rngs=nnx.Rngs(0))
    )
    native, _ = adapters.from_nnx(module)
    expected = jax.jit(native)(fewer, *inputs)
    np.testing.assert_allclose(jax.jit(smaller)(fewer, *inputs), expected, rtol=1e-5, atol=1e-6)


# --- as a function --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["unrolled", "scanned"])
def hand(request):
    fn, params, name = {
        "unrolled": (unrolled, unrolled_params(), "layer_1"),
        "scanned": (scanned, stacked_params(), "layers[1]"),
    }[request.param]
    return *structured.drop_layers(fn, params, name, X)[:2], without(unrolled_params(), 1)


def test_other_batch_sizes(hand):
    smaller, fewer, expected = hand
    np.testing.assert_allclose(jax.jit(smaller)(fewer, X[:2]), expected[:2], rtol=1e-5)
    assert smaller(fewer, jnp.ones((9, 4))).shape == (9, 2)


def test_vmap_over_inputs_and_params(hand):
    smaller, fewer, expected = hand
    one_by_one = jax.vmap(smaller, in_axes=(None, 0))(fewer, X[:, None])
    np.testing.assert_allclose(one_by_one[:, 0], expected, rtol=1e-5)
    two = jax.tree.map(lambda x: jnp.stack([x, jnp.zeros_like(x)]), fewer)
    both = jax.vmap(smaller, in_axes=(0, None))(two, X)
    np.testing.assert_allclose(both[0], expected, rtol=1e-5)
    assert not both[1].any()


def test_export_with_a_symbolic_batch(hand):
    smaller, fewer, expected = hand
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), fewer)
    x = jax.ShapeDtypeStruct(export.symbolic_shape("b, 4"), jnp.float32)
    exported = export.export(jax.jit(smaller))(shapes, x)
    np.testing.assert_allclose(exported.call(fewer, X[:3]), expected[:3], rtol=1e-5)


def test_what_is_dropped_is_not_computed(hand):
    smaller, fewer, _ = hand
    flops = 2 * 5 * (2 * (4 * 3 + 3 * 4) + 4 * 2)  # two layers, and the head
    assert graph.trace(smaller, fewer, X).flops == flops
    text = jax.jit(smaller).lower(fewer, X).as_text()
    assert "3x4x3" not in text  # no stacked leaf is put together at its old size


def test_it_is_found_to_have_blocks_itself(hand):
    smaller, fewer, _ = hand
    name = "layers[0]" if smaller.dropped.iterations else "layer_0"
    again, fewest, certificate = structured.drop_layers(smaller, fewer, name, X)
    assert certificate.holds
    np.testing.assert_allclose(again(fewest, X), without(unrolled_params(), 0, 1), rtol=1e-5)


def test_the_decision_as_a_file(hand, tmp_path):
    smaller, fewer, expected = hand
    file = tmp_path / "dropped.json"
    smaller.dropped.save(file)
    loaded = structured.Dropped.load(file)
    assert loaded == smaller.dropped
    fn, make = (scanned, stacked_params) if loaded.iterations else (unrolled, unrolled_params)
    again = structured.rebuild_layers(fn, loaded, jax.eval_shape(make))
    np.testing.assert_allclose(again(fewer, X), expected, rtol=1e-5)
    for x, y in zip(*map(jax.tree.leaves, (loaded.apply(make()), fewer)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_files_of_something_else(tmp_path):
    for k, text in enumerate(["", "[1]", '{"kind": "other", "version": 1}']):
        (tmp_path / f"{k}.json").write_text(text)
        with pytest.raises(FileError, match="cannot be read"):
            structured.Dropped.load(tmp_path / f"{k}.json")


def test_a_decision_about_another_model(hand):
    smaller, _, _ = hand
    other = {"head": jnp.ones((4, 2))}
    with pytest.raises(StructureError, match="no 'layer"):
        structured.rebuild_layers(unrolled, smaller.dropped, other)


def test_params_of_other_shapes(hand):
    smaller, fewer, _ = hand
    wrong = {**fewer, "head": jnp.ones((4, 3))}
    with pytest.raises(StructureError, match=r"shape \(4, 3\) for \(4, 2\) at 'head'"):
        smaller(wrong, X)
    with pytest.raises(StructureError, match="too many|shape"):
        smaller(stacked_params() if smaller.dropped.iterations else unrolled_params(), X)


# --- what goes along ------------------------------------------------------------------------------


def test_statistics_of_a_dropped_batchnorm_are_not_returned():
    fn, params, inputs = ZOO["resnet_train"].build()
    smaller, fewer = dropped_without_running(fn, params, "params/layer1_0", *inputs)
    _, state = jax.eval_shape(smaller, fewer, *inputs)
    assert set(state["batch_stats"]) == {"bn1", "layer2_0", "layer3_0"}
    assert set(fewer["batch_stats"]) == {"bn1", "layer2_0", "layer3_0"}
    assert jax.eval_shape(smaller, {**fewer, **state}, *inputs)[0].shape == (2, 3)


def test_tied_leaves_stay():
    def fn(params, x):
        x = x + jnp.tanh(x @ params["tied"]) @ params["own"]
        return (x + x @ params["b"]) @ params["tied"]

    params = {k: draw(n, 4, 4) for n, k in enumerate(("tied", "own", "b"))}
    smaller, fewer, certificate = structured.drop_layers(fn, params, "tied+own", X)
    assert set(fewer) == {"tied", "b"}
    assert certificate.notes == ("tied stays: it is read outside what was dropped",)
    x = np.asarray(X)
    expected = (x + x @ fewer["b"]) @ fewer["tied"]
    np.testing.assert_allclose(smaller(fewer, X), expected, rtol=1e-5, atol=1e-6)


def test_other_containers_keep_their_places():
    fn = lambda params, x: layer(layer(x, params[0]), params[1])
    params = [unrolled_params()["layer_0"], unrolled_params()["layer_1"]]
    smaller, fewer, _ = structured.drop_layers(fn, params, "0", X)
    assert fewer[0] is None and set(fewer[1]) == {"up", "down"}
    np.testing.assert_allclose(smaller(fewer, X), layer(X, params[1]), rtol=1e-6)


def stateful(params, x, keys):
    """A stack with a running mean per layer, a key per layer, and leaves stacked along axis 1."""

    def body(x, slices):
        up, down, mean, key = slices
        h = jnp.tanh(x @ up.astype(jnp.float32)) + jax.random.normal(key, (3,))
        return x + h @ down, 0.9 * mean + 0.1 * h.mean(0)

    stacks = (params["up"].transpose(1, 0, 2), params["down"], params["mean"], keys)
    x, mean = jax.lax.scan(body, x, stacks)
    return x, {"mean": mean}


@pytest.mark.parametrize("gone", [[1], [0, 2]])
def test_rows_of_everything_that_a_scan_reads(gone):
    params = {"up": draw(0, 4, 3, 3), "down": draw(1, 3, 3, 4), "mean": draw(2, 3, 3)}
    keys, name = jax.random.split(jax.random.key(0), 3), "down+mean+up"
    fn = stateful
    (name,) = structured.blocks(fn, params, X, keys).layers
    smaller, fewer, certificate = structured.drop_layers(fn, params, {name: gone}, X, keys)
    assert certificate.holds, str(certificate)
    kept = np.asarray([k for k in range(3) if k not in gone])
    assert fewer["up"].shape == (4, len(kept), 3)
    expected = {"up": params["up"][:, kept], "down": params["down"][kept]}
    expected["mean"] = params["mean"][kept]
    y, state = fn(expected, X, keys[kept])
    found, new = jax.jit(smaller)(fewer, X, keys)  # the inputs stay as they were
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["mean"], state["mean"], rtol=1e-5, atol=1e-6)


class NoisyLayer(nn.Module):
    """A residual layer with dropout, to be scanned."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dropout(0.5, deterministic=False)(nn.Dense(6, name="up")(x))
        return x + nn.Dense(4, name="down")(y), None


def test_a_linen_scan_with_leaves_stacked_along_axis_1_and_split_keys():
    scan = nn.scan(
        NoisyLayer,
        variable_axes={"params": 1},
        split_rngs={"params": True, "dropout": True},
        length=5,
    )
    module = scan(name=None)
    params = jax.eval_shape(module.init, {"params": KEY, "dropout": KEY}, X)
    params = jax.tree.map(lambda x: draw(x.size, *x.shape), params)
    fn = jax.jit(lambda params, x, key: module.apply(params, x, rngs={"dropout": key})[0])
    (name,) = structured.blocks(fn, params, X, KEY).layers
    smaller, fewer, certificate = structured.drop_layers(fn, params, {name: [1, 3]}, X, KEY)
    assert certificate.holds, str(certificate)
    assert certificate.given.dense.relative > 1e-3
    assert [x.shape for x in jax.tree.leaves(fewer)] == [(4, 3), (6, 3, 4), (6, 3), (4, 3, 6)]
    zeros = jax.tree.map(lambda x: x.at[:, jnp.array([1, 3])].set(0), params)
    np.testing.assert_allclose(smaller(fewer, X, KEY), fn(zeros, X, KEY), rtol=1e-5, atol=1e-6)


def test_results_stacked_over_layers_are_refused():
    def fn(params, x):
        x, seen = jax.lax.scan(lambda x, p: (layer(x, p), x), x, params["layers"])
        return x, seen

    params = {"layers": stacked_params()["layers"]}
    with pytest.raises(ArgumentError, match="stacked results"):
        structured.drop_layers(fn, params, "layers[0]", X)


def test_rows_that_something_else_reads_stay():
    def fn(params, x):
        return scanned(params, x) + jnp.sum(params["layers"]["up"])

    smaller, fewer, certificate = structured.drop_layers(fn, stacked_params(), "layers[0]", X)
    assert fewer["layers"]["up"].shape == (3, 4, 3) and fewer["layers"]["down"].shape == (2, 3, 4)
    assert certificate.notes == ("layers/up keeps its rows: not only the scan reads them",)
    expected = without(unrolled_params(), 0) + np.sum(fewer["layers"]["up"])
    np.testing.assert_allclose(smaller(fewer, X), expected, rtol=1e-5)


def test_a_block_whose_inside_is_returned():
    def fn(params, x):
        h = jnp.tanh(x @ params["a"])
        return (x + h) + x @ params["b"], h

    params = {"a": jnp.eye(4), "b": jnp.eye(4)}
    with pytest.raises(ArgumentError, match="'a', whose 'a' fn reads elsewhere"):
        structured.drop_layers(fn, params, "a", X)


def test_a_call_that_reads_a_leaf_that_went():
    def fn(params, x, *, more=None):
        y = layer(layer(x, params["layer_0"]), params["layer_1"])
        return y if more is None else y @ params["layer_0"]["up"]

    params = {k: unrolled_params()[k] for k in ("layer_0", "layer_1")}
    smaller, fewer, _ = structured.drop_layers(fn, params, "layer_0", X)
    with pytest.raises(ArgumentError, match="reads 'layer_0/up' outside"):
        smaller(fewer, X, more=jnp.ones(()))


def test_shapes_alone_give_sizes():
    shapes = jax.eval_shape(stacked_params)
    x = jax.ShapeDtypeStruct((5, 4), jnp.float32)
    _, fewer, certificate = structured.drop_layers(scanned, shapes, "layers[0]", x)
    assert fewer["layers"]["up"].shape == (2, 4, 3)
    assert certificate.given is None and certificate.random is None and not certificate.holds
    assert (certificate.before.params, certificate.after.params) == (3 * 24 + 8, 2 * 24 + 8)


# --- bad input ------------------------------------------------------------------------------------

RAISED = [
    ("layer_7", SelectionError, "The nearest are: 'layer_"),
    ("nothing/**", SelectionError, "no residual block"),
    ([], SelectionError, "got nothing"),
    ("layer_*", ArgumentError, "all 3 residual blocks"),
    ("layer_0[0]", ArgumentError, "Drop it by its name, 'layer_0'"),
    (3, ArgumentTypeError, "got 3"),
    ([3], ArgumentTypeError, r"got \[3\]"),
]
RAISED_IN_STACK = [
    ("layers[3]", ArgumentError, "from 0 to 2"),
    ("layers[-1]", ArgumentError, "from 0 to 2"),
    ({"layers": []}, ArgumentError, "at least one"),
    ({"layers": [0, 1, 2]}, ArgumentError, "at least one layer that stays"),
    ({"layer": [0]}, SelectionError, "'layers'"),
    ({"layers": ["0"]}, ArgumentTypeError, "integers"),
    ("layers", ArgumentError, "all 1 residual blocks"),
]


@pytest.mark.parametrize(("blocks", "error", "match"), RAISED)
def test_bad_names(blocks, error, match):
    with pytest.raises(error, match=match):
        structured.drop_layers(unrolled, unrolled_params(), blocks, X)


@pytest.mark.parametrize(("blocks", "error", "match"), RAISED_IN_STACK)
def test_bad_layers_of_a_stack(blocks, error, match):
    with pytest.raises(error, match=match):
        structured.drop_layers(scanned, stacked_params(), blocks, X)


def test_one_branch_of_one_layer_of_a_stack():
    fn, params, inputs = ZOO["llama_scanned"].build()
    with pytest.raises(ArgumentError, match=r"Drop the whole layer, 'params/layers\[1\]'"):
        structured.drop_layers(fn, params, "params/layers/attention[1]", *inputs)


def test_a_shortcut_that_changes_shape():
    fn, params, inputs = ZOO["resnet_eval"].build()
    with pytest.raises(ArgumentError, match="its shortcut changes shape"):
        structured.drop_layers(fn, params, "params/layer2_0", *inputs)


def test_quantized_leaves_go_whole():
    def quantized(params):
        to_int8 = lambda x: numerics.quantize(x, numerics.Format(numerics.int8))
        return {k: v if k == "head" else jax.tree.map(to_int8, v) for k, v in params.items()}

    fn, stack = quantize.execute(unrolled), quantize.execute(scanned)
    smaller, fewer, certificate = structured.drop_layers(
        fn, quantized(unrolled_params()), "layer_1", X
    )
    assert certificate.holds and set(fewer) == {"head", "layer_0", "layer_2"}
    # Scales of zero are weights of zero.
    assert certificate.given.weights.relative < 1e-5 < certificate.given.dense.relative
    np.testing.assert_allclose(smaller(fewer, X), without(unrolled_params(), 1), atol=0.02)
    params = quantized(stacked_params())
    smaller, fewer, certificate = structured.drop_layers(stack, params, "layers[1]", X)
    assert certificate.notes[0] == "layers/down keeps its rows: it is quantized"
    np.testing.assert_allclose(smaller(fewer, X), without(unrolled_params(), 1), atol=0.02)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("kind", ["unrolled", "scanned"])
def test_sharded_over_a_mesh(kind, axes):
    """Batch over one axis, outputs of the head over the other; the result is one device's."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axes, axes))
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    fn, make, name = (
        (unrolled, unrolled_params, "layer_1")
        if kind == "unrolled"
        else (scanned, stacked_params, {"layers": np.asarray([1])})
    )
    params, x = make(), draw(99, 4, 4)
    smaller, fewer = dropped_without_running(fn, params, name, x)
    with jax.sharding.set_mesh(mesh):
        sharded = {k: jax.tree.map(place, v) for k, v in params.items() if k != "head"}
        sharded["head"] = place(params["head"], None, "model")
        given = place(x, "data")
        found = structured.drop_layers(fn, sharded, name, given)
        assert found[2].holds, str(found[2])
        result = jax.jit(found[0])(found[1], given)
    np.testing.assert_allclose(result, smaller(fewer, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jitted", [False, True])
def test_strict_promotion_in_bfloat16(strict_promotion, jitted):
    half = lambda params: jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for fn, params, name in (
        (unrolled, unrolled_params(), "layer_1"),
        (scanned, stacked_params(), "layers[1]"),
    ):
        fn = jax.jit(fn) if jitted else fn
        x = X.astype(jnp.bfloat16)
        smaller, fewer, certificate = structured.drop_layers(fn, half(params), name, x)
        assert certificate.holds, str(certificate)
        y = smaller(fewer, x)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(np.float32), without(unrolled_params(), 1), atol=0.1)
        scores = structured.block_influence(fn, half(params), [x])
        gated, with_gates = structured.gate(fn, half(params), x)
        assert len(scores) == 3 and (gated(with_gates, x) == fn(half(params), x)).all()


def test_blocks_and_layers_may_be_given_themselves():
    found = structured.blocks(unrolled, unrolled_params(), X)
    for one in (found["layer_0"], found.layers["layer_0"], ["layer_0"], "*_0"):
        smaller, _, _ = structured.drop_layers(unrolled, jax.eval_shape(unrolled_params), one, X)
        assert smaller.dropped.blocks == ("layer_0",)
