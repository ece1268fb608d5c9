"""`execute`: whole models by codes, under every transformation, on one device and on several."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from zoo import ZOO

from jaxcompress import graph, numerics, quantize, tree
from jaxcompress.errors import ArgumentError, SelectionError, StructureError
from jaxcompress.numerics import (
    Activation,
    Format,
    PerChannel,
    PerGroup,
    PerToken,
    QArray,
    float8_e4m3fn,
    int4,
    int8,
)
from jaxcompress.quantize._shardings import shardings

TOKEN = Activation(format=Format(int8, PerToken()))
INT8, INT4 = Format(int8, PerChannel()), Format(int4, PerGroup(4))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def pack(params, formats, activation=TOKEN):
    """Quantize the leaves at these paths."""
    return tree.map_with_path(
        lambda path, w: (
            dataclasses.replace(numerics.quantize(w, formats[path]), activation=activation)
            if path in formats
            else w
        ),
        params,
    )


def rounded(equation, *operands):
    """Round the activation of a site by the rounding of single arrays, and go on: the reference.

    It is a handler for `graph.replay`. Its gradient is the straight-through one.
    """
    site, operands = equation.sites[0], list(operands)
    if site.axes.lookup:
        return equation.bind(*operands)
    k = 1 - site.operand
    x, name = operands[k], equation.primitive.name
    if name == "conv_general_dilated":
        kept = (equation.params["dimension_numbers"].lhs_spec[0],)
    else:
        numbers = equation.params.get("dimension_numbers")
        if numbers is None:
            numbers = equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        kept = tuple(j for j in range(x.ndim) if j not in numbers[0][k])
    format = Format(int8, PerChannel(kept)) if kept else Format(int8)
    operands[k] = numerics.fake_quant(x.astype(jnp.float32), format).astype(x.dtype)
    return equation.bind(*operands)


def close(got, expected, tolerance=1e-5):
    """Compare every array, by its own largest entry."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max(initial=0) <= tolerance * np.abs(b).max(initial=1e-6)


# --- The zoo --------------------------------------------------------------------------------------

NO_CODES = {  # leaf -> why it is dequantized, where it is
    "mobilenet": "feature groups",
    "efficientnet_block": "feature groups",
    "conv_gru_equinox": "scales vary along what the convolution sums",  # (out, in) layouts
    "convnext": "feature groups",
    "custom_vjp": "custom_vjp_call takes arrays",
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    """By codes alone and with activations: what the rounded arrays give, in one compilation."""
    fn, params, inputs = ZOO[name].build()
    found = graph.trace(fn, params, *inputs).sites
    leaves = dict(tree.items(params))
    paths = [p for p in dict.fromkeys(s.path for s in found) if leaves[p].ndim >= 2]
    formats = dict.fromkeys(paths, INT8)

    def run(params, inputs):
        alone, both = pack(params, formats, None), pack(params, formats)
        dense = quantize.unpack(alone)
        looked = {s.path for s in found if s.axes.lookup}
        handled = tuple(p for p in paths if name != "custom_vjp" or p != "params/kernel")
        assert handled and looked <= set(leaves)
        return (
            quantize.execute(fn)(alone, *inputs),
            fn(dense, *inputs),
            quantize.execute(fn)(both, *inputs),
            graph.replay(fn, {handled: rounded})(dense, *inputs),
        )

    by_weights, expected, by_codes, rounded_too = jax.jit(run)(params, inputs)
    close(by_weights, expected)
    close(by_codes, rounded_too)
    uses = quantize.site_kernels(fn, jax.eval_shape(lambda p: pack(p, formats), params), *inputs)
    assert {use.path for use in uses} == set(paths)
    assert {use.site for use in uses if use.site} <= {s.name for s in found}
    fallbacks = {use.why for use in uses if use.kernel == "dequantized"}
    assert all(NO_CODES[name] in why for why in fallbacks) if name in NO_CODES else not fallbacks


# --- Transformations ------------------------------------------------------------------------------


def mlp(p, x):
    h = jnp.tanh(x @ p["up"] + p["bias"])
    return h @ p["down"] * p["scale"]


@pytest.fixture(scope="module")
def small():
    params = {"up": draw(8, 12), "bias": draw(1, 12)[0], "down": draw(12, 4, seed=1)}
    params["scale"] = draw(1, 4, seed=2)[0]
    return params, draw(6, 8, seed=3)


FORMATS = {"up": INT8, "down": INT4}


def test_gradients_pass_through_rounding(small):
    params, x = small
    q = pack(params, FORMATS)
    dense = quantize.unpack(q)
    free = {"bias": params["bias"], "scale": params["scale"]}

    def loss(fn, params):
        return lambda free, x: (fn({**params, **free}, x) ** 2).sum()

    reference = graph.replay(mlp, {("up", "down"): rounded})

    @jax.jit
    def grads(free, x):
        codes = jax.value_and_grad(loss(quantize.execute(mlp), q), (0, 1))(free, x)
        return codes, jax.value_and_grad(loss(reference, dense), (0, 1))(free, x)

    codes, expected = grads(free, x)
    close(codes, expected)
    assert all(float(abs(g).max()) > 0.1 for g in jax.tree.leaves(codes[1]))


def test_gradients_stop_where_a_static_range_clips():
    ends = jnp.full((1, 1), -1.0), jnp.full((1, 1), 1.0)
    format = Format(int8)
    scale, _ = numerics.scale_of_range(*ends, format)
    q = pack({"w": draw(3, 2)}, {"w": INT8}, Activation(format=format, scale=scale))
    x = jnp.array([[0.5, -0.999, 1.5], [-7.0, 0.0, 1.0]])
    fn = lambda p, x: x @ p["w"]
    grad = jax.jit(jax.grad(lambda x: quantize.execute(fn)(q, x).sum()))(x)
    inside = np.abs(np.asarray(x)) <= 1
    expected = np.where(inside, np.asarray(numerics.dequantize(q["w"])).sum(1), 0)
    np.testing.assert_allclose(grad, expected, rtol=1e-6)


def test_gradients_of_weights_alone_need_no_straight_through(small):
    params, x = small
    q = pack(params, FORMATS, None)
    f = lambda fn, p: jax.jit(jax.grad(lambda x: (fn(p, x) ** 2).sum()))(x)
    close(f(quantize.execute(mlp), q), f(mlp, quantize.unpack(q)))


def test_vmap_remat_and_jit_inside(small):
    params, x = small
    q = pack(params, FORMATS)
    inner = jax.checkpoint(jax.jit(mlp))
    fn = lambda p, x: inner(p, x)
    assert {u.kernel for u in quantize.site_kernels(fn, q, x)} == {"codes", "codes in groups"}

    @jax.jit
    def run(q, x):
        run = quantize.execute(fn)
        one = jax.vmap(quantize.execute(mlp), in_axes=(None, 0))
        loss = jax.grad(lambda x: run(q, x).sum())
        return quantize.execute(mlp)(q, x), run(q, x), one(q, x), loss(x)

    plain, through, mapped, grad = run(q, x)
    close(through, plain)
    close(mapped, plain)
    close(grad, jax.grad(lambda x: quantize.execute(mlp)(q, x).sum())(x))


def test_vmap_inside_and_experts():
    """A leaf that `vmap` takes apart is a batch axis, as are experts under `ragged_dot`."""
    params = {"w": draw(3, 8, 4), "experts": draw(2, 4, 5, seed=1)}
    q = pack(params, {"w": Format(int8, PerChannel((0, 2))), "experts": Format(int8)})

    def fn(p, x, sizes):
        h = jax.vmap(lambda w, x: x @ w)(p["w"], x).sum(0)
        return jax.lax.ragged_dot(h, p["experts"], sizes)

    x, sizes = draw(3, 6, 8, seed=2), jnp.array([[4, 2], [1, 5]])
    assert {u.kernel for u in quantize.site_kernels(fn, q, x, sizes[0])} == {"codes"}

    @jax.jit
    def run(q, dense, x, sizes):
        reference = graph.replay(fn, {("w", "experts"): rounded})
        got = [quantize.execute(fn)(q, x, each) for each in sizes]
        expected = [reference(dense, x, each) for each in sizes]
        grad = jax.grad(lambda x: quantize.execute(fn)(q, x, sizes[0]).sum())(x)
        return got, expected, grad, jax.grad(lambda x: reference(dense, x, sizes[0]).sum())(x)

    got, expected, grad, expected_grad = run(q, quantize.unpack(q), x, sizes)
    close(got, expected)
    close(grad, expected_grad)


def loops(p, x):
    """Leaves taken apart by a scan, shared in it, in a while loop and in both branches."""

    def layer(x, w):
        x = jnp.tanh(x @ w) @ p["shared"]
        return x, x.sum()

    x, sums = jax.lax.scan(layer, x, p["stack"])
    x, sums_back = jax.lax.scan(layer, x, p["grouped"], reverse=True)
    for k in range(2):
        x = jnp.tanh(x @ p["stack"][k])
        x = jnp.tanh(x @ p["grouped"][k])
    x = jax.lax.while_loop(
        lambda x: jnp.abs(x @ p["gate"]).sum() > 0.3, lambda x: jnp.tanh(x @ p["shared"]) / 3, x
    )
    x = jax.lax.cond(x.sum() > 0, lambda x: x @ p["shared"], lambda x: 2 * (x @ p["gate"]), x)
    return x, sums, sums_back


def test_loops_and_branches():
    params = {"stack": draw(2, 8, 8), "grouped": draw(2, 8, 8, seed=1)}
    params |= {"shared": draw(8, 8, seed=2), "gate": draw(8, 8, seed=3)}
    formats = {"stack": Format(int8, PerChannel((0, 2))), "grouped": INT4}
    formats |= {"shared": INT4, "gate": INT8}
    q, x = pack(params, formats), draw(3, 8, seed=4)
    uses = quantize.site_kernels(loops, q, x)
    assert not [use for use in uses if use.kernel == "dequantized"]
    assert {use.site for use in uses} == {s.name for s in graph.trace(loops, params, x).sites}

    @jax.jit
    def run(q, dense, x):
        reference = graph.replay(loops, {tuple(formats): rounded})
        return quantize.execute(loops)(q, x), reference(dense, x)

    close(*run(q, quantize.unpack(q), x))


def test_groups_along_the_layers_are_dequantized_and_reported():
    params = {"stack": draw(4, 8, 8)}
    q = pack(params, {"stack": Format(int8, PerGroup(2, -3))}, None)
    fn = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["stack"])[0]
    (use,) = quantize.site_kernels(fn, q, jnp.ones((2, 8)))
    assert (use.kernel, use.why) == ("dequantized", "scan takes arrays")
    close(quantize.execute(fn)(q, jnp.ones((2, 8))), fn(quantize.unpack(q), jnp.ones((2, 8))))


def test_a_rule_of_its_own_is_a_border():
    """Inside a custom_vjp nothing is rounded; its own gradient stays, and the border is named."""
    fn, params, inputs = ZOO["custom_vjp"].build()
    q = pack(params, {"params/kernel": INT8})
    (use,) = quantize.site_kernels(fn, q, *inputs)
    assert (use.kernel, use.site, use.why) == ("dequantized", None, "custom_vjp_call takes arrays")
    grad = lambda fn, p: jax.grad(lambda x: (100 * fn(p, x)).sum())(*inputs)
    close(grad(quantize.execute(fn), q), grad(fn, quantize.unpack(q)))


# --- Programs -------------------------------------------------------------------------------------


def exported(q, x):
    """mlp by codes as StableHLO, for any batch."""
    (batch,) = export.symbolic_shape("batch")
    flat, treedef = jax.tree.flatten(q)

    @jax.jit
    def served(flat, x):
        return quantize.execute(mlp)(jax.tree.unflatten(treedef, flat), x)

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in flat]
    return flat, served, export.export(served)(shapes, jax.ShapeDtypeStruct((batch, 8), x.dtype))


@pytest.mark.parametrize("activation", [None, TOKEN], ids=["weights", "activations"])
def test_export_for_any_batch(small, activation):
    params, x = small
    flat, served, program = exported(pack(params, FORMATS, activation), x)
    for rows in (6, 2):
        close(program.call(flat, x[:rows]), served(flat, x[:rows]))


def test_export_to_bytes_and_back(small):
    pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers")
    params, x = small
    flat, served, program = exported(pack(params, FORMATS), x)
    close(export.deserialize(program.serialize()).call(flat, x), served(flat, x))


def test_int4_stays_packed(small):
    """The program's arguments are int4: half a byte for a weight, wherever it is kept."""
    params, x = small
    q = pack(params, {"up": INT4, "down": INT4}, None)
    lowered = jax.jit(quantize.execute(mlp)).lower(q, x)
    weights = [a.dtype for a in jax.tree.leaves(lowered.in_avals) if a.ndim == 3 and a.shape[1] > 1]
    assert weights == [jnp.int4, jnp.int4]
    assert "tensor<2x4x12xi4>" in lowered.as_text()


def test_backends_are_chosen_or_given(small):
    params, x = small
    q = pack(params, {"up": Format(float8_e4m3fn)}, Activation(format=Format(float8_e4m3fn)))
    lowered = {
        backend: str(jax.make_jaxpr(quantize.execute(mlp, backend=backend))(q, x))
        for backend in (None, "cpu", "gpu", "tpu")
    }
    # float8 is what GPUs multiply; elsewhere bfloat16 holds its numbers.
    direct = "preferred_element_type=float32"
    assert lowered[None] == lowered["cpu"] == lowered["tpu"] != lowered["gpu"]
    assert "bf16[6,12]" not in lowered["gpu"] and "bf16[8,12]" in lowered["tpu"]
    assert direct in lowered["gpu"]
    close(quantize.execute(mlp, backend="gpu")(q, x), quantize.execute(mlp)(q, x))


def test_errors(small):
    params, x = small
    for call in (
        lambda: quantize.execute(mlp)(params, x),
        lambda: quantize.site_kernels(mlp, params, x),
    ):
        with pytest.raises(SelectionError, match=r"quantize\.ptq or quantize\.pack"):
            call()
    for call in (quantize.execute, functools.partial(quantize.site_kernels, params=params)):
        with pytest.raises(ArgumentError, match='"gpu"'):
            call(mlp, backend="cuda")
    q = pack({**params, "up": draw(5, 12)}, FORMATS)
    with pytest.raises(StructureError, match=r"fn raises TypeError: dot_general.*'up' \(5, 12\)"):
        quantize.execute(mlp)(q, x)


def test_what_it_is_called_stays():
    executed = quantize.execute(mlp)
    assert executed.__name__ == "mlp" and executed.__wrapped__ is mlp


# --- Many devices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("activation", [None, TOKEN], ids=["weights", "activations"])
def test_shards_compute_what_one_device_does(kind, activation):
    """Leaves that are split along inputs (or their groups) and outputs, batches along data."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    params = {"up": draw(8, 16), "bias": draw(1, 16)[0], "down": draw(16, 8, seed=1)}
    params |= {"wide": draw(8, 16, seed=2), "narrow": draw(16, 4, seed=3)}
    specs = {
        "up": (None, "model"),
        "down": ("model",),
        "wide": (None, "model"),
        "narrow": ("model",),
    }
    formats = {"up": INT8, "down": INT8, "wide": INT4, "narrow": INT4}
    x = draw(4, 8, seed=4)
    rows = NamedSharding(mesh, PartitionSpec("data", None))
    options = {"out_sharding": rows} if kind == AxisType.Explicit else {}

    def fn(p, x):
        h = jnp.tanh(jnp.dot(x, p["up"]) + p["bias"])
        h = jnp.dot(h, p["down"], **options)
        h = jnp.tanh(jnp.dot(h, p["wide"]))
        return jnp.dot(h, p["narrow"], **options)

    q = pack(params, formats, activation)
    placed = {
        path: put(leaf, *(("model",) if path == "bias" else ()))
        if not isinstance(leaf, QArray)
        else jax.device_put(leaf, shardings(leaf, NamedSharding(mesh, PartitionSpec(*specs[path]))))
        for path, leaf in q.items()
    }
    assert placed["narrow"].values.sharding.spec == PartitionSpec("model", None, None)
    assert placed["up"].values.sharding.spec == PartitionSpec(None, "model")
    loss = lambda p, x: (quantize.execute(fn)(p, x) ** 2).sum()
    both = lambda p, x: (quantize.execute(fn)(p, x), jax.grad(loss, 1)(p, x))
    with jax.set_mesh(mesh):
        got = jax.jit(both)(placed, put(x, "data"))
    assert got[0].sharding.spec[0] == "data" and len(got[0].sharding.device_set) == 8
    options.clear()
    close(got, jax.jit(both)(q, x))


# --- What a TPU would move ------------------------------------------------------------------------


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is absent")
def test_a_tpu_reads_half_a_byte_for_a_weight():
    """Bytes that a compiled matvec moves, against bfloat16: 4.5 bits are 0.27 of 16."""
    fn = lambda p, x: x @ p["w"]
    w = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16)
    format = Format(int4, PerGroup(128), scale_dtype=jnp.bfloat16)
    q = jax.eval_shape(lambda w: numerics.quantize(w, format), w)
    executed = quantize.execute(fn, backend="tpu")
    flat, treedef = jax.tree.flatten(q)
    served = lambda flat, x: executed({"w": jax.tree.unflatten(treedef, flat)}, x)
    before = graph.cost(fn, {"w": w}, x, target="tpu-v5e:2x2")
    after = graph.cost(served, flat, x, target="tpu-v5e:2x2")
    assert after.bytes < 0.3 * before.bytes
