"""Replay: bit-identical when nothing changes, through every construct, and changed where asked."""

import functools
import warnings

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress import graph
from jaxcompress.errors import ArgumentError, ArgumentTypeError, SelectionError

KEY = jax.random.key(0)
W = {"w": jax.random.normal(KEY, (4, 4)) / 2}
STACKED = {"w": jax.random.normal(KEY, (3, 4, 4)) / 2}
X = jax.random.normal(jax.random.key(1), (2, 4))


def identity(equation, *operands):
    return equation.bind(*operands)


def everywhere(equation):
    return not equation.primitive.multiple_results


@jax.custom_jvp
def odd_tanh(x, w):
    return jnp.tanh(x @ w)


@odd_tanh.defjvp
def _(primals, tangents):
    return odd_tanh(*primals), 3 * tangents[0] @ primals[1]  # on purpose not the true rule


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def odd_dense(x, w, factor):
    return jnp.tanh(x @ w) * factor


def _forward(x, w, factor):
    y = x @ w
    return jnp.tanh(y) * factor, (x, w, y)


def _backward(factor, residuals, g):
    x, w, y = residuals
    d = g * factor * (1 - jnp.tanh(y) ** 2) * 1.5  # on purpose not the true rule
    return d @ w.T, x.T @ d


odd_dense.defvjp(_forward, _backward)


def _remat(p, x):
    policy = jax.checkpoint_policies.save_only_these_names("kept")
    block = jax.checkpoint(
        lambda x: jnp.sin(checkpoint_name(x @ p["w"], "kept")) @ p["w"].T, policy=policy
    )
    return block(block(x))


FUNCTIONS = {
    "jit": lambda p, x: jax.jit(lambda w, x: jnp.tanh(x @ w))(p["w"], x) @ p["w"],
    "custom_jvp": lambda p, x: odd_tanh(jax.nn.relu(x), p["w"]),
    "custom_vjp": lambda p, x: odd_dense(x, p["w"], 2.0),
    "custom_vjp in scan": lambda p, x: lax.fori_loop(
        0, 2, lambda i, c: odd_dense(c, p["w"], 2.0), x
    ),
    "remat": _remat,
    "scan": lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, p["w"], reverse=True),
    "unrolled scan": lambda p, x: lax.scan(
        lambda c, w: (jnp.tanh(c @ w), c[0]), x, p["w"], unroll=2
    ),
    "cond": lambda p, x: lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: 2 * x, x),
    "switch": lambda p, x: lax.switch(
        2, [lambda x: x, lambda x: x @ p["w"], lambda x: x @ p["w"] @ p["w"]], x
    ),
    "vmap": lambda p, x: jax.vmap(lambda w: jnp.tanh(x @ w))(p["w"]),
    "grad inside": lambda p, x: jax.grad(lambda x: jnp.tanh(x @ p["w"]).sum())(x),
    "remat of scan of cond": lambda p, x: jax.checkpoint(
        lambda x: lax.scan(
            lambda c, w: (lax.cond(c.sum() > 0, lambda c: jnp.tanh(c @ w), lambda c: c, c), None),
            x,
            p["w"],
        )[0]
    )(x),
}
STACKS = {"scan", "unrolled scan", "vmap", "remat of scan of cond"}


def total(fn):
    def loss(params, x):
        return sum(leaf.sum() for leaf in jax.tree.leaves(fn(params, x)))

    return loss


def assert_same(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_identity_handler_changes_no_bit(name):
    fn, params = FUNCTIONS[name], STACKED if name in STACKS else W
    value_and_grad = jax.jit(jax.value_and_grad(total(fn), argnums=(0, 1)))
    wanted = value_and_grad(params, X)
    for handlers in ({"w": identity}, {everywhere: identity}):
        replayed = graph.replay(fn, handlers)
        assert_same(wanted, jax.jit(jax.value_and_grad(total(replayed), argnums=(0, 1)))(params, X))


def test_without_handlers_everything_is_bound_whole():
    fn = FUNCTIONS["remat of scan of cond"]
    primitives = lambda fn: [e.primitive.name for e in graph_jaxpr(fn, STACKED).eqns]
    assert primitives(graph.replay(fn, {})) == primitives(fn)
    assert_same(jax.jit(fn)(STACKED, X), jax.jit(graph.replay(fn, {}))(STACKED, X))


def test_a_while_loop_is_rebuilt_with_its_condition():
    def fn(p, x):
        return lax.while_loop(lambda c: (c @ p["w"]).sum() < 9.0, lambda c: c @ p["w"] + 1, x)

    taken = []

    def note(equation, *operands):
        taken.append(equation.sites[0].scope)
        return equation.bind(*operands)

    assert_same(jax.jit(fn)(W, X), jax.jit(graph.replay(fn, {"w": note}))(W, X))
    assert {("while",), ("while condition",)} == set(taken)


def test_handlers_change_what_they_handle_and_nothing_else():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params = {"a": W["w"], "b": W["w"] + 1}
    doubled = graph.replay(fn, {"b": lambda equation, x, w: equation.bind(x, 2 * w)})
    np.testing.assert_allclose(doubled(params, X), 2 * fn(params, X), rtol=1e-6)


def test_the_first_key_that_takes_an_equation_counts():
    fn = lambda p, x: x @ p["a"] @ p["b"] + x.sum()
    params = {"a": W["w"], "b": W["w"]}
    zero = lambda equation, *operands: jnp.zeros_like(equation.bind(*operands))
    keys = [("b", zero), (jax.lax.dot_general_p, identity)]
    np.testing.assert_array_equal(graph.replay(fn, keys)(params, X), jnp.full((2, 4), X.sum()))


def test_handlers_may_change_parameters_of_the_equation():
    fn = lambda p, x: x @ p["w"]
    half = lambda equation, x, w: equation.bind(
        x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )
    out = graph.replay(fn, {"w": half})(W, X)
    assert out.dtype == jnp.float32 and not np.array_equal(out, fn(W, X))
    np.testing.assert_allclose(out, fn(W, X), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", ["custom_vjp", "custom_jvp"])
def test_custom_rules_stay_but_values_change(name):
    """The forward value is the handler's; the derivative is the function's own rule."""
    fn = FUNCTIONS[name]
    seen = []

    def doubled(equation, x, w):
        seen.append(equation.sites[0].name)
        return 2 * equation.bind(x, w)

    value = graph.replay(fn, {"w": doubled})(W, X)
    inner = jax.nn.relu(X) if name == "custom_jvp" else X
    factor = 1.0 if name == "custom_jvp" else 2.0
    np.testing.assert_allclose(value, factor * jnp.tanh(2 * inner @ W["w"]), rtol=1e-5)
    gradient = jax.grad(total(graph.replay(fn, {"w": doubled})), argnums=1)(W, X)
    if name == "custom_jvp":
        true = jax.grad(total(fn), argnums=1)(W, X)
    else:  # its residual y comes from the handled forward function
        d = 3 * (1 - jnp.tanh(2 * X @ W["w"]) ** 2)
        true = d @ W["w"].T
    np.testing.assert_allclose(gradient, true, rtol=1e-5)
    assert set(seen) == {"w"}


def test_a_policy_of_checkpoint_survives():
    count = lambda fn: str(jax.make_jaxpr(jax.grad(total(fn)))(W, X)).count("dot_general")
    free = jax.checkpoint(lambda w, x: jnp.sin(x @ w) @ w.T)
    unsaved = lambda p, x: free(p["w"], free(p["w"], x))
    assert count(graph.replay(_remat, {"w": identity})) == count(_remat) < count(unsaved)


def test_under_vmap_and_named_axes():
    fn = lambda p, x: lax.pmean(jnp.tanh(x @ p["w"]), "batch")
    run = lambda f: jax.vmap(f, in_axes=(None, 0), axis_name="batch")(W, X)
    assert_same(run(fn), run(graph.replay(fn, {"w": identity})))


def test_effects_happen_once_and_in_order():
    seen = []

    def fn(p, x):
        def body(x):
            jax.debug.callback(lambda v: seen.append(float(v)), x.sum(), ordered=True)
            return x @ p["w"]

        return jax.jit(body)(jax.jit(body)(x))

    jax.jit(graph.replay(fn, {"w": identity}))(W, X)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [X.sum(), (X @ W["w"]).sum()], rtol=1e-5)


def test_host_callbacks_pass_through():
    def fn(p, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda v: np.asarray(v) * 2, shape, x) @ p["w"]

    assert_same(fn(W, X), graph.replay(fn, {"w": identity})(W, X))


def test_donation_of_an_inner_jit_survives():
    donating = jax.jit(lambda w, x: x + (x @ w).sum(), donate_argnums=1)
    fn = lambda p, x: donating(p["w"], x + 1)
    replayed = graph.replay(fn, {"w": identity})
    assert_same(fn(W, X), replayed(W, X))
    (eqn,) = [e for e in graph_jaxpr(replayed).eqns if e.primitive.name in ("jit", "pjit")]
    assert eqn.params["donated_invars"] == (False, True)


def test_donated_arguments_of_the_whole():
    fn = lambda p, x: x + x @ p["w"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the CPU may say that it does not use the donation
        out = jax.jit(graph.replay(fn, {"w": identity}), donate_argnums=1)(W, X + 0)
    assert_same(out, jax.jit(fn)(W, X))


def graph_jaxpr(fn, params=W):
    closed = jax.make_jaxpr(fn)(params, X)
    return getattr(closed, "jaxpr", closed)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shardings_survive(axis_type):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    spec = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.jit(lambda w, x: x @ w, out_shardings=spec, inline=True)

    def local(w, x):
        return lax.psum(jnp.tanh(x @ w), "data")

    def fn(p, x):
        y = placed(p["w"], x)
        z = jnp.einsum("bi,io->bo", y, p["w"])
        specs = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec()}
        return y, z, jax.shard_map(local, mesh=mesh, **specs)(p["w"], z)

    with jax.set_mesh(mesh):
        x = jax.device_put(X, spec)
        w = {"w": jax.device_put(W["w"], NamedSharding(mesh, PartitionSpec()))}
        wanted, got = jax.jit(fn)(w, x), jax.jit(graph.replay(fn, {"w": identity}))(w, x)
        gradient = jax.jit(jax.grad(total(fn)))(w, x)
        assert_same(gradient, jax.jit(jax.grad(total(graph.replay(fn, {"w": identity}))))(w, x))
    assert_same(wanted, got)
    for one, other in zip(wanted, got, strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_random_keys_and_structure_pass_through():
    def fn(p, x, key):
        return {"y": x @ p["w"], "key": jax.random.split(key), "none": None, "w": p["w"]}

    wanted, got = fn(W, X, KEY), graph.replay(fn, {"w": identity})(W, X, KEY)
    assert jax.tree.structure(wanted) == jax.tree.structure(got)
    assert_same(wanted["y"], got["y"])
    assert (jax.random.key_data(wanted["key"]) == jax.random.key_data(got["key"])).all()


@pytest.mark.parametrize(
    "key",
    ["**/kernel", jax.lax.sin_p, lambda equation: False],
    ids=["glob", "primitive", "predicate"],
)
def test_a_key_that_takes_nothing_raises(key):
    with pytest.raises(SelectionError, match="takes no equation"):
        graph.replay(lambda p, x: x @ p["w"], [("w", identity), (key, identity)])(W, X)


def test_a_key_that_an_earlier_one_shadows_raises():
    with pytest.raises(SelectionError, match="earlier key"):
        graph.replay(lambda p, x: x @ p["w"], [("*", identity), ("w", identity)])(W, X)


@pytest.mark.parametrize("handlers", [{3: identity}, {"w": 3}], ids=["key", "handler"])
def test_bad_handlers_are_named(handlers):
    with pytest.raises(ArgumentTypeError, match="handlers"):
        graph.replay(lambda p, x: x @ p["w"], handlers)


def test_a_choice_by_platform_stays_one():
    def elsewhere(x, w):
        return jax.lax.linalg.lu(x @ w)[0] if jax.default_backend() == "tpu" else unlowerable(x @ w)

    from jax.extend.core import Primitive

    only_tpu = Primitive("test_only_on_tpu")
    only_tpu.def_abstract_eval(lambda x: x)
    unlowerable = only_tpu.bind

    def fn(p, x):
        return lax.platform_dependent(x, p["w"], tpu=elsewhere, default=lambda x, w: x @ w)

    assert_same(jax.jit(fn)(W, X), jax.jit(graph.replay(fn, {"w": identity}))(W, X))
    np.testing.assert_array_equal(jax.jit(graph.tap(fn, "w"))(W, X)[0], jax.jit(fn)(W, X))


def test_a_forward_rule_without_the_equation_is_refused():
    @jax.custom_vjp
    def dense(x, w):
        return x @ w

    dense.defvjp(lambda x, w: ((x[:, :, None] * w).sum(1), (x, w)), lambda r, g: (g @ r[1].T, w0))
    w0 = jnp.zeros((4, 4))
    replayed = graph.replay(lambda p, x: dense(x, p["w"]), {"w": identity})
    assert_same(replayed(W, X), X @ W["w"])
    with pytest.raises(ArgumentError, match="forward rule has no such equation"):
        jax.grad(total(replayed))(W, X)


def test_a_where_predicate_is_a_key():
    chosen = lambda path, leaf: path == "w" and leaf.ndim == 2
    zero = lambda equation, *operands: 0 * equation.bind(*operands)
    out = graph.replay(lambda p, x: x @ p["w"], [(chosen, zero)])(W, X)
    np.testing.assert_array_equal(out, jnp.zeros((2, 4)))


@pytest.mark.parametrize("result", [None, (1.0,), [X]], ids=["none", "tuple", "list"])
def test_a_handler_that_returns_no_array_is_named(result):
    with pytest.raises(ArgumentError, match="from the handler at w: expected|handler at w"):
        graph.replay(lambda p, x: x @ p["w"], {"w": lambda equation, *xs: result})(W, X)


def test_eager_outputs_are_arrays():
    fn = lambda p, x, n: (x @ p["w"], n, 2, jnp.zeros(3))
    outputs = graph.replay(fn, {"w": identity})(W, X, 3)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(outputs))


def test_under_export_with_a_symbolic_batch():
    (batch,) = jax.export.symbolic_shape("b")
    replayed = jax.jit(graph.replay(lambda p, x: jnp.tanh(x @ p["w"]), {"w": identity}))
    exported = jax.export.export(replayed)(W, jax.ShapeDtypeStruct((batch, 4), "float32"))
    np.testing.assert_allclose(exported.call(W, X), jnp.tanh(X @ W["w"]), rtol=1e-6)


def test_a_forward_rule_that_contracts_more_keeps_names_apart():
    @jax.custom_vjp
    def dense(x, w):
        return (x @ w) @ w[:, :2]

    def forward(x, w):
        gram = w.T @ w  # not in the primal
        return (x @ w) @ w[:, :2], (x, gram)

    dense.defvjp(forward, lambda r, g: (g @ jnp.ones((2, 4)), r[1]))
    names = []

    def note(equation, *operands):
        names.append(tuple(site.name for site in equation.sites))
        return equation.bind(*operands)

    jax.grad(total(graph.replay(lambda p, x: dense(x, p["w"]), {"w": note})))(W, X)
    assert {("w",), ("w#1",)} < set(names)
    (extra,) = set(names) - {("w",), ("w#1",)}
    assert all("#forward" in name for name in extra)
