"""Functions that are easy to get wrong: false state, permuted layers, cuts, dead code, low bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress import structured


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(s) / 3, jnp.float32) for s in shapes]


def halves(groups):
    return structured.keep(groups, {g.name: np.arange(g.size // 2) for g in groups.values()})


def holds(fn, params, x):
    groups = structured.groups(fn, params, x)
    assert len(groups)
    return structured.shrink(fn, params, halves(groups), x)[2].holds


def test_an_output_with_the_path_and_shape_of_a_leaf_is_no_state():
    params, (x,) = drawn((8, 8), (8, 8)), drawn((8, 8))
    fn = lambda p, x: (jnp.tanh(x @ p[0]) @ p[1],)
    groups = structured.groups(fn, params, x)
    assert {g.frozen for g in groups.frozen.values()} >= {"it is axis 1 of output 0"}
    small, fewer, certificate = structured.shrink(fn, params, halves(groups), x)
    assert certificate.holds and small(fewer, x)[0].shape == (8, 8)
    assert small(fewer, x[:3])[0].shape == (3, 8)


@pytest.mark.parametrize("batch", [5, 8])
def test_an_output_as_large_as_a_leaf_is_no_state_of_dropped_layers(batch):
    *params, x = drawn((8, 8), (8, 8), (8, 8), (8, 8), (batch, 8))

    def fn(p, x):
        a = jnp.tanh(x @ p[0])
        h = x + a @ p[1]
        h = h + jnp.tanh(h @ p[2]) @ p[3]
        return a, h.sum(-1)

    small, fewer, certificate = structured.drop_layers(fn, params, "0+1", x)
    a, b = small(fewer, x)
    expected = jnp.tanh(x @ params[0]), (x + jnp.tanh(x @ params[2]) @ params[3]).sum(-1)
    np.testing.assert_allclose(a, expected[0], rtol=1e-6)
    np.testing.assert_allclose(b, expected[1], rtol=1e-5, atol=1e-6)
    assert certificate.holds


def test_state_of_dropped_layers_goes_with_them():
    """New state is told from an activation by its indices: the leaf's own."""
    up, down, mean, x = drawn((8, 6), (6, 8), (6,), (6, 8))
    params = {"a": {"up": up, "down": down, "mean": mean}, "b": {"up": up, "down": down}}

    def fn(p, x):
        h = x @ p["a"]["up"]
        state = 0.9 * p["a"]["mean"] + 0.1 * h.mean(0)
        x = x + jnp.tanh(h - state) @ p["a"]["down"]
        x = x + jnp.tanh(x @ p["b"]["up"]) @ p["b"]["down"]
        return x, {"a": {"mean": state}}

    small, fewer, certificate = structured.drop_layers(fn, params, "a", x)
    assert set(fewer) == {"b"} and certificate.holds
    assert not jax.tree.leaves(small(fewer, x)[1])


def layered(params, x):
    block = lambda c, leaves: (c + jnp.tanh(c @ leaves["up"]) @ leaves["down"], None)
    order = np.array([0, 2, 1])
    return lax.scan(block, x, {"up": params["up"], "down": params["down"][order]})[0]


def test_layers_in_another_order_keep_the_same_units():
    up, down, x = drawn((3, 8, 10), (3, 10, 8), (5, 8))
    params = {"up": up, "down": down}
    groups = structured.groups(layered, params, x)
    assert [g.layers for g in groups.values()] == [()]
    assert holds(layered, params, x)


def test_low_precision_hides_no_wrong_surgery():
    up, down, x = (a.astype(jnp.bfloat16) for a in drawn((3, 8, 10), (3, 10, 8), (5, 8)))
    params = {"up": up, "down": down}
    groups = structured.groups(layered, params, x)
    _, _, certificate = structured.shrink(layered, params, halves(groups), x)
    assert certificate.holds and certificate.tolerance < 1e-4
    # A function that rounds by itself is held to what that allows, and no more.
    rounding = lambda p, x: (x @ p["a"]).astype(jnp.bfloat16).astype(jnp.float32) @ p["b"]
    a, b, x = drawn((3, 8), (8, 2), (4, 3))
    groups = structured.groups(rounding, {"a": a, "b": b}, x)
    _, _, certificate = structured.shrink(rounding, {"a": a, "b": b}, halves(groups), x)
    assert certificate.holds and certificate.tolerance == 0.05


def test_nothing_finite_proves_nothing():
    a, b, x = drawn((3, 8), (8, 2), (4, 3))
    fn = lambda p, x: jnp.log(x @ p["a"] - 1e9) @ p["b"]
    assert not holds(fn, {"a": a, "b": b}, x)


def test_layers_share_units_that_a_slice_tells_apart():
    def fn(params, x):
        def block(c, leaves):
            h = c @ leaves["up"]
            h = jnp.concatenate([jax.nn.relu(h[:, :4]), jnp.tanh(h[:, 4:])], axis=-1)
            return c + h @ leaves["down"], None

        return lax.scan(block, x @ params["in"], params["layers"])[0] @ params["out"]

    start, up, down, end, x = drawn((3, 6), (2, 6, 8), (2, 8, 6), (6, 2), (4, 3))
    params = {"in": start, "layers": {"up": up, "down": down}, "out": end}
    groups = structured.groups(fn, params, x)
    assert groups["layers/up"].layers == ()
    keep = structured.choose(
        groups, structured.importance(groups, params), budget=structured.Params(0.6)
    )
    assert structured.shrink(fn, params, keep, x)[2].holds


def test_a_tie_of_an_index_with_a_product_of_itself_is_frozen():
    def fn(p, x):
        h, g = x @ p["w"], x @ p["g"]
        return (h + (h[:, :2, None] * g[:, None]).reshape(-1, 4)) @ p["o"]

    w, g, o, x = drawn((3, 4), (3, 2), (4, 3), (4, 3))
    groups = structured.groups(fn, {"w": w, "g": g, "o": o}, x)
    assert not groups and "do not nest" in " ".join(str(f.frozen) for f in groups.frozen.values())


def test_what_all_goes_together_is_listed():
    u, d, x = drawn((3, 16), (16, 2), (4, 3))
    fn = lambda p, x: (lambda h: h + h[:, np.r_[1:16, 0]])(x @ p["u"]) @ p["d"]
    groups = structured.groups(fn, {"u": u, "d": d}, x)
    assert "all its indices go together" in {g.frozen for g in groups.frozen.values()}


def test_dead_code_ties_nothing():
    u, d, x = drawn((3, 16), (16, 2), (4, 3))
    fn = lambda p, x: (lambda h: (h[:, 0], jnp.tanh(h) @ p["d"])[1])(x @ p["u"])
    groups = structured.groups(fn, {"u": u, "d": d}, x)
    assert groups["u"].size == 16
    keep = structured.keep(groups, {"u": np.arange(5, 9)})
    assert structured.shrink(fn, {"u": u, "d": d}, keep, x)[2].holds


def test_a_bias_makes_no_residual_stream():
    u, b, d, x = drawn((3, 16), (16,), (16, 2), (4, 3))
    fn = lambda p, x: jnp.tanh(x @ p["u"] + jnp.broadcast_to(p["b"], (4, 16))) @ p["d"]
    groups = structured.groups(fn, {"u": u, "b": b, "d": d}, x)
    assert groups["u"].role == "hidden"


def test_printing_and_transforms_of_other_axes(capfd):
    def fn(p, x):
        h = x @ p["u"]
        jax.debug.print("{}", h[0, 0] * 0)
        return jnp.fft.fft(h, axis=0).real @ p["d"]

    # fft along the batch only: units are apart from each other
    u, d, x = drawn((3, 16), (16, 2), (4, 3))
    groups = structured.groups(fn, {"u": u, "d": d}, x)
    assert groups["u"].size == 15  # one is printed
    keep = structured.keep(groups, {"u": np.arange(3, 9)})
    assert structured.shrink(fn, {"u": u, "d": d}, keep, x)[2].holds


def decode(weights, cache, token, index):
    """One step of attention: 4 heads of 2 features, over a cache (batch, 5, heads, 2)."""
    q, k, v = (jnp.einsum("bd,dhf->bhf", token, weights[name]) for name in "qkv")
    place = (0, index, 0, 0)
    cache = {
        name: lax.dynamic_update_slice(cache[name], new[:, None], place)
        for name, new in (("k", k), ("v", v))
    }
    scores = jnp.einsum("bhf,bthf->bht", q, cache["k"])
    past = jnp.arange(5) <= index
    weight = jax.nn.softmax(jnp.where(past, scores, -1e9), axis=-1)
    attended = jnp.einsum("bht,bthf->bhf", weight, cache["v"])
    return jnp.einsum("bhf,hfd->bd", attended, weights["o"]), {"cache": cache}


def test_a_cache_shrinks_with_the_heads_if_it_is_state():
    q, k, v, o, token = drawn((3, 4, 2), (3, 4, 2), (3, 4, 2), (4, 2, 3), (2, 3))
    weights, index = {"q": q, "k": k, "v": v, "o": o}, jnp.int32(1)
    cache = dict(zip("kv", drawn((2, 5, 4, 2), (2, 5, 4, 2)), strict=True))
    # As an input, it comes at the size that callers know.
    found = structured.groups(decode, weights, cache, token, index)
    assert "it is tied to axis 2 of input 0/k" in {g.frozen for g in found.frozen.values()}
    assert not any(g.role == "heads" for g in found.values())

    step = lambda params, token, index: decode(params["w"], params["cache"], token, index)
    params = {"w": weights, "cache": cache}
    groups = structured.groups(step, params, token, index)
    (heads,) = (g for g in groups.values() if g.role == "heads")
    assert {m.path for m in heads.members} == {*(f"w/{n}" for n in "qkvo"), "cache/k", "cache/v"}
    kept = np.array([0, 3])
    small, fewer, certificate = structured.shrink(step, params, {heads.name: kept}, token, index)
    assert certificate.holds and fewer["cache"]["k"].shape == (2, 5, 2, 2)
    _, state = small(fewer, token, index)
    result, state = small({**fewer, **state}, token, index + 1)
    by_hand = {name: weights[name][:, kept] for name in "qkv"} | {"o": o[kept]}
    cut = {name: x[:, :, kept] for name, x in cache.items()}
    cut = decode(by_hand, cut, token, index)[1]["cache"]
    expected = decode(by_hand, cut, token, index + 1)
    np.testing.assert_allclose(result, expected[0], rtol=1e-5)
    np.testing.assert_allclose(state["cache"]["v"], expected[1]["cache"]["v"], rtol=1e-5)


def attend(p, x):
    """4 query heads of 5 features over 2 key heads; what is asked are the latents, if any."""
    asked = jnp.broadcast_to(p["latents"], (2, 3, 3)) if "latents" in p else x
    q, k, v = (
        jnp.einsum("btd,dhf->bthf", of, p[n]) for n, of in (("q", asked), ("k", x), ("v", x))
    )
    return jnp.einsum("bthf,hfd->bd", jax.nn.dot_product_attention(q, k, v), p["o"])


def test_queries_that_share_a_key_head_are_heads():
    q, k, v, o, x = drawn((3, 4, 5), (3, 2, 5), (3, 2, 5), (4, 5, 3), (2, 3, 3))
    params = {"q": q, "k": k, "v": v, "o": o}
    groups = structured.groups(attend, params, x)
    queries = groups.frozen["q"]
    assert [m.indices.tolist() for m in queries.members] == [[[0, 2], [1, 3]]] * 2
    assert queries.frozen == "the number of query heads for each key head is kept"
    assert queries.role == "heads" and groups["k"].role == "heads"
    assert groups.frozen["v"].role == "head size"
    free = structured.groups(attend, params, x, whole_heads=False)
    assert free["q"].role == "heads" and holds(attend, params, x)


def test_weighing_experts_makes_no_heads_of_them():
    """`einsum` weighs the hidden units by a product that sums over nothing."""

    def fn(params, x):
        chosen = jax.nn.softmax(x @ params["router"])
        hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, params["up"]))
        return jnp.einsum("tef,efd,te->td", hidden, params["down"], chosen)

    shapes = (3, 2), (2, 3, 4), (2, 4, 3), (5, 3)
    router, up, down, x = drawn(*shapes)
    groups = structured.groups(fn, {"router": router, "up": up, "down": down}, x)
    assert (groups["up"].role, groups["up"].size) == ("hidden", 4)


def test_latents_are_no_features_of_heads():
    q, k, v, o, x = drawn((3, 4, 5), (3, 2, 5), (3, 2, 5), (4, 5, 3), (2, 4, 3))
    (latents,) = drawn((3, 3))
    params = {"q": q, "k": k, "v": v, "o": o, "latents": latents}
    groups = structured.groups(attend, params, x)
    found = [g for g in groups.values() if g.members[0].path == "latents"]
    assert [(g.members[0].axis, g.role) for g in found] == [(0, "hidden"), (1, "hidden")]
    assert holds(attend, params, x)


def test_a_derivative_of_its_own_stays_where_arrays_are_closed_over():
    table = np.array([2.0, 3.0], np.float32)
    activate = jax.custom_jvp(lambda h: jnp.tanh(h) * jnp.asarray(table).sum())
    activate.defjvp(lambda p, t: (activate(*p), 7 * t[0] * jnp.asarray(table)[1]))  # a false one
    fn = lambda p, x: activate(x @ p["up"]) @ p["down"]
    up, down, x = drawn((3, 8), (8, 2), (4, 3))
    keep = {"up": [1, 2, 6]}
    small, fewer, certificate = structured.shrink(fn, {"up": up, "down": down}, keep, x)
    found, expected = (jax.grad(lambda p, run=run: run(p, x).sum())(fewer) for run in (small, fn))
    assert certificate.holds
    np.testing.assert_allclose(found["up"], expected["up"], rtol=1e-6)


def dropped(key, h):
    return h * jax.random.bernoulli(key, 0.5, h.shape)


def until_small(key, h):
    large = lambda h: jnp.max(jnp.abs(h) * jnp.arange(1.0, 9.0)) > 0.1
    return lax.while_loop(large, lambda h: h / 2, h)


@pytest.mark.parametrize(
    ("inside", "layers"),
    [
        (dropped, (2,)),
        (jax.checkpoint(dropped), (2,)),
        (lambda key, h: lax.scan(lambda h, _: (dropped(key, h), None), h, length=2)[0], (2,)),
        (lambda key, h: lax.cond(jnp.sum(h) > 0, dropped, lambda key, h: h, key, h), (2,)),
        (lambda key, h: h * jnp.arange(8.0), (2,)),
        (jax.custom_jvp(dropped), ()),
        (until_small, ()),
    ],
    ids=["dropout", "remat", "scan", "cond", "iota", "custom_jvp", "while condition"],
)
def test_layers_keep_their_own_units_of_what_is_made(inside, layers):
    if isinstance(inside, jax.custom_jvp):
        inside.defjvp(
            lambda p, t: (inside(*p), jax.jvp(lambda h: dropped(p[0], h), p[1:], t[1:])[1])
        )

    def fn(p, x, key):
        def block(c, layer):
            weights, key, mask = layer
            return c + (inside(key, c @ weights["up"]) * mask) @ weights["down"], None

        mask = jax.random.uniform(key, (2, 8))
        layer = p["layers"], jax.random.split(key, 2), mask
        return lax.scan(block, x @ p["in"], layer)[0]

    start, up, down, x = drawn((3, 4), (2, 4, 8), (2, 8, 4), (5, 3))
    params, key = {"in": start, "layers": {"up": up, "down": down}}, jax.random.key(0)
    groups = structured.groups(fn, params, x, key)
    assert groups["layers/up"].layers == layers
    (of_layers,) = (g for g in groups.frozen.values() if (g.members[0].axis, g.size) == (0, 2))
    assert of_layers.frozen == "a scan runs over it: drop_layers removes layers"
    kept = [[0, 3, 7], [1, 2, 6]] if layers else [0, 3, 7]
    keep = structured.keep(groups, {"layers/up": kept})
    small, fewer, certificate = structured.shrink(fn, params, keep, x, key)
    assert certificate.holds
    if inside is until_small:
        return
    loss = lambda fn: jax.jit(jax.grad(lambda p: jnp.sum(fn(p, x, key) ** 2)))
    expected = loss(fn)(structured.mask_params(params, keep))
    for a, b in zip(
        jax.tree.leaves(loss(small)(fewer)),
        jax.tree.leaves(structured.slice_params(expected, keep)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_layers_share_units_of_what_is_joined_inside():
    """`linspace` joins its last number to the others: as many of each in every layer."""

    def fn(params, x):
        def layer(h, p):
            return h + (jnp.tanh(h @ p["up"]) * jnp.linspace(0.5, 1, 6)) @ p["down"], None

        return jax.lax.scan(layer, x, params)[0]

    up, down, x = drawn((3, 4, 6), (3, 6, 4), (2, 4))
    params = {"up": up, "down": down}
    (group,) = structured.groups(fn, params, x).values()
    assert group.layers == ()
    for units in ([0, 2, 3], [1, 5]):  # without the last, and with it
        assert structured.shrink(fn, params, {group.name: units}, x)[2].holds


def test_writes_at_a_constant_of_the_program():
    numbers = lax.ScatterDimensionNumbers((0, 1), (), (1,))

    @jax.custom_vjp
    def write(h):
        return lax.scatter(h, jnp.array([2]), jnp.ones((h.shape[0], 3)), numbers)

    write.defvjp(lambda h: (write(h), None), lambda _, g: (g,))
    fn = lambda p, x: jnp.tanh(write(x @ p["up"])) @ p["down"]
    up, down, x = drawn((3, 8), (8, 2), (4, 3))
    params = {"up": up, "down": down}
    keep = structured.keep(structured.groups(fn, params, x), {"up": [0, 1, 3, 5, 7]})
    small, fewer, certificate = structured.shrink(fn, params, keep, x)
    assert certificate.holds
    loss = lambda fn: lambda p: jnp.sum(fn(p, x) ** 2)
    want = structured.slice_params(jax.grad(loss(fn))(structured.mask_params(params, keep)), keep)
    for got, expected in zip(
        *map(jax.tree.leaves, (jax.grad(loss(small))(fewer), want)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_layers_share_units_that_a_condition_reads():
    def fn(params, x, key):
        def layer(h, p):
            noise = jax.random.normal(key, (h.shape[0], 6))
            grown = lax.while_loop(
                lambda c: jnp.sum(c**2) < 1, lambda c: 2 * c + noise, jnp.tanh(h @ p["up"])
            )
            return h + grown @ p["down"], None

        return jax.lax.scan(layer, x, params)[0]

    up, down, x = drawn((3, 4, 6), (3, 6, 4), (2, 4))
    params, key = {"up": up, "down": down}, jax.random.key(0)
    (group,) = structured.groups(fn, params, x, key).values()
    assert group.layers == ()
    assert structured.shrink(fn, params, {group.name: [0, 2, 3]}, x, key)[2].holds
