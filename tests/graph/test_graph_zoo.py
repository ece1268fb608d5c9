"""The graph against the zoo: every leaf accounted for, FLOPs counted by hand, replay exact."""

import collections
import functools
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from zoo import ZOO
from zoo_sequences import LLAMA

from jaxcompress import adapters, graph, tree

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
from models.convnext import ConvNeXt
from models.mobilenet import MobileNetV2
from models.vit import ViT

HANDLERS = {"none": {}, "identity": {"**": lambda equation, *operands: equation.bind(*operands)}}


@functools.cache
def traced(name):
    fn, params, inputs = ZOO[name].build()
    return graph.trace(fn, params, *inputs)


@pytest.mark.parametrize("name", ZOO)
def test_every_leaf_is_accounted_for(name):
    model, found = ZOO[name], traced(name)
    assert dict(collections.Counter(site.path for site in found.sites)) == dict(model.sites)
    assert set(found.uses) == model.elsewhere
    assert set(found.unreached) == model.unused
    assert found.returned == ()
    names = [site.name for site in found.sites]
    assert len(set(names)) == len(names) and set(names) >= set(model.sites)


@pytest.mark.parametrize("name", ZOO)
def test_flops_are_the_hand_count(name):
    found = traced(name)
    assert found.flops == ZOO[name].flops
    parts = sum(part.flops for part in (*found.sites, *found.elsewhere))
    if name == "control_flow":  # the total has the costlier branch only
        cheaper = found["branch/direct"].flops + found["shared"].flops
        assert parts - cheaper == found.flops
    else:
        assert parts == found.flops


IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


@pytest.mark.parametrize(
    ("module", "published"),
    [
        pytest.param(MobileNetV2(), "0.301", id="mobilenet-v2"),
        pytest.param(ConvNeXt(), "4.456", id="convnext-t"),
    ],
)
def test_published_multiply_adds(module, published):
    """In 10⁹, as torchvision's documentation gives them."""
    variables = jax.eval_shape(module.init, jax.random.key(0), IMAGE)
    fn, params = adapters.from_linen(module, variables)
    assert f"{graph.trace(fn, params, IMAGE).flops / 2e9:.3f}" == published


def test_published_multiply_adds_of_vit():
    module = nnx.eval_shape(lambda: ViT(rngs=nnx.Rngs(0)))
    module.eval()
    fn, params = adapters.from_nnx(module)
    assert f"{graph.trace(fn, params, IMAGE).flops / 2e9:.3f}" == "17.564"


# --- Replay ---------------------------------------------------------------------------------------


# Always run, whatever the programs look like: one model of each construct.
COMPILED = {
    "resnet_train",
    "llama_scanned_nnx",
    "moe_ragged",
    "char_lstm",
    "conv_gru_equinox",
    "control_flow",
    "custom_vjp",
}


@functools.cache
def lowered(name, replayed=None):
    """The program that XLA gets: outputs, and gradients to the float leaves of params."""
    model = ZOO[name]
    fn, params, inputs = model.build()
    if replayed is not None:
        fn = graph.replay(fn, HANDLERS[replayed])
    floats, rest = tree.partition(params, lambda path, leaf: tree.is_floating(leaf))

    def loss(floats):
        outputs = fn(tree.merge(floats, rest), *inputs)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(outputs)), outputs

    function = jax.grad(loss, has_aux=True) if model.differentiable else loss
    return jax.jit(function).lower(floats), floats


@functools.cache
def run(name, replayed=None):
    program, floats = lowered(name, replayed)
    return program.compile()(floats)


@pytest.mark.parametrize("handlers", HANDLERS)
@pytest.mark.parametrize("name", ZOO)
def test_replay_is_exact(name, handlers):
    """Bit for bit: the same program, or else the same outputs and gradients when it runs."""
    same = lowered(name)[0].as_text() == lowered(name, handlers)[0].as_text()
    if same and (name not in COMPILED or handlers == "none"):
        return
    result, expected = run(name, handlers), run(name)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_programs_tell_models_apart():
    """What `test_replay_is_exact` relies on: another constant is another program."""
    fn, params, inputs = ZOO["custom_vjp"].build()
    scaled = graph.replay(fn, {"**/head/*": lambda e, *o: e.bind(*o) * (1 + 1e-6)})
    texts = {jax.jit(f).lower(params, *inputs).as_text() for f in (fn, scaled)}
    assert len(texts) == 2


# --- Taps -----------------------------------------------------------------------------------------


def both(site, activation, output):
    """What an observer sees, as it came and as rows."""
    if site.primitive == "ragged_dot_general":  # observers get it by expert: rows already
        return activation, output, activation, output
    return activation, output, site.rows(activation), site.output_rows(output)


@functools.cache
def tapped(name):
    """What goes into each site and what comes out of it, as NumPy arrays; see `both`."""
    fn, params, inputs = ZOO[name].build()
    found = traced(name)

    def empty(site):
        operands = [site.activation, site.output]
        if site.primitive == "ragged_dot_general":
            operands = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in operands]
        shapes = jax.eval_shape(functools.partial(both, site), *operands)
        return jax.tree.map(lambda x: np.zeros((*site.stack, *x.shape), x.dtype), shapes)

    keep = lambda site, state, activation, output: both(site, activation, output)
    observed = graph.observe(fn, {site.name: keep for site in found.sites})
    states = {site.name: empty(site) for site in found.sites}
    _, states = jax.jit(observed)(params, states, *inputs)
    return jax.tree.map(np.asarray, states)


def as_matrix(leaf, site):
    """The leaf as (*batch, features, outputs), by the roles of its axes."""
    axes = site.axes
    inner = sorted({*axes.contract, *axes.spatial} - set(axes.group))
    roles = [*axes.batch, *inner, *axes.output]
    rest = [k for k in range(leaf.ndim) if k not in roles]  # of one entry, or the layer
    leaf = leaf.transpose(*roles, *rest)
    batch = leaf.shape[: len(axes.batch)]
    features = math.prod(leaf.shape[len(batch) : len(batch) + len(inner)])
    matrix = leaf.reshape(*batch, features, -1)
    if axes.group:  # (features, groups * outputs) -> (groups, features, outputs)
        matrix = np.moveaxis(matrix.reshape(features, site.feature_groups, -1), 1, 0)
    return matrix


@pytest.mark.parametrize("name", ZOO)
def test_rows_times_leaf_are_output_rows(name):
    """At every site: what comes out is what goes in, times the leaf in the shape of its roles."""
    leaves = dict(tree.items(ZOO[name].build()[1]))
    for site in traced(name).sites:
        seen = tapped(name)[site.name]
        if not site.stack:
            seen = [x[None] for x in seen]
        assert len(site.stack) <= 1 and len(seen[0]) == math.prod(site.stack)
        for i, (activation, output, rows, output_rows) in enumerate(zip(*seen, strict=True)):
            leaf = np.asarray(leaves[site.path])
            for axis in site.axes.stacked:
                leaf = np.expand_dims(np.take(leaf, i, axis), axis)
            if site.axes.lookup:
                np.testing.assert_array_equal(output, leaf[activation].reshape(output.shape))
                continue
            product = rows @ as_matrix(leaf, site)
            np.testing.assert_allclose(
                product, output_rows, rtol=1e-4, atol=1e-5, err_msg=site.name
            )


@pytest.mark.parametrize("name", ["llama_scanned", "inception"])
def test_taps_are_what_observers_see(name):
    fn, params, inputs = ZOO[name].build()
    outputs, inputs_of = jax.jit(graph.tap(fn, "**", at="input"))(params, *inputs)
    _, outputs_of = jax.jit(graph.tap(fn, "**", at="output"))(params, *inputs)
    assert list(inputs_of) == list(outputs_of) == list(tapped(name))
    for site, (activation, output, *_) in tapped(name).items():
        np.testing.assert_allclose(inputs_of[site], activation, rtol=1e-6)
        np.testing.assert_allclose(outputs_of[site], output, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(outputs, jax.jit(fn)(params, *inputs))


def numbers(name):
    """The model's leaves by path, and its inputs, as float64 NumPy."""
    _, params, inputs = ZOO[name].build()
    leaves = {path: np.asarray(leaf) for path, leaf in tree.items(params)}
    return leaves, [np.asarray(x) for x in inputs]


def check(name, expected, *, prefix="params/"):
    """Compare activations that go into sites."""
    assert expected
    for path, value in expected.items():
        got = tapped(name)[prefix + path][0]
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5, err_msg=path)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_taps_of_a_dense_chain():
    p, (x,) = numbers("custom_vjp")
    h = np.log1p(np.exp(x @ p["params/inputs/kernel"] + p["params/inputs/bias"]))
    check("custom_vjp", {"inputs/kernel": x, "kernel": h, "head/kernel": h @ p["params/kernel"]})


def test_taps_of_convolutions():
    p, (x,) = numbers("inception")
    relu_conv = lambda x, name: np.maximum(
        x @ p[f"params/{name}/kernel"][0, 0] + p[f"params/{name}/bias"], 0
    )
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    middle = relu_conv(x, "middle_in")
    expected = {
        "narrow/kernel": x,
        "middle_in/kernel": x,
        "middle_out/kernel": middle,
        "wide_out/kernel": relu_conv(x, "wide_in"),
        "pooled/kernel": windows.max((-2, -1)),
    }
    check("inception", expected)
    padded = np.pad(middle, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = sum(
        padded[:, i : i + 3, j : j + 3] @ p["params/middle_out/kernel"][i, j]
        for i in range(3)
        for j in range(3)
    )
    got = tapped("inception")["params/middle_out/kernel"][1]
    np.testing.assert_allclose(got, out, rtol=1e-4, atol=1e-5)


def rotate(x):
    """RoPE on (batch, time, heads, 2): one pair a head, which turns by one radian a position."""
    angle = np.arange(x.shape[1])[:, None]
    a, b = x[..., 0], x[..., 1]
    turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    return np.stack(turned, axis=-1)


def test_taps_of_a_scanned_llama():
    """Every layer of the stack, through rematerialisation."""
    p, (tokens,) = numbers("llama_scanned")
    norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    x = p["params/embed/embedding"][tokens]
    expected = collections.defaultdict(list)
    for i in range(LLAMA["layers"]):
        w = {
            path.removeprefix("params/layers/"): leaf[i]
            for path, leaf in p.items()
            if "layers" in path
        }
        project = lambda x, name, w=w: np.einsum("btd,dhk->bthk", x, w[f"attention/{name}/kernel"])
        y = norm(x, w["norm1/scale"])
        q, k, v = project(y, "q"), project(y, "k"), project(y, "v")
        q, k = rotate(q), rotate(k)
        out = np.zeros_like(q)
        for head in range(4):  # two query heads to a key head
            scores = np.einsum("bqd,bkd->bqk", q[:, :, head], k[:, :, head // 2]) / 2**0.5
            scores += np.triu(np.full((3, 3), -np.inf), 1)
            out[:, :, head] = softmax(scores) @ v[:, :, head // 2]
        x = x + np.einsum("bthk,hkd->btd", out, w["attention/o/kernel"])
        z = norm(x, w["norm2/scale"])
        gate = z @ w["gate/kernel"]
        hidden = gate * sigmoid(gate) * (z @ w["up/kernel"])
        x = x + hidden @ w["down/kernel"]
        for name in ("attention/q", "attention/k", "attention/v"):
            expected[f"layers/{name}/kernel"].append(y)
        expected["layers/attention/o/kernel"].append(out)
        expected["layers/gate/kernel"].append(z)
        expected["layers/up/kernel"].append(z)
        expected["layers/down/kernel"].append(hidden)
    check("llama_scanned", {path: np.stack(values) for path, values in expected.items()})
    check("llama_scanned", {"embed/embedding#1": norm(x, p["params/norm/scale"])})


def test_taps_of_experts():
    """Token by token: the place each takes at its best expert, and what the expert makes of it."""
    for name, prefix in (("moe", "params/"), ("moe_ragged", "")):
        p, (x,) = numbers(name)
        p = {path.removeprefix(prefix): leaf for path, leaf in p.items()}
        x = x.reshape(6, 4)  # (batch, time, dim) -> (tokens, dim)
        best = softmax(x @ p["router/kernel"]).argmax(-1)
        assert len(set(best)) > 1
        queues = [x[best == expert] for expert in range(3)]
        hidden = [np.maximum(q @ p["up"][e], 0) for e, q in enumerate(queues)]
        expected = {"router/kernel": x}
        if name == "moe":  # four places each, the rest zeros
            filled = lambda parts: np.stack(
                [np.pad(q[:4], ((0, 4 - len(q[:4])), (0, 0))) for q in parts]
            )
            expected |= {"up": filled(queues), "down": filled(hidden)}
        else:  # sorted by expert, and zero where a token belongs to another one
            ends = np.cumsum([len(q) for q in queues])
            place = lambda q, end: np.pad(q, ((end - len(q), 6 - end), (0, 0)))
            expected["up"] = np.stack(list(map(place, queues, ends)))
            expected["down"] = np.stack(list(map(place, hidden, ends)))
            outputs = np.stack(
                list(map(place, [q @ p["up"][e] for e, q in enumerate(queues)], ends))
            )
            np.testing.assert_allclose(tapped(name)["up"][1], outputs, rtol=1e-4, atol=1e-5)
        check(name, expected, prefix=prefix)


def test_taps_of_an_lstm():
    """Every step of both layers: the input beside the state, and the gates."""
    p, (characters,) = numbers("char_lstm")
    x = p["params/embed/embedding"][characters]
    for layer in range(2):
        kernel = p[f"params/cell_{layer}/gates/kernel"]
        bias = p[f"params/cell_{layer}/gates/bias"]
        c = h = np.zeros((2, 3))
        seen, gates, states = [], [], []
        for step in range(4):
            seen.append(np.concatenate([x[:, step], h], axis=-1))
            gates.append(seen[-1] @ kernel)
            i, j, f, o = np.split(gates[-1] + bias, 4, axis=-1)
            c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(j)
            h = sigmoid(o) * np.tanh(c)
            states.append(h)
        x = np.stack(states, axis=1)
        check("char_lstm", {f"cell_{layer}/gates/kernel": np.stack(seen)})
        got = tapped("char_lstm")[f"params/cell_{layer}/gates/kernel"][1]
        np.testing.assert_allclose(got, np.stack(gates), rtol=1e-4, atol=1e-5)
    check("char_lstm", {"head/kernel": x})
