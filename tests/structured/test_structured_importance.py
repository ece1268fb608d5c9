"""Scores of units against loops over entries, and what `importance` refuses."""

import dataclasses

import flax.linen as nn
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
    member,
    mlp,
    normal,
    stack,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress import adapters, errors, structured, tree
from jaxcompress.structured._fpgm import distances_to_others
from jaxcompress.structured._lamp import lamp

BATCHES = [normal(5, 3), normal(2, 3)]
CASES = {
    "mlp": (MLP, MLP_GROUPS, "up"),
    "hidden units by layer": (STACK, STACK_GROUPS, "hidden"),
    "stream over layers": (STACK, STACK_GROUPS, "stream"),
    "heads": (HEADS, HEAD_GROUPS, "value"),
}


def raw(groups, params, **kwargs):
    return structured.importance(groups, params, normalize=None, **kwargs)


def kernels(group):
    return [m for m in group.members if m.produces or m.reads]


def per_unit(params, member, f):
    """Apply f to the entries of each unit, `(*layers, size)`."""
    found = entries(params, member)
    if member.layers:
        return np.array([[f(x) for x in layer] for layer in found])
    return np.array([f(x) for x in found])


# --- Weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_sums_powers_over_the_kernels(case, p):
    params, groups, name = CASES[case]
    members = kernels(groups[name])
    assert len(members) == 2
    wanted = sum(per_unit(params, m, lambda x: (np.abs(x) ** p).sum()) for m in members)
    scores = raw(groups, params, method=structured.Magnitude(p=p))[name]
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)


def test_scores_are_divided_by_the_groups_mean_maximum_or_sum():
    scores = raw(STACK_GROUPS, STACK)
    for name, how in (("mean", np.mean), ("max", np.max), ("sum", np.sum)):
        normal = structured.importance(STACK_GROUPS, STACK, normalize=name)
        for key, x in scores.items():  # layer by layer
            wanted = x / how(np.asarray(x), axis=-1, keepdims=True)
            np.testing.assert_allclose(normal[key], wanted, rtol=1e-6)
    zeros = structured.importance(STACK_GROUPS, jax.tree.map(jnp.zeros_like, STACK))
    assert not np.any(zeros["hidden"]) and zeros["hidden"].shape == (2, 4)


def test_members_are_summed_averaged_or_the_largest_counts():
    each = [
        np.asarray(raw({"x": dataclasses.replace(MLP_GROUPS["up"], members=(m,))}, MLP)["up"])
        for m in kernels(MLP_GROUPS["up"])
    ]
    for how in ("sum", "mean", "max"):
        wanted = getattr(np, how)(each, axis=0)
        np.testing.assert_allclose(raw(MLP_GROUPS, MLP, reduce=how)["up"], wanted, rtol=1e-6)


def test_a_group_without_kernels_counts_what_it_has():
    only = {"g": group("g", 4, member("params/norm/scale", 0, 4))}
    wanted = np.abs(MLP["params"]["norm"]["scale"])
    np.testing.assert_allclose(raw(only, MLP, method=structured.Magnitude(p=1))["g"], wanted)


def test_random_scores_differ_by_group_and_need_shapes_only():
    method = structured.Random(key=jax.random.key(3))
    shapes = jax.eval_shape(lambda: STACK)
    scores = raw(STACK_GROUPS, shapes, method=method)
    again = raw({"hidden": STACK_GROUPS["hidden"]}, STACK, method=method)
    np.testing.assert_array_equal(scores["hidden"], again["hidden"])
    assert scores["hidden"].shape == (2, 4)
    assert len(np.unique(np.concatenate([s.ravel() for s in scores.values()]))) == 11


@pytest.mark.parametrize("case", CASES)
def test_fpgm_sums_distances(case):
    params, groups, name = CASES[case]

    def distances(rows):
        return [sum(np.linalg.norm(a - b) for b in rows) for a in rows]

    wanted = 0
    for m in kernels(groups[name]):
        found = entries(params, m)
        wanted = wanted + np.array([distances(x) for x in found] if m.layers else distances(found))
    scores = raw(groups, params, method=structured.FPGM())[name]
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)


def test_equal_units_are_at_no_distance(strict_promotion):
    rows = jnp.tile(1000 + normal(1, 7), (3, 1))
    assert not np.any(distances_to_others(rows))


def test_lamp_divides_by_what_is_not_below(strict_promotion):
    scores = np.array([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 4.0, 4.0]], np.float32)
    wanted = [[3 / 3, 1 / 7, 2 / 5, 1 / 6], [0, 0, 4 / 8, 4 / 4]]
    np.testing.assert_allclose(lamp(jnp.asarray(scores)), wanted, rtol=1e-6)
    by_group = structured.importance(MLP_GROUPS, MLP, method=structured.LAMP())["up"]
    np.testing.assert_allclose(by_group, lamp(raw(MLP_GROUPS, MLP)["up"]), rtol=1e-6)
    assert float(by_group.max()) == 1


def test_norm_scales_are_found_by_name_by_where_and_in_the_graph():
    wanted = np.abs(MLP["params"]["norm"]["scale"])
    found = structured.scales(MLP_GROUPS, mlp, MLP, BATCHES[0])
    assert found == ("params/norm/scale",)
    for where in (None, "**/scale", found):
        method = structured.BatchNormScale(where=where)
        np.testing.assert_allclose(raw(MLP_GROUPS, MLP, method=method)["up"], wanted)
    with pytest.raises(errors.ArgumentError, match="'hidden', 'stream'"):
        raw(STACK_GROUPS, STACK, method=structured.BatchNormScale())


def test_the_scales_of_a_linen_network_in_training_mode():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, name="bn")(
                nn.Conv(2, (1, 1), name="conv")(x)
            )
            return nn.LayerNorm(name="ln")(x)

    x = jnp.ones((2, 3, 3, 1))
    fn, params = adapters.from_linen(
        Net(), jax.eval_shape(Net().init, jax.random.key(0), x), mutable=["batch_stats"]
    )
    paths = [p for p in tree.paths(params) if not p.startswith("params/conv")]
    several = {"c": group("c", 2, *(member(p, 0, 2) for p in paths))}
    assert set(structured.scales(several, fn, params, x)) == {
        "params/bn/scale",
        "params/ln/scale",
    }


# --- Data -----------------------------------------------------------------------------------------


def loss(params, x):
    return jnp.square(mlp(params, x)).sum(-1)


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


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "given", "missing"),
    [
        (structured.Taylor(), {}, "fn or loss"),
        (structured.Fisher(), {"loss": loss}, "batches"),
        (structured.OBD(), {"batches": BATCHES}, "fn or loss"),
        (structured.ActivationNorm(), {"loss": loss, "batches": BATCHES}, "fn, which"),
        (structured.Wanda(), {"fn": mlp}, "batches"),
    ],
)
def test_what_a_method_needs_is_named(method, given, missing):
    with pytest.raises(errors.ArgumentError, match=f"{missing}.*{type(method).__name__}"):
        raw(MLP_GROUPS, MLP, method=method, **given)


def test_weights_that_are_not_finite_are_named():
    broken = {**HEADS, "out": HEADS["out"].at[0, 0, 0].set(jnp.nan)}
    with pytest.raises(errors.NonFiniteError, match="'out'"):
        structured.importance(HEAD_GROUPS, broken)
    huge = {**HEADS, "out": HEADS["out"] * 1e30}
    with pytest.raises(errors.NonFiniteError, match="'value' not finite"):
        structured.importance(HEAD_GROUPS, huge)


@pytest.mark.parametrize(
    ("kwargs", "kind", "match"),
    [
        ({"method": structured.Magnitude}, errors.ArgumentTypeError, "called"),
        ({"normalize": "min"}, errors.ArgumentError, "normalize"),
        ({"reduce": "min"}, errors.ArgumentError, "reduce"),
        ({"reduce": "max", "method": structured.Taylor()}, errors.ArgumentError, "together"),
    ],
)
def test_unknown_options(kwargs, kind, match):
    with pytest.raises(kind, match=match):
        structured.importance(MLP_GROUPS, MLP, **kwargs)


def test_options_of_methods():
    for make in (
        lambda: structured.Magnitude(p=3),
        lambda: structured.Taylor(power=0),
        lambda: structured.Fisher(at_once=0),
        lambda: structured.ActivationNorm(order=3),
        lambda: structured.ActivationNorm(at="middle"),
    ):
        with pytest.raises(errors.ArgumentError):
            make()


@pytest.mark.parametrize(
    ("params", "kind", "match"),
    [
        ({"value": HEADS["value"]}, errors.StructureError, "no leaf 'out'"),
        ({**HEADS, "value": normal(3, 3)}, errors.StructureError, "index 3"),
        ({**HEADS, "value": normal(4)}, errors.StructureError, "axes"),
        (jax.eval_shape(lambda: HEADS), errors.ArgumentTypeError, "shape only"),
    ],
)
def test_params_of_another_model(params, kind, match):
    with pytest.raises(kind, match=match):
        structured.importance(HEAD_GROUPS, params)


def test_sites_that_do_not_line_up_or_are_not_there():
    fn = lambda p, x: jnp.tanh(x @ p["value"][:, ::-1]) @ p["out"].reshape(4, 3)
    with pytest.raises(errors.ArgumentError, match="permutes"):
        raw(HEAD_GROUPS, HEADS, method=structured.Wanda(), fn=fn, batches=BATCHES)
    only = {"g": group("g", 4, member("params/norm/scale", 0, 4))}
    for method in (structured.ActivationNorm(), structured.Wanda()):
        with pytest.raises(errors.ArgumentError, match="'g'"):
            raw(only, MLP, method=method, fn=mlp, batches=BATCHES)
    examples = [(BATCHES[0], jnp.ones(3))]
    with pytest.raises(errors.ArgumentError, match="lead with the examples"):
        raw(MLP_GROUPS, MLP, method=structured.Fisher(), loss=loss, batches=examples)
    state = {"s": group("s", 4, member("batch_stats/norm/mean", 0, 4))}
    with pytest.raises(errors.ArgumentError, match="learns"):
        structured.importance(state, MLP)
