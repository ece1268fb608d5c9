"""Targets: published figures, topologies, meshes, rates, and what is said without a plugin."""

import importlib.util
import os

import jax.numpy as jnp
import pytest

from jaxcompress import errors, graph
from jaxcompress.graph import Target
from jaxcompress.graph.cost import _aot_devices
from jaxcompress.graph.cost._targets import TARGETS, resolve

needs_tpu = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is absent"),
]
ACCELERATORS = sorted(set(TARGETS) - {"cpu"})


@pytest.mark.parametrize("name", ACCELERATORS)
def test_published_figures_are_plausible(name):
    target = Target.named(name)
    assert target.name == name and target.source
    assert 1e14 < target.rates["bfloat16"] < 1e15
    assert target.rates["bfloat16"] <= target.rates["int8"] <= 2 * target.rates["bfloat16"]
    # Machine balance: hundreds of operations per byte on all of them.
    assert 100 < target.rates["bfloat16"] / target.bandwidth < 700
    assert 16e9 <= target.memory <= 141e9


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("tpu-v5e", "bfloat16", 197),
        ("tpu-v5e", "float32", 197),
        ("tpu-v5e", "int4", 393),
        ("tpu-v5e", "float8_e4m3fn", 197),
        ("tpu-v6e", "uint8", 1836),
        ("tpu-v4", "float16", 275),
        ("h200", "float8_e5m2", 1979),
        ("h100", "float32", 494.7),
        ("a100", "float8_e4m3fn", 312),
    ],
)
def test_rates_by_dtype(name, dtype, tera):
    assert Target.named(name).rate(getattr(jnp, dtype)) == pytest.approx(tera * 1e12)


def test_no_rate_where_none_was_published():
    assert Target.named("tpu-v5e").rate(jnp.int32) is None
    assert Target.named("cpu").rate(jnp.float32) is None


@pytest.mark.parametrize(
    ("text", "name", "topology"),
    [
        ("tpu-v5e:4x4", "tpu-v5e:4x4", "v5e:4x4"),
        ("v5p:4x4x8", "tpu-v5p:4x4x8", "v5p:4x4x8"),
        ("v6e", "tpu-v6e", "v6e:1x1"),
    ],
)
def test_topology_strings(text, name, topology):
    target = Target.named(text)
    assert (target.name, target.topology) == (name, topology)
    assert target.rates == Target.named(name.split(":")[0]).rates


@pytest.mark.parametrize("text", ["tpu-v9", "h200:2x2", "", "cpu:8"])
def test_unknown_names(text):
    with pytest.raises(errors.ArgumentError, match="tpu-v5e"):
        Target.named(text)


def test_what_target_may_be():
    mine = Target(name="mine", platform="cpu")
    assert resolve(mine) is mine
    with pytest.raises(errors.ArgumentTypeError, match="int"):
        resolve(3)
    with pytest.raises(errors.ArgumentError, match="rocm"):
        Target(name="mine", platform="rocm")


def test_a_mesh_of_the_cpu_devices():
    mesh = Target.named("cpu").mesh((2, 4), ("data", "model"))
    assert dict(mesh.shape) == {"data": 2, "model": 4}
    with pytest.raises(errors.ArgumentError, match="4096 devices"):
        Target.named("cpu").mesh((64, 64), ("data", "model"))


@pytest.mark.parametrize(("name", "extra"), [("tpu-v5e:2x2", "tpu"), ("h200", "cuda12")])
def test_a_missing_plugin_names_its_extra(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    monkeypatch.setattr(_aot_devices, "_devices", {})
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(errors.MissingExtraError, match=rf"jaxcompress\[{extra}\]"):
        graph.cost(lambda w, x: x @ w, jnp.ones((2, 2)), jnp.ones((2, 2)), target=name)


def test_cuda_options_describe_the_card():
    text = Target.named("h200").options["target_config"]
    assert "core_count: 132" in text and "memory_bandwidth: 4800000000000" in text
    assert "major: 9 minor: 0" in text and text.count("{") == text.count("}")
    assert "core_count: 108" in Target.named("a100").options["target_config"]


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        pytest.param("tpu-v4", 1, marks=needs_tpu),
        pytest.param("tpu-v5e", 1, marks=needs_tpu),
        pytest.param("tpu-v5p", 1, marks=needs_tpu),
        pytest.param("tpu-v6e:2x4", 8, marks=needs_tpu),
        pytest.param("v5p:4x4x8", 128, marks=needs_tpu),
    ],
)
def test_tpu_devices(name, devices):
    before = dict(os.environ)
    found = Target.named(name).devices()
    assert len(found) == devices and found[0].platform == "tpu"
    assert Target.named(name).devices() is found
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", [pytest.param("v5e:3x5x7x2", marks=needs_tpu)])
def test_topologies_that_the_compiler_refuses(name):
    with pytest.raises(errors.ArgumentError, match="3x5x7x2"):
        Target.named(name).devices()
