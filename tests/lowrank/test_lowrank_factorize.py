"""`factorize`: budgets met, what the ranks lose, and every leaf accounted for."""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from zoo import ZOO

from jaxcompress import export, graph, lowrank, quantize, tree
from jaxcompress.budget import Bytes, Flops, Params, Seconds
from jaxcompress.errors import ArgumentError, ArgumentTypeError, NonFiniteError, SelectionError
from jaxcompress.lowrank import SVD, ActivationSVD, Factors, Ranks, Tucker2, execute, factorize
from jaxcompress.lowrank._allocate import Allocation
from jaxcompress.lowrank._candidate import Rung

RNG = np.random.default_rng


def draw(*shape, seed=0):
    return jnp.asarray(RNG(seed).normal(size=shape), jnp.float32)


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"]


def small():
    """An MLP whose matrices have spectra that fall off, and skewed inputs."""
    params = {"up": draw(12, 24) * 0.8 ** jnp.arange(24), "down": draw(24, 10, seed=1)}
    return params | {"bias": draw(10, seed=2)}, draw(64, 12, seed=3) * 0.7 ** jnp.arange(12)


@pytest.fixture(scope="module")
def resnet():
    return ZOO["resnet_eval"].build()


# --- Allocation -----------------------------------------------------------------------------------


def ladders(seed):
    """Leaves of random sizes and spectra; losses are convex in the rank but for the first step."""
    rng, found = RNG(seed), {}
    for name in "abc":
        inner, outer = rng.integers(3, 8, 2)
        s = np.sort(rng.uniform(size=min(inner, outer)) ** 3)[::-1]
        ranks = [r for r in range(len(s), 0, -1) if r * (inner + outer) < inner * outer]
        rungs = [
            Rung((r,), int(r * (inner + outer)), 0, float(s[r:].sum() / s.sum())) for r in ranks
        ]
        found[name] = [Rung((), int(inner * outer), 0, 0.0), *rungs]
    return found


@pytest.mark.parametrize("seed", range(6))
def test_allocation_against_every_choice(seed):
    found = ladders(seed)
    allocation = Allocation(found, "params", 7)
    every = [
        dict(zip(found, ks, strict=True))
        for ks in itertools.product(*(range(len(ladder)) for ladder in found.values()))
    ]
    costs = {tuple(s.values()): allocation.cost(s) for s in every}
    loss = lambda state: sum(found[p][k].loss for p, k in state.items())
    longest = max(a.params - b.params for la in found.values() for a, b in itertools.pairwise(la))
    for limit in range(min(map(int, costs.values())), max(map(int, costs.values())) + 1, 3):
        state = allocation.within(limit)
        assert state is not None and allocation.cost(state) <= limit
        fitting = [s for s in every if costs[tuple(s.values())] <= limit]
        # Within a step of the best there is, and no leaf could stand one rung higher.
        stricter = [s for s in every if costs[tuple(s.values())] <= limit - 2 * longest]
        assert loss(state) >= min(map(loss, fitting)) - 1e-12
        assert not stricter or loss(state) <= min(map(loss, stricter)) + 1e-12
        for path, k in state.items():
            for higher in range(k):
                assert allocation.cost({**state, path: higher}) > limit
    assert allocation.within(min(costs.values()) - 1) is None


# --- Budgets on models ----------------------------------------------------------------------------


def accounted(result, params):
    """Every leaf once, sizes and FLOPs as they are, nothing above break-even."""
    report = result.report
    paths = [leaf.path for leaf in report.leaves]
    everything = [*paths, *report.kept, *report.unselected, *report.exempt]
    assert sorted(everything) == sorted(tree.paths(params))
    assert report.params == sum(x.size for x in jax.tree.leaves(result.params))
    assert report.params_before == tree.count(params)
    saved = sum(leaf.params_before - leaf.params for leaf in report.leaves)
    assert report.params == report.params_before - saved
    saved = sum(leaf.flops_before - leaf.flops for leaf in report.leaves)
    assert report.flops == report.flops_before - saved
    for leaf in report.leaves:
        assert leaf.params < leaf.params_before and leaf.flops < leaf.flops_before
        assert max(leaf.ranks) <= max(leaf.break_even)
        assert str(leaf.path) in str(report)
    is_node = lambda x: isinstance(x, Factors)
    nodes = [x for x in jax.tree.leaves(result.params, is_leaf=is_node) if is_node(x)]
    assert [node.ranks for node in nodes] == [leaf.ranks for leaf in report.leaves]


@pytest.mark.parametrize("budget", [Flops(0.8), Bytes(0.7), Params(900)])
def test_budgets_are_met_within_a_rank(resnet, budget):
    fn, params, inputs = resnet
    result = factorize(fn, params, [inputs], budget=budget)
    accounted(result, params)
    report = result.report
    unit = type(budget).__name__.lower()
    left, whole = getattr(report, unit), getattr(report, f"{unit}_before")
    assert left <= budget.limit(whole)
    for leaf in report.leaves:
        step = getattr(leaf, "flops" if unit == "flops" else "params") / leaf.ranks[0]
        step *= 4 if unit == "bytes" else 1
        top = leaf.ranks[0] == leaf.break_even[0]
        assert top or left + step > budget.limit(whole)
    got, dense = execute(fn)(result.params, *inputs), fn(lowrank.densify(result.params), *inputs)
    np.testing.assert_allclose(got, dense, atol=1e-4 * float(jnp.abs(dense).max()))


@pytest.mark.parametrize("name", ["llama_scanned", "moe_ragged", "mobilenet", "char_lstm"])
def test_models(name):
    fn, params, inputs = ZOO[name].build()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    accounted(factorize(fn, params, [shapes], budget=Params(0.93)), params)


def test_the_least_that_can_be_reached_is_said_and_can(resnet):
    fn, params, inputs = resnet
    with pytest.raises(ArgumentError, match="at least") as caught:
        factorize(fn, params, [inputs], budget=Params(0.01))
    least = int(caught.value.args[0].split("at least ")[1].split(" ")[0].replace(",", ""))
    result = factorize(fn, params, [inputs], budget=Params(least))
    assert result.report.params == least and {x.ranks for x in result.report.leaves} == {(1,)}


def test_tucker_takes_convolutions_and_the_next_method_the_rest(resnet):
    fn, params, inputs = resnet
    ranks = Ranks({"**/layer3_0/*/kernel": (2, 3), "**/linear/kernel": 1})
    result = factorize(fn, params, [inputs], budget=ranks, method=(Tucker2(), SVD()))
    accounted(result, params)
    methods = [(leaf.method, leaf.ranks) for leaf in result.report.leaves]
    assert methods == [("Tucker2", (2, 3)), ("Tucker2", (2, 3)), ("SVD", (1,))]
    got, dense = execute(fn)(result.params, *inputs), fn(lowrank.densify(result.params), *inputs)
    np.testing.assert_allclose(got, dense, atol=1e-4 * float(jnp.abs(dense).max()))


def test_ranks_are_multiples(resnet):
    fn, params, inputs = resnet
    result = factorize(fn, params, [inputs], budget=Params(0.8), multiple=4)
    assert {leaf.ranks[0] % 4 for leaf in result.report.leaves} == {0}
    assert any("multiple of 4" in why for why in result.report.exempt.values())


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is absent")
def test_seconds_of_a_target():
    params, x = {"up": draw(1024, 512), "down": draw(512, 1024)}, jnp.ones((8, 1024))
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    budget = Seconds(0.7, target="tpu-v5e")
    result = factorize(fn, params, [x], budget=budget, multiple=64)
    assert result.report.seconds is not None
    before, after = result.report.seconds
    assert after <= 0.7 * before
    cost = lambda fn, p: graph.cost(fn, p, x, target="tpu-v5e").seconds
    assert (before, after) == (cost(fn, params), cost(execute(fn), result.params))


def test_a_target_without_a_clock():
    params, x = small()
    with pytest.raises(ArgumentError, match="gives no time"):
        factorize(mlp, params, [x], budget=Seconds(0.5, target="cpu"))


# --- What is lost ---------------------------------------------------------------------------------


def ratio(x, of):
    return float(jnp.linalg.norm(x) / jnp.linalg.norm(of))


def test_errors_are_those_of_the_arrays():
    params, x = small()
    ranks = Ranks({"up": 3, "down": 4})
    aware = factorize(mlp, params, [x[:20], x[20:]], budget=ranks, method=ActivationSVD())
    plain = factorize(mlp, params, [x], budget=ranks)
    inputs = {"up": x, "down": jnp.tanh(x @ params["up"])}
    for path, seen in inputs.items():
        off, off_plain = (r.params[path].dense() - params[path] for r in (aware, plain))
        got = aware.report[path]
        assert got.weight_error == pytest.approx(ratio(off, params[path]), rel=1e-3)
        error, error_plain = (ratio(seen @ o, seen @ params[path]) for o in (off, off_plain))
        assert got.output_error == pytest.approx(error, rel=1e-2)
        assert error < 0.95 * error_plain
        s = np.linalg.svd(params[path], compute_uv=False)
        expected = np.sqrt((s[got.ranks[0] :] ** 2).sum() / (s**2).sum())
        assert plain.report[path].weight_error == pytest.approx(expected, rel=1e-3)
        assert plain.report[path].output_error is None


def test_stacked_layers_see_their_own_inputs():
    """A scan over layers: each layer's factors are those of its own weights and activations."""

    def fn(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    w, x = draw(3, 10, 10) / 3, draw(40, 10, seed=1) * 0.6 ** jnp.arange(10)
    result = factorize(
        fn, {"w": w}, [x[:16], x[16:]], budget=Ranks({"w": 2}), method=ActivationSVD()
    )
    dense = result.params["w"].dense()
    for layer in range(3):
        pair = lowrank.activation_svd(w[layer], x.T @ x, 2)
        np.testing.assert_allclose(dense[layer], pair.left @ pair.right, atol=2e-3)
        x = jnp.tanh(x @ w[layer])


def test_a_stack_of_one_layer():
    """A scan of one step: its axis of the leaf has one entry, and is none to its matrices."""
    fn = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
    w, x = np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32)
    stacked = factorize(fn, {"w": w}, [x[0]], budget=Ranks({"w": 2}), method=ActivationSVD())
    plain = lambda p, x: jnp.tanh(x @ p["w"])
    alone = factorize(plain, {"w": w[0]}, [x[0]], budget=Ranks({"w": 2}), method=ActivationSVD())
    np.testing.assert_allclose(
        stacked.params["w"].dense()[0], alone.params["w"].dense(), rtol=1e-4, atol=1e-5
    )


def test_convolutions_see_patches():
    """The error that is reported is that of the outputs of a strided convolution."""

    def fn(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    params, x = {"w": draw(3, 3, 4, 8)}, draw(4, 6, 6, 4, seed=1) * jnp.array([4.0, 2, 1, 0.1])
    result = factorize(fn, params, [x], budget=Ranks({"w": 3}), method=ActivationSVD())
    off = execute(fn)(result.params, x) - fn(params, x)
    found = ratio(off, fn(params, x))
    assert result.report["w"].output_error == pytest.approx(found, rel=1e-2)


def test_a_kernel_with_two_sites_has_one_pair_of_factors():
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T + jnp.sin(x) @ p["w"] @ p["v"]
    params, x = {"w": draw(8, 12), "v": draw(12, 8, seed=1)}, draw(30, 8, seed=2)
    result = factorize(fn, params, [x], budget=Ranks({"w": 2}), method=ActivationSVD())
    accounted(result, params)
    seen = jnp.concatenate([x, jnp.sin(x)])
    pair = lowrank.activation_svd(params["w"], seen.T @ seen, 2)
    np.testing.assert_allclose(result.params["w"].dense(), pair.left @ pair.right, atol=1e-3)


def test_factors_learn():
    params, x = small()
    result = factorize(mlp, params, [x], budget=Params(0.5))
    loss = lambda p: jnp.square(execute(mlp)(p, x) - mlp(params, x)).mean()

    @jax.jit
    def step(p, _):
        return jax.tree.map(lambda a, g: a - 0.05 * g, p, jax.grad(loss)(p)), None

    trained, _ = jax.lax.scan(step, result.params, None, length=60)
    assert loss(trained) < 0.7 * loss(result.params)
    assert jax.tree.structure(trained) == jax.tree.structure(result.params)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_factors_live_where_the_leaf_did(kind):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,))
    params, x = small()
    whole = NamedSharding(mesh, PartitionSpec())
    params, x = jax.device_put((params, x), whole)
    params["up"] = jax.device_put(params["up"], NamedSharding(mesh, PartitionSpec(None, "model")))
    method = ActivationSVD()
    got = factorize(mlp, params, [x], budget=Ranks({"up": 3}), method=method).params["up"]
    assert got.right.sharding.spec == PartitionSpec(None, "model")
    assert got.left.sharding.is_fully_replicated


def test_the_product_of_energy_shares_is_kept():
    """Against all pairs of ranks, by NumPy; the sum of shares lost would give up one leaf."""
    params, x = small()
    limit = 0.4 * tree.count(params)
    report = factorize(mlp, params, [x], budget=Params(0.4)).report
    options = {}
    for path in ("up", "down"):
        w = np.asarray(params[path], np.float64)
        s2 = np.linalg.svd(w, compute_uv=False) ** 2
        thin = [(r * sum(w.shape), s2[:r].sum() / s2.sum()) for r in range(1, 8)]
        options[path] = [*thin, (w.size, 1.0)]
    pairs = list(itertools.product(options["up"], options["down"]))
    best = lambda limit: max(a[1] * b[1] for a, b in pairs if 10 + a[0] + b[0] <= limit)
    got = np.prod([1 - leaf.weight_error**2 for leaf in report.leaves])
    assert len(report.leaves) == 2 and report.params <= limit
    assert best(limit - 36) - 1e-4 <= got <= best(limit) + 1e-4


# --- Decisions as data ----------------------------------------------------------------------------


def test_ranks_of_a_report_make_the_same_factors(resnet):
    fn, params, inputs = resnet
    first = factorize(fn, params, [inputs], budget=Params(0.7), method=(Tucker2(), SVD()))
    again = factorize(
        fn, params, [inputs], budget=Ranks(first.report.ranks), method=(Tucker2(), SVD())
    )
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)


def test_factors_come_back_from_a_file(tmp_path):
    params, x = small()
    result = factorize(mlp, params, [x], budget=Params(0.5))
    export.save(tmp_path / "model.safetensors", result.params)
    loaded = export.load(tmp_path / "model.safetensors").params
    for back in (
        lowrank.restore(loaded),
        export.load(tmp_path / "model.safetensors", like=result.params).params,
    ):
        assert jax.tree.structure(back) == jax.tree.structure(result.params)
        jax.tree.map(np.testing.assert_array_equal, back, result.params)
    with pytest.raises(SelectionError, match="without mappings"):
        lowrank.restore(params)


# --- Who is left alone, and why -------------------------------------------------------------------


def test_reasons():
    def fn(params, ids, x):
        h = params["table"][ids] + x @ params["plain"] + x @ params["tiny"] @ params["tiny"].T
        h = h + params["scale"] * x[:, :8] + x @ jnp.abs(params["used"])
        h = h @ (params["one"] @ params["two"])
        return h + x @ params["both"] @ params["both"], params["spare"]

    shapes = {"table": (10, 8), "plain": (8, 8), "tiny": (8, 1), "scale": (1, 8), "used": (8, 8)}
    shapes |= {"one": (8, 8), "two": (8, 8), "both": (8, 8), "spare": (4, 4), "unread": (4, 4)}
    params = {name: draw(*shape) for name, shape in shapes.items()}
    params["whole"] = jnp.ones((4, 4), int)
    inputs = jnp.zeros(5, int), draw(5, 8)
    result = factorize(fn, params, [inputs], budget=Ranks({"plain": 2}), where="**")
    accounted(result, params)
    exempt = result.report.exempt
    assert exempt["table"] == "is looked up"
    assert exempt["tiny"] == "has no rank below break-even"
    assert "used outside" in exempt["scale"]
    assert "needed as an array" in exempt["used"]
    assert "returned" in exempt["spare"] and "not read" in exempt["unread"]
    assert exempt["whole"] == "is no floating-point array"
    assert "two factorised leaves" in exempt["two"]
    assert result.report.kept == ("both", "one")
    with pytest.raises(KeyError, match="looked up"):
        result.report["table"]
    with pytest.raises(KeyError, match="whole within the budget"):
        result.report["both"]


def test_feature_groups_are_left_alone():
    fn, params, inputs = ZOO["mobilenet"].build()
    report = factorize(fn, params, [inputs], budget=Params(0.9)).report
    assert "is a convolution with feature groups" in report.exempt.values()


def test_strict_and_nothing_to_do():
    fn, params, inputs = ZOO["char_lstm"].build()
    with pytest.raises(SelectionError, match="is looked up"):
        factorize(fn, params, [inputs], budget=Params(0.9), strict=True)
    with pytest.raises(SelectionError, match="matches none"):
        factorize(fn, params, [inputs], budget=Params(0.9), where="**/kernle")
    with pytest.raises(SelectionError, match="is looked up"):
        factorize(fn, params, [inputs], budget=Params(0.9), where="**/embedding")


def test_compressed_leaves_are_left_alone():
    params, x = small()
    packed = params | quantize.pack({"down": params["down"]}, quantize.presets.int8_weights)
    result = factorize(quantize.execute(mlp), packed, [x], budget=Ranks({"up": 3}))
    assert result.report.exempt == {"down": "is compressed already"}
    got = execute(quantize.execute(mlp))(result.params, x)
    want = mlp(quantize.unpack(lowrank.densify(result.params)), x)
    np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize(
    ("kwargs", "kind", "match"),
    [
        ({"budget": 0.5}, ArgumentTypeError, "budget.Params"),
        ({"budget": Params(1.0)}, ArgumentError, "as they are"),
        ({"budget": Params(0.5), "method": "svd"}, ArgumentTypeError, r"SVD\(\)"),
        ({"budget": Params(0.5), "method": ()}, ArgumentTypeError, r"SVD\(\)"),
        ({"budget": Params(0.5), "method": Tucker2()}, SelectionError, "no convolution"),
        ({"budget": Params(0.5), "multiple": 0}, ArgumentError, "1 or more"),
        ({"budget": Ranks({"up": 9})}, ArgumentError, r"such as \(7,\)"),
        ({"budget": Ranks({"up": (2, 2)})}, ArgumentError, r"1 rank"),
        ({"budget": Ranks({"up": 2, "nothing": 3})}, SelectionError, "'nothing'"),
        ({"budget": Ranks({})}, SelectionError, "take no leaf"),
    ],
)
def test_misuse(kwargs, kind, match):
    params, x = small()
    with pytest.raises(kind, match=match):
        factorize(mlp, params, [x], **kwargs)


def test_values_that_are_not_finite():
    params, x = small()
    with pytest.raises(NonFiniteError, match="'down'"):
        bad = params | {"down": params["down"].at[0, 0].set(jnp.nan)}
        factorize(mlp, bad, [x], budget=Params(0.5))
    with pytest.raises(NonFiniteError, match="batches"):
        factorize(mlp, params, [x.at[0].set(jnp.inf)], budget=Params(0.5), method=ActivationSVD())
