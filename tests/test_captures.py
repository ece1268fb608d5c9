"""fn is traced no more often than what is asked needs: its calls in Python are counted."""

import jax
import jax.numpy as jnp
import pytest

from jaxcompress import graph, quantize, stats, structured

PARAMS = {"up": jax.random.normal(jax.random.key(0), (3, 8)), "down": jnp.ones((8, 3)) / 8}
X = jax.random.normal(jax.random.key(1), (4, 3))


class Counted:
    """A residual block that counts how often it is called in Python."""

    def __init__(self):
        self.calls = 0

    def __call__(self, params, x):
        self.calls += 1
        x = x + jnp.tanh(x @ params["up"]) @ params["down"]
        return x + jnp.tanh(x @ params["up2"]) @ params["down2"] if "up2" in params else x


@pytest.fixture
def fn():
    return Counted()


def test_what_takes_a_traced_call_does_not_trace_again(fn):
    traced = graph.capture(fn, PARAMS, X)
    assert fn.calls == 1
    assert graph.trace(traced).flops == graph.cost(traced).flops
    assert graph.dims(traced) is graph.dims(traced)
    assert set(graph.affine(traced)) == {"up", "down"}
    keep = {"up": {1: jnp.arange(3)}, "down": {0: jnp.arange(3)}}
    graph.remask(traced, keep)(PARAMS, X)
    graph.leaks(traced, keep, PARAMS, X)
    graph.tap(traced, "*")(PARAMS, X)
    small = {"up": PARAMS["up"][:, :3], "down": PARAMS["down"][:3]}
    graph.resize(traced, keep, {"up": (3, 8), "down": (8, 3)})(small, X)
    assert graph.cost(traced, target="cpu").compiled is not None
    assert graph.capture(traced) is traced and fn.calls == 1


def test_a_traced_call_of_other_shapes_is_traced_again(fn):
    traced = graph.capture(fn, PARAMS, X)
    _, taps = graph.tap(traced, "up")(PARAMS, X[:2])
    assert taps["up"].shape == (2, 8) and fn.calls == 2


def test_shrink_after_groups(fn):
    groups = structured.groups(fn, PARAMS, X)
    keep = structured.keep(groups, {"up": [0, 2, 5]})
    fn.calls = 0
    certificate = structured.shrink(fn, PARAMS, keep, X)[2]
    assert certificate.holds and fn.calls == 0


def test_shrink_after_groups_of_another_batch(fn):
    groups = structured.groups(fn, PARAMS, X[:1])
    keep = structured.keep(groups, {"up": [0, 2, 5]})
    fn.calls = 0
    assert structured.shrink(fn, PARAMS, keep, X)[2].holds and fn.calls == 1


def test_shrink_in_bfloat16_traces_once_more_in_float32(fn):
    params, x = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, X))
    keep = structured.keep(structured.groups(fn, params, x), {"up": [0, 2, 5]})
    fn.calls = 0
    assert structured.shrink(fn, params, keep, x)[2].holds and fn.calls == 1


def test_drop_layers(fn):
    params = {**PARAMS, "up2": PARAMS["up"], "down2": PARAMS["down"]}
    smaller, fewer, certificate = structured.drop_layers(fn, params, "up2+down2", X)
    assert certificate.holds and fn.calls == 1
    smaller(fewer, X)
    smaller(fewer, X)
    assert fn.calls == 2  # it keeps its plan for calls of one kind


def test_collect_of_statistics_of_gradients(fn):
    statistics = {"range": stats.absmax(), "fisher": stats.fisher()}
    stats.collect(fn, PARAMS, [X, X, X], statistics)
    assert fn.calls == 1
    stats.collect(fn, PARAMS, [X, X[:2]], statistics)
    assert fn.calls == 3  # once for each batch size


def test_sequential(fn):
    stats.sequential(fn, PARAMS, [X, X], stats.absmax(), lambda stop: None)
    assert fn.calls == 1


def test_ptq(fn):
    quantize.ptq(fn, PARAMS, [X, X], quantize.presets.int8_static)
    assert fn.calls <= 2
