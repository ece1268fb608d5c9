"""Leaves followed through what real code does to them: lookups, stacks, loops, shards."""

import jax
import jax.export
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxcompress import graph
from jaxcompress.graph import Axes

KEY = jax.random.key(0)
X = jax.ShapeDtypeStruct((2, 4), "float32")


def array(*shape):
    return jax.random.normal(KEY, shape)


def sole(fn, params, *inputs):
    (site,) = graph.trace(fn, params, *inputs).sites
    return site


def test_what_is_looked_up_varies_with_the_inputs():
    """Positions and scales that are added to embeddings are no weights of the next contraction."""

    def fn(p, tokens, i):
        x = (p["embed"][tokens] + p["pos"]) * p["embed"][i]
        y = x @ p["w"]
        return p["table"][jnp.argmax(y, -1)]

    params = {"embed": array(7, 4), "pos": array(3, 4), "w": array(4, 5), "table": array(5, 2)}
    found = graph.trace(fn, params, jnp.arange(3), 2)
    assert {site.name: site.primitive for site in found.sites} == {
        "embed": "gather",
        "embed#1": "dynamic_slice",
        "w": "dot_general",
        "table": "gather",
    }
    assert [use.primitive for use in found.uses["pos"]] == ["add"]
    assert found["w"].upstream == ("embed", "embed#1")
    assert found["embed#1"].axes == Axes(lookup=(0,), output=(1,))
    assert found["embed#1"].rows(jnp.int32(2)).tolist() == [[2]]


def test_leaves_stacked_by_fn_are_followed_into_the_scan():
    def fn(p, x):
        return lax.scan(lambda c, w: (c @ w, None), x, jnp.stack([p["a"], p["b"]]))[0]

    found = graph.trace(fn, {"a": array(4, 4), "b": array(4, 4)}, X)
    assert [(site.path, site.axes.contract) for site in found.sites] == [("a", (0,)), ("b", (0,))]


def test_leaves_taken_apart_and_repeated_by_fn_are_followed():
    def fn(p, x):
        for w in p["layers"]:
            x = x @ w
        return jnp.concatenate([x, x], axis=1) @ jnp.tile(p["w"], (2, 1))

    found = graph.trace(fn, {"layers": array(2, 4, 4), "w": array(4, 5)}, X)
    assert [site.path for site in found.sites] == ["layers", "layers", "w"]
    assert found["layers#1"].axes == Axes(contract=(1,), output=(2,), sliced=(0,))


@pytest.mark.parametrize("batched_input", [False, True])
def test_convolutions_that_vmap_has_batched(batched_input):
    def conv(w, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)

    x = jnp.ones((2, 5, 5, 3))
    if batched_input:
        fn = lambda p, x: jax.vmap(conv)(p["w"], jnp.stack([x] * 4))
    else:
        fn = lambda p, x: jax.vmap(conv, in_axes=(0, None))(p["w"], x)
    site = sole(fn, {"w": jnp.ones((4, 3, 3, 3, 8))}, x)
    assert site.axes.contract == (3,) and site.axes.spatial == (1, 2)
    assert site.axes.output == (0, 4) and site.flops == 4 * 2 * (2 * 5 * 5 * 8) * 27


def test_the_condition_of_a_loop_reads_what_is_carried_in_the_end():
    def fn(p, x):
        state = (p["w"], x)
        condition = lambda c: (c[1] @ c[0]).sum() < 9
        return lax.while_loop(condition, lambda c: (1.1 * c[0], c[1] + 1), state)[1]

    found = graph.trace(fn, {"w": array(4, 4)}, X)
    assert not found.sites and found.uses["w"][0].primitive == "while"


def test_a_barrier_passes_each_operand_on():
    def fn(p, x):
        w, x = lax.optimization_barrier((p["w"], x))
        return x @ w

    assert sole(fn, {"w": array(4, 5)}, X).axes.contract == (0,)


def test_what_cannot_be_entered_is_named():
    layer = jax.custom_batching.custom_vmap(lambda w, x: x @ w)
    layer.def_vmap(lambda size, batched, w, x: (x @ w, True))
    found = graph.trace(lambda p, x: jax.jit(layer)(p["w"], x), {"w": array(4, 5)}, X)
    ((*scope, primitive),) = found.opaque
    assert primitive == "custom_vmap_call" and len(scope) == 1
    with pytest.raises(ValueError, match="custom_vmap_call contracts inside cannot be seen"):
        graph.tap(lambda p, x: layer(p["w"], x), "w")({"w": array(4, 5)}, jnp.ones((2, 4)))


def test_symbolic_dimensions():
    (batch,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, 4), "float32")
    assert sole(lambda p, x: x @ p["w"], {"w": array(4, 5)}, x).flops == 2 * 4 * 5


# --- constructs --------------------------------------------------------------------------------


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shard_map_counts_all_devices(axis_type):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    batch = PartitionSpec("data")

    def fn(p, x):
        f = jax.shard_map(
            lambda w, x: jnp.tanh(x @ w),
            mesh=mesh,
            in_specs=(PartitionSpec(), batch),
            out_specs=batch,
        )
        return f(p["w"], x)

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 4)), jax.NamedSharding(mesh, batch))
        w = jax.device_put(jnp.ones((4, 5)), jax.NamedSharding(mesh, PartitionSpec()))
        site = sole(fn, {"w": w}, x)
    assert site.flops == 2 * 8 * 4 * 5 and site.stack == (4,) and site.scope == ("shard_map",)


@pytest.mark.parametrize("tiled", [False, True])
def test_roles_inside_a_shard_map_are_of_the_whole_leaf(tiled):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("model"), PartitionSpec()

    def heads(w, v, x):  # w (8, 16): 4 rows here, two heads of two; v (4, 8): gathered
        y = jnp.einsum("nhd,hde->ne", x.reshape(3, 2, 2), w.reshape(2, 2, 16))
        v = lax.all_gather(v, "model", tiled=tiled).reshape(4, 8)
        return lax.psum(y, "model")[:, :4] @ v

    f = jax.shard_map(
        heads,
        mesh=mesh,
        in_specs=(split, split, PartitionSpec(None, "model")),
        out_specs=whole,
        check_vma=False,
    )
    params = {"w": jnp.ones((8, 16)), "v": jnp.ones((4, 8))}
    found = graph.trace(lambda p, x: f(p["w"], p["v"], x), params, jnp.ones((3, 8)))
    assert found["w"].axes == Axes(contract=(0,), output=(1,))
    assert found["v"].axes == Axes(contract=(0,), output=(1,))


def test_a_grad_inside_fn_is_traced_too():
    def fn(p, x):
        return jax.grad(lambda x: jnp.tanh(x @ p["w"]).sum())(x)

    found = graph.trace(fn, {"w": array(4, 5)}, X)
    assert [s.axes.contract for s in found.sites] == [(0,), (1,)]  # forward, then backward


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_leaves_that_change_places_in_a_loop_are_not_followed(loop):
    """After two swaps a carry is the leaf that it began with, after three the other."""
    swap = lambda c: (c[1], c[0])

    def fn(p, x):
        if loop == "scan":
            a, b = lax.scan(lambda c, _: (swap(c), None), (p["a"], p["b"]), None, length=2)[0]
        else:
            done = lambda c: c[0] < 2
            _, (a, b) = lax.while_loop(
                done, lambda c: (c[0] + 1, swap(c[1])), (0, (p["a"], p["b"]))
            )
        return x @ a + b.sum()

    found = graph.trace(fn, {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}, jnp.ones((2, 3)))
    assert not found.sites and {u.primitive for u in found.uses["a"]} == {loop}


def test_a_leaf_that_a_scan_stacks_is_not_followed_but_one_that_it_hands_on_is():
    stacked = lambda p, x: x @ lax.scan(lambda c, _: (c, c), p["a"], None, length=3)[1][1]
    found = graph.trace(stacked, {"a": jnp.ones((3, 3))}, jnp.ones((2, 3)))
    assert not found.sites and "a" in found.uses
    handed = lambda p, x: x @ lax.scan(lambda c, w: (c, w), x, p["a"])[1][1]
    (site,) = graph.trace(handed, {"a": jnp.ones((2, 3, 4))}, jnp.ones((2, 3))).sites
    assert site.axes.contract == (1,)
