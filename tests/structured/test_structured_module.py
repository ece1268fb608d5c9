"""`to_module`: the user's own class at new widths computes what the shrunk function does."""

import functools
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from zoo import ZOO
from zoo_registry import linen, nnx_model
from zoo_sequences import LLAMA

from jaxcompress import structured, tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError
from jaxcompress.structured.module._fields import MOST_TRIALS, search

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
from models.char_lstm import CharLSTM
from models.llama import Llama, LlamaConfig
from models.llama_nnx import Llama as NnxLlama
from models.mixer import NnxMixer
from models.resnet import CifarResNet

X = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)


def halved(groups, *roles):
    names = [name for name, group in groups.items() if not roles or group.role in roles]
    return structured.keep(groups, {name: np.arange(groups[name].size // 2) for name in names})


def outputs_of(small):
    if isinstance(small.module, nnx.Module):
        return small.module
    return functools.partial(small.module.apply, small.params)


# --- Linen --------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A residual stream that RMSNorm sees, with its epsilon in a field."""

    width: int = 8
    hidden: tuple[int, ...] = (6,)
    epsilon: float = 0.25

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="embed")(x)
        y = nn.RMSNorm(epsilon=self.epsilon, name="norm")(x)
        x = x + nn.Dense(self.width, name="down")(nn.relu(nn.Dense(self.hidden[0], name="up")(y)))
        return nn.Dense(2, name="head")(nn.RMSNorm(epsilon=self.epsilon, name="last")(x))


@pytest.fixture(scope="module")
def normed():
    fn, params, inputs = linen(Normed(), X)
    return fn, params, structured.groups(fn, params, *inputs)


def test_width_and_epsilon_fold_into_fields_and_scales(normed):
    _, params, groups = normed
    keep = halved(groups)
    small = structured.to_module(Normed(), params, keep, X)
    assert small.module == Normed(width=4, hidden=(3,), epsilon=0.5)
    assert small.fields == {"width": (8, 4), "hidden[0]": (6, 3), "epsilon": (0.25, 0.5)}
    assert small.folded == {"params/norm/scale": 2**0.5, "params/last/scale": 2**0.5}
    assert small.agrees and small.distance.relative <= 1e-5 and not small.notes

    # By hand: the norm divides by the old width what is left of the sum.
    p = structured.slice_params(params, keep)["params"]
    dense = lambda name, x: x @ np.asarray(p[name]["kernel"]) + np.asarray(p[name]["bias"])
    norm = lambda name, x: (
        x / np.sqrt(np.sum(x**2, -1, keepdims=True) / 8 + 0.25) * np.asarray(p[name]["scale"])
    )
    x = dense("embed", X)
    x = x + dense("down", np.maximum(dense("up", norm("norm", x)), 0))
    expected = dense("head", norm("last", x))
    np.testing.assert_allclose(outputs_of(small)(X), expected, rtol=1e-4, atol=1e-5)


def test_trained_weights_and_shapes_are_welcome(normed):
    fn, params, groups = normed
    keep = halved(groups, "hidden")
    trained = jax.tree.map(lambda x: 1.5 * x, structured.slice_params(params, keep))
    small = structured.to_module(Normed(), trained, keep, X)
    assert small.module == Normed(hidden=(3,)) and not small.folded
    expected = structured.rebuild(fn, keep)(trained, X)
    np.testing.assert_allclose(outputs_of(small)(X), expected, rtol=1e-5)

    abstract = structured.to_module(Normed(), jax.eval_shape(lambda: params), keep, X)
    assert abstract.module == small.module and abstract.distance is None and not abstract.agrees
    assert "not compared" in str(abstract)


def test_an_epsilon_without_a_field_is_told_and_measured():
    module = Llama(LlamaConfig(**LLAMA, tied=True))
    fn, params, inputs = ZOO["llama_scanned"].build()
    keep = halved(structured.groups(fn, params, *inputs))
    small = structured.to_module(module, params, keep, *inputs)
    changed = {name.removeprefix("config."): new for name, (_, new) in small.fields.items()}
    assert changed == {"dim": 2, "heads": 2, "kv_heads": 1, "hidden": 3}
    assert set(small.folded) == {
        f"params/{n}/scale" for n in ("layers/norm1", "layers/norm2", "norm")
    }
    assert small.agrees and small.structural.relative <= 1e-5 < small.distance.relative < 1e-3
    assert len(small.notes) == 3 and "epsilon stays 1.0e-06, where 2.0e-06" in small.notes[0]
    assert "but for epsilon" in str(small)


def test_a_state_of_a_recurrence_is_set_where_all_widths_are_one_field():
    module = CharLSTM(5, 4, 2)
    fn, params, inputs = linen(module, jnp.array([[0, 3, 1]]))
    groups = structured.groups(fn, params, *inputs)
    small = structured.to_module(module, params, halved(groups), *inputs)
    assert small.module.features == 2 and small.agrees
    cell = structured.keep(groups, {"params/cell_0/gates/kernel": [0, 1]})
    with pytest.raises(ArgumentError, match="cell_0/gates/bias.*structured.rebuild"):
        structured.to_module(module, params, cell, *inputs)


def test_stages_of_a_resnet_fit_one_width_only_if_all_halve_about_the_middle():
    module = CifarResNet(blocks=1, width=4, classes=3)
    images = np.random.default_rng(1).standard_normal((1, 4, 4, 3)).astype(np.float32)
    fn, params, inputs = linen(module, images)
    groups = structured.groups(fn, params, *inputs)
    units = {name: np.arange(group.size // 2) for name, group in groups.items()}
    # A shortcut pads zeros on both sides: as many go on the left as on the right.
    units["params/layer2_0/conv2/kernel"] = [0, 2]
    units["params/layer3_0/conv2/kernel"] = [0, 1, 4, 5]
    small = structured.to_module(module, params, structured.keep(groups, units), *inputs)
    assert small.module.width == 2 and small.agrees

    units["params/layer2_0/conv2/kernel"] = [0, 1]  # same shapes, zeros elsewhere
    aside = structured.keep(groups, units)
    with pytest.raises(ArgumentError, match="a module that computes something else"):
        structured.to_module(module, params, aside, *inputs)


class OffCentre(nn.Module):
    """LayerNorm over the residual stream."""

    width: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="embed")(x)
        return nn.Dense(2, name="head")(nn.LayerNorm(name="norm")(x))


def test_a_subtracted_mean_is_refused_or_measured():
    fn, params, inputs = linen(OffCentre(), X)
    keep = halved(structured.groups(fn, params, *inputs))
    with pytest.raises(ArgumentError, match="subtracts a mean over 8, of which 4 are left"):
        structured.to_module(OffCentre(), params, keep, X)
    with pytest.raises(ArgumentError, match="subtracts a mean"):
        structured.to_module(OffCentre(), jax.eval_shape(lambda: params), keep, X)
    small = structured.to_module(OffCentre(), params, keep, X, exact=False)
    assert small.module.width == 4 and not small.agrees
    shrunk = structured.rebuild(fn, keep)(structured.slice_params(params, keep), X)
    off = float(np.max(np.abs(outputs_of(small)(X) - shrunk)) / np.max(np.abs(shrunk)))
    assert 1e-3 < off <= small.distance.relative * 1.001


class Gemma(nn.Module):
    """A norm of the user's own, whose scale is off by 1, and attention written out."""

    width: int = 8
    size: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, use_bias=False, name="embed")(x)
        scale = self.param("scale", nn.initializers.normal(), (self.width,))
        x = x * (jnp.mean(x * x, -1, keepdims=True) + 0.0) ** -0.5 * (1 + scale)
        q, k, v = (nn.DenseGeneral((2, self.size), name=name)(x) for name in "qkv")
        scores = jnp.einsum("qhd,khd->hqk", q, k) * self.size**-0.5
        y = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v)
        return nn.DenseGeneral(2, axis=(-2, -1), name="out")(y)


def test_own_norms_and_the_size_of_heads_fold():
    fn, params, inputs = linen(Gemma(), X)
    groups = structured.groups(fn, params, *inputs, whole_heads=False)
    keep = halved(groups, "residual", "embedding", "hidden", "head size")
    small = structured.to_module(Gemma(), params, keep, X)
    assert small.module == Gemma(width=4, size=2) and small.agrees and not small.notes
    assert small.folded == {
        "params/scale": 2**0.5, "params/q/kernel": 0.5**0.5, "params/q/bias": 0.5**0.5
    }  # fmt: skip
    scale = np.asarray(params["params"]["scale"])[:4]
    np.testing.assert_allclose(small.params["params"]["scale"], (1 + scale) * 2**0.5 - 1, rtol=1e-5)


# --- NNX ----------------------------------------------------------------------------------------


def test_nnx_keywords_defaults_and_tuples_are_set():
    class Default(NnxMixer):
        def __init__(self, patches=4, *, width=4, hidden=(6, 8), rngs):
            super().__init__(
                patches, width=width, blocks=1, hidden=hidden, patch=2, classes=3, rngs=rngs
            )

    build = functools.partial(Default, rngs=nnx.Rngs(0))
    images = np.random.default_rng(1).standard_normal((1, 4, 4, 3)).astype(np.float32)
    fn, params, _ = nnx_model(build, images)
    keep = halved(structured.groups(fn, params, images), "hidden")
    small = structured.to_module(build, params, keep, images)
    assert small.fields == {"hidden[0]": (6, 3), "hidden[1]": (8, 4)} and small.agrees
    assert isinstance(small.module, Default) and small.module.blocks[0].tokens.up.out_features == 3
    expected = structured.rebuild(fn, keep)(structured.slice_params(params, keep), images)
    np.testing.assert_allclose(small.module(images), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ArgumentError, match="cannot be folded"):
        keep = halved(structured.groups(fn, params, images), "residual")
        structured.to_module(build, params, keep, images)


def test_nnx_attributes_take_the_epsilon():
    build = functools.partial(NnxLlama, LlamaConfig(**LLAMA), rngs=nnx.Rngs(0))
    fn, params, inputs = ZOO["llama_scanned_nnx"].build()
    keep = halved(structured.groups(fn, params, *inputs))
    small = structured.to_module(build, params, keep, *inputs)
    assert small.fields["config.dim"] == (4, 2) and small.agrees and not small.notes
    assert small.distance.relative <= 1e-5
    assert small.module.layers.norm1.epsilon == pytest.approx(2e-6)
    assert small.module.embed.embedding[...].shape == (7, 2)
    assert tree.count(nnx.state(small.module)) == tree.count(small.params)


def test_what_is_no_module_is_refused(normed):
    _, params, groups = normed
    keep = halved(groups)
    for module in (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lambda: {"a": jnp.ones(2)}, 3):
        with pytest.raises(ArgumentTypeError, match="functools.partial"):
            structured.to_module(module, params, keep, X)


# --- The search ---------------------------------------------------------------------------------


def test_search_lists_all_that_fit_and_does_not_fall_for_equal_numbers():
    # Two numbers are 8, of which one must stay; a product of two can halve in two ways.
    places = {("vocab",): 8, ("width",): 8, ("heads",): 4, ("size",): 4}
    shapes = lambda s: {
        "embed": (s.get(("vocab",), 8), s.get(("width",), 8)),
        "q": (s.get(("width",), 8), s.get(("heads",), 4) * s.get(("size",), 4)),
    }
    wanted = {"embed": (8, 4), "q": (4, 8)}
    found = [settings for settings, misfits in search(places, [(4, 2), (8, 4)], wanted, shapes)]
    assert {frozenset(s.items()) for s in found} == {
        frozenset({(("width",), 4), ((name,), 2)}) for name in ("heads", "size")
    }


def test_search_gives_the_best_of_what_does_not_fit_within_its_bound():
    trials = []

    def shapes(settings):
        trials.append(settings)
        width = settings.get(("a",), 8)
        if width == 2:
            return None
        return {"x": (width,), "y": (width,)}

    places = {("a",): 8, ("b",): 8, ("c",): 8}
    wanted = {"x": (4,), "y": (6,)}
    ((settings, misfits),) = search(places, [(8, 4), (8, 6), (8, 2)], wanted, shapes)
    assert misfits == ["y"] and settings[("a",)] == 4
    assert len(trials) <= MOST_TRIALS and len({tuple(sorted(s.items())) for s in trials}) == len(
        trials
    )
