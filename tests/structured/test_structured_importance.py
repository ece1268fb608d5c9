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
    kernels,
    loss,
    member,
    mlp,
    normal,
    per_unit,
    raw,
)

from jaxcompress import adapters, errors, numerics, structured, tree
from jaxcompress.structured.importance._fpgm import distances_to_others
from jaxcompress.structured.importance._lamp import lamp

BATCHES = [normal(5, 3), normal(2, 3)]
CASES = {
    "mlp": (MLP, MLP_GROUPS, "up"),
    "hidden units by layer": (STACK, STACK_GROUPS, "hidden"),
    "stream over layers": (STACK, STACK_GROUPS, "stream"),
    "heads": (HEADS, HEAD_GROUPS, "value"),
}


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


def test_packed_leaves_are_refused():
    packed = {**HEADS, "value": numerics.quantize(HEADS["value"], numerics.Format(numerics.int8))}
    with pytest.raises(errors.ArgumentTypeError, match="QArray at 'value'.*before quantizing"):
        structured.importance(HEAD_GROUPS, packed)
