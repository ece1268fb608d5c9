"""The demo end to end at a few steps, `inspect`, and errors without a trace."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import cli, export
from jaxcompress.cli import _demo, _models


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert cli.main(["demo", "--out", str(out), "--steps", "24", "--seed", "3"]) == 0
    return out


def test_the_demo_writes_its_rows_and_files(demo):
    rows = json.loads((demo / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["dense", "pruned", "+ distilled", "+ int8", "+ int4"]
    sizes = [row["bytes"] for row in rows]
    assert (
        sizes[0] > 4 * sizes[1] and sizes[1] == sizes[2] and sizes[0] > 8 * sizes[3] > 8 * sizes[4]
    )
    for row in rows:
        file = demo / "models" / f"{row['model'].removeprefix('+ ')}.safetensors"
        assert file.stat().st_size == row["bytes"]
        assert row["accuracy"] > 0.3 and 0 < row["cross_entropy"] < 3
    assert rows[0]["agreement"] == 1.0 and rows[1]["agreement"] < 1.0
    assert {p.name for p in (demo / "plots").glob("*.png")} == {
        "tradeoff.png",
        "dense.png",
        "pruned.png",
        "distilled.png",
        "int8.png",
        "int4.png",
    }
    page = (demo / "report.html").read_text()
    assert "+ int4" in page and "http" not in page.replace("http://www.w3.org", "")


def test_the_demo_prunes_to_the_sparsity_asked_for(demo):
    mask = export.load(demo / "models" / "int8.safetensors").mask
    kernels = [np.asarray(m) for m in jax.tree.leaves(mask)]
    assert len(kernels) == 4
    for kernel in kernels:
        assert abs((~kernel).mean() - 0.8) <= 0.5 / kernel.size


def test_the_demo_repeats_by_seed(demo, tmp_path):
    cli.main(["demo", "--out", str(tmp_path), "--steps", "24", "--seed", "3"])
    for name in ("dense", "int4"):
        file = f"models/{name}.safetensors"
        assert (tmp_path / file).read_bytes() == (demo / file).read_bytes()


def test_inspect_lists_every_leaf(demo, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["inspect", str(demo / "models" / "int4.safetensors")]) == 0
    printed = capsys.readouterr().out
    for text in ("params/conv1/kernel", "params/head/bias", "int4", "total", "stage: + int4"):
        assert text in printed


def test_errors_come_without_a_trace(demo, tmp_path, capsys):
    whole = (demo / "models" / "int4.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-7])
    assert cli.main(["inspect", str(tmp_path / "cut.safetensors")]) == 1
    assert capsys.readouterr().err.startswith("error: `path`: expected ")
    assert cli.main(["inspect", str(tmp_path / "none.safetensors")]) == 1
    assert cli.main(["demo", "--sparsity", "1.5", "--out", str(tmp_path)]) == 1
    assert "`--sparsity`: expected a fraction" in capsys.readouterr().err
    for argument in ("--steps", "--seed"):
        assert cli.main(["demo", argument, "-1", "--out", str(tmp_path)]) == 1
        assert f"`{argument}`: expected" in capsys.readouterr().err


def test_verify_sees_one_bit(tmp_path):
    params = {"w": jnp.ones(3)}
    _demo.verify(params, {"w": jnp.ones(3)}, tmp_path)
    with pytest.raises(_demo.DemoError, match="differ from those in memory"):
        _demo.verify(params, {"w": params["w"].at[1].set(jnp.nextafter(1.0, 2.0))}, tmp_path)
    with pytest.raises(_demo.DemoError, match="another structure"):
        _demo.verify(params, {"v": jnp.ones(3)}, tmp_path)


@pytest.mark.parametrize("name", _models.MODELS)
def test_models_map_images_to_logits(name):
    shapes = jax.eval_shape(
        lambda: _models.MODELS[name]().init_with_output(jax.random.key(0), jnp.ones((3, 8, 8, 1)))
    )
    assert shapes[0].shape == (3, 10)


def test_digits_are_split_by_seed():
    (a, b), (c, _) = _models.load_digits(0), _models.load_digits(1)
    assert len(a.labels) == 1297 and len(b.labels) == 500
    assert a.images.min() == 0 and a.images.max() == 1 and a.images.dtype == np.float32
    assert not np.array_equal(a.labels, c.labels)
