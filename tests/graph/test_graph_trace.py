"""Sites, roles of axes, the account of every leaf: on functions that can be checked by eye."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress import graph, numerics, quantize, sparsity
from jaxcompress.errors import ArgumentError, ArgumentTypeError
from jaxcompress.graph import Axes, Use

KEY = jax.random.key(0)
X = jax.ShapeDtypeStruct((2, 4), "float32")


def array(*shape):
    return jax.random.normal(KEY, shape)


def sole(fn, params, *inputs):
    (site,) = graph.trace(fn, params, *inputs).sites
    return site


# --- roles -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fn", "shape", "axes"),
    [
        ("flax", lambda p, x: x @ p["w"], (4, 5), Axes(contract=(0,), output=(1,))),
        ("equinox", lambda p, x: x @ p["w"].T, (5, 4), Axes(contract=(1,), output=(0,))),
        (
            "heads",
            lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"]),
            (4, 3, 5),
            Axes(contract=(0,), output=(1, 2)),
        ),
        (
            "merged heads",
            lambda p, x: x @ p["w"].reshape(4, 15),
            (4, 3, 5),
            Axes(contract=(0,), output=(1, 2)),
        ),
        (
            "back from heads",
            lambda p, x: jnp.einsum("bhd,hdo->bo", x.reshape(2, 2, 2), p["w"]),
            (2, 2, 5),
            Axes(contract=(0, 1), output=(2,)),
        ),
        (
            "split output",
            lambda p, x: x @ p["w"].reshape(4, 2, 3)[:, 0],
            (4, 6),
            Axes(contract=(0,), output=(1,)),
        ),
        (
            "cast, permuted, sliced",
            lambda p, x: x @ jnp.swapaxes(p["w"].astype(jnp.bfloat16), 0, 1)[:, :2],
            (5, 4),
            Axes(contract=(1,), output=(0,)),
        ),
        (
            "experts",
            lambda p, x: jnp.einsum("ebi,eio->ebo", jnp.stack([x] * 3), p["w"]),
            (3, 4, 5),
            Axes(contract=(1,), output=(2,), batch=(0,)),
        ),
        (
            "vmap",
            lambda p, x: jax.vmap(lambda w: x @ w, in_axes=2)(p["w"]),
            (4, 5, 3),
            Axes(contract=(0,), output=(1, 2)),
        ),
        (
            "scanned",
            lambda p, x: lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0],
            (3, 4, 4),
            Axes(contract=(1,), output=(2,), stacked=(0,)),
        ),
        (
            "scan in scan",
            lambda p, x: lax.scan(
                lambda c, w: lax.scan(lambda c, v: (c @ v, None), c, w), x, p["w"]
            )[0],
            (2, 3, 4, 4),
            Axes(contract=(2,), output=(3,), stacked=(0, 1)),
        ),
        (
            "sliced by a loop",
            lambda p, x: lax.fori_loop(0, 3, lambda i, c: c @ p["w"][i], x),
            (3, 4, 4),
            Axes(contract=(1,), output=(2,), sliced=(0,)),
        ),
        (
            "lookup",
            lambda p, x: p["w"][x.astype(int)],
            (7, 5),
            Axes(lookup=(0,), output=(1,)),
        ),
        (
            "one-hot lookup",
            lambda p, x: jax.nn.one_hot(x.astype(int), 7) @ p["w"],
            (7, 5),
            Axes(contract=(0,), output=(1,)),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_roles_of_axes(name, fn, shape, axes):
    site = sole(fn, {"w": jax.ShapeDtypeStruct(shape, "float32")}, X)
    assert site.axes == axes


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_roles_in_convolutions(groups):
    def fn(params, x):
        return lax.conv_general_dilated(
            x,
            params["w"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    params = {"w": jnp.ones((3, 3, 4 // groups, 8))}
    site = sole(fn, params, jnp.ones((2, 5, 5, 4)))
    group = (3,) if groups > 1 else ()
    assert site.axes == Axes(contract=(2,), output=(3,), spatial=(0, 1), group=group)
    assert site.feature_groups == groups
    assert site.flops == 2 * (2 * 5 * 5 * 8) * (3 * 3 * 4 // groups)


def test_a_torch_layout_kernel_keeps_its_own_axes():
    def fn(params, x):
        return lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )

    site = sole(fn, {"w": jnp.ones((8, 4, 3, 3))}, jnp.ones((2, 4, 5, 5)))
    assert site.axes == Axes(contract=(1,), output=(0,), spatial=(2, 3))
    assert site.rows(jnp.ones((2, 4, 5, 5))).shape == (50, 36)


# --- counting --------------------------------------------------------------------------------


def test_flops_and_bytes():
    site = sole(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 5), jnp.bfloat16)}, X)
    assert site.flops == 2 * 2 * 4 * 5
    # jnp promotes: the activation (2, 4) and the result (2, 5) are float32, the leaf bfloat16
    assert site.bytes == 4 * 8 + 4 * 10 + 2 * 20


def test_a_scan_counts_its_length_and_a_while_one_iteration():
    w = {"w": jnp.ones((4, 4))}
    once = 2 * 2 * 4 * 4

    scanned = graph.trace(lambda p, x: lax.fori_loop(0, 7, lambda i, c: c @ p["w"], x), w, X)
    assert scanned.flops == scanned.sites[0].flops == 7 * once
    assert scanned.sites[0].bounded and scanned.sites[0].stack == (7,)

    def while_fn(p, x):
        return lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ p["w"], x)

    looped = graph.trace(while_fn, w, X)
    assert looped.flops == once and not looped.sites[0].bounded


def test_a_cond_counts_its_costliest_branch():
    def fn(p, i, x):
        return lax.switch(i, [lambda x: x, lambda x: x @ p["w"], lambda x: x @ p["w"] @ p["w"]], x)

    found = graph.trace(fn, {"w": jnp.ones((4, 4))}, 0, X)
    assert found.flops == 2 * (2 * 2 * 4 * 4)
    assert [site.scope for site in found.sites] == [("cond[1]",), ("cond[2]",), ("cond[2]",)]


def test_contractions_without_a_leaf_are_listed():
    found = graph.trace(lambda p, x: (x @ p["w"]) @ x.T, {"w": jnp.ones((4, 4))}, X)
    (scores,) = found.elsewhere
    assert scores.flops == 2 * 2 * 2 * 4
    assert found.flops == scores.flops + found.sites[0].flops


def test_the_bytes_of_a_quantized_leaf_are_the_stored_ones():
    dense = {"w": array(256, 8)}
    packed = quantize.pack(dense, quantize.presets.int4_g128)
    fn = lambda p, x: x @ quantize.unpack(p)["w"]
    x = jnp.ones((2, 256))
    site = sole(fn, packed, x)
    assert site.axes == Axes(contract=(0,), output=(1,))  # of the leaf, not of its blocks
    moved = 4 * (2 * 256 + 2 * 8)
    assert site.bytes == moved + packed["w"].nbytes < sole(fn, dense, x).bytes


# --- every leaf ------------------------------------------------------------------------------


def test_every_leaf_is_accounted_for():
    def fn(p, x):
        hidden = jnp.tanh(x @ p["kernel"] + p["bias"]) * p["scale"]
        return hidden @ p["kernel"].T, p["state"], p["cast"].astype(jnp.bfloat16)

    params = {
        "kernel": array(4, 5),
        "bias": array(5),
        "scale": array(5),
        "state": array(3),
        "cast": array(3),
        "spare": array(3),
    }
    found = graph.trace(fn, params, X)
    assert [site.name for site in found.sites] == ["kernel", "kernel#1"]
    assert found["kernel#1"].axes == Axes(contract=(1,), output=(0,))
    assert found.uses == {
        "bias": (Use(primitive="add"),),
        "cast": (Use(primitive="output"),),
        "scale": (Use(primitive="mul"),),
    }
    assert found.returned == ("state",) and found.unreached == ("spare",)
    with pytest.raises(KeyError):
        found["kernel#2"]


def test_a_leaf_that_modulates_a_weight_is_a_use_and_the_weight_a_site():
    def weight_norm(p, x):
        v = p["v"]
        return x @ (v / jnp.sqrt((v**2).sum(0, keepdims=True)) * p["g"])

    found = graph.trace(weight_norm, {"v": array(4, 5), "g": array(5)}, X)
    assert [site.path for site in found.sites] == ["v"]
    assert [use.primitive for use in found.uses["g"]] == ["mul"]


def test_a_leaf_that_scales_itself_is_only_followed():
    masked = lambda p, x: x @ jnp.where(jnp.abs(p["w"]) > 0.1, p["w"] / p["w"].max(axis=0), 0)
    found = graph.trace(masked, {"w": array(4, 5)}, X)
    assert [site.path for site in found.sites] == ["w"] and not found.uses


def test_a_mask_among_the_params_is_a_use():
    masked = lambda p, x: x @ jnp.where(p["mask"], p["w"], 0)
    found = graph.trace(masked, {"w": array(4, 5), "mask": jnp.ones((4, 5), bool)}, X)
    assert [site.path for site in found.sites] == ["w"]
    assert found.uses == {"mask": (Use(primitive="select_n", scope=("jit(_where)",)),)}


def test_leaves_put_together_are_sites_of_one_equation():
    def fused(p, x):
        return x @ jnp.concatenate([p["q"], p["k"].T], axis=1)

    first, second = graph.trace(fused, {"k": array(3, 4), "q": array(4, 5)}, X).sites
    assert (first.path, first.axes) == ("q", Axes(contract=(0,), output=(1,)))
    assert (second.path, second.axes) == ("k", Axes(contract=(1,), output=(0,)))
    assert (first.flops, second.flops) == (2 * 2 * 4 * 5, 2 * 2 * 4 * 3)  # each its own columns


def test_what_a_construct_hands_back_unchanged_is_still_the_leaf():
    stacked = {"w": jnp.ones((3, 4, 4))}
    body = jax.checkpoint(lambda c, w: (c @ w, w))
    found = graph.trace(lambda p, x: lax.scan(body, x, p["w"]), stacked, X)
    assert found.returned == ("w",) and not found.uses

    def carried(p, x):
        state = (0, x, p["w"])
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ c[2], c[2]), state)[1]

    found = graph.trace(carried, {"w": jnp.ones((4, 4))}, X)
    assert [site.path for site in found.sites] == ["w"] and not found.uses


def test_a_leaf_that_changes_as_it_is_carried_is_used_there():
    def fn(p, x):
        return lax.fori_loop(0, 3, lambda i, c: (c[0] @ c[1], c[1] * 0.5), (x, p["w"]))[0]

    found = graph.trace(fn, {"w": jnp.ones((4, 4))}, X)
    assert not found.sites and found.uses["w"][0].primitive == "scan"


def test_an_opaque_primitive_is_named():
    def fn(p, x):
        return x + jnp.linalg.cholesky(p["w"])[:2]

    found = graph.trace(fn, {"w": jnp.eye(4)}, X)
    assert "cholesky" in {use.primitive for use in found.uses["w"]} and not found.sites


# --- which sites share, and which feed which ---------------------------------------------------


def test_sites_that_read_one_activation_share_a_source():
    def attention(p, x):
        h = jnp.tanh(x)
        q, k = h.astype(jnp.bfloat16) @ p["q"], h.astype(jnp.bfloat16) @ p["k"]
        return jax.jit(lambda h: h @ p["v"])(h) * (q @ k.T).sum()

    params = {"q": array(4, 4), "k": array(4, 4), "v": array(4, 4)}
    found = graph.trace(attention, params, X)
    assert found["q"].source == found["k"].source != found["v"].source


def test_constants_share_no_source():
    def fn(p, x):
        return jnp.zeros((3, 4)) @ p["a"] + jnp.ones((3, 4)) @ p["b"]

    first, second = graph.trace(fn, {"a": array(4, 4), "b": array(4, 4)}, X).sites
    assert first.source != second.source


def test_upstream_names_the_nearest_sites():
    def fn(p, x):
        a = x @ p["a"]
        b = jnp.tanh(a) @ p["b"]
        return (a + b) @ p["c"]

    found = graph.trace(fn, {name: array(4, 4) for name in "abc"}, X)
    assert [site.upstream for site in found.sites] == [(), ("a",), ("b",)]


# --- contraction axes ---------------------------------------------------------------------------


def test_contraction_axes_let_patterns_follow_any_layout():
    params = {"weight": array(6, 8), "stacked": array(2, 6, 6), "bias": array(6)}

    def fn(p, x):
        h = p["weight"] @ x + p["bias"]
        return lax.scan(lambda h, w: (w @ h, None), h, p["stacked"])[0]

    axes = graph.contraction_axes(fn, params, jnp.ones(8))
    assert axes == {"stacked": (2,), "weight": (1,)}
    mask = sparsity.make_mask(params, pattern=sparsity.NM(2, 4), where="weight", axes=axes)
    kept = np.asarray(mask["weight"]).reshape(6, 2, 4).sum(axis=2)
    assert (kept == 2).all()


def test_contraction_axes_of_a_tied_leaf_come_from_its_contraction():
    def fn(p, tokens):
        return p["embedding"][tokens] @ p["embedding"].T

    params = {"embedding": array(7, 4)}
    assert graph.contraction_axes(fn, params, jnp.arange(3)) == {"embedding": (1,)}


# --- abstract and bad input ----------------------------------------------------------------------


def test_abstract_arguments_take_no_memory():
    w = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.int4)
    site = sole(
        lambda p, x: x @ p.astype(x.dtype), w, jax.ShapeDtypeStruct((1, 1 << 20), "bfloat16")
    )
    assert site.flops == 2 << 40 and site.path == ""


def test_an_abstract_qarray_is_one_leaf():
    policy = quantize.presets.int8_weights
    packed = jax.eval_shape(
        lambda p: quantize.pack(p, policy), {"w": jax.ShapeDtypeStruct((8, 4), "float32")}
    )
    assert isinstance(packed["w"], numerics.QArray)
    site = sole(lambda p, x: x @ quantize.unpack(p)["w"], packed, jnp.ones((2, 8)))
    assert site.path == "w" and site.axes.contract == (0,)


def test_keyword_arguments_are_traced():
    found = graph.trace(lambda p, x, *, scale: x @ p["w"] * scale, {"w": array(4, 5)}, X, scale=2.0)
    assert len(found.sites) == 1


@pytest.mark.parametrize(
    ("fn", "params", "inputs", "error", "said"),
    [
        (lambda p, x: x if x.sum() > 0 else p["w"], {"w": 1.0 * np.ones(3)}, (X,), TypeError, "fn"),
        (lambda p, x: x, {"w": "text"}, (X,), TypeError, "'w' is str 'text'"),
        (lambda p, x: x, {"w": 1.0}, (X,), TypeError, "'w' is float"),
        (lambda p, x: x, {"w": np.ones(3)}, (), TypeError, "missing a required argument"),
        (lambda p, x: x, {"w": np.ones(3)}, (X, X), TypeError, "too many positional"),
        (lambda p, x, s: x, {"w": np.ones(3)}, (X, "same"), TypeError, "str 'same' at 1"),
        (lambda p, x: x, {"a/b": np.ones(1), "a": {"b": np.ones(1)}}, (X,), ValueError, "'a/b'"),
    ],
    ids=["untraceable", "text", "number", "too few", "too many", "a string", "colliding paths"],
)
def test_bad_input_is_named(fn, params, inputs, error, said):
    assert issubclass(ArgumentTypeError, TypeError) and issubclass(ArgumentError, ValueError)
    with pytest.raises(error, match=said):
        graph.trace(fn, params, *inputs)


@pytest.mark.parametrize(("inputs", "named"), [((X,), {}), ((None, X), {}), ((), {"scale": 2.0})])
def test_a_traced_call_takes_no_arguments(inputs, named):
    call = lambda p, x, scale=1.0: x @ p["w"] * scale
    traced = graph.capture(call, {"w": array(4, 5)}, X)
    with pytest.raises(ArgumentError, match="a Traced, and arguments"):
        graph.trace(traced, *inputs, **named)


def test_an_output_that_ignores_params_leaves_them_unreached():
    found = graph.trace(lambda p, x: x + 1, {"w": array(4, 5)}, X)
    assert found.unreached == ("w",) and not found.sites and found.flops == 0
