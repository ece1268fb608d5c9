"""`execute`: factors in any arrangement of axes give what the array gives, and learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from zoo import ZOO

from jaxcompress import graph, quantize, tree
from jaxcompress.errors import SelectionError, StructureError
from jaxcompress.graph.sites._forms import form_at
from jaxcompress.lowrank import Factors, densify, execute, places

LESS = "multiplying its factors out costs less here"


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def factors(shape, left, right, *, core=None, rank=2, seed=0):
    """Random factors that hold these axes of a shape."""
    rng = np.random.default_rng([seed, *shape])

    def part(axes, *ranks):
        lengths = [n if k in axes else 1 for k, n in enumerate(shape)]
        return jnp.asarray(rng.normal(size=(*lengths, *ranks)), jnp.float32)

    middle = None if core is None else part(core, rank, rank)
    return Factors(left=part(left, rank), right=part(right, rank), core=middle)


def by_hand(f):
    """The array that factors stand for, in NumPy."""
    left, right = np.asarray(f.left, np.float64), np.asarray(f.right, np.float64)
    if f.core is None:
        return (left * right).sum(-1)
    core = np.asarray(f.core, np.float64)
    return (left[..., :, None] * core * right[..., None, :]).sum((-1, -2))


def close(got, expected, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max(initial=0) <= tolerance * np.abs(b).max(initial=1e-6)


def check(fn, f, *inputs, by_factors=True):
    """fn by factors is fn on the array, in values and in gradients, and says what it did."""
    params = {"w": f}

    @jax.jit
    def both(params):
        run = lambda fn, params: (fn(params, *inputs) ** 2).sum()
        one = jax.grad(lambda p: run(execute(fn), p))(params)
        two = jax.grad(lambda p: run(fn, densify(p)))(params)
        return (execute(fn)(params, *inputs), one), (fn(densify(params), *inputs), two)

    close(*both(params))
    found = {place.by_factors for place in places(fn, params, *inputs)}
    assert found == {by_factors}


# --- The node ------------------------------------------------------------------------------------


def test_dense_is_the_product():
    for f in (factors((5, 6), (0,), (1,)), factors((2, 5, 6), (0, 1), (0, 2))):
        assert f.shape == f.dense().shape and f.ranks == (2,)
        np.testing.assert_allclose(f.dense(), by_hand(f), rtol=1e-5)
    f = factors((3, 3, 5, 6), (2,), (3,), core=(0, 1))
    np.testing.assert_allclose(f.dense(), by_hand(f), rtol=1e-4)
    assert f.ranks == (2, 2) and f.entries == 5 * 2 + 9 * 4 + 2 * 6 and f.ndim == 4
    assert tree.paths({"w": f}) == ["w/left", "w/core", "w/right"]
    assert tree.count({"w": f}) == f.entries


# --- Contractions in any arrangement --------------------------------------------------------------

DOTS = {
    "plain": (lambda p, x: x @ p["w"], (8, 9), (0,), (1,), (4, 8)),
    "transposed": (lambda p, x: x @ p["w"].T, (9, 8), (0,), (1,), (4, 8)),
    "first operand": (lambda p, x: p["w"] @ x, (9, 8), (1,), (0,), (8, 4)),
    "merged after": (lambda p, x: x @ p["w"].reshape(8, 12), (8, 3, 4), (0,), (1, 2), (4, 8)),
    "split before": (
        lambda p, x: jnp.einsum("tab,abo->to", x, p["w"].reshape(2, 4, 9)),
        (8, 9),
        (0,),
        (1,),
        (4, 2, 4),
    ),
    "fused heads": (
        lambda p, x: jnp.einsum("td,dhf->htf", x, p["w"]),
        (8, 3, 4),
        (0,),
        (1, 2),
        (5, 8),
    ),
    "out of heads": (
        lambda p, x: jnp.einsum("thf,hfd->td", x, p["w"]),
        (3, 4, 8),
        (0, 1),
        (2,),
        (5, 3, 4),
    ),
    "experts": (
        lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"]),
        (3, 8, 9),
        (0, 1),
        (0, 2),
        (3, 4, 8),
    ),
    "experts for all tokens": (
        lambda p, x: jnp.einsum("td,edf->tef", x, p["w"]),
        (3, 8, 9),
        (0, 1),
        (0, 2),
        (4, 8),
    ),
    "a split in three": (
        lambda p, x: jnp.concatenate(jnp.split(x @ p["w"], 3, -1)[::-1], -1),
        (8, 9),
        (0,),
        (1,),
        (4, 8),
    ),
    "slices of the kernel": (
        lambda p, x: x @ p["w"][:, :5] + x[:, :5] @ p["w"][:5, 4:],
        (8, 9),
        (0,),
        (1,),
        (12, 8),
    ),
    "one expert": (lambda p, x: x @ p["w"][1], (3, 8, 9), (0, 1), (0, 2), (4, 8)),
    "one input": (lambda p, x: x @ p["w"], (1, 9), (0,), (1,), (4, 1)),
    "remat": (jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"])), (8, 9), (0,), (1,), (4, 8)),
}


@pytest.mark.parametrize("name", [name for name in DOTS if name != "one input"])
def test_contractions(name):
    fn, shape, left, right, x = DOTS[name]
    check(fn, factors(shape, left, right), draw(*x, seed=1))


def test_an_axis_of_one_entry():
    fn, shape, left, right, x = DOTS["one input"]
    check(fn, factors(shape, left, right), draw(*x, seed=1), by_factors=False)


def test_a_core_is_contracted_between():
    f = factors((8, 9), (0,), (1,), core=())
    for fn, x in ((lambda p, x: x @ p["w"], (4, 8)), (lambda p, x: x @ p["w"].T, (4, 9))):
        check(fn, f, draw(*x, seed=1))


def test_a_scan_takes_stacked_factors_apart():
    def fn(params, x):
        step = lambda h, w: (jnp.tanh(h @ w / 4), h.sum())
        return jnp.hstack(lax.scan(step, x, params["w"])[1]) + 0 * x.sum()

    check(fn, factors((3, 8, 8), (0, 1), (0, 2)), draw(4, 8, seed=1))


def conv(x, w, *, strides=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


CONVS = {
    "plain": {},
    "strided": {"strides": (2, 1)},
    "valid": {"padding": "VALID"},
    "dilated": {"rhs_dilation": (1, 2)},
    "transposed": {"lhs_dilation": (2, 2), "padding": ((1, 1), (2, 0))},
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("svd", name) for name in CONVS),
        ("tucker", "strided"),
        ("tucker", "transposed"),
        ("separable", "strided"),
        ("separable", "dilated"),
    ],
)
def test_convolutions(kind, name):
    shape, x = (3, 3, 6, 7), draw(2, 5, 6, 6, seed=1)
    f = {
        "svd": factors(shape, (0, 1, 2), (3,)),
        "tucker": factors(shape, (2,), (3,), core=(0, 1)),
        "separable": factors(shape, (0, 2), (1, 3)),
    }[kind]
    check(lambda p, x: conv(x, p["w"], **CONVS[name]), f, x)


def test_a_strided_convolution_of_one_position():
    f = factors((1, 1, 8, 9), (2,), (3,))
    check(lambda p, x: conv(x, p["w"], strides=(2, 2)), f, draw(2, 5, 6, 8, seed=1))


def test_a_kernel_turned_round():
    """Factors whose left part holds the outputs, as of a kernel that was transposed."""
    f = factors((3, 3, 7, 6), (2,), (0, 1, 3))
    check(lambda p, x: conv(x, p["w"].transpose(0, 1, 3, 2)), f, draw(2, 5, 6, 6, seed=1))


def test_ragged_experts():
    sizes = jnp.array([3, 0, 5])
    f = factors((3, 8, 9), (0, 1), (0, 2))
    check(lambda p, x: lax.ragged_dot(x, p["w"], sizes), f, draw(8, 8, seed=1))


# --- Where the array is needed --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda p, x: x @ p["w"][jnp.argsort(x[0])], "gather takes arrays"),
        (lambda p, x: x @ jnp.abs(p["w"]), "abs takes arrays"),
        (lambda p, x: x @ (p["w"] @ p["w"].T), None),
        (lambda p, x: x.ravel() @ p["w"].reshape(64, 1), None),
    ],
)
def test_multiplied_out_elsewhere(fn, why):
    params, x = {"w": factors((8, 8), (0,), (1,))}, draw(8, 8, seed=1)
    close(jax.jit(execute(fn))(params, x), fn(densify(params), x))
    reasons = [place.why for place in places(fn, params, x) if not place.by_factors]
    assert reasons and (why is None or why in reasons)


def test_no_factors_above_break_even():
    """Many tokens by factors of full rank: the product of the factors is the cheaper way."""
    f = factors((8, 8), (0,), (1,), rank=8)
    fn = lambda p, x: x @ p["w"]
    assert [p.why for p in places(fn, {"w": f}, draw(64, 8))] == [LESS]
    assert [p.by_factors for p in places(fn, {"w": f}, draw(1, 8))] == [True]
    dense = graph.trace(fn, {"w": f.dense()}, draw(64, 8)).flops
    run = graph.trace(execute(fn), {"w": f}, draw(64, 8)).flops
    assert run <= dense + 2 * 8 * 8 * 8


@pytest.mark.parametrize(("tokens", "by_factors"), [(19, True), (20, False)])
def test_the_break_even_counts_the_product_of_the_factors(tokens, by_factors):
    """By factors `T 5 (8 + 8)` multiply-adds; multiplied out `T 8 8`, and 8 8 5 before."""
    f = factors((8, 8), (0,), (1,), rank=5)
    found = places(lambda p, x: x @ p["w"], {"w": f}, draw(tokens, 8))
    assert [place.by_factors for place in found] == [by_factors]


def test_the_cheaper_order_is_run():
    """`x y^T` with a wide y: contracting from the thin side costs 2 * 2 * (8 + 100) a row."""
    f = factors((8, 100), (0,), (1,))
    for fn, x in ((lambda p, x: x @ p["w"], draw(4, 8)), (lambda p, x: x @ p["w"].T, draw(4, 100))):
        assert graph.trace(execute(fn), {"w": f}, x).flops == 4 * 2 * 2 * (8 + 100)


# --- Whole models ---------------------------------------------------------------------------------


def split(fn, params, inputs):
    """Factorise every leaf that is contracted alone, at half of the smaller side, by NumPy."""
    found = graph.trace(fn, params, *inputs)

    def one(path, leaf):
        sites = found.sites_of(path)
        if not sites or sites[0].axes.lookup or sites[0].feature_groups > 1:
            return leaf
        form = form_at(leaf.shape, sites)
        w = np.asarray(form.to_matrices(leaf), np.float64)
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        rank = max(1, s.shape[-1] // 2)
        left, right = (u * s[..., None, :])[..., :rank], np.swapaxes(vt, -1, -2)[..., :rank]

        def place(part, axes):
            held = [*form.lead, *axes]
            part = part.reshape(*(leaf.shape[k] for k in held), rank)
            part = part.transpose(*np.argsort(held), len(held))
            lengths = [n if k in held else 1 for k, n in enumerate(leaf.shape)]
            return jnp.asarray(part.reshape(*lengths, rank), leaf.dtype)

        return Factors(left=place(left, form.inner), right=place(right, form.outer))

    return tree.map_with_path(one, params)


WHOLE = "llama_scanned gpt2 resnet_eval mobilenet char_lstm moe_ragged"


@pytest.mark.parametrize("name", WHOLE.split())
def test_whole_models(name):
    fn, params, inputs = ZOO[name].build()
    factored = split(fn, params, inputs)
    both = jax.jit(lambda p, *x: (execute(fn)(p, *x), fn(densify(p), *x)))
    close(*both(factored, *inputs), tolerance=1e-4)
    done = places(fn, factored, *inputs)
    assert {p.why for p in done if not p.by_factors} <= {LESS}
    assert any(p.by_factors for p in done)


def test_a_border_that_takes_arrays():
    fn, params, inputs = ZOO["custom_vjp"].build()
    factored = split(fn, params, inputs)
    close(jax.jit(execute(fn))(factored, *inputs), jax.jit(fn)(densify(factored), *inputs))
    assert any("custom_vjp" in p.why for p in places(fn, factored, *inputs))


# --- Transformations and the rest of the package --------------------------------------------------


def test_vmap_over_factors():
    f = factors((3, 8, 9), (0, 1), (0, 2))
    fn, x = lambda p, x: x @ p["w"], draw(3, 4, 8, seed=1)
    got = jax.vmap(execute(fn))({"w": f}, x)
    close(got, jnp.einsum("etd,edf->etf", x, f.dense()))


def test_bfloat16():
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    fn = lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
    f, x = factors((8, 9), (0,), (1,)), draw(4, 8, seed=1)
    got = execute(fn)({"w": f}, x)
    assert got.dtype == jnp.bfloat16
    close(got, half(x) @ half(f).dense(), tolerance=0.03)
    mixed = lambda p, x: lax.dot(half(x), p["w"], preferred_element_type=jnp.float32)
    assert execute(mixed)({"w": half(f)}, x).dtype == jnp.float32


def test_other_leaves_may_be_quantized():
    """Codes at one leaf, factors at another, and factors that are themselves codes."""
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
    params = {"w": factors((8, 9), (0,), (1,)), "v": draw(9, 4)}
    x = draw(16, 8, seed=1)
    result = quantize.ptq(execute(fn), params, [x], quantize.presets.int8_weights)
    assert {leaf.path for leaf in result.report.leaves} == {"w/left", "w/right", "v"}
    got = quantize.execute(execute(fn))(result.params, x)
    close(got, fn(densify(params), x), tolerance=0.05)
    close(got, fn(densify(quantize.unpack(result.params)), x))


def test_execute_with_codes_beside():
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
    policy = quantize.presets.int8_weights
    params = {"w": factors((8, 9), (0,), (1,)), **quantize.pack({"v": draw(9, 4)}, policy)}
    x = draw(16, 8, seed=1)
    got = execute(quantize.execute(fn))(params, x)
    close(got, fn(densify(quantize.unpack(params)), x))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded(kind):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    f, x = factors((8, 12), (0,), (1,)), draw(4, 8, seed=1)
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    placed = Factors(left=put(f.left), right=put(f.right, None, "model"))
    got = jax.jit(execute(fn))({"w": placed}, put(x, "data"))
    assert got.sharding.spec == PartitionSpec("data", "model")
    close(got, fn({"w": f.dense()}, x))


def test_misuse():
    fn = lambda p, x: x @ p["w"]
    with pytest.raises(SelectionError, match="params without any Factors"):
        execute(fn)({"w": draw(8, 9)}, draw(4, 8))
    with pytest.raises(StructureError, match=r"'w' \(7, 9\)"):
        execute(fn)({"w": factors((7, 9), (0,), (1,))}, draw(4, 8))
