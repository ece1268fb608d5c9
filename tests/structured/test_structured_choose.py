"""Budgets are met exactly, on the shrunk function; steps, bounds, scopes."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from zoo import ZOO

from jaxcompress import graph, structured, tree
from jaxcompress.errors import ArgumentError, NonFiniteError, SelectionError, StructureError
from jaxcompress.structured import _choose
from jaxcompress.structured._sizes import Sizes


def two_layers(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


PARAMS = {"a": jnp.ones((4, 16)), "b": jnp.ones((16, 16)), "c": jnp.ones((16, 2))}
X = jnp.ones((5, 4))


def groups(**options):
    return structured.groups(two_layers, PARAMS, X, **options)


def scores(found, seed=0):
    rng = np.random.default_rng(seed)
    return {g.name: rng.random((*g.layers, g.size)) for g in found.values()}


@functools.cache
def zoo(name):
    fn, params, inputs = ZOO[name].build()
    return fn, params, inputs, structured.groups(fn, params, *inputs)


BUDGETS = (structured.Params, structured.Flops, structured.Bytes)


@pytest.mark.parametrize("scope", ["global", "local", "isomorphic"])
@pytest.mark.parametrize("name", ["resnet_eval", "llama_scanned", "char_lstm", "control_flow"])
def test_budgets_are_met_by_the_shrunk_function(name, scope):
    fn, params, inputs, found = zoo(name)
    given = scores(found)
    dense = [tree.count(params), graph.trace(fn, params, *inputs).flops, tree.nbytes(params)]
    for kind, total in zip(BUDGETS, dense, strict=True):
        keep = structured.choose(found, given, budget=kind(0.75), scope=scope)
        small, fewer = structured.rebuild(fn, keep), structured.slice_params(params, keep)
        if kind is structured.Flops:
            have = graph.trace(small, fewer, *inputs).flops
        else:
            have = tree.count(fewer) if kind is structured.Params else tree.nbytes(fewer)
        assert have <= 0.75 * total
        assert have > 0.3 * total


@pytest.mark.parametrize("name", ["resnet_eval", "gpt_neox", "llama", "mobilenet", "moe"])
def test_counts_by_labels_are_those_of_the_shrunk_function(name):
    fn, params, inputs, found = zoo(name)
    rng, sizes = np.random.default_rng(0), Sizes(found)
    counts = {g.name: int(rng.integers(1, g.size + 1)) for g in found.values()}
    keep = structured.keep(found, {name: np.arange(n) for name, n in counts.items()})
    fewer = structured.slice_params(params, keep)
    assert sizes.params(counts) == tree.count(fewer)
    assert sizes.bytes(counts) == tree.nbytes(fewer)
    flops = graph.trace(structured.rebuild(fn, keep), fewer, *inputs).flops
    assert sizes.flops(counts) == pytest.approx(flops, rel=1e-9)


def test_one_unit_more_would_not_fit():
    found = groups()
    keep = structured.choose(found, scores(found), budget=structured.Params(0.5))
    a, b = (keep[name].size if name in keep else 16 for name in ("a", "b"))
    count = lambda a, b: 4 * a + a * b + 2 * b
    assert count(a, b) <= count(16, 16) / 2 < min(count(a + 1, b), count(a, b + 1))


def test_an_amount_is_an_amount():
    found = groups()
    keep = structured.choose(found, scores(found), budget=structured.Params(100))
    assert tree.count(structured.slice_params(PARAMS, keep)) <= 100


def test_global_takes_the_lowest_of_all_and_local_as_many_of_each():
    found = groups()
    given = {"a": np.arange(16.0), "b": 100 + np.arange(16.0)}
    lowest = structured.choose(found, given, budget=structured.Params(0.6))
    assert "b" not in lowest and lowest["a"].tolist() == [*range(16 - lowest["a"].size, 16)]
    even = structured.choose(found, given, budget=structured.Params(0.6), scope="local")
    assert abs(even["a"].size - even["b"].size) <= 1


def test_multiples_and_bounds():
    found = groups(round_to=4)
    keep = structured.choose(found, scores(found), budget=structured.Params(0.5), scope="local")
    assert {units.size % 4 for units in keep.values()} == {0}
    found = groups()
    given = {"a": np.arange(16.0), "b": 100 + np.arange(16.0)}
    bounds = {"a": (12, 1.0), "hidden": (0.25, 0.5)}
    keep = structured.choose(found, given, budget=structured.Params(0.5), bounds=bounds)
    assert keep["a"].size >= 12 and 4 <= keep["b"].size <= 8


def test_seconds_are_searched_on_a_target():
    machine = graph.Target(name="mine", platform="cpu", rates={"float32": 1e9}, bandwidth=1e12)
    found = groups(round_to=8)
    budget = structured.Seconds(0.7, machine)
    keep = structured.choose(found, scores(found), budget=budget, scope="local")
    small, fewer = structured.rebuild(two_layers, keep), structured.slice_params(PARAMS, keep)
    before = graph.cost(two_layers, PARAMS, X, target=machine).seconds
    assert graph.cost(small, fewer, X, target=machine).seconds <= 0.7 * before


def test_keys_that_match_no_group_are_refused():
    with pytest.raises(SelectionError, match="`bounds`.*'hiden', which match no group"):
        structured.choose(
            groups(), scores(groups()), budget=structured.Params(0.5), bounds={"hiden": (1, 2)}
        )
    with pytest.raises(SelectionError, match="`round_to`.*'b/\\*\\*'"):
        groups(round_to={"a": 4, "b/**": 2})
    assert groups(round_to={"heads": 2, "a": 4})["a"].round_to == 4  # a role may be missing


def test_what_is_dense_is_measured_once(monkeypatch):
    seen = []
    measure = _choose.measure_call
    monkeypatch.setattr(_choose, "measure_call", lambda *args: seen.append(1) or measure(*args))
    found = groups()
    assert not structured.choose(found, scores(found), budget=structured.Flops(1.0))
    assert len(seen) == 1


def test_keyword_arrays_are_inputs_like_others():
    fn = lambda p, x, *, mask: two_layers(p, x * mask)
    found = structured.groups(fn, PARAMS, X, mask=X)
    machine = graph.Target(name="mine", platform="cpu", rates={"float32": 1e9}, bandwidth=1e12)
    for budget in (structured.Flops(0.5), structured.Seconds(0.9, machine)):
        keep = structured.choose(found, scores(found), budget=budget, scope="local")
        assert tree.count(structured.slice_params(PARAMS, keep)) < tree.count(PARAMS)


def test_a_budget_that_cannot_be_met_says_the_least():
    found = groups()
    with pytest.raises(ArgumentError, match="at least 7,"):
        structured.choose(found, scores(found), budget=structured.Params(5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"c": np.ones(2)}, SelectionError, "the frozen group 'c'"),
        ({"d": np.ones(2)}, SelectionError, "unknown group 'd'"),
        ({"a": np.ones(3)}, StructureError, r"shape \(3,\) for 'a'"),
        ({"a": np.full(16, np.nan)}, NonFiniteError, "NaN in 'a'"),
    ],
)
def test_scores_that_do_not_fit(change, error, message):
    found = groups()
    with pytest.raises(error, match=message):
        structured.choose(found, scores(found) | change, budget=structured.Params(0.5))


def test_other_mistakes():
    found = groups()
    with pytest.raises(SelectionError, match="no groups"):
        structured.choose(found, {}, budget=structured.Params(0.5))
    with pytest.raises(ArgumentError, match="a fraction in"):
        structured.Params(0.0)
    with pytest.raises(ArgumentError, match="'global', 'isomorphic' or 'local'"):
        structured.choose(found, scores(found), budget=structured.Params(0.5), scope="all")
    with pytest.raises(ArgumentError, match="least <= most"):
        structured.choose(found, scores(found), budget=structured.Params(0.5), bounds={"a": (9, 3)})
    with pytest.raises(ArgumentError, match="a positive multiple"):
        groups(round_to=0)
