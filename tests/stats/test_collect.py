"""`collect` against NumPy forward passes written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stats_mlp import BATCHES, MLP, mlp, normal

from jaxcompress import stats, tree
from jaxcompress.errors import ArgumentError, SelectionError


def mlp_hidden(x):
    return np.tanh(x @ MLP["up"]["kernel"] + MLP["up"]["bias"])


def close(got, want, rtol=1e-5):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-5)


def test_every_site_of_an_mlp():
    collected = stats.collect(
        mlp,
        MLP,
        iter(BATCHES),
        {"moment": stats.second_moment(), "out": stats.min_max(reads="output")},
    )
    x = np.concatenate(BATCHES).astype(np.float64)
    hidden = mlp_hidden(x)
    assert set(collected) == {"up/kernel", "down/kernel"} and collected.batches == 3
    close(collected["up/kernel"]["moment"].total, x.T @ x)
    close(collected["down/kernel"]["moment"].total, hidden.T @ hidden)
    assert collected["down/kernel"]["moment"].tokens == 12
    close(collected["down/kernel"]["out"].high, (hidden @ MLP["down"]["kernel"]).max(0))
    assert not collected.skipped and not collected.non_finite


def test_where_chooses_and_one_statistic_comes_bare():
    collected = stats.collect(mlp, MLP, [(x,) for x in BATCHES], stats.absmax(), where="down/*")
    assert list(collected) == ["down/kernel"]
    close(collected["down/kernel"], np.abs(mlp_hidden(np.concatenate(BATCHES))).max(0))
    with pytest.raises(KeyError, match="up/kernel; there are: 'down/kernel'"):
        collected["up/kernel"]


def test_one_compile_per_shape():
    traces = []

    def fn(params, x):
        traces.append(x.shape)
        return mlp(params, x)

    def collected_from(batches):
        traces.clear()
        stats.collect(fn, MLP, batches, stats.absmax())
        return len(traces)

    # Traces beyond those of one batch would be compilations.
    once = collected_from(BATCHES[:1])
    assert collected_from([BATCHES[0]] * 7) == once
    device = jax.devices()[3]
    assert collected_from([jax.device_put(BATCHES[0], device)] * 3) == once
    assert collected_from(BATCHES) == once + 1  # the smaller last one


def test_few_batches_are_in_flight():
    read, finished = [], []

    def batches():
        for number in range(6):
            read.append(number)
            yield BATCHES[0]

    def note(x):
        jax.debug.callback(lambda: finished.append(len(read)))
        return x

    stats.collect(lambda p, x: mlp(p, note(x)), MLP, batches(), stats.absmax())
    assert len(finished) == 6
    assert all(ahead <= number + 4 for number, ahead in enumerate(finished))


def test_memory_does_not_grow_with_the_number_of_batches():
    held = []

    def batches():
        for _ in range(8):
            held.append(sum(x.nbytes for x in jax.live_arrays()))
            yield jnp.ones((64, 4))

    stats.collect(mlp, MLP, batches(), stats.second_moment())
    assert max(held[4:]) <= max(held[2:4])


def test_random_keys_are_inputs_like_others():
    def noisy(params, x, key):
        return mlp(params, x + jax.random.normal(key, x.shape))

    keys = jax.random.split(jax.random.key(0))
    batches = [(BATCHES[0], keys[0]), (BATCHES[1], keys[1])]
    noise = [x + np.asarray(jax.random.normal(key, x.shape)) for x, key in batches]
    collected = stats.collect(noisy, MLP, batches, stats.absmax())
    close(collected["up/kernel"], np.abs(np.concatenate(noise)).max(0))


def patches(x, size=2):
    """Cut windows of a (n, h, w, c) image without padding: (n, positions, kh * kw * c)."""
    n, h, w, _ = x.shape
    rows = [
        x[:, i : i + size, j : j + size].reshape(n, -1)
        for i in range(h - size + 1)
        for j in range(w - size + 1)
    ]
    return np.stack(rows, 1)


def test_convolutions_are_read_as_patches_and_as_channels():
    kernel = normal(2, 2, 3, 5)
    batches = [normal(2, 4, 3, 3), normal(1, 4, 3, 3)]

    def conv(params, x):
        return jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    collected = stats.collect(
        conv,
        {"conv": kernel},
        batches,
        {
            "patches": stats.second_moment(),
            "channels": stats.channel_norm(reads="channels"),
            "fisher": stats.fisher(),
            "gates": stats.gradient_activation(at="input"),
        },
    )["conv"]
    x = np.concatenate(batches).astype(np.float64)
    rows = patches(x).reshape(-1, 12)
    close(collected["patches"].total, rows.T @ rows)
    assert collected["patches"].tokens == 3 * 6
    close(collected["channels"].l2, np.sqrt((x**2).sum((0, 1, 2))))
    # The outputs are summed, so that every output has gradient 1.
    close(collected["fisher"].total, np.repeat((rows**2).sum(0)[:, None], 5, 1))
    # Σ a g over an input channel is what its kernel slice adds to the summed outputs.
    per_channel = [
        (rows.reshape(-1, 4, 3)[..., c] @ kernel.reshape(4, 3, 5)[:, c]).sum() for c in range(3)
    ]
    close(collected["gates"].signed, per_channel, rtol=1e-4)


def test_scan_iterations_are_kept_apart():
    params = {"layers": normal(3, 4, 4)}

    def fn(params, x):
        body = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
        return jax.lax.scan(body, x, params["layers"])[0]

    collected = stats.collect(
        fn, params, BATCHES, {"moment": stats.second_moment(), "histogram": stats.histogram(bins=8)}
    )["layers"]
    h, moments = np.concatenate(BATCHES).astype(np.float64), []
    counts = []
    for layer, w in enumerate(params["layers"]):
        moments.append(h.T @ h)
        width = float(collected["histogram"].width[layer])
        counts.append(np.histogram(h, np.arange(-4, 5) * width)[0])
        h = np.tanh(h @ w)
    close(collected["moment"].total, moments)
    np.testing.assert_array_equal(collected["histogram"].counts, counts)
    assert collected["moment"].mean.shape == (3, 4, 4)


def test_experts_are_kept_apart():
    params = {"experts": normal(2, 4, 3)}
    fn = lambda p, x: jnp.einsum("etd,edf->etf", x, p["experts"])
    batches = [normal(2, 5, 4), normal(2, 3, 4)]
    collected = stats.collect(
        fn, params, batches, {"moment": stats.second_moment(), "fisher": stats.fisher()}
    )["experts"]
    x = np.concatenate(batches, 1).astype(np.float64)
    close(collected["moment"].total, np.einsum("etd,etf->edf", x, x))
    np.testing.assert_array_equal(collected["moment"].tokens, [8, 8])
    close(collected["fisher"].total, np.repeat((x**2).sum(1)[..., None], 3, -1))


def test_ragged_experts_are_kept_apart_and_have_no_gradients():
    params = {"experts": normal(2, 4, 3)}
    fn = lambda p, x, sizes: jax.lax.ragged_dot(x, p["experts"], sizes)
    x, sizes = normal(5, 4), np.array([2, 3], np.int32)
    norm = stats.collect(fn, params, [(x, sizes)], stats.channel_norm())["experts"]
    close(norm.l2, np.stack([np.sqrt((part**2).sum(0)) for part in np.split(x, [2])]))
    with pytest.raises(ArgumentError, match="ragged_dot"):
        stats.collect(fn, params, [(x, sizes)], stats.fisher())


def tied(params, tokens):
    x = jnp.tanh(params["embed"][tokens])
    return x @ params["embed"].T


def test_both_ends_of_a_tied_embedding():
    params = {"embed": normal(7, 4)}
    batches = [np.array([[1, 2, 1], [6, 1, 0]]), np.array([[5, 5, 1]])]
    collected = stats.collect(
        tied,
        params,
        batches,
        {
            "lookups": stats.lookups(),
            "moment": stats.second_moment(),
            "output": stats.absmax(reads="output"),
        },
    )
    tokens = np.concatenate(batches).reshape(-1)
    lookup, head = collected["embed"], collected["embed#1"]
    np.testing.assert_array_equal(lookup["lookups"].counts, np.bincount(tokens, minlength=7))
    rows = np.tanh(params["embed"][tokens].astype(np.float64))
    close(head["moment"].total, rows.T @ rows)
    close(lookup["output"], np.abs(params["embed"][tokens]).max(0))
    assert set(lookup) == {"lookups", "output"} and set(head) == {"moment", "output"}
    assert "stats.lookups" in collected.skipped["embed"]["moment"]
    assert "no lookup" in collected.skipped["embed#1"]["lookups"]
    only = stats.collect(tied, params, batches, stats.absmax())
    assert list(only) == ["embed#1"] and set(only.skipped) == {"embed"}
    with pytest.raises(KeyError, match="looks rows up"):
        only["embed"]
    with pytest.raises(SelectionError, match="no lookup"):
        stats.collect(mlp, MLP, BATCHES, stats.lookups())


def counting():
    """A statistic that notes each trace of its update."""
    calls = []

    def update(state, x):
        calls.append(x.shape)
        return state + x.sum()

    return calls, stats.Statistic(
        init=lambda features: jnp.float32(0), update=update, finalize=lambda state: state
    )


def test_one_activation_is_read_once():
    params = {name: normal(4, 4) for name in "qkvo"}

    def attention(p, x):
        q, k, v = (x @ p[name] for name in "qkv")
        return jax.nn.softmax(q @ k.T) @ v @ p["o"]

    calls, total = counting()
    collected = stats.collect(attention, params, BATCHES[:1], total)
    assert len(calls) == 3  # to see its shapes; q, k and v together; and o
    assert collected["q"] is collected["k"] and collected["k"] is collected["v"]
    close(collected["q"], BATCHES[0].sum())


def test_one_image_read_in_different_windows_is_read_twice():
    params = {"one": normal(1, 1, 3, 2), "three": normal(3, 3, 3, 2), "again": normal(3, 3, 3, 2)}

    def inception(p, x):
        conv = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return [conv(x, kernel) for kernel in p.values()]

    collected = stats.collect(inception, params, [normal(1, 4, 4, 3)], stats.second_moment())
    assert collected["one"].total.shape == (3, 3)
    assert collected["three"] is collected["again"]
    assert collected["three"].total.shape == (27, 27)


def branch(params, x):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ params["yes"], lambda: jnp.tanh(x) @ params["no"])


def test_a_branch_counts_where_it_is_taken():
    params = {"yes": normal(4, 3), "no": normal(4, 3)}
    taken, other = np.abs(BATCHES[0]), -np.abs(BATCHES[1])
    collected = stats.collect(
        branch,
        params,
        [taken, other, taken],
        {"norm": stats.channel_norm(), "fisher": stats.fisher(), "low": stats.min_max()},
    )
    assert collected["yes"]["norm"].tokens == 10 and collected["no"]["norm"].tokens == 5
    close(collected["yes"]["norm"].l1, 2 * taken.sum(0))
    close(collected["no"]["low"].low, np.tanh(other).min(0))
    assert collected["no"]["fisher"].tokens == 5  # rows of zeros in the other batches do not count
    close(collected["no"]["fisher"].total, np.repeat((np.tanh(other) ** 2).sum(0)[:, None], 3, 1))


def loop(params, x):
    def more(carry):
        return carry[1] < 3

    def body(carry):
        return jnp.tanh(carry[0] @ params["w"]), carry[1] + 1

    return jax.lax.while_loop(more, body, (x, 0))[0]


def test_a_while_loop_adds_up_its_iterations():
    params = {"w": normal(4, 4)}
    norm = stats.collect(loop, params, BATCHES[:1], stats.channel_norm())["w"]
    h, want = BATCHES[0], 0
    for _ in range(3):
        want, h = want + np.abs(h).sum(0), np.tanh(h @ params["w"])
    close(norm.l1, want)
    assert norm.tokens == 15
    with pytest.raises(ArgumentError, match="`while` loop"):
        stats.collect(loop, params, BATCHES[:1], stats.fisher())


GRADIENTS = {
    "fisher": stats.fisher(),
    "kronecker": stats.kronecker(),
    "output": stats.gradient_activation(),
    "input": stats.gradient_activation(at="input"),
    "gates": stats.channel_fisher(),
    "forward": stats.second_moment(),
}


def loss(params, x):
    return jnp.square(mlp(params, x)).sum()


def expected_gradients(x):
    """Differentiate the squared outputs of the MLP by hand; per site (x, output, g, dx)."""
    x = x.astype(np.float64)
    hidden = mlp_hidden(x)
    up, down = x @ MLP["up"]["kernel"], hidden @ MLP["down"]["kernel"]
    g = 2 * (down + MLP["down"]["bias"])
    dh = g @ MLP["down"]["kernel"].T
    dup = dh * (1 - hidden**2)
    return {
        "up/kernel": (x, up, dup, dup @ MLP["up"]["kernel"].T),
        "down/kernel": (hidden, down, g, dh),
    }


def check_gradients(collected, batches):
    for name, (x, y, g, dx) in expected_gradients(np.concatenate(batches)).items():
        got = collected[name]
        close(got["fisher"].total, (x**2).T @ g**2, rtol=1e-4)
        close(got["kronecker"].gradients, g.T @ g, rtol=1e-4)
        close(got["kronecker"].inputs, x.T @ x, rtol=1e-4)
        close(got["output"].signed, (y * g).sum(0), rtol=1e-4)
        close(got["input"].absolute, np.abs(x * dx).sum(0), rtol=1e-4)
        close(got["gates"].total, ((y * g) ** 2).sum(0), rtol=1e-4)
        close(got["forward"].total, x.T @ x, rtol=1e-4)
        assert got["fisher"].tokens == len(x)


def test_gradients_of_an_mlp():
    check_gradients(stats.collect(loss, MLP, BATCHES, GRADIENTS), BATCHES)


def test_gradients_of_scanned_layers():
    params = {"layers": normal(2, 4, 4)}

    def fn(params, x):
        body = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
        return jax.lax.scan(body, x, params["layers"])[0]

    got = stats.collect(fn, params, BATCHES, stats.fisher(), where="layers")["layers"].total
    x = np.concatenate(BATCHES).astype(np.float64)
    w0, w1 = params["layers"]
    h = np.tanh(x @ w0)
    g1 = 1 - np.tanh(h @ w1) ** 2
    g0 = (g1 @ w1.T) * (1 - h**2)
    close(got, np.stack([(x**2).T @ g0**2, (h**2).T @ g1**2]), rtol=1e-4)


def test_gradients_reach_only_where_they_are_defined():
    @jax.custom_vjp
    def layer(x, w):
        return x @ w

    layer.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    params = {"own": normal(4, 4), "plain": normal(4, 3)}
    fn = lambda p, x: layer(x, p["own"]) @ p["plain"]
    with pytest.raises(ArgumentError, match="'own', which lies inside a custom_vjp"):
        stats.collect(fn, params, BATCHES, stats.fisher())
    both = stats.collect(fn, params, BATCHES, stats.channel_norm())
    some = stats.collect(fn, params, BATCHES, stats.fisher(), where=tree.without("**", "own"))
    assert set(both) == {"own", "plain"} and set(some) == {"plain"}
    with pytest.raises(ArgumentError, match="floating-point"):
        stats.collect(lambda p, x: (x @ p["own"]).argmax(), params, BATCHES, stats.fisher())


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_sharded_batches_give_the_same(axis_type):
    kind = getattr(jax.sharding.AxisType, axis_type)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    place = lambda x, *spec: jax.device_put(
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    params = {"layers": normal(2, 4, 4), "head": normal(4, 6)}
    batches = [normal(4, 3, 4), normal(4, 3, 4)]

    def fn(params, x):
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]
        return h @ params["head"]

    several = {
        "moment": stats.second_moment(),
        "histogram": stats.histogram(bins=16),
        "covariance": stats.mean_covariance(diagonal=True),
        "fisher": stats.fisher(),
    }
    sharded_params = {
        "layers": place(params["layers"]),
        "head": place(params["head"], None, "model"),
    }
    alone = stats.collect(fn, params, batches, several)
    sharded = stats.collect(fn, sharded_params, [place(x, "data") for x in batches], several)
    assert set(alone) == set(sharded) == {"layers", "head"}
    for name in alone:
        for a, b in zip(jax.tree.leaves(alone[name]), jax.tree.leaves(sharded[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
            assert b.is_fully_replicated and len(b.sharding.device_set) == 4


def test_a_statistic_whose_state_changes_its_form_is_refused():
    last = stats.Statistic(
        init=lambda features: jnp.zeros(()),
        update=lambda state, x: x.sum(0),
        finalize=lambda state: state,
    )
    with pytest.raises(ArgumentError, match=r"'mine', whose update at 'w' turns float32\[\]"):
        stats.collect(
            lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, [jnp.ones((4, 3))], {"mine": last}
        )


def test_complex_activations_are_refused_by_site():
    fn = lambda p, x: (x * 1j) @ p["w"]
    with pytest.raises(ArgumentError, match="'w', which has complex"):
        stats.collect(fn, {"w": jnp.ones((3, 2))}, [jnp.ones((4, 3))], stats.absmax())


def test_a_non_finite_entry_counts_once():
    fn = lambda p, x: x @ p["w"]
    batch = jnp.ones((4, 3)).at[1, 2].set(jnp.inf)
    both = {"absmax": stats.absmax(), "fisher": stats.fisher()}
    for statistics in (stats.absmax(), both):
        found = stats.collect(
            fn, {"w": jnp.ones((3, 2))}, [batch], statistics, allow_non_finite=True
        )
        assert dict(found.non_finite) == {"w": 1}
