"""Stages: what compiles, what is carried, what is told apart."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress import errors, graph
from jaxcompress.graph.program import capture_program
from jaxcompress.stats.stages._canonical import Keys, Shared
from jaxcompress.stats.stages._stages import Stages


def layered(layers, *, scan):
    """An embedding, equal layers of several sites with a residual, and a head."""

    def layer(x, w):
        h = jax.nn.relu(x @ w["up"]) * jnp.cos(jnp.arange(4.0))
        return x + jax.jit(lambda h: jax.nn.silu(h) @ w["down"])(h)

    def fn(p, tokens):
        x = p["embed"][tokens]
        if scan:
            x = lax.scan(lambda x, w: (layer(x, w), None), x, p["layers"])[0]
        else:
            for w in p["layers"]:
                x = layer(x, w)
        return x @ p["head"]

    make = lambda *shape: jnp.ones(shape) / 4
    params = {"embed": make(5, 3), "head": make(3, 5)}
    if scan:
        params["layers"] = {"up": make(layers, 3, 4), "down": make(layers, 4, 3)}
    else:
        params["layers"] = [{"up": make(3, 4), "down": make(4, 3)} for _ in range(layers)]
    return fn, params


def largest(site, state, activation, output):
    return jnp.maximum(state, jnp.abs(activation).max().astype(jnp.float32))


def run_all(stages, params, batches, visit=lambda stop: None):
    """Take batches through all stops with one observer everywhere; returns the last states."""
    batch_runs = [stages.make_pipeline(params, batch).start(batch) for batch in batches]
    found = []
    for stop in batch_runs[0].pipeline.boundaries:
        observers = {site.name: largest for site in stop.sites}
        cells = {name: jnp.zeros(()) for name in observers}
        for batch_run in batch_runs:
            cells = batch_run.advance(jax.tree.leaves(params), observers, cells)
        found.append((stop, cells))
        visit(stop)
    return found


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_layers_that_are_alike_compile_once(scan):
    seconds = "/jax/core/compile/backend_compile_duration"
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    counts = {}
    for layers in (2, 6):
        fn, params = layered(layers, scan=scan)
        batches = [(jnp.zeros((2, 3), int),), (jnp.ones((2, 3), int),)]
        jax.clear_caches()
        events.clear()
        stages = Stages(fn, "**")
        cells = run_all(stages, params, batches[:1])
        assert len(cells) == 2 + 2 * layers
        before = events.count(seconds)
        assert before > 0
        again = run_all(stages, params, batches[1:])
        assert events.count(seconds) == before  # the second batch compiles nothing
        # Every row of the embedding is the same; only the index that was looked up differs.
        assert [float(*c.values()) for _, c in again[1:]] == [
            float(*c.values()) for _, c in cells[1:]
        ]
        counts[layers] = stages.compiled, before
    assert counts[2] == counts[6] and counts[2][0] <= 12


def test_batches_of_another_size_compile_once_more():
    fn, params = layered(2, scan=False)
    stages = Stages(fn, "**")
    run_all(stages, params, [(jnp.zeros((2, 3), int),)] * 3)
    once = stages.compiled
    run_all(stages, params, [(jnp.zeros((2, 3), int),), (jnp.zeros((1, 3), int),)])
    assert stages.compiled == 2 * once


def test_what_finished_stages_carried_is_freed():
    """At a stop, a batch carries what later stages read: here the residual and its sine."""

    def fn(p, x):
        for w in p:
            x = x + jnp.tanh(jnp.sin(x) @ w)
        return x

    params = [jnp.ones((7, 7)) / 9] * 6
    held = []

    def visit(stop):
        gc.collect()
        held.append(sum(x.shape == (11, 7) for x in jax.live_arrays()))

    before = [jnp.ones((11, 7)) * k for k in range(3)]
    batches = [(x,) for x in before]
    run_all(Stages(fn, "**"), params, batches, visit)
    # Three are the caller's. Each batch has the residual and its sine; at the end, nothing.
    assert held == [6] + [9] * 4 + [3]
    del batches, before


def test_what_depends_on_params_only_is_made_anew_from_the_params_of_the_moment():
    def fn(p, x):
        kernel = (p["w"] * 2).T
        return jnp.tanh(x @ kernel) @ kernel

    params, x = {"w": jnp.eye(3)}, jnp.ones((2, 3))
    pipeline = Stages(fn, "**").make_pipeline(params, (x,))
    batch_run = pipeline.start((x,))
    cells = batch_run.advance([params["w"]], {"w": largest}, {"w": jnp.zeros(())})
    assert float(cells["w"]) == 1
    cells = batch_run.advance([3 * params["w"]], {"w#1": largest}, {"w#1": jnp.zeros(())})
    assert float(cells["w#1"]) == pytest.approx(np.tanh(6))
    assert [stop.slices for stop in pipeline.boundaries] == [{"w": {}}, {"w": {}}]


def test_an_unused_part_of_a_batch_is_not_kept():
    fn = lambda p, x, y: (x @ p["w"], y + 1)
    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    y = jnp.ones((1 << 10,)) * 2
    batch_run = Stages(fn, "**").make_pipeline(params, (x, y)).start((x, y))
    pointer = y.unsafe_buffer_pointer()
    del y
    gc.collect()
    assert all(a.size != 1 << 10 or a.unsafe_buffer_pointer() != pointer for a in jax.live_arrays())
    assert float(batch_run.advance([params["w"]], {"w": largest}, {"w": jnp.zeros(())})["w"]) == 1


def key_of(keys, fn, *args):
    return keys.program(capture_program(fn, args)[0])


X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (lambda x: jnp.sin(x) + 1, lambda y: jnp.sin(y) + 1, True),
        (jax.nn.relu, lambda x: jax.nn.relu(x), True),
        (lambda x: lax.scan(lambda c, y: (c + y, None), x[0], x), None, True),
        (lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x), None, True),
        (lambda x: x * np.arange(3.0, dtype=np.float32), None, True),
        (lambda x: x * 0.0, lambda x: x * -0.0, False),
        (lambda x: x + 1, lambda x: x + 2, False),
        (lambda x: x - x.T.T, lambda x: x.T.T - x, False),
        (lambda x: (x, x + 1), lambda x: (x + 1, x), False),
        (lambda x: x.sum(0), lambda x: x.sum(1), False),
        (
            lambda x: x * np.float32([1, 2, 3]),
            lambda x: x * np.float32([1, 2, 4]),
            False,
        ),
        (
            lambda x: lax.scan(lambda c, y: (c + y, None), x[0], x),
            lambda x: lax.scan(lambda c, y: (c - y, None), x[0], x),
            False,
        ),
        (
            lambda x: jax.jit(lambda x: x * 2, keep_unused=True)(x),
            lambda x: jax.jit(lambda x: x * 3, keep_unused=True)(x),
            False,
        ),
    ],
    ids=[
        "names",
        "custom-jvp",
        "scan",
        "cond",
        "constant",
        "signed-zero",
        "literal",
        "operands",
        "results",
        "params",
        "other-constant",
        "other-scan",
        "other-jit",
    ],
)
def test_keys_tell_programs_apart_by_what_they_do(one, other, equal):
    keys = Keys()
    first, second = key_of(keys, one, X), key_of(keys, other or one, X)
    assert (first == second) == equal
    assert key_of(keys, one, X[:1]) != first


def test_shared_calls_compile_once_and_give_what_the_function_gives():
    shared = Shared(Keys())
    for k in range(3):
        f = lambda x, y: {"sum": x["a"] + y, "twice": (x["a"], x["a"], 2)}
        result = shared.call(f, {"a": X * k, "unused": X}, X)
        np.testing.assert_array_equal(result["sum"], X * k + X)
        np.testing.assert_array_equal(result["twice"][1], X * k)
        assert int(result["twice"][2]) == 2
    assert len(shared.functions) == 1
    assert shared.call(lambda: jnp.arange(3)).tolist() == [0, 1, 2]


def test_the_condition_of_a_loop_is_refused():
    def fn(p, x):
        return lax.while_loop(lambda x: (x @ p["w"]).sum() < 1, lambda x: x + 1, x)

    with pytest.raises(errors.ArgumentError, match="condition"):
        Stages(fn, "**").make_pipeline({"w": jnp.ones((3, 3))}, (jnp.ones(3),))


def test_sites_of_a_slice_have_its_axes_and_counts():
    def fn(p, x):
        xs = jnp.moveaxis(p["w"], 1, 0)  # (layers, in, out)
        return lax.scan(lambda x, w: (x @ w, None), x, xs)[0]

    params, x = {"w": jnp.ones((3, 5, 3))}, jnp.ones((2, 3))
    (site,) = graph.trace(fn, params, x).sites
    stops = Stages(fn, "**").make_pipeline(params, (x,)).boundaries
    assert [dict(stop.slices["w"]) for stop in stops] == [{1: i} for i in range(5)]
    assert [stop.iteration for stop in stops] == [(i,) for i in range(5)]
    assert (site.axes.contract, site.axes.output, site.axes.stacked) == ((0,), (2,), (1,))
    (mine,) = stops[0].sites
    assert (mine.axes.contract, mine.axes.output, mine.axes.stacked) == ((0,), (1,), ())
    assert (mine.stack, mine.repeats, 5 * mine.flops) == ((), 1, site.flops)
