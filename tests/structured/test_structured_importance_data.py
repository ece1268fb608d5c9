"""Scores that need data against loops over entries, and every method on kinds of params."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import (
    HEAD_GROUPS,
    HEADS,
    MLP,
    MLP_GROUPS,
    STACK,
    STACK_GROUPS,
    entries,
    group,
    heads,
    kernels,
    loss,
    member,
    mlp,
    normal,
    per_unit,
    raw,
    stack,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from zoo import ZOO

from jaxcompress import structured, tree

BATCHES = [normal(5, 3), normal(2, 3)]


def slopes(params, x):
    """Sum g w over all learned members, for the mean loss of x, by loops in NumPy."""
    gradients = jax.grad(lambda p: loss(p, x).mean())(params)
    total = 0
    for m in MLP_GROUPS["up"].members:
        if not m.path.startswith("batch_stats"):
            w, g = entries(params, m), entries(gradients, m)
            total = total + np.array([(a * b).sum() for a, b in zip(w, g, strict=True)])
    return total


@pytest.mark.parametrize("power", [1, 2])
def test_taylor_averages_over_batches(power):
    wanted = np.mean([np.abs(slopes(MLP, x)) ** power for x in BATCHES], axis=0)
    method = structured.Taylor(power=power)
    scores = raw(MLP_GROUPS, MLP, method=method, batches=BATCHES, loss=loss)
    np.testing.assert_allclose(scores["up"], wanted, rtol=1e-4)


def test_taylor_takes_gradients_or_differentiates_the_summed_outputs():
    gradients = jax.grad(lambda p: mlp(p, BATCHES[0]).sum())(MLP)
    given = raw(MLP_GROUPS, MLP, method=structured.Taylor(gradients=gradients))
    method = structured.Taylor()
    found = raw(MLP_GROUPS, MLP, method=method, fn=mlp, batches=BATCHES[:1])
    np.testing.assert_allclose(given["up"], found["up"], rtol=1e-5)


def test_taylor_is_the_change_of_a_linear_loss():
    """Of a function that is linear in the group's entries, it is the change, exactly."""
    params = {"w": normal(3, 4)}
    several = {"w": group("w", 4, member("w", 1, 4, kind="p"))}
    fn = lambda p, x: x @ p["w"]
    scores = raw(several, params, method=structured.Taylor(power=1), fn=fn, batches=BATCHES[:1])
    wanted = np.abs(np.asarray(fn(params, BATCHES[0])).sum(0))
    np.testing.assert_allclose(scores["w"], wanted, rtol=1e-4)


@pytest.mark.parametrize("at_once", [1, 3])
def test_fisher_squares_the_slopes_of_examples(at_once):
    examples = [x[None] for batch in BATCHES for x in batch]
    wanted = sum(slopes(MLP, x) ** 2 for x in examples) / (2 * len(examples))
    method = structured.Fisher(at_once=at_once)
    scores = raw(MLP_GROUPS, MLP, method=method, batches=BATCHES, loss=loss)
    np.testing.assert_allclose(scores["up"], wanted, rtol=1e-4)


def test_gradients_of_stacked_layers():
    gradients = jax.grad(lambda p: stack(p, BATCHES[0]).sum())(STACK)
    scores = raw(
        STACK_GROUPS, STACK, method=structured.Taylor(power=1), fn=stack, batches=BATCHES[:1]
    )
    product = jax.tree.map(lambda w, g: w * g, STACK, gradients)
    for name, several in STACK_GROUPS.items():
        wanted = np.abs(sum(per_unit(product, m, np.sum) for m in several.members))
        np.testing.assert_allclose(scores[name], wanted, rtol=1e-4, atol=1e-5)


def test_obd_is_half_the_diagonal_fisher_times_squares():
    each = jax.vmap(jax.grad(lambda p, x: loss(p, x[None])[0]), (None, 0))
    wanted = 0
    for x in BATCHES:  # one token an example: the statistic's tokens are examples
        squares = jax.tree.map(lambda g: np.square(g).sum(0), jax.device_get(each(MLP, x)))
        for m in kernels(MLP_GROUPS["up"]):
            w, h = entries(MLP, m), entries(squares, m)
            wanted = wanted + np.array([(a**2 * b).sum() / 2 for a, b in zip(w, h, strict=True)])
    scores = raw(MLP_GROUPS, MLP, method=structured.OBD(), batches=BATCHES, loss=loss)
    np.testing.assert_allclose(scores["up"], wanted, rtol=1e-4)


def inputs_of_stack():
    """What each layer's kernels multiply, over all batches: `(layers, tokens, features)`."""
    stream, hidden = [], []
    for layer in range(2):
        xs = [np.asarray(x) for x in BATCHES]
        for k in range(layer):
            one = jax.tree.map(lambda p, k=k: p[k : k + 1], STACK)
            xs = [np.asarray(stack(one, x)) for x in xs]
        stream.append(np.concatenate(xs))
        hidden.append(np.tanh(stream[-1] @ STACK["up"][layer] + STACK["bias"][layer]))
    return np.stack(stream), np.stack(hidden)


def test_activations_where_units_are_read_and_computed():
    stream, hidden = inputs_of_stack()
    norm = lambda **kwargs: raw(
        STACK_GROUPS,
        STACK,
        method=structured.ActivationNorm(**kwargs),
        fn=stack,
        batches=BATCHES,
    )
    scores = norm()
    np.testing.assert_allclose(scores["hidden"], np.abs(hidden).mean(1), rtol=1e-5)
    # The kernel that reads the stream does so in each layer: one score for all.
    np.testing.assert_allclose(scores["stream"], 2 * np.abs(stream).mean((0, 1)), rtol=1e-5)
    scores = norm(order=2)
    np.testing.assert_allclose(scores["hidden"], np.sqrt(np.square(hidden).mean(1)), rtol=1e-5)
    scores = norm(at="output")
    before = np.abs(stream @ np.asarray(STACK["up"])).mean(1)
    np.testing.assert_allclose(scores["hidden"], before, rtol=1e-5)


def test_activations_of_heads_are_summed():
    values = np.tanh(np.concatenate(BATCHES) @ HEADS["value"])
    wanted = np.abs(values).mean(0).reshape(2, 2).sum(1)
    method = structured.ActivationNorm()
    scores = raw(HEAD_GROUPS, HEADS, method=method, fn=heads, batches=BATCHES)
    np.testing.assert_allclose(scores["value"], wanted, rtol=1e-5)


def test_wanda_multiplies_each_kernel_by_the_norms_of_its_inputs():
    stream, hidden = inputs_of_stack()
    scores = raw(STACK_GROUPS, STACK, method=structured.Wanda(), fn=stack, batches=BATCHES)
    up = np.abs(STACK["up"]) * np.linalg.norm(stream, axis=1)[..., None]
    down = np.abs(STACK["down"]) * np.linalg.norm(hidden, axis=1)[..., None]
    np.testing.assert_allclose(scores["hidden"], up.sum(1) + down.sum(2), rtol=1e-5)
    np.testing.assert_allclose(scores["stream"], up.sum((0, 2)) + down.sum((0, 1)), rtol=1e-5)


CONV = {"first": normal(3, 3, 1, 4), "depthwise": normal(3, 3, 1, 4), "last": normal(1, 1, 4, 2)}
CONV_GROUPS = {
    "c": group(
        "c",
        4,
        member("first", 3, 4, kind="p"),
        member("depthwise", 3, 4, kind="pr"),
        member("last", 2, 4, kind="r"),
    )
}


def conv(params, x):
    for name, groups in (("first", 1), ("depthwise", 4), ("last", 1)):
        x = jax.lax.conv_general_dilated(
            jnp.tanh(x),
            params[name],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
    return x


def test_feature_maps_and_depthwise_convolutions():
    x = normal(2, 3, 3, 1)
    first = np.tanh(conv_part(x, 1))
    second = np.tanh(conv_part(x, 2))
    wanted = np.abs(first).mean((0, 1, 2)) + np.abs(second).mean((0, 1, 2))
    method = structured.ActivationNorm()
    scores = raw(CONV_GROUPS, CONV, method=method, fn=conv, batches=[x])
    np.testing.assert_allclose(scores["c"], wanted, rtol=1e-5)

    def norms(x):  # of each entry of the windows, with zeros around the image
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = [[padded[:, i : i + 3, j : j + 3] for j in range(3)] for i in range(3)]
        return np.sqrt(np.square(windows).sum((2, 3, 4)))  # (3, 3, channels)

    wanted = (np.abs(CONV["first"]) * norms(np.tanh(x))[..., None]).sum((0, 1, 2))
    wanted = wanted + (np.abs(CONV["depthwise"][:, :, 0]) * norms(first)).sum((0, 1))
    last = np.abs(CONV["last"][0, 0]) * np.linalg.norm(second.reshape(-1, 4), axis=0)[:, None]
    scores = raw(CONV_GROUPS, CONV, method=structured.Wanda(), fn=conv, batches=[x])
    np.testing.assert_allclose(scores["c"], wanted + last.sum(1), rtol=1e-5)


def conv_part(x, layers):
    """The output of the first layers alone, by the rest set to the identity."""
    names = ("first", "depthwise")[:layers]
    for name in names:
        x = jax.lax.conv_general_dilated(
            jnp.tanh(x),
            CONV[name],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=1 if name == "first" else 4,
        )
    return np.asarray(x)


def test_a_tables_rows_count_as_they_are_looked_up():
    params = {"table": normal(5, 3), "head": normal(3, 2)}
    several = {"d": group("d", 3, member("table", 1, 3, kind="p"), member("head", 0, 3, kind="r"))}
    fn = lambda p, i: p["table"][i] @ p["head"]
    indices = jnp.array([0, 3, 3, 4])
    scores = raw(several, params, method=structured.Wanda(), fn=fn, batches=[indices])
    counts = np.array([1, 0, 0, 2, 1])
    wanted = (np.abs(params["table"]) * np.sqrt(counts)[:, None]).sum(0)
    looked_up = np.asarray(params["table"])[indices]
    wanted = wanted + (np.abs(params["head"]) * np.linalg.norm(looked_up, axis=0)[:, None]).sum(1)
    np.testing.assert_allclose(scores["d"], wanted, rtol=1e-5)
    output = structured.ActivationNorm(at="output")
    scores = raw(several, params, method=output, fn=fn, batches=[indices])
    np.testing.assert_allclose(scores["d"], np.abs(looked_up).mean(0), rtol=1e-5)


def test_a_stack_of_one_layer():
    one = jax.tree.map(lambda p: p[:1], STACK)
    several = {"hidden": dataclasses.replace(STACK_GROUPS["hidden"], layers=(1,))}
    scores = raw(several, one, method=structured.ActivationNorm(), fn=stack, batches=BATCHES)
    _, hidden = inputs_of_stack()
    np.testing.assert_allclose(scores["hidden"], np.abs(hidden[:1]).mean(1), rtol=1e-5)


def test_time_steps_of_a_recurrent_layer_are_put_together():
    params = {"w": normal(3, 3), "out": normal(3, 2)}
    several = {"h": group("h", 3, member("w", 1, 3, kind="p"), member("w", 0, 3, kind="r"))}

    def fn(p, xs):
        step = lambda h, x: (jnp.tanh(h @ p["w"] + x), None)
        return jax.lax.scan(step, jnp.zeros((2, 3)), xs)[0] @ p["out"]

    xs, h, seen = normal(4, 2, 3), np.zeros((2, 3)), []
    for x in np.asarray(xs):
        seen.append(h)
        h = np.tanh(h @ np.asarray(params["w"]) + x)
    scores = raw(several, params, method=structured.ActivationNorm(), fn=fn, batches=[xs])
    np.testing.assert_allclose(scores["h"], np.abs(seen).mean((0, 1)), rtol=1e-4)


# --- Kinds of params ------------------------------------------------------------------------------

METHODS = {
    "magnitude": structured.Magnitude(),
    "fpgm": structured.FPGM(),
    "lamp": structured.LAMP(),
    "random": structured.Random(key=jax.random.key(0)),
    "taylor": structured.Taylor(),
    "fisher": structured.Fisher(),
    "obd": structured.OBD(),
    "activations": structured.ActivationNorm(),
    "wanda": structured.Wanda(),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_bfloat16_and_on_an_explicit_mesh(name, strict_promotion):
    given = {"method": METHODS[name], "fn": stack, "batches": BATCHES[:1]}
    scores = structured.importance(STACK_GROUPS, STACK, **given)
    assert all(np.all(s >= 0) and s.dtype == jnp.float32 for s in scores.values())
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), STACK)
    given["batches"] = [x.astype(jnp.bfloat16) for x in BATCHES[:1]]
    rough = structured.importance(STACK_GROUPS, half, **given)
    for key, s in scores.items():
        assert rough[key].dtype == jnp.float32
        # Slopes cancel: signed sums of bfloat16 gradients keep fewer digits.
        np.testing.assert_allclose(rough[key], s, atol=0.15 * float(s.max()))
    given["batches"] = BATCHES[:1]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    specs = {"up": (None, None, "x"), "bias": (), "down": (None, "x", None)}
    with jax.set_mesh(mesh):
        split = {
            path: jax.device_put(p, NamedSharding(mesh, PartitionSpec(*specs[path])))
            for path, p in STACK.items()
        }
        sharded = structured.importance(STACK_GROUPS, split, **(given | {"fn": explicit_stack}))
    for key, s in scores.items():
        np.testing.assert_allclose(sharded[key], s, rtol=1e-4, atol=1e-6)


def explicit_stack(params, x):
    def layer(x, p):
        hidden = jnp.tanh(jnp.matmul(x, p["up"], out_sharding=PartitionSpec(None, "x")) + p["bias"])
        return x + jnp.matmul(hidden, p["down"], out_sharding=PartitionSpec(None, None)), None

    return jax.lax.scan(layer, x, params)[0]


def test_sites_of_a_tied_table_that_see_other_axes_do_not_count():
    params = {"table": normal(5, 3), "w": normal(3, 3)}
    several = {"d": group("d", 3, member("table", 1, 3, kind="pr"), member("w", 1, 3, kind="p"))}
    fn = lambda p, i: jnp.tanh(p["table"][i] @ p["w"]) @ p["table"].T
    indices = jnp.array([0, 3, 3, 4])
    looked_up = np.asarray(params["table"])[indices]
    before = looked_up @ np.asarray(params["w"])
    given = {"fn": fn, "batches": [indices]}
    scores = raw(several, params, method=structured.ActivationNorm(at="output"), **given)
    wanted = np.abs(looked_up).mean(0) + np.abs(before).mean(0)
    np.testing.assert_allclose(scores["d"], wanted, rtol=1e-5)
    scores = raw(several, params, method=structured.ActivationNorm(), **given)
    np.testing.assert_allclose(scores["d"], np.abs(np.tanh(before)).mean(0), rtol=1e-5)


# --- Groups as they are found ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder_decoder", "llama_scanned", "moe"])
def test_groups_of_the_zoo(name):
    fn, params, inputs = ZOO[name].build()
    groups = structured.groups(fn, params, *inputs)
    leaves = {path: np.asarray(x) for path, x in tree.items(params) if tree.is_floating(x)}
    scores = raw(groups, params, method=structured.Magnitude(p=1))
    for key, one in groups.items():
        wanted = np.zeros((*one.layers, one.size))
        counted = [m for m in one.members if m.produces or m.reads or one.role == "experts"]
        for m in counted:
            x = np.moveaxis(np.abs(leaves[m.path]), (*m.layers, m.axis), range(len(m.layers) + 1))
            for unit in range(one.size):
                kept = x.take(m.indices[unit], axis=len(m.layers))
                wanted[..., unit] += kept.sum(tuple(range(len(m.layers), kept.ndim)))
        np.testing.assert_allclose(scores[key], wanted, rtol=1e-4, err_msg=key)
    for at in ("input", "output"):
        method = structured.ActivationNorm(at=at)
        found = structured.importance(groups, params, method=method, fn=fn, batches=[inputs])
        assert all(np.all(np.isfinite(x)) and np.any(x > 0) for x in found.values())
