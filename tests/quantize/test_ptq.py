"""`ptq`: what it does with whole models, what it reports, and what it needs of batches."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import ZOO

from jaxcompress import graph, numerics, quantize, stats, tree
from jaxcompress.errors import ArgumentError, NonFiniteError, SelectionError, StructureError
from jaxcompress.numerics import (
    MSE,
    AbsMax,
    Entropy,
    Format,
    Percentile,
    PerChannel,
    PerGroup,
    PerToken,
    QArray,
    int4,
    int8,
)
from jaxcompress.quantize import Method, Policy, RoundToNearest, Rule, presets

INT8, INT4 = Format(int8, PerChannel()), Format(int4, PerGroup(4))
TOKEN, TENSOR = Format(int8, PerToken()), Format(int8)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mlp(p, x):
    return jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]


def mlp_params():
    params = {"up": draw(8, 12) / 3, "bias": draw(1, 12)[0], "down": draw(12, 4, seed=1) / 3}
    return params, draw(6, 8, seed=2)


def decibel(signal, noise):
    return 10 * math.log10(float((signal**2).sum()) / float((noise**2).sum()))


# --- Whole models ---------------------------------------------------------------------------------

# One structure each: stacked layers and tied embeddings, experts in two forms, depthwise
# convolutions, kernels of attention heads, layouts of (out, in), recurrence.
MODELS = [
    ("llama_scanned", "int8_static", 0.15),
    ("moe", "int8", 0.05),
    ("moe_ragged", "int8_weights", 0.05),
    ("efficientnet_block", "int8", 0.15),
    ("vit", "int8_static", 0.15),
    ("conv_gru_equinox", "int8_static", 0.1),
    ("char_lstm", "int4_g128", 0.5),
]


@pytest.mark.parametrize(("name", "preset", "bound"), MODELS)
def test_models(name, preset, bound):
    fn, params, inputs = ZOO[name].build()
    policy = getattr(presets, preset)
    result = quantize.ptq(fn, params, [inputs], policy)
    report, before, after = result.report, dict(tree.items(params)), dict(tree.items(result.params))

    # Every leaf is in one place, and nothing but the quantized ones has changed.
    done = [leaf.path for leaf in report.leaves]
    named = [*done, *report.excluded, *report.unselected, *report.exempt]
    assert sorted(named) == sorted(tree.paths(params))
    assert {path for path, leaf in after.items() if isinstance(leaf, QArray)} == set(done)
    assert all(after[path] is before[path] for path in before if path not in done)
    assert tree.paths(result.params) == tree.paths(params)
    sites = graph.trace(fn, params, *inputs).sites
    assert set(done) == {s.path for s in sites} - set(report.exempt)
    assert (report.bytes_before, report.bytes) == (tree.nbytes(params), tree.nbytes(after))

    # Every leaf of a contraction has a scale per output of each of its matrices, or in groups.
    for leaf in report.leaves:
        q, mine = after[leaf.path], [s for s in sites if s.path == leaf.path]
        assert q.dtype == before[leaf.path].dtype and q.shape == before[leaf.path].shape
        contracting = [s for s in mine if not s.axes.lookup]
        if contracting and preset != "int4_g128":
            axes = max(contracting, key=lambda s: s.flops).axes
            summed = {*axes.contract, *axes.spatial}
            shape = tuple(1 if k in summed else n for k, n in enumerate(q.shape))
            assert q.scale.shape == shape
        w, hat = np.asarray(before[leaf.path], np.float64), np.asarray(numerics.dequantize(q))
        assert leaf.weight_sqnr == pytest.approx(decibel(w, w - hat), abs=0.01)
        assert leaf.bytes < leaf.bytes_before
        assert set(leaf.output_sqnr) <= {s.name for s in mine} and leaf.output_sqnr
        assert all(10 < ratio < 70 for ratio in leaf.output_sqnr.values())
        acts = policy.rules[0].activations if contracting else None
        assert leaf.activations == acts and leaf.static == (acts is not None and "static" in preset)
        assert (q.activation is not None) == (acts is not None)
        assert not acts or q.activation.is_static == leaf.static
        assert len([n for n in leaf.notes if "no activation" in n]) == (
            policy.rules[0].activations is not None and not contracting
        )

    got = jax.tree.leaves(jax.jit(quantize.execute(fn))(result.params, *inputs))
    for y, ref in zip(got, jax.tree.leaves(jax.jit(fn)(params, *inputs)), strict=True):
        assert np.linalg.norm(y - ref) <= bound * np.linalg.norm(ref)
    assert f"{report.bytes_before:,} bytes -> {report.bytes:,}" in str(report)


def test_a_tied_leaf_is_quantized_once():
    """One leaf, two sites: looked up by rows, contracted by codes of the same array."""
    fn = lambda p, tokens: jnp.tanh(p["embed"][tokens]) @ p["embed"].T
    params, tokens = {"embed": draw(10, 8)}, jnp.array([[1, 9, 3]])
    result = quantize.ptq(fn, params, [tokens], presets.int8_static)
    (leaf,) = result.report.leaves
    assert [use.kernel for use in leaf.kernels] == ["rows", "codes"]
    assert set(leaf.output_sqnr) == {"embed", "embed#1"} and not leaf.notes
    assert result.params["embed"].scale.shape == (10, 1)  # per output of the contraction


def test_output_ratios_are_of_the_kernels_on_fns_own_activations():
    params, x = mlp_params()
    result = quantize.ptq(mlp, params, [x, 100 * x], presets.int8)  # the first batch counts

    def dynamic(x):
        scale = np.abs(x).max(-1, keepdims=True) / 127
        return np.round(x / scale) * scale

    x, hidden = np.asarray(x), np.tanh(np.asarray(x) @ params["up"] + params["bias"])
    for path, acts in {"up": x, "down": hidden}.items():
        y = acts @ np.asarray(params[path])
        off = dynamic(acts) @ np.asarray(numerics.dequantize(result.params[path])) - y
        assert result.report[path].output_sqnr == {path: pytest.approx(decibel(y, off), abs=0.01)}


# --- What is left alone, and what is changed ------------------------------------------------------


def test_reasons_and_notes():
    def fn(p, x):
        h = jnp.tanh(x @ p["groups"]) @ p["short"] @ p["whole"] @ p["prime"]
        return h @ p["kept"] * p["scale"].sum() + p["free"], p["returned"]

    params = {"groups": draw(24, 20), "short": draw(20, 12), "whole": draw(12, 19)}
    params |= {"prime": draw(19, 24), "kept": draw(24, 4), "scale": draw(2, 2), "free": draw(1, 4)}
    params |= {"returned": draw(2, 2), "unused": draw(2, 2), "index": jnp.arange(4).reshape(2, 2)}
    coarse = ["groups", "short", "scale", "returned"]
    policy = Policy(
        (
            Rule(where="kept", weights=None),
            Rule(where="prime", weights=Format(int4, PerGroup(18))),
            Rule(where=["kept", "prime"], weights=INT8),
            Rule(where=coarse, weights=Format(int4, PerGroup(16))),
            Rule(where=["whole", "index", "unused"], weights=Format(int4, PerGroup(128))),
        )
    )
    x = draw(3, 24)
    result = quantize.ptq(fn, params, [x], policy)
    report = result.report
    assert {leaf.path: (leaf.format.granularity, leaf.notes) for leaf in report.leaves} == {
        "groups": (PerGroup(12, -2), ("groups of 12, since 16 does not divide 24",)),
        "short": (PerGroup(10, -2), ("groups of 10, since 16 does not divide 20",)),
        "whole": (PerGroup(12, -2), ("one group of 12, which is all there is",)),
    }
    assert report.excluded == ("kept",) and report.unselected == ("free",)
    assert report.exempt == {
        "index": "is not read by fn",
        "prime": "has 19 entries along axis -2, which do not divide into groups of 18",
        "returned": "is returned as it came",
        "scale": "is used outside any contraction or lookup (reduce_sum)",
        "unused": "is not read by fn",
    }
    assert report.unused_rules == (2,)
    assert report.untouched == {"kept": "is excluded by a rule", "prime": report.exempt["prime"]}
    text = str(report)
    assert "weights [dB]" in text  # brackets are no markup
    assert "rule 2 decided no leaf" in text and "prime: left alone, it has 19 entries" in text
    assert "short: groups of 10, since 16 does not divide 20" in text
    with pytest.raises(SelectionError, match=r"5 of 8 leaves.*rules \[2\]"):
        quantize.ptq(fn, params, [x], policy, strict=True)
    for path, says in {
        "kept": "'kept' was left alone by a rule with weights=None",
        "free": "'free' was selected by no rule",
        "prime": "'prime' was left alone: it has 19 entries",
        "shrt": "'shrt' is no leaf of params; quantized are, for example: 'short'",
    }.items():
        with pytest.raises(KeyError, match=says):
            report[path]


def test_nothing_to_quantize_is_an_error():
    params, x = mlp_params()
    fn = lambda p, x: x * p["up"].sum()
    with pytest.raises(SelectionError, match=r"2 of 2 leaves.*'up' is used outside"):
        quantize.ptq(fn, params, [x], presets.int8)
    with pytest.raises(SelectionError, match="where"):
        quantize.ptq(mlp, params, [x], Policy((Rule(where="kernel", weights=INT8),)))


def test_granularities_with_axes_of_their_own_mean_the_leafs():
    """The method cannot follow them, which the report says; plain ones follow the site."""
    params, x = mlp_params()
    own = Format(int8, PerChannel((0, 1)))
    policy = Policy((Rule(where="up", weights=own, method=quantize.GPTQ()), Rule(weights=INT8)))
    result = quantize.ptq(mlp, params, [x], policy)
    (note,) = result.report["up"].notes
    assert note.startswith("rounded to nearest, since PerChannel(axes=(0, 1))")
    assert result.report["up"].method == "RoundToNearest"
    assert result.params["up"].scale.shape == (8, 12)
    by_output = quantize.ptq(lambda p, x: x @ p["w"].T, {"w": draw(4, 8)}, [x], presets.int8)
    assert by_output.params["w"].scale.shape == (4, 1)


# --- Static ranges --------------------------------------------------------------------------------


def stack(p, x):
    """Three stacked layers, then the same leaf twice more, at an index of Python."""
    x, _ = jax.lax.scan(lambda x, w: (2 * jnp.tanh(x @ w), None), x, p["w"])
    return jnp.tanh(x @ p["head"]["a"]) @ p["head"]["b"]


def seen_by_stack(p, batches):
    """What every layer reads, of all batches, in NumPy."""
    x = np.concatenate([np.asarray(b) for b in batches])
    seen = []
    for w in np.asarray(p["w"]):
        seen.append(x)
        x = 2 * np.tanh(x @ w)
    return seen, x


STACK = {"w": draw(3, 8, 8) * jnp.array([0.2, 0.02, 0.5])[:, None, None]}
STACK["head"] = {"a": draw(8, 4, seed=1), "b": draw(4, 2, seed=2)}
BATCHES = [draw(40, 8, seed=k) * (k + 1) for k in range(2)]


def static_scales(range, **changes):
    format = Format(**{"qtype": int8, "range": range, **changes})
    policy = Policy((Rule(weights=INT8, activations=format, static=True),))
    result = quantize.ptq(stack, STACK, iter(BATCHES), policy)
    return result.params["w"].activation, result.params["head"]["a"].activation


def test_static_ranges_are_each_layers_own():
    activation, head = static_scales(AbsMax())
    seen, last = seen_by_stack(STACK, BATCHES)
    assert activation.scale.shape == (3, 1, 1) and activation.zero is None
    expected = [np.abs(x).max() / 127 for x in seen]
    np.testing.assert_allclose(np.ravel(activation.scale), expected, rtol=1e-5)
    np.testing.assert_allclose(np.ravel(head.scale), [np.abs(last).max() / 127], rtol=1e-5)


def test_static_ranges_with_zero_points():
    activation, _ = static_scales(AbsMax(), symmetric=False)
    seen, _ = seen_by_stack(STACK, BATCHES)
    low, high = np.array([[min(x.min(), 0), max(x.max(), 0)] for x in seen]).T
    np.testing.assert_allclose(np.ravel(activation.scale), (high - low) / 255, rtol=1e-5)
    zero = np.round(-128 - low / ((high - low) / 255))
    np.testing.assert_allclose(np.ravel(activation.zero), zero, atol=1)


def test_static_ranges_by_percentile_error_and_entropy():
    seen, _ = seen_by_stack(STACK, BATCHES)
    widest = np.array([np.abs(x).max() for x in seen])
    width = 2 * widest / 256  # of a bin that is a power of two, at most
    ends = 127 * np.ravel(static_scales(Percentile(98.0))[0].scale)
    least, most = np.array([np.percentile(np.abs(x), [97.5, 98.5]) for x in seen]).T
    assert (least - width <= ends).all() and (ends <= most + width).all()
    assert ends[0] < 0.9 * widest[0]  # whose tail is heavy

    def error(x, end, levels=7):
        step = end / levels
        return np.mean((x - np.clip(np.round(x / step), -levels, levels) * step) ** 2)

    narrow = Format(int4, range=MSE())
    ends = 7 * np.ravel(static_scales(MSE(), qtype=int4)[0].scale)
    assert narrow.limits == (-7, 7)
    for x, end, wide in zip(seen, ends, widest, strict=True):
        best = min(error(x, wide * f) for f in np.linspace(0.3, 1, 71))
        assert error(x, end) <= 1.05 * best and best < error(x, wide)
    assert ends[0] < 0.8 * widest[0]

    ends = 127 * np.ravel(static_scales(Entropy())[0].scale)
    assert (ends <= widest * 1.0001).all() and (ends > 0.3 * widest).all()


def test_static_ranges_of_a_recurrent_leaf_cover_all_times():
    """A scan over time has one weight: its range is that of all times together."""

    def fn(p, x):
        step = lambda h, x: (jnp.tanh(x + h @ p["w"]), None)
        return jax.lax.scan(step, jnp.zeros(x.shape[1:]), x)[0]

    params, x = {"w": draw(4, 4)}, draw(5, 3, 4, seed=1)
    policy = Policy((Rule(weights=INT8, activations=TENSOR, static=True),))
    q = quantize.ptq(fn, params, [x], policy).params["w"]
    h, peak = np.zeros((3, 4)), 0.0
    for each in np.asarray(x):
        peak = max(peak, np.abs(h).max())
        h = np.tanh(each + h @ np.asarray(params["w"]))
    np.testing.assert_allclose(np.ravel(q.activation.scale), [peak / 127], rtol=1e-5)


# --- Batches --------------------------------------------------------------------------------------


def counted(batches, seen):
    for k, batch in enumerate(batches):
        seen.append(k)
        yield batch


def test_batches_are_read_once_and_only_if_needed():
    params, x = mlp_params()
    for policy, expected in ((presets.int8_static, [0, 1, 2]), (presets.int8, [0])):
        seen = []
        quantize.ptq(mlp, params, counted([x, 2 * x, x[:2]], seen), policy)
        assert seen == expected


def test_what_batches_must_be():
    params, x = mlp_params()
    before = dict(params)
    run = lambda batches, policy=presets.int8_static: quantize.ptq(mlp, params, batches, policy)
    with pytest.raises(ArgumentError, match="no batches"):
        run([])
    with pytest.raises(NonFiniteError, match=r"batch 1.*'up'"):
        run([x, x.at[1, 2].set(jnp.nan)])
    with pytest.raises(ArgumentError, match=r"nothing but zeros at the sites of 'up'"):
        run([jnp.zeros_like(x)])
    with pytest.raises(StructureError, match="batch 1"):
        run([x, (x, x)])
    assert params == before and all(params[k] is before[k] for k in params)
    for bad in (jnp.nan, jnp.inf):
        params["down"] = before["down"].at[0, 0].set(bad)
        with pytest.raises(NonFiniteError, match=r"'down'.*finite|finite.*'down'"):
            run([x], presets.int8_weights)


def test_what_a_branch_never_showed_has_no_static_range():
    fn = lambda p, x: jax.lax.cond(x.sum() > 0, lambda x: x @ p["a"], lambda x: x @ p["b"], x)
    params, x = {"a": draw(4, 2), "b": draw(4, 2)}, jnp.abs(draw(3, 4))
    with pytest.raises(ArgumentError, match="'b'"):
        quantize.ptq(fn, params, [x], presets.int8_static)
    result = quantize.ptq(fn, params, [x, -x], presets.int8_static)
    expected = np.abs(x).max() / 127
    policy = dataclasses.replace(presets.int8_static.rules[0], activations=TENSOR)
    result = quantize.ptq(fn, params, [x, -2 * x], Policy((policy,)))
    got = [float(result.params[k].activation.scale.squeeze()) for k in "ab"]
    np.testing.assert_allclose(got, [expected, 2 * expected], rtol=1e-5)


# --- Methods that go in sequence ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scaled(Method):
    """Multiplies the weights by the mean square of what they read: so that one sees what it saw."""

    @property
    def statistics(self) -> Mapping[str, stats.Statistic]:
        return {"moment": stats.second_moment()}

    @property
    def sequential(self) -> bool:
        return True

    def __call__(self, w: Any, format: Format, seen: Mapping[str, Any]) -> Any:
        power = jnp.trace(seen["moment"].total) / seen["moment"].tokens
        return numerics.quantize(w * power, format), {"power": power}


SCALED = Policy((Rule(weights=INT8, method=Scaled()),))


def scaled(w, x):
    """What `Scaled` makes of a matrix by NumPy, and how strong its input was."""
    power = (x**2).sum() / x.shape[0]
    w = np.asarray(w) * power
    step = np.abs(w).max(0) / 127
    return np.round(w / step) * step, power


def unrolled(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def indexed(p, x):
    for k in range(3):
        x = jnp.tanh(x @ p["w"][k])
    return x


LAYERS = draw(3, 6, 6)
SEQUENCES = {
    "unrolled": (unrolled, dict(zip("abc", LAYERS, strict=True))),
    "scanned": (scanned, {"w": LAYERS}),
    "indexed": (indexed, {"w": LAYERS}),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequential_methods_see_what_replaced_weights_give(name):
    fn, params = SEQUENCES[name]
    x = draw(30, 6, seed=1)
    result = quantize.ptq(fn, params, iter([x[:20], x[20:]]), SCALED)
    got = np.stack([np.asarray(numerics.dequantize(q)) for q in result.params.values()])
    x, powers = np.asarray(x), []
    for w, hat in zip(LAYERS, got.reshape(3, 6, 6), strict=True):
        expected, power = scaled(w, x)
        powers.append(power)
        np.testing.assert_allclose(hat, expected, atol=0.02 * np.abs(expected).max())
        x = np.tanh(x @ hat)
    reported = [leaf.diagnostics["power"] for leaf in result.report.leaves]
    expected = powers if name == "unrolled" else [max(powers)]
    np.testing.assert_allclose(reported, expected, rtol=1e-3)
    assert all(leaf.method == "Scaled" and not leaf.notes for leaf in result.report.leaves)
    assert result.report.leaves[0].bytes_before == tree.nbytes(next(iter(params.values())))


def test_sequential_methods_see_each_experts_own():
    fn = lambda p, x: jnp.einsum("eth,eho->eto", jnp.tanh(x @ p["in"]), p["out"])
    params = {"in": draw(6, 4), "out": draw(2, 4, 3, seed=1)}
    x = draw(2, 10, 6, seed=2) * jnp.array([1.0, 0.1])[:, None, None]
    result = quantize.ptq(fn, params, [x], SCALED)
    hats = {k: np.asarray(numerics.dequantize(q)) for k, q in result.params.items()}
    expected, _ = scaled(params["in"], np.asarray(x).reshape(20, 6))
    np.testing.assert_allclose(hats["in"], expected, atol=0.02 * np.abs(expected).max())
    for k in range(2):
        expected, _ = scaled(params["out"][k], np.tanh(np.asarray(x[k]) @ hats["in"]))
        np.testing.assert_allclose(hats["out"][k], expected, atol=0.02 * np.abs(expected).max())


def test_rules_without_data_are_replaced_before_what_they_feed():
    """A leaf rounded to nearest is upstream of one that is seen: it is rounded by then."""
    params, x = {"a": draw(6, 6), "b": draw(6, 6, seed=1)}, draw(30, 6, seed=2)
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    coarse = Rule(where="a", weights=Format(numerics.ternary, PerChannel()))
    result = quantize.ptq(fn, params, [x], Policy((coarse, Rule(weights=INT8, method=Scaled()))))
    hat = np.asarray(numerics.dequantize(result.params["a"]))
    expected, _ = scaled(params["b"], np.tanh(np.asarray(x) @ hat))
    got = np.asarray(numerics.dequantize(result.params["b"]))
    np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max())
    assert result.report["a"].method == "RoundToNearest" and not result.report["a"].notes


def test_slices_that_nothing_reached_are_noted():
    fn = lambda p, x: x @ p["w"][0] @ p["w"][2]
    params = {"w": draw(3, 6, 6)}
    result = quantize.ptq(fn, params, [draw(10, 6, seed=1)], SCALED)
    assert result.report["w"].notes == ("1 slices rounded to nearest, since nothing reached them",)
    hat = numerics.dequantize(result.params["w"])[1]
    expected = numerics.dequantize(numerics.quantize(params["w"][1], INT8))
    np.testing.assert_allclose(hat, expected, rtol=1e-6)


def test_lookups_and_moved_leaves_are_rounded_to_nearest_with_a_note():
    def fn(p, tokens):
        return p["table"][tokens] @ p["moved"][::-1]

    params = {"table": draw(5, 6), "moved": draw(6, 4)}
    rules = Policy((Rule(weights=INT8, method=Scaled()),))
    result = quantize.ptq(fn, params, [jnp.array([0, 3])], rules)
    notes = {leaf.path: leaf.notes for leaf in result.report.leaves}
    assert notes == {
        "moved": (
            "rounded to nearest, since its entries are moved about before they are contracted",
        ),
        "table": ("rounded to nearest, since it is only looked up",),
    }
    assert all(leaf.method == RoundToNearest.__name__ for leaf in result.report.leaves)


def test_host_memory_changes_nothing():
    fn, params = SEQUENCES["scanned"]
    batches = [draw(8, 6, seed=k) for k in itertools.islice(itertools.count(), 2)]
    here = quantize.ptq(fn, params, batches, SCALED).params["w"]
    there = quantize.ptq(fn, params, batches, SCALED, host=True).params["w"]
    np.testing.assert_array_equal(here.values, there.values)
    np.testing.assert_array_equal(here.scale, there.scale)
