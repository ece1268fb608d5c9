"""Re-estimated running statistics against NumPy's, in Linen, NNX and by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import nnx

from jaxcompress import adapters, errors, structured, tree

RNG = np.random.default_rng(0)
BATCHES = [jnp.asarray(RNG.normal(3, 2, (n, 3)), jnp.float32) for n in (6, 6, 2)]
WEIGHTS = np.array([6, 6, 2]) / 14


class Net(nn.Module):
    momentum: float = 0.99

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(not train, momentum=self.momentum, name="first")(x)
        x = nn.tanh(nn.Dense(4, name="dense")(x))
        return nn.BatchNorm(not train, momentum=self.momentum, name="second")(x)


def net(momentum=0.99, **kwargs):
    module = Net(momentum)
    variables = module.init(jax.random.key(0), BATCHES[0])
    variables["batch_stats"] = jax.tree.map(lambda x: x + 50, variables["batch_stats"])
    return module, *adapters.from_linen(module, variables, mutable=["batch_stats"], **kwargs)


def hidden(params, x):
    """What the second norm sees, in NumPy."""
    x = np.asarray(x, np.float64)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    x = x * p["first"]["scale"] + p["first"]["bias"]
    return np.tanh(x @ p["dense"]["kernel"] + p["dense"]["bias"])


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
def test_averages_of_batch_statistics_whatever_the_momentum(momentum):
    _, fn, params = net(momentum)
    found = structured.reestimate(fn, params, BATCHES)
    for name, seen in (("first", lambda x: np.asarray(x)), ("second", lambda x: hidden(params, x))):
        for what in ("mean", "var"):
            wanted = sum(
                w * getattr(seen(x), what)(0) for w, x in zip(WEIGHTS, BATCHES, strict=True)
            )
            np.testing.assert_allclose(
                found["batch_stats"][name][what], wanted, rtol=2e-5, atol=1e-6
            )
    before, after = dict(tree.items(params)), dict(tree.items(found))
    assert all(after[p] is before[p] for p in before if p.startswith("params"))


def test_the_variance_of_all_data_does_not_depend_on_batches():
    _, fn, params = net()
    found = structured.reestimate(fn, params, BATCHES, between=True)["batch_stats"]["first"]
    data = np.concatenate(BATCHES)
    np.testing.assert_allclose(found["mean"], data.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["var"], data.var(0), rtol=1e-5)
    without = structured.reestimate(fn, params, BATCHES)["batch_stats"]["first"]
    assert np.all(without["var"] < found["var"])


def test_constant_data_gives_its_values_exactly():
    _, fn, params = net(0.999)
    constant = [jnp.full((4, 3), 7.25)] * 3
    found = structured.reestimate(fn, params, constant)["batch_stats"]["first"]
    # Within rounding of one division, though the share of a batch is a thousandth.
    np.testing.assert_allclose(found["mean"], 7.25, rtol=3e-7)
    np.testing.assert_array_equal(found["var"], 0)


def test_inference_agrees_with_training_on_one_batch():
    module, fn, params = net()
    found = structured.reestimate(fn, params, BATCHES[:1])
    trained, _ = fn(params, BATCHES[0])
    served = module.apply(found, BATCHES[0], train=False)
    np.testing.assert_allclose(served, trained, atol=1e-4)


def test_frozen_layers_are_used_and_left():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(True, name="frozen")(x)
            return nn.BatchNorm(False, name="free")(x)

    variables = Half().init(jax.random.key(0), BATCHES[0])
    stats = variables["batch_stats"]
    stats["frozen"] = {"mean": jnp.full(3, 5.0), "var": jnp.full(3, 4.0 - 1e-5)}
    fn, params = adapters.from_linen(Half(), variables, mutable=["batch_stats"])
    found = structured.reestimate(fn, params, BATCHES)["batch_stats"]
    np.testing.assert_array_equal(found["frozen"]["mean"], 5.0)
    wanted = sum(w * (np.asarray(x).mean(0) - 5) / 2 for w, x in zip(WEIGHTS, BATCHES, strict=True))
    np.testing.assert_allclose(found["free"]["mean"], wanted, rtol=1e-4, atol=1e-6)


def test_counters_and_corrected_averages_as_haiku_has_them():
    def fn(params, x):
        hidden = 0.9 * params["hidden"] + 0.1 * x.mean(0)
        counter = params["counter"] + 1
        average = hidden / (1 - 0.9 ** counter.astype(jnp.float32))
        return x, {"hidden": hidden, "counter": counter, "average": average}

    params = {"hidden": jnp.ones(3), "counter": jnp.int32(20), "average": jnp.ones(3)}
    with pytest.raises(errors.ArgumentError, match="'average'"):
        structured.reestimate(fn, params, BATCHES)
    found = structured.reestimate(fn, params, BATCHES, where="hidden")
    wanted = sum(w * np.asarray(x).mean(0) for w, x in zip(WEIGHTS, BATCHES, strict=True))
    np.testing.assert_allclose(found["hidden"], wanted, rtol=1e-5)
    np.testing.assert_array_equal(found["average"], 1)


def test_bfloat16_statistics_are_not_biased():
    def fn(params, x):
        m = jnp.bfloat16(0.9)
        return x, {"mean": m * params["mean"] + jnp.bfloat16(0.1) * x.mean(0).astype(jnp.bfloat16)}

    params = {"mean": jnp.zeros(3, jnp.bfloat16)}
    found = structured.reestimate(fn, params, [jnp.full((4, 3), 2.0)])
    assert found["mean"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found["mean"], np.float32), 2.0, rtol=0.005)


@pytest.mark.parametrize("name", ["resnet_train", "densenet_train"])
def test_networks_of_the_zoo(name):
    fn, params, (x,) = zoo.ZOO[name].build()
    found = structured.reestimate(fn, params, [x, 2 * x], between=True)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    before, after = dict(tree.items(params)), dict(tree.items(found))
    state = {path for path in before if path.split("/")[-1] in ("mean", "var")}
    assert {path for path in before if after[path] is not before[path]} == state
    # The first norm's input does not depend on any other: its statistics are a convolution's.
    kernel, stats = {
        "resnet_train": ("params/conv1/kernel", "batch_stats/bn1"),
        "densenet_train": ("stem/kernel", "blocks/0/0/norm"),
    }[name]
    maps = jax.lax.conv_general_dilated(
        jnp.concatenate([x, 2 * x]),
        before[kernel],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(after[f"{stats}/mean"], maps.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after[f"{stats}/var"], maps.var((0, 1, 2)), rtol=1e-4)


def test_scanned_layers():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.BatchNorm(False, momentum=0.9, name="norm")(x)
            return x + 1, None

    scanned = nn.scan(
        Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2
    )()
    variables = scanned.init(jax.random.key(0), BATCHES[0], None)
    apply, params = adapters.from_linen(scanned, variables, mutable=["batch_stats"])
    found = structured.reestimate(lambda p, x: apply(p, x, None), params, BATCHES)
    mean = found["batch_stats"]["norm"]["mean"]
    wanted = sum(w * np.asarray(x).mean(0) for w, x in zip(WEIGHTS, BATCHES, strict=True))
    np.testing.assert_allclose(mean, [wanted, np.ones(3)], rtol=1e-5)


# --- Refusals -------------------------------------------------------------------------------------


def refused(fn, params, kind, match, batches=BATCHES, **kwargs):
    with pytest.raises(kind, match=match):
        structured.reestimate(fn, params, batches, **kwargs)


def test_what_is_refused():
    module, fn, params = net()
    inference, _ = adapters.from_linen(module, params, train=False, mutable=["batch_stats"])
    refused(inference, params, errors.ArgumentError, "training mode")
    plain, _ = adapters.from_linen(module, params, train=False)
    refused(plain, params, errors.ArgumentTypeError, "mutable")
    refused(fn, params, errors.ArgumentError, "no batches", batches=[])
    refused(fn, params, errors.ArgumentError, "nothing", where="nothing")
    nan = [BATCHES[0].at[0, 0].set(jnp.nan)]
    refused(fn, params, errors.NonFiniteError, "first/mean", batches=nan)
    one = {"mean": jnp.ones(3)}
    stray = lambda p, x: (x, {"other": 0.9 * p["mean"]})
    refused(stray, one, errors.StructureError, "'other'")
    short = lambda p, x: (x, {"mean": 0.9 * p["mean"][:2]})
    refused(short, one, errors.StructureError, "shape")
    square = lambda p, x: (x, {"mean": p["mean"] ** 2 + x.mean(0)})
    refused(square, one, errors.ArgumentError, "no running average")
    average = lambda p, x: (x, {"mean": 0.5 * p["mean"] + 0.5 * x.mean(0)})
    refused(average, one, errors.ArgumentError, "no leaf called `var`", between=True)
    alone = lambda p, x: (x, {"var": 0.5 * p["var"] + 0.5 * x.var(0)})
    refused(alone, {"var": jnp.ones(3)}, errors.ArgumentError, "no mean beside", between=True)


def test_nnx_modules_take_the_result():
    module = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    module.train()
    fn, params = adapters.from_nnx(module, mutable=nnx.BatchStat)
    found = adapters.to_nnx(module, structured.reestimate(fn, params, BATCHES[:1]))
    np.testing.assert_allclose(found.var[...], np.asarray(BATCHES[0]).var(0), rtol=1e-5)
