"""What the smaller function can do, what keeps are refused, and what certificates say."""

import functools
import pickle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, tree_util
from zoo import ZOO

from jaxcompress import graph, structured, tree
from jaxcompress.errors import ArgumentError, FileError, SelectionError, StructureError


def mlp(p, x):
    return jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]


def mlp_params(hidden=8):
    rng = np.random.default_rng(0)
    shapes = {"up": (3, hidden), "bias": (hidden,), "down": (hidden, 2)}
    return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}


X = jnp.asarray(np.random.default_rng(1).standard_normal((4, 3)), jnp.float32)
KEEP = {"up": [1, 2, 6]}


@functools.cache
def shrunk():
    return structured.shrink(mlp, mlp_params(), KEEP, X)


def by_hand(x):
    p = mlp_params()
    return (
        jnp.tanh(x @ p["up"][:, [1, 2, 6]] + p["bias"][jnp.array([1, 2, 6])])
        @ p["down"][jnp.array([1, 2, 6])]
    )


def test_it_is_the_function_with_fewer_units():
    fn, params, certificate = shrunk()
    np.testing.assert_allclose(fn(params, X), by_hand(X), rtol=1e-6)
    assert certificate.holds and certificate.before.params == 48
    assert (certificate.after.params, certificate.after.flops) == (18, 2 * 4 * 15)
    assert "holds" in str(certificate)


@pytest.mark.parametrize("batch", [1, 7])
def test_other_batch_sizes(batch):
    fn, params, _ = shrunk()
    x = jnp.ones((batch, 3))
    np.testing.assert_allclose(jax.jit(fn)(params, x), by_hand(x), rtol=1e-6)


def test_equations_without_results():
    def fn(params, x):
        jax.debug.callback(lambda x: None, x.sum())
        return mlp(params, x)

    smaller_fn, params, certificate = structured.shrink(fn, mlp_params(), KEEP, X)
    keep = structured.keep(structured.groups(fn, mlp_params(), X), KEEP)
    assert certificate.holds and not graph.leaks(fn, keep.leaves, mlp_params(), X)
    np.testing.assert_allclose(smaller_fn(params, X), by_hand(X), rtol=1e-6)


def test_vmap_and_grad():
    fn, params, _ = shrunk()
    np.testing.assert_allclose(
        jax.vmap(fn, (None, 0))(params, X[:, None])[:, 0], by_hand(X), rtol=1e-5
    )
    found = jax.grad(lambda x: fn(params, x).sum())(X)
    np.testing.assert_allclose(found, jax.grad(lambda x: by_hand(x).sum())(X), rtol=1e-5)


@pytest.mark.parametrize("name", ["char_lstm", "resnet_eval"])
def test_export_with_a_symbolic_batch(name):
    fn, params, (x,) = ZOO[name].build()
    groups = structured.groups(fn, params, x)
    keep = structured.keep(groups, {g.name: np.arange((g.size + 1) // 2) for g in groups.values()})
    small, smaller = structured.rebuild(fn, keep), structured.slice_params(params, keep)
    (batch,) = export.symbolic_shape("b")
    like = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), smaller)
    call = export.export(jax.jit(small))(shapes, like).call
    np.testing.assert_allclose(call(smaller, x), small(smaller, x), rtol=1e-5, atol=1e-6)


def test_shrinking_what_has_shrunk():
    fn, params, _ = shrunk()
    again, fewer, certificate = structured.shrink(fn, params, {"up": [0, 2]}, X)
    assert certificate.holds and fewer["up"].shape == (3, 2)
    p = mlp_params()
    rows = jnp.array([1, 6])
    expected = jnp.tanh(X @ p["up"][:, rows] + p["bias"][rows]) @ p["down"][rows]
    np.testing.assert_allclose(again(fewer, X), expected, rtol=1e-6)


def test_shapes_are_enough():
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), mlp_params())
    _, smaller, certificate = structured.shrink(mlp, like, KEEP, X)
    assert smaller["down"].shape == (3, 2) and certificate.after.params == 18
    assert certificate.random is None and not certificate.holds
    assert "nothing was run" in str(certificate)


def test_low_precision_params():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), mlp_params())
    _, smaller, certificate = structured.shrink(mlp, params, KEEP, X.astype(jnp.bfloat16))
    assert certificate.holds and smaller["up"].dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_params(kind):
    types = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((4,), ("x",), axis_types=types, devices=jax.devices()[:4])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    places = {"up": columns, "bias": everywhere, "down": rows}
    with jax.set_mesh(mesh):
        params = {name: jax.device_put(x, places[name]) for name, x in mlp_params().items()}
        x = jax.device_put(X, everywhere)
        fn = lambda p, x: jnp.matmul(
            jnp.tanh(x @ p["up"]),
            p["down"],
            out_sharding=everywhere if kind == "Explicit" else None,
        )
        small, smaller, certificate = structured.shrink(fn, params, {"up": [0, 1, 4, 6]}, x)
        assert certificate.holds
        result = jax.jit(small)(smaller, x)
    p = mlp_params()
    kept = jnp.array([0, 1, 4, 6])
    expected = jnp.tanh(X @ p["up"][:, kept]) @ p["down"][kept]
    np.testing.assert_allclose(result, expected, rtol=1e-5)


# --- Calls ----------------------------------------------------------------------------------------


def counted(scale):
    """The function, smaller, with a list that grows whenever it is traced at full size."""
    traces = []

    def fn(p, x):
        traces.append(x.shape)
        return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"] * scale()

    keep = structured.keep(structured.groups(fn, mlp_params(), X), KEEP)
    traces.clear()
    return structured.rebuild(fn, keep), traces


def relu_by_hand(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]


def test_it_is_traced_once_for_arguments_of_one_kind():
    small, traces = counted(lambda: 1.0)
    _, params, _ = shrunk()
    for k in range(3):
        np.testing.assert_allclose(small(params, X + k), relu_by_hand(params, X + k), rtol=1e-5)
        found = jax.grad(lambda x: small(params, x).sum())(X + k)
        expected = jax.grad(lambda x: relu_by_hand(params, x).sum())(X + k)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        jax.jit(small)(params, X)
    assert traces == [(4, 3)]
    for _ in range(2):
        small(params, X[:2])
        jax.vmap(small, (None, 0))(params, X[:, None])
        with jax.default_matmul_precision("float32"):
            text = str(jax.make_jaxpr(small)(params, X))
        assert "Precision.HIGHEST" in text or "precision=F32" in text
    assert traces == [(4, 3), (2, 3), (1, 3), (4, 3)]
    for n in range(5, 21):  # the first ones are forgotten
        jax.eval_shape(small, params, jax.ShapeDtypeStruct((n, 3), jnp.float32))
    small(params, X)
    assert len(traces) == 4 + 16 + 1


def test_no_tracer_outlives_its_trace():
    box = [jnp.float32(1.0)]
    small, traces = counted(lambda: box[0])
    _, params, _ = shrunk()

    def scaled(s):
        box[0] = s
        return small(params, X).sum()

    whole = relu_by_hand(params, X).sum()
    np.testing.assert_allclose(jax.jit(scaled)(3.0), 3 * whole, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(scaled)(3.0), whole, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(scaled)(jnp.arange(3.0)), whole * np.arange(3), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(scaled))(3.0), whole, rtol=1e-5)
    assert len(traces) == 4
    np.testing.assert_allclose(scaled(jnp.float32(2.0)), 2 * whole, rtol=1e-5)


def test_a_tracer_that_fn_closes_over_is_cut():
    keep = structured.keep(structured.groups(mlp, mlp_params(), X), KEEP)
    _, params, _ = shrunk()

    def scaled(s):
        fn = lambda p, x: jnp.tanh(x @ p["up"] + p["bias"] * s) @ p["down"]
        return structured.rebuild(fn, keep)(params, X).sum()

    ones = jnp.ones(8)
    whole = by_hand(X).sum()
    np.testing.assert_allclose(jax.jit(scaled)(ones), whole, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(scaled)(ones[None]), [whole], rtol=1e-5)
    found = jax.grad(scaled)(ones)
    assert np.flatnonzero(found).tolist() == KEEP["up"]


def test_nothing_of_a_trace_is_kept_after_it():
    """Not the constants that were cut in it, nor what rules of differentiation close over."""

    def fn(p, x):
        return jax.nn.relu(x @ p["up"] * np.linspace(1, 2, 8, dtype=np.float32)) @ p["down"]

    keep = structured.keep(structured.groups(fn, mlp_params(), X), KEEP)
    params = structured.slice_params(mlp_params(), keep)
    kept = np.array(KEEP["up"])
    scales = np.linspace(1, 2, 8, dtype=np.float32)[kept]
    expected = jax.nn.relu(X @ params["up"] * scales) @ params["down"]
    small = structured.rebuild(fn, keep)
    with jax.checking_leaks():
        for _ in range(2):
            np.testing.assert_allclose(jax.jit(small)(params, X), expected, rtol=1e-5)
            jax.jit(jax.grad(lambda p: small(p, X).sum()))(params)
            np.testing.assert_allclose(small(params, X), expected, rtol=1e-5)


class Tagged(NamedTuple):
    x: jax.Array
    tags: list[str]


tree_util.register_pytree_node(
    Tagged, lambda t: ((t.x,), t.tags), lambda tags, xs: Tagged(*xs, tags)
)


def test_what_cannot_be_hashed_is_traced_each_time():
    traces = []

    def fn(p, x):
        traces.append(x.tags)
        return jnp.tanh(x.x @ p["up"] + p["bias"]) @ p["down"]

    tagged = Tagged(X, ["a list"])
    keep = structured.keep(structured.groups(fn, mlp_params(), tagged), KEEP)
    traces.clear()
    small, (_, params, _) = structured.rebuild(fn, keep), shrunk()
    for _ in range(2):
        np.testing.assert_allclose(small(params, tagged), by_hand(X), rtol=1e-6)
    assert len(traces) == 2


# --- Distances ------------------------------------------------------------------------------------


def normalised(p, x):
    h = x @ p["up"]
    centred = h - h.mean(-1, keepdims=True)
    h = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return (h * p["scale"]) @ p["down"]


def test_a_normalisation_is_named_as_what_lets_zeros_in():
    rng = np.random.default_rng(0)
    shapes = {"up": (3, 8), "scale": (8,), "down": (8, 2)}
    params = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
    _, _, certificate = structured.shrink(normalised, params, KEEP, X)
    assert certificate.holds and certificate.random.weights.relative > 1e-3
    leak = certificate.leaks[0]
    assert "reduce_sum" in leak.primitive and leak.effect > 1e-3 and leak.magnitude > 0
    assert certificate.random.weights.relative == pytest.approx(leak.effect, rel=0.1)


def test_a_wrong_surgery_does_not_pass():
    """What `holds` is worth: weights of other units are found out."""
    fn, params, certificate = shrunk()
    wrong = dict(params, up=jnp.roll(params["up"], 1, axis=1))
    keep = structured.keep(structured.groups(mlp, mlp_params(), X), KEEP)
    reference = graph.remask(mlp, keep.leaves)(mlp_params(), X)
    gap = jnp.max(jnp.abs(fn(wrong, X) - reference)) / jnp.max(jnp.abs(reference))
    assert gap > 100 * certificate.tolerance


# --- Keep -----------------------------------------------------------------------------------------


def test_keep_files_come_back(tmp_path):
    fn, params, inputs = ZOO["llama_scanned"].build()
    groups = structured.groups(fn, params, *inputs)
    chosen = {"params/layers/gate/kernel": [[0, 2], [3, 5]], "params/embed/embedding": [0, 3]}
    keep = structured.keep(groups, chosen)
    keep.save(tmp_path / "keep.json")
    again = structured.Keep.load(tmp_path / "keep.json")
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in keep.items()}
    assert again.shapes == keep.shapes and again.layers == keep.layers
    small = structured.slice_params(params, again)
    np.testing.assert_array_equal(
        structured.rebuild(fn, again)(small, *inputs),
        structured.rebuild(fn, keep)(structured.slice_params(params, keep), *inputs),
    )


def test_keeps_compare_by_what_stays():
    groups = structured.groups(mlp, mlp_params(), X)
    keep, alike = structured.keep(groups, KEEP), structured.keep(groups, KEEP)
    assert keep == alike and keep is not alike
    assert keep != structured.keep(groups, {"up": [1, 2, 5]}) and keep != dict(keep)


def test_a_keep_is_shown_and_pickled_without_the_call():
    keep = structured.keep(structured.groups(mlp, mlp_params(), X), KEEP)
    again = pickle.loads(pickle.dumps(keep))
    assert keep.traced is not None and again.traced is None
    assert repr(again) == repr(keep) and again["up"].tolist() == [1, 2, 6]


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "keep.json").write_text('{"format": "other"}')
    with pytest.raises(FileError, match="a file that `Keep.save` wrote"):
        structured.Keep.load(tmp_path / "keep.json")


def groups():
    return structured.groups(mlp, mlp_params(), X)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ({"up": [0, 8]}, ArgumentError, "different indices from 0 to 7"),
        ({"up": [-1, 2]}, ArgumentError, "different indices from 0 to 7"),
        ({"up": [2, 2]}, ArgumentError, "different indices"),
        ({"up": []}, ArgumentError, "at least one"),
        ({"up": [0.5]}, ArgumentError, "integers of shape"),
        ({"up": [[0], [1]]}, ArgumentError, "integers of shape"),
        ({"down": [0]}, SelectionError, "the frozen group .down.: it is axis 1 of output 0"),
        ({"upp": [0]}, SelectionError, "unknown group 'upp'.*'up'"),
    ],
)
def test_indices_that_do_not_fit(indices, error, message):
    with pytest.raises(error, match=message):
        structured.keep(groups(), indices)


def test_params_of_other_shapes():
    keep = structured.keep(groups(), KEEP)
    with pytest.raises(ArgumentError, match=r"'bias' of shape \(9,\)"):
        structured.slice_params(mlp_params(9), keep)
    small = structured.rebuild(mlp, keep)
    with pytest.raises(ArgumentError, match="with the kept indices only"):
        small(mlp_params(), X)
    with pytest.raises(StructureError, match="no leaf at 'down'"):
        small({k: v for k, v in shrunk()[1].items() if k != "down"}, X)
    with pytest.raises(StructureError, match="'other'"):
        small({**shrunk()[1], "other": jnp.ones(2)}, X)


def test_a_keep_of_another_model():
    keep = structured.keep(groups(), KEEP)
    other = lambda p, x: jnp.sort(x @ p["up"] + p["bias"]) @ p["down"]
    with pytest.raises(ArgumentError, match="it is sorted"):
        structured.rebuild(other, keep)(shrunk()[1], X)


def test_an_output_that_carries_a_pruned_axis():
    both = lambda p, x: (mlp(p, x), x @ p["up"])
    with pytest.raises(SelectionError, match="it is axis 1 of output 1"):
        structured.shrink(both, mlp_params(), KEEP, X)


def test_layers_keep_equal_numbers():
    fn, params, inputs = ZOO["llama_scanned"].build()
    found = structured.groups(fn, params, *inputs)
    with pytest.raises(ArgumentError, match="integers of shape"):
        structured.keep(found, {"params/layers/gate/kernel": [[0, 1], [2, 3], [4, 5]]})
    same = structured.keep(found, {"params/layers/gate/kernel": [0, 1]})
    assert same["params/layers/gate/kernel"].tolist() == [[0, 1], [0, 1]]


def test_slices_of_gradients_are_gradients_of_slices():
    fn, params, _ = shrunk()
    keep = structured.keep(groups(), KEEP)
    dense = jax.grad(lambda p: mlp(p, X).sum())(structured.mask_params(mlp_params(), keep))
    small = jax.grad(lambda p: fn(p, X).sum())(params)
    for a, b in zip(
        tree.leaves(structured.slice_params(dense, keep)), tree.leaves(small), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
