"""`sequential` sees what a plain forward pass sees once everything upstream is replaced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from zoo import ZOO

from jaxcompress import errors, graph, numerics, stats, tree


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@jax.custom_jvp
def soft(x):
    return jnp.log1p(jnp.exp(x))


soft.defjvp(lambda xs, ts: (soft(*xs), ts[0]))


def mlp():
    """Two sites on one activation, inside jit, remat and custom_jvp; a bias and a transpose."""

    @jax.jit
    def gated(p, x):
        return soft(x @ p["gate"]) * (x @ p["up"].T)

    def fn(p, x, scale):
        x = x @ p["in"] + p["bias"] * scale
        return jax.checkpoint(gated)(p, x) @ p["down"]

    params = {"in": draw(3, 4), "bias": draw(4, 1)[:, 0], "gate": draw(4, 5, seed=1)}
    params |= {"up": draw(5, 4, seed=2), "down": draw(5, 2, seed=3)}
    return fn, params, (draw(6, 3), jnp.float32(0.5))


def conv():
    """A convolution, a grouped one with a stride, and a dense head."""

    def fn(p, x):
        run = functools.partial(
            jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(run(x, p["a"], (1, 1), "SAME"))
        x = jnp.tanh(run(x, p["b"], (2, 2), "VALID", feature_group_count=2))
        return x.reshape(x.shape[0], -1) @ p["head"]

    params = {"a": draw(3, 3, 2, 4), "b": draw(2, 2, 2, 6, seed=1), "head": draw(24, 2, seed=2)}
    return fn, params, (draw(2, 4, 4, 2),)


def scans():
    """A backward scan along axis 1, with inputs, a counter, a shared leaf and rows out."""

    def fn(p, x, extra):
        def step(carry, slices):
            x, count, fixed = carry
            w, b = slices
            x = jnp.tanh(x @ w + b * count) @ p["shared"]
            return (x, count + 1, fixed), x.sum(-1)

        xs = jnp.moveaxis(p["w"], 1, 0), extra
        start = (x, jnp.int32(0), p["scale"])
        (x, _, scale), rows = jax.lax.scan(step, start, xs, reverse=True)
        return (x * scale) @ p["head"], rows @ p["rows"]

    params = {"w": draw(3, 2, 4), "shared": draw(4, 3, seed=1), "head": draw(3, 2, seed=2)}
    params |= {"rows": draw(5, 2, seed=3), "scale": draw(3, 1, seed=4)[:, 0]}
    return fn, params, (draw(5, 3), draw(2, 5, 4, seed=5))


def nested():
    """A scan in a scan, both over one leaf."""

    def fn(p, x):
        inner = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(lambda x, w: jax.lax.scan(inner, x, w), x, p["w"])[0] @ p["head"]

    return fn, {"w": draw(2, 3, 4, 4) / 2, "head": draw(4, 2)}, (draw(5, 4),)


def loop():
    """A loop of Python over a stacked leaf, and one leaf in three parts on one activation."""

    def fn(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p["w"][i].astype(jnp.float32))
        return sum(x @ p["qkv"][k] for k in range(3))

    params = {"w": draw(3, 4, 4).astype(jnp.bfloat16), "qkv": draw(3, 4, 2, seed=1)}
    return fn, params, (draw(5, 4),)


OWN = {f.__name__: f for f in (mlp, conv, scans, nested, loop)}


@functools.cache
def case(name):
    """`(fn, params, batches)`, the second batch smaller."""
    fn, params, inputs = OWN[name]() if name in OWN else ZOO[name].build()
    if name == "scans":
        return fn, params, [inputs, (inputs[0] / 2, inputs[1] * 2)]

    def half(x):
        return x[: x.shape[0] // 2] if x.ndim else x

    return fn, params, [inputs, jax.tree.map(half, inputs)]


def put(params, stop, new):
    """What `sequential` is to do with the leaves that come back."""

    def replaced(path, leaf):
        if path not in new:
            return leaf
        index = stop.index[path]
        return jnp.asarray(leaf).at[index].set(new[path]) if index else new[path]

    return tree.map_with_path(replaced, params)


def gram(x):
    x = np.asarray(x, np.float32)
    return np.swapaxes(x, -1, -2) @ x


CASES = ["conv", "scans", "nested", "loop", "llama_scanned", "moe_ragged"]


def axes_of_slice(site, stop):
    """The contracted axes of the array that the visitor gets."""
    gone = [k for k, i in enumerate(stop.index[site.path]) if isinstance(i, int)]
    return tuple(k - sum(g < k for g in gone) for k in site.axes.contract)


class Checker:
    """Replaces every leaf (or slice) when it is first visited, and checks the stop before."""

    def __init__(self, fn, params, batches):
        self.fn, self.params, self.batches = fn, params, batches
        self.tapped = jax.jit(graph.tap(fn, tree.weights, at="input"))
        self.sites = [graph.trace(fn, params, *batch) for batch in batches]
        self.seen, self.replaced, self.stops = [], set(), 0

    def __call__(self, stop):
        assert stop.number == self.stops < stop.total
        self.stops += 1
        activations = [self.tapped(self.params, *batch)[1] for batch in self.batches]
        for site in stop.sites:
            self.seen.append(site.name)
            if site.axes.lookup:
                assert site.name not in stop.results
            elif site.primitive != "ragged_dot_general":  # whose taps are not split by expert
                self.check(site, stop, activations)
        new = {
            path: (1.5 * leaf).astype(leaf.dtype)
            for path, leaf in stop.leaves.items()
            if (path, str(stop.index[path])) not in self.replaced
        }
        self.replaced |= {(path, str(stop.index[path])) for path in new}
        self.params = put(self.params, stop, new)
        return new

    def check(self, site, stop, activations):
        expected = 0
        for traced, found in zip(self.sites, activations, strict=True):
            shaped = traced[site.name]
            assert site.axes.contract == axes_of_slice(shaped, stop)
            assert site.stack == shaped.stack[len(stop.iteration) :]
            expected += gram(shaped.rows(found[site.name][stop.iteration]))
        result = stop.results[site.name].total
        np.testing.assert_allclose(result, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_after_upstream_was_replaced(name):
    fn, params, batches = case(name)
    checker = Checker(fn, params, batches)
    result = stats.sequential(fn, params, batches, stats.second_moment(), checker)
    jax.tree.map(np.testing.assert_array_equal, result, checker.params)
    leaves = dict(tree.items(params))
    runs = {
        site.name: int(np.prod(site.stack, dtype=int))
        for site in checker.sites[0].sites
        if tree.weights(site.path, leaves[site.path])
    }
    assert {site: checker.seen.count(site) for site in checker.seen} == runs
    # The caller's arrays are as they were, and of what is selected none is.
    paths = {checker.sites[0][site].path for site in runs}
    for path, leaf in tree.items(result):
        assert (path in paths) != np.array_equal(leaf, leaves[path])


def gathered(pairs, result):
    """Stack what the iterations of a site gave, as `collect` has it."""
    pairs = sorted(pairs, key=lambda pair: pair[0])
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(found for _, found in pairs))
    return jax.tree.map(lambda x, like: x.reshape(like.shape), stacked, result)


@pytest.mark.parametrize("name", ["nested", "inception", "control_flow"])
def test_a_visitor_that_changes_nothing_sees_what_collect_collects(name):
    fn, params, batches = case(name)
    several = {"gram": stats.second_moment(), "out": stats.min_max(reads="output")}
    several["lookups"] = stats.lookups()
    collected = stats.collect(fn, params, batches, several, where=tree.weights)
    found: dict = {}

    def visit(stop):
        for site in stop.sites:
            found.setdefault(site.name, []).append((stop.iteration, stop.results[site.name]))
        # As good as None: the same leaves, or none of them.
        return dict(list(stop.leaves.items())[:1]) if stop.number % 2 else None

    result = stats.sequential(fn, params, batches, several, visit, host=name == "llama")
    jax.tree.map(np.testing.assert_array_equal, result, params)
    assert sorted(found) == sorted(collected)
    for site, expected in collected.items():
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            gathered(found[site], expected),
            expected,
        )


def test_constructs_that_cannot_be_left_inside_are_one_stop_before_they_run():
    fn, params, batches = case("control_flow")
    stops = []

    def visit(stop):
        stops.append([site.name for site in stop.sites])
        return {path: 2 * leaf for path, leaf in stop.leaves.items()}

    result = stats.sequential(fn, params, batches, stats.absmax(), visit)
    inside = ["branch/up", "branch/down", "shared", "branch/direct", "shared#1"]
    assert stops == [["inputs/kernel"], ["loop/kernel"], inside]
    np.testing.assert_array_equal(result["shared"], 2 * params["shared"])


def test_time_is_no_stack_of_layers():
    """A recurrent weight is visited once, with the statistics of each step kept apart."""

    def fn(p, x):
        return jax.lax.scan(lambda h, y: (jnp.tanh(h @ p["w"] + y), None), x[0], x)[0]

    x, seen = draw(4, 2, 3), []
    stats.sequential(fn, {"w": draw(3, 3)}, [x], stats.second_moment(), seen.append)
    (stop,) = seen
    assert stop.iteration == () and stop.results["w"].total.shape == (4, 3, 3)
    np.testing.assert_allclose(stop.results["w"].total[0], gram(x[0]), rtol=1e-5)


def test_a_shared_leaf_is_visited_at_each_site_with_what_was_returned_before():
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"]
    x, w, seen = draw(5, 3), draw(3, 3, seed=1), []

    def visit(stop):
        seen.append((stop.sites[0].name, stop.leaves["w"], stop.results[stop.sites[0].name]))
        return {"w": np.asarray(stop.leaves["w"]) + 1}

    result = stats.sequential(fn, {"w": w}, [x], stats.second_moment(), visit)
    assert [name for name, _, _ in seen] == ["w", "w#1"]
    np.testing.assert_array_equal(seen[1][1], w + 1)
    np.testing.assert_allclose(seen[1][2].total, gram(jnp.tanh(x @ (w + 1))), rtol=1e-4)
    np.testing.assert_array_equal(result["w"], w + 1 + 1)  # the first site is not run anew


def test_sites_on_one_activation_share_one_computation():
    fn, params, batches = case("mlp")
    seen = []
    stats.sequential(fn, params, batches, stats.second_moment(), seen.append)
    assert [[site.name for site in stop.sites] for stop in seen] == [
        ["in"],
        ["gate", "up"],
        ["down"],
    ]
    assert seen[1].results["gate"].total is seen[1].results["up"].total


def test_each_equation_runs_once_per_batch_and_nothing_after_the_last_stop():
    runs = []

    def noted(x, what):
        jax.debug.callback(lambda: runs.append(what))
        return x

    def fn(p, x):
        step = lambda x, w: (noted(jnp.tanh(x @ w), "layer"), None)
        x, _ = jax.lax.scan(step, noted(x @ p["in"], "in"), p["w"])
        return noted(x @ p["out"], "out")

    params = {"in": draw(2, 3), "w": draw(4, 3, 3), "out": draw(3, 2)}
    batches = [draw(5, 2, seed=k) for k in range(3)]
    double = lambda stop: {path: 2 * leaf for path, leaf in stop.leaves.items()}
    stats.sequential(fn, params, batches, stats.absmax(), double)
    jax.effects_barrier()
    assert sorted(runs) == ["in"] * 3 + ["layer"] * 4 * 3


def test_a_quantized_leaf_is_one_leaf_and_handed_over_whole():
    def fn(p, x):
        w = numerics.dequantize(p["w"])
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    quantized = numerics.quantize(draw(3, 4, 4), numerics.Format(numerics.int8))
    x, seen = draw(5, 4), []

    def visit(stop):
        seen.append(stop)
        return {"w": jax.tree.map(jnp.zeros_like, stop.leaves["w"])}

    result = stats.sequential(fn, {"w": quantized}, [x], stats.second_moment(), visit)
    (stop,) = seen  # one stop for the scan: what it slices are parts of the leaf
    assert stop.leaves["w"] is quantized and stop.index == {"w": ()}
    np.testing.assert_allclose(stop.results["w"].total[0], gram(x), rtol=1e-5)
    assert not np.any(numerics.dequantize(result["w"]))
    with pytest.raises(errors.StructureError, match="for 'w'"):
        visit = lambda stop: {"w": numerics.dequantize(quantized)}
        stats.sequential(fn, {"w": quantized}, [x], stats.absmax(), visit)


@pytest.mark.parametrize("kind", ["jax", "host"])
def test_random_keys_and_integers_travel_too(kind):
    def fn(p, x, key):
        x, key = x @ p["a"], jax.random.split(key)[1]
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.where(kept, x, 0) @ p["b"]

    params, seen = {"a": draw(3, 4), "b": draw(4, 2)}, {}
    batch = draw(5, 3), jax.random.key(3)
    visit = lambda stop: seen.update(stop.results)
    stats.sequential(fn, params, [batch], stats.second_moment(), visit, host=kind == "host")
    activation = graph.tap(fn, "b", at="input")(params, *batch)[1]["b"]
    np.testing.assert_allclose(seen["b"].total, gram(activation), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "host"),
    [
        pytest.param("llama_scanned", AxisType.Auto, True, id="auto-host"),
        pytest.param("nested", AxisType.Explicit, False, id="explicit"),
    ],
)
def test_sharded_batches_give_the_same(name, kind, host):
    fn, params, _ = case(name)
    tokens = draw(8, 4) if name == "nested" else jnp.arange(8 * 3).reshape(8, 3) % 7
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    spread = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    found: dict = {"one": [], "many": []}

    def visit(stop, kind):
        found[kind].append(jax.tree.leaves(stop.results))
        return {path: 0.9 * leaf for path, leaf in stop.leaves.items()}

    one, many = (functools.partial(visit, kind=k) for k in ("one", "many"))
    stats.sequential(fn, params, [tokens], stats.second_moment(), one, host=host)
    with jax.set_mesh(mesh):
        stats.sequential(fn, whole, [spread], stats.second_moment(), many, host=host)
    shardings = [x.sharding for x in jax.tree.leaves(found["many"])]
    assert all(s.is_fully_replicated and len(s.device_set) == 8 for s in shardings)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(compare, found["many"], found["one"])


def stops_of(returned=None, *, batches=None, statistic=None, where="**", **kwargs):
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    visit = lambda stop: returned
    return stats.sequential(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
        params,
        [jnp.ones((4, 2))] if batches is None else batches,
        statistic or stats.absmax(),
        visit,
        where=where,
        **kwargs,
    )


@pytest.mark.parametrize(
    ("kind", "call", "says"),
    [
        (errors.ArgumentError, lambda: stops_of(batches=[]), "at least one"),
        (errors.ArgumentTypeError, lambda: stops_of(batches=3), "iterable"),
        (errors.SelectionError, lambda: stops_of(where="nothing"), "'a', 'b'"),
        (errors.SelectionError, lambda: stops_of(statistic=stats.lookups()), "lookup"),
        (errors.ArgumentError, lambda: stops_of(statistic=stats.fisher()), "not run yet"),
        (errors.ArgumentTypeError, lambda: stops_of(statistic=stats.absmax), "called"),
        (errors.StructureError, lambda: stops_of({"b": jnp.ones((3, 2))}), r"a result for 'b'"),
        (
            errors.StructureError,
            lambda: stops_of({"a": jnp.ones((3, 2))}),
            r"float32 \(3, 2\) for 'a'",
        ),
        (
            errors.StructureError,
            lambda: stops_of({"a": jnp.ones((2, 3), int)}),
            r"int32 \(2, 3\) for 'a'",
        ),
        (errors.StructureError, lambda: stops_of(jnp.ones((2, 3))), "mapping"),
        (errors.NonFiniteError, lambda: stops_of({"a": jnp.full((2, 3), jnp.nan)}), "at 'b': 12"),
        (errors.StructureError, lambda: stops_of(batches=[jnp.ones((4, 2)), 1.0]), "batch 1"),
    ],
    ids=[
        "no-batches",
        "batches-type",
        "where",
        "misfit",
        "gradients",
        "statistics-type",
        "unknown-path",
        "shape",
        "dtype",
        "result-type",
        "non-finite",
        "other-batch",
    ],
)
def test_errors_name_what_is_wrong(kind, call, says):
    with pytest.raises(kind, match=says):
        # The second stop would be returned "a" too: whatever is wrong comes up before.
        call()


def test_non_finite_activations_are_let_through_on_request():
    batches = [jnp.array([[1.0, jnp.inf]])]
    with pytest.raises(errors.NonFiniteError, match="at 'a': 1"):
        stops_of(batches=batches)
    assert stops_of(batches=batches, allow_non_finite=True)["a"].shape == (2, 3)
