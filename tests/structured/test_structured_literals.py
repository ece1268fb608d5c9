"""Where a function divides by a width that shrinks: found however it is written."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import graph
from jaxcompress.structured.module._literals import WidthLiteral, set_epsilons, width_literals

X = jnp.ones((5, 3))
PARAMS = {"in": jnp.ones((3, 8)), "s": jnp.ones(8), "out": jnp.ones((8, 2))}
KEEP = {
    "in": {1: np.array([0, 1, 6])}, "s": {0: np.array([0, 1, 6])},
    "out": {0: np.array([0, 1, 6])},
}  # fmt: skip

NORMS = {
    "rsqrt": lambda x, s: x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 0.5) * s,
    "scale first": lambda x, s: x * (jax.lax.rsqrt(jnp.mean(x * x, -1)[:, None] + 0.5) * s),
    "divide": lambda x, s: s * (x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 0.5)),
    "power": lambda x, s: x * (jnp.sum(x**2, -1, keepdims=True) * (1 / 8) + 0.5) ** -0.5 * s,
    "inverse": lambda x, s: x * (1 / jnp.sqrt(0.5 + jnp.mean(x**2, -1, keepdims=True))) * s,
    "nested": lambda x, s: jax.jit(NORMS["rsqrt"])(x, s),
    "checkpointed": lambda x, s: jax.checkpoint(NORMS["rsqrt"])(x, s),
}


def found_in(norm, params=PARAMS, keep=KEEP):
    fn = lambda p, x: norm(x @ p["in"], p["s"]) @ p["out"]
    return fn, width_literals(graph.dims(fn, params, X), keep)


@pytest.mark.parametrize("name", NORMS)
def test_a_root_mean_square_is_found_with_its_scale_and_epsilon(name):
    fn, (literal,) = found_in(NORMS[name])
    assert (literal.kind, literal.leaves) == ("norm", ("s",)) and not literal.centred
    assert (literal.old, literal.new, literal.epsilon) == (8, 3, 0.5)
    assert literal.factor == pytest.approx((8 / 3) ** 0.5)
    assert literal.wanted_epsilon == pytest.approx(0.5 * 8 / 3)

    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), PARAMS)
    x = np.asarray(X) @ np.asarray(params["in"])
    rms = np.sqrt(np.mean(x**2, -1, keepdims=True) + 0.5 * 8 / 3)
    expected = (x / rms * np.asarray(params["s"])) @ np.asarray(params["out"])
    np.testing.assert_allclose(set_epsilons(fn, [literal])(params, X), expected, rtol=1e-5)


def test_an_offset_of_the_scale_is_told():
    _, (literal,) = found_in(lambda x, s: NORMS["rsqrt"](x, 1 + s))
    assert literal.offset == 1.0 and literal.leaves == ("s",)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, s: nn.LayerNorm(use_bias=False, epsilon=0.5).apply({"params": {"scale": s}}, x),
        lambda x, s: (
            (x - jnp.mean(x, -1, keepdims=True))
            * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 0.5)
            * s
        ),
    ],
    ids=["fast variance", "two passes"],
)
def test_a_mean_that_is_subtracted_is_told(norm):
    _, (literal,) = found_in(norm)
    assert literal.centred and literal.leaves == ("s",) and literal.epsilon == 0.5


def test_a_norm_without_a_scale_has_no_leaves():
    _, literals = found_in(lambda x, s: NORMS["rsqrt"](x, 1.0) * jnp.tanh(s))
    assert [(x.kind, x.leaves, x.old, x.new) for x in literals] == [("norm", (), 8, 3)]


def test_what_does_not_divide_by_a_width_that_shrinks_is_left_alone():
    # Unit length has no width in it; the mean over rows is over another axis.
    for norm in (
        lambda x, s: x * jax.lax.rsqrt(jnp.sum(x**2, -1, keepdims=True) + 0.5) * s,
        lambda x, s: x * jax.lax.rsqrt(jnp.mean(x**2, 0, keepdims=True) + 0.5) * s,
        lambda x, s: jnp.tanh(x * s) / 8.0,
    ):
        assert found_in(norm)[1] == ()
    assert found_in(NORMS["rsqrt"], keep={})[1] == ()


def attention(scale, *, fused=False):
    def fn(p, x):
        q, k = (x @ p["qk"] if fused else x @ p[name] for name in ("q", "k"))
        q, k = (q[:, :4], q[:, 4:]) if fused else (q, k)
        return jax.nn.softmax(scale(q, k)) @ x

    return fn


@pytest.mark.parametrize(
    "scale",
    [lambda q, k: q @ k.T / 2.0, lambda q, k: (q * 0.5) @ k.T, lambda q, k: q @ (0.5 * k).T],
    ids=["scores", "queries", "keys"],
)
def test_the_root_of_the_size_of_heads_is_found(scale):
    params = {"q": jnp.ones((3, 4)), "k": jnp.ones((3, 4))}
    keep = {name: {1: np.array([0])} for name in params}
    (literal,) = width_literals(graph.dims(attention(scale), params, X), keep)
    assert literal == WidthLiteral(kind="attention", leaves=literal.leaves, old=4, new=1)
    assert literal.leaves in (("q",), ("k",)) and literal.factor == 0.5


def test_a_leaf_that_gives_queries_and_keys_is_not_scaled():
    params = {"qk": jnp.ones((3, 8))}
    keep = {"qk": {1: np.array([0, 4])}}
    fn = attention(lambda q, k: q @ k.T / 2.0, fused=True)
    assert width_literals(graph.dims(fn, params, X), keep) == ()
