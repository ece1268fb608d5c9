"""fn is traced no more often than what is asked needs: its calls in Python are counted."""

import copy
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import graph, lowrank, quantize, stats, structured
from jaxcompress.budget import Params
from jaxcompress.graph.cost import _aot
from jaxcompress.numerics import Format, PerChannel, PerTensor, int8

PARAMS = {"up": jax.random.normal(jax.random.key(0), (3, 8)), "down": jnp.ones((8, 3)) / 8}
X = jax.random.normal(jax.random.key(1), (4, 3))
W8, A8 = Format(int8, PerChannel()), Format(int8, PerTensor())


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
    assert certificate.holds and fn.calls == 1  # by the function that is returned


def test_shrink_after_groups_of_another_batch(fn):
    groups = structured.groups(fn, PARAMS, X[:1])
    keep = structured.keep(groups, {"up": [0, 2, 5]})
    fn.calls = 0
    assert structured.shrink(fn, PARAMS, keep, X)[2].holds and fn.calls == 2


def test_shrink_in_bfloat16_traces_once_more_in_float32(fn):
    params, x = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, X))
    keep = structured.keep(structured.groups(fn, params, x), {"up": [0, 2, 5]})
    fn.calls = 0
    assert structured.shrink(fn, params, keep, x)[2].holds and fn.calls == 2


def test_quantization_aware_training(fn):
    policy = quantize.Policy((quantize.Rule(weights=W8, activations=A8, static=True),))
    qat = quantize.train(fn, policy)
    variables = qat.init(PARAMS, X)
    assert fn.calls == 1
    qat(variables, X)
    assert fn.calls == 2
    jax.grad(lambda v: qat(v, X).sum(), allow_int=True)(variables)
    qat.observe(variables, X)
    qat.coverage(variables, X)
    assert fn.calls == 5


def test_factorize(fn):
    """The call, where factors are multiplied out, and what came of it."""
    lowrank.factorize(fn, PARAMS, [X], budget=Params(0.9), method=lowrank.ActivationSVD())
    assert fn.calls == 3


def test_a_call_compiles_once_for_a_target(fn, monkeypatch):
    compiled = []
    inner = _aot._compile
    monkeypatch.setattr(_aot, "_compile", lambda *args: compiled.append(1) or inner(*args))
    traced = graph.capture(fn, PARAMS, X)
    for _ in range(2):
        assert graph.cost(traced, target="cpu").compiled is not None
    assert len(compiled) == 1


def test_drop_layers(fn):
    params = {**PARAMS, "up2": PARAMS["up"], "down2": PARAMS["down"]}
    smaller, fewer, certificate = structured.drop_layers(fn, params, "up2+down2", X)
    assert certificate.holds and fn.calls == 2
    smaller(fewer, X)
    smaller(fewer, X)
    assert fn.calls == 3  # it keeps its plan for calls of one kind


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


# --- what a captured call is kept for -------------------------------------------------------------


def test_a_call_is_traced_again_where_jax_is_set_otherwise(fn):
    traced = graph.capture(fn, PARAMS, X)
    with jax.default_matmul_precision("highest"):
        jaxpr = str(jax.make_jaxpr(graph.tap(traced, "up"))(PARAMS, X))
    assert fn.calls == 2 and "HIGHEST" in jaxpr


def test_a_certificate_is_of_the_function_that_is_returned():
    """Also where 64 bits came on after the indices were chosen."""
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"] + jnp.ones(()) / 3
    keep = structured.keep(structured.groups(fn, PARAMS, X), {"up": [0, 1]})
    with jax.enable_x64(True):
        small, fewer, certificate = structured.shrink(fn, PARAMS, keep, X)
        assert small(fewer, X).dtype == jnp.float64 and certificate.holds


def test_weak_types_stay():
    fn = lambda p, x: (jnp.tanh(x @ p["up"]) @ p["down"]) * p["scale"]
    params, x = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, X))
    params = {**params, "scale": jnp.asarray(2.0)}
    small, fewer, certificate = structured.shrink(fn, params, {"up": [0, 2, 5]}, x)
    assert small(fewer, x).dtype == fn(params, x).dtype == jnp.bfloat16 and certificate.holds


def test_methods_are_known_again(fn):
    class Model:
        def apply(self, params, x):
            return fn(params, x)

    model = Model()
    keep = structured.keep(structured.groups(model.apply, PARAMS, X), {"up": [0, 2, 5]})
    fn.calls = 0
    assert structured.shrink(model.apply, PARAMS, keep, X)[2].holds and fn.calls == 1


def test_what_is_kept_of_calls_holds_no_params_and_no_tracers(fn):
    params = {**PARAMS, "up2": PARAMS["up"], "down2": PARAMS["down"]}
    smaller, fewer, _ = structured.drop_layers(fn, params, "up2+down2", X)
    with jax.checking_leaks():
        jax.jit(smaller)(fewer, X)
    seen = []
    for count in range(1, 4):
        fewer = jax.tree.map(lambda x: x + 1, fewer)
        seen.append(weakref.ref(fewer["up"]))
        smaller(fewer, X[:count])
    del fewer
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3
    weight = jnp.ones((3, 8))
    groups = structured.groups(fn, {**PARAMS, "up": weight}, X)
    held = weakref.ref(weight)
    del weight
    gc.collect()
    assert held() is None and groups


def test_indices_are_pickled_and_copied_without_the_call(fn):
    keep = structured.keep(structured.groups(fn, PARAMS, X), {"up": [0, 2, 5]})
    for other in (pickle.loads(pickle.dumps(keep)), copy.deepcopy(keep)):
        assert other.traced is None
        np.testing.assert_array_equal(other["up"], keep["up"])
