import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import ZOO

from jaxcompress import graph, numerics, quantize
from jaxcompress.errors import ArgumentError, StructureError

pytestmark = pytest.mark.usefixtures("strict_promotion")

INT8 = quantize.Rule(where="w", weights=numerics.Format(numerics.int8, numerics.PerChannel()))


def draw(seed, *shape, positive=False):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.5, 1.5, shape) if positive else rng.standard_normal(shape)
    return jnp.asarray(x, jnp.float32)


def norm_params(*stack, inputs=3, outputs=4):
    return {
        "w": draw(0, *stack, inputs, outputs),
        "mean": draw(1, *stack, outputs),
        "var": draw(2, *stack, outputs, positive=True),
        "scale": draw(3, *stack, outputs, positive=True),
        "bias": draw(4, *stack, outputs),
    }


def normed(y, p):
    return (y - p["mean"]) * (jax.lax.rsqrt(p["var"] + 1e-5) * p["scale"]) + p["bias"]


def expected(p):
    p = {name: np.asarray(x, np.float64) for name, x in p.items()}
    A = p["scale"] / np.sqrt(p["var"] + 1e-5)
    return A, p["bias"] - p["mean"] * A


def only(fn, params, *inputs):
    (chain,) = graph.affine(fn, params, *inputs).values()
    return chain


def check(chain, params, A, B):
    for got, wanted in zip(chain.affine(params), (A, B), strict=True):
        assert got.shape == np.shape(wanted)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def scanned(p, x):
    return jax.lax.scan(lambda x, p: (jnp.tanh(normed(x @ p["w"], p)), None), x, p)[0]


def branches(p, x):
    body = lambda x: jnp.tanh(normed(x @ p["w"], p))
    return jax.lax.cond(x[0, 0] > 0, body, jnp.sin, x)


CONSTRUCTS = {
    "plain": lambda p, x: jnp.tanh(normed(x @ p["w"], p)),
    "norm in jit": lambda p, x: jnp.tanh(jax.jit(normed)(x @ p["w"], p)),
    "product in jit": lambda p, x: jnp.tanh(normed(jax.jit(jnp.matmul)(x, p["w"]), p)),
    "remat": jax.checkpoint(lambda p, x: jnp.tanh(normed(x @ p["w"], p))),
    "cond": branches,
    "while": lambda p, x: jax.lax.fori_loop(0, x.shape[0], lambda _, x: normed(x @ p["w"], p), x),
}


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_a_norm_is_one_chain(name):
    params = norm_params(inputs=4)
    chain = only(CONSTRUCTS[name], params, draw(9, 2, 4))
    assert chain.leaves == ("bias", "mean", "scale", "var")
    assert (chain.bias, chain.shifts, chain.shared) == ("bias", "bias", ())
    assert (chain.unfoldable, chain.unshiftable) == (None, None)
    check(chain, params, *expected(params))


def test_each_layer_of_a_stack_has_its_own():
    params = norm_params(3, inputs=4)
    chain = only(scanned, params, draw(9, 2, 4))
    assert chain.stopped == "tanh is not affine in its result"
    check(chain, params, *expected(params))


def test_nested_stacks():
    params = norm_params(2, 3, inputs=4)
    fn = lambda p, x: jax.lax.scan(lambda x, p: (scanned(p, x), None), x, p)[0]
    check(only(fn, params, draw(9, 2, 4)), params, *expected(params))


def test_a_scan_over_time_shares_its_kernel():
    params = norm_params(inputs=4)
    step = lambda p, h, x: (normed(x @ p["w"], p) + h, None)
    fn = lambda p, xs: jax.lax.scan(functools.partial(step, p), xs[0], xs)[0]
    check(only(fn, params, draw(9, 5, 2, 4)), params, *expected(params))
    # one norm a step, as in recurrent BatchNorm, cannot go into the one kernel
    apart = norm_params(5, inputs=4) | {"w": params["w"]}

    def by_step(p, xs):
        w, rest = p["w"], {name: x for name, x in p.items() if name != "w"}
        body = lambda h, xp: step({"w": w, **xp[1]}, h, xp[0])
        return jax.lax.scan(body, xs[0], (xs, rest))[0]

    chain = only(by_step, apart, draw(9, 5, 2, 4))
    reason = "the other operand of sub differs between uses of its kernel in a scan"
    assert chain.stopped == reason and chain.leaves == ()
    assert chain.unshiftable == f"no leaf is added to its result: {reason}"


def test_every_kind_of_step():
    def fn(p, x):
        y = x @ p["w"]
        y = -(p["a"] - y) / p["b"]
        y = (3.0 - jax.lax.stop_gradient(p["c"]) * y).astype(jnp.bfloat16).astype(jnp.float32)
        return jnp.exp(y)

    params = {"w": draw(0, 3, 4), "a": draw(1, 4), "b": draw(2, 4, positive=True), "c": draw(3, 4)}
    chain = only(fn, params, draw(9, 2, 3))
    a, b, c = (np.asarray(params[name]) for name in "abc")
    assert chain.bias is None and chain.unshiftable == "no step adds a leaf to it as it is"
    check(chain, params, -c / b, 3 + c * a / b)


def test_channels_of_several_axes_in_another_order():
    """Heads and their entries, swapped after the contraction, with positions between."""

    def fn(p, x):
        y = jnp.einsum("bti,ihd->bthd", x, p["w"]).transpose(0, 2, 1, 3)  # (b, h, t, d)
        y = y * p["gain"][:, None, None] + p["bias"].T[:, None, :]
        return jnp.tanh(y.reshape(2, 1, 3, 5, 4))

    params = {"w": draw(0, 6, 3, 4), "gain": draw(1, 3), "bias": draw(2, 4, 3)}
    chain = only(fn, params, draw(9, 2, 5, 6))
    assert chain.bias == "bias" and chain.unfoldable is None
    check(chain, params, np.repeat(params["gain"], 4), np.asarray(params["bias"]).T.reshape(-1))
    shifted = chain.shifted(params, jnp.arange(12.0))
    moved = np.asarray(shifted["bias"] - params["bias"])
    np.testing.assert_allclose(
        moved,
        (np.repeat(params["gain"], 4) * np.arange(12.0)).reshape(3, 4).T,
        rtol=1e-5,
        atol=1e-5,
    )


def test_experts_have_a_norm_each():
    params = norm_params(3)
    fn = lambda p, x: jnp.tanh(jax.vmap(normed)(jnp.einsum("etd,edf->etf", x, p["w"]), p))
    chain = only(fn, params, draw(9, 3, 5, 3))
    check(chain, params, *expected(params))
    assert chain.unfoldable is None


def test_grouped_convolutions_give_rows_by_group():
    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2
        )
        return jnp.tanh(normed(y, p))

    params = norm_params(outputs=6) | {"w": draw(0, 3, 3, 2, 6)}
    A, B = expected(params)
    check(only(fn, params, draw(9, 2, 4, 4, 4)), params, A.reshape(2, 3), B.reshape(2, 3))


def fork(p, x):
    y = x @ p["w"]
    return y * p["scale"], y


def layer_norm(p, x):
    y = x @ p["w"]
    y = y - y.mean(-1, keepdims=True)
    return y * p["scale"] + p["bias"]


ENDS = {
    "it is normalised by its own statistics, which depend on fn's inputs": layer_norm,
    "its result is read at 2 places: mul, fn's results": fork,
    "the other operand of mul depends on fn's inputs": lambda p, x: (x @ p["w"]) * x.sum(),
    "the other operand of add differs between positions": lambda p, x: x @ p["w"] + p["rows"],
    "reshape mixes its channels with its positions": lambda p, x: (x @ p["w"]).reshape(-1) * 2.0,
    "integer_pow is not affine in its result": lambda p, x: (x @ p["w"]) ** 2,
    "relu is not affine in its result": lambda p, x: jax.nn.relu(x @ p["w"]),
    "div is not affine in its result": lambda p, x: p["scale"] / (x @ p["w"]),
    "its result is what scan gives out": lambda p, x: jax.lax.map(lambda x: x @ p["w"], x),
    "its result is what fn returns": lambda p, x: (x @ p["w"], p["scale"]),
}


@pytest.mark.parametrize("reason", ENDS)
def test_why_a_chain_ends(reason):
    chain = only(ENDS[reason], norm_params() | {"rows": draw(5, 2, 4)}, draw(9, 2, 3))
    assert chain.stopped == reason
    assert chain.unfoldable == f"no leaf scales its result: {reason}"


def test_leaves_that_others_read_are_told():
    params = norm_params() | {"v": draw(7, 3, 4)}
    fn = lambda p, x: (jnp.tanh(normed(x @ p["w"], p)), jnp.tanh(x @ p["v"] + p["bias"]))
    chains = graph.affine(fn, params, draw(9, 2, 3))
    assert chains["w"].shared == ("bias",)
    # the mean is the norm's own, so it can hold the shift in the place of the bias
    assert (chains["w"].unfoldable, chains["w"].bias, chains["w"].shifts) == (None, None, "mean")
    assert chains["v"].unshiftable == "bias, added to it, is read at other places as well"
    with pytest.raises(ArgumentError, match="bias, added to it, is read at other places"):
        chains["v"].shifted(params, jnp.zeros(4))


def test_one_output():
    fn = lambda p, x: jnp.tanh(3.0 * (x @ p["w"]) + p["b"])
    params, x = {"w": draw(0, 3), "b": draw(1)}, draw(9, 2, 3)
    chain = only(fn, params, x)
    check(chain, params, [3.0], np.asarray(params["b"])[None])
    np.testing.assert_allclose(chain.shifted(params, jnp.ones(1))["b"], params["b"] + 3, rtol=1e-6)


def test_parts_of_leaves_are_not_followed():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    body = lambda w, b, x: x @ w + b
    sharded = jax.shard_map(
        body, mesh=mesh, in_specs=(spec(None, "x"), spec("x"), spec()), out_specs=spec(None, "x")
    )
    params = norm_params()
    chain = only(lambda p, x: sharded(p["w"], p["bias"], x), params, draw(9, 2, 3))
    assert chain.unshiftable == chain.unfoldable == "it lies inside a shard_map"
    with pytest.raises(ArgumentError, match="inside a shard_map"):
        chain.affine(params)


# --- Shifts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONSTRUCTS, "scan"])
def test_a_shift_of_the_result(name):
    """What `perturb` adds to the result, `shifted` puts into a leaf."""
    fn = CONSTRUCTS.get(name, scanned)
    params = norm_params(*([3] if name == "scan" else []), inputs=4)
    x = draw(9, 2, 4).at[0, 0].set(1.0)
    chain = only(fn, params, x)
    shift = draw(8, *params["bias"].shape)
    site = chain.site
    offset = jnp.broadcast_to(shift[..., None, :], (*site.stack, *site.output.shape))
    result = fn(chain.shifted(params, shift), x)
    wanted = graph.perturb(fn, "w")(params, {site.name: offset}, x)
    np.testing.assert_allclose(result, wanted, rtol=2e-4, atol=1e-5)
    assert np.abs(result - fn(params, x)).max() > 1e-2


@pytest.mark.parametrize("name", ["efficientnet_block", "char_lstm"])
def test_shifts_in_the_zoo(name):
    """At every site that has a bias of its own; the shift is the same at every position."""
    fn, params, inputs = ZOO[name].build()
    chains = graph.affine(fn, params, *inputs)
    able = {n: chain for n, chain in chains.items() if chain.unshiftable is None}
    assert set(chains) == set(able)
    shifts, offsets = {}, {}
    for seed, (n, chain) in enumerate(able.items()):
        shape, site = jax.eval_shape(chain.affine, params)[0].shape, chain.site
        shifts[n] = 0.1 * draw(seed, *shape)
        rows = jnp.zeros(site.output.shape)
        like = jax.ShapeDtypeStruct(rows.shape, rows.dtype)
        full = jax.eval_shape(site.output_rows, like).shape
        spread = jnp.broadcast_to(shifts[n][..., None, :], full)
        (offset,) = jax.linear_transpose(site.output_rows, like)(spread)
        offsets[n] = jnp.broadcast_to(offset, (*site.stack, *offset.shape))

    @jax.jit
    def both(params):
        shifted = params
        for n, chain in able.items():
            shifted = chain.shifted(shifted, shifts[n])
        wanted = graph.perturb(fn, "**")(params, offsets, *inputs)
        return fn(shifted, *inputs), wanted, fn(params, *inputs)

    with jax.numpy_dtype_promotion("standard"):  # the models', not ours
        result, wanted, plain = both(params)
        np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-5)
        assert np.abs(result - plain).max() > 1e-2


def test_a_shift_once_the_kernel_is_quantized():
    """The chain was found with arrays; only the leaves that it reads have to be such."""
    params, x = norm_params(), draw(9, 2, 3)
    chain, shift = only(CONSTRUCTS["plain"], params, x), draw(8, 4)
    packed = quantize.pack(params, quantize.Policy((INT8,)))
    shifted = chain.shifted(packed, shift)
    assert shifted["w"] is packed["w"]
    np.testing.assert_allclose(
        shifted["bias"] - params["bias"], expected(params)[0] * shift, rtol=1e-5, atol=1e-6
    )


def test_what_cannot_be_folded_is_refused():
    chain = only(layer_norm, norm_params(), draw(9, 2, 3))
    with pytest.raises(ArgumentError, match="'w': no leaf scales its result"):
        chain.folded(norm_params())


def test_a_shift_of_another_shape_is_refused():
    params = norm_params()
    chain = only(CONSTRUCTS["plain"], params, draw(9, 2, 3))
    with pytest.raises(StructureError, match=r"shape \(5,\) for 'w'.*|expected shape \(4,\)"):
        chain.shifted(params, jnp.zeros(5))


# --- Bypass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONSTRUCTS, "scan"])
def test_bypass_leaves_the_addition(name):
    fn = CONSTRUCTS.get(name, scanned)
    params = norm_params(*([3] if name == "scan" else []), inputs=4)
    x = draw(9, 2, 4).at[0, 0].set(1.0)
    without = graph.bypass(fn, ["w"])
    neutral = params | {
        "mean": jnp.zeros_like(params["mean"]),
        "scale": jnp.sqrt(params["var"] + 1e-5),
    }
    np.testing.assert_allclose(without(params, x), fn(neutral, x), rtol=1e-5, atol=1e-6)
    assert "rsqrt" in str(jax.make_jaxpr(fn)(params, x))
    assert "rsqrt" not in str(jax.make_jaxpr(without)(params, x))


def test_bypass_refuses_what_is_no_chain():
    params, x = norm_params(), draw(9, 2, 3)
    with pytest.raises(ArgumentError, match="normalised by its own statistics"):
        graph.bypass(layer_norm, ["w"])(params, x)
    with pytest.raises(ArgumentError, match="'scale': fn has no such contraction"):
        graph.bypass(CONSTRUCTS["plain"], ["scale"])(params, x)


@pytest.mark.parametrize("together", [jax.device_put, jax.lax.optimization_barrier])
def test_leaves_that_pass_beside_inputs_are_still_known(together):
    """Result k of such an equation is operand k, whatever the others depend on."""

    def fn(params, x):
        params, x = together((params, x))
        return jnp.tanh((x @ params["w"] + params["b"]) * params["s"])

    params = {"w": jnp.ones((3, 2)), "b": jnp.arange(2.0), "s": jnp.array([2.0, 3.0])}
    chain = graph.affine(fn, params, jnp.ones((1, 3)))["w"]
    assert chain.leaves == ("b", "s") and chain.unfoldable is None
    A, B = chain.affine(params)
    np.testing.assert_allclose(A, [2.0, 3.0])
    np.testing.assert_allclose(B, [0.0, 3.0])
