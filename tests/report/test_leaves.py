"""Every leaf accounted for, in memory and in the file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import export, numerics, report, tree
from jaxcompress.errors import StructureError

KEPT = np.arange(64).reshape(8, 8) % 4 == 0


def model():
    kernel = jnp.asarray(np.where(KEPT, 1.0, 0.0), jnp.float32)
    q = numerics.quantize(kernel, numerics.Format(numerics.int4, numerics.PerChannel()))
    params = {
        "dense": {"bias": jnp.zeros(8, jnp.bfloat16), "kernel": q},
        "key": jax.random.key(0),
        "nothing": jnp.zeros((0, 3)),
        "step": 3,
        "wide": kernel,
    }
    mask = jax.tree.map(lambda _: None, params, is_leaf=lambda x: isinstance(x, tree.LeafNode))
    return params, mask | {"dense": {"bias": None, "kernel": KEPT}}


def test_rows_and_total():
    params, mask = model()
    found = report.leaves(params, mask=mask)
    by_path = {row.path: row for row in found.rows}
    assert list(by_path) == tree.paths(params)
    kernel = by_path["dense/kernel"]
    assert (kernel.stored, kernel.shape, kernel.entries, kernel.kept) == ("int4", (8, 8), 64, 16)
    assert kernel.bytes == 64 // 2 + 8 * 4 and kernel.bits == 8.0
    assert kernel.sparsity == 0.75
    assert by_path["dense/bias"].stored == "bfloat16" and by_path["dense/bias"].bits == 16
    assert by_path["nothing"].sparsity == by_path["nothing"].bits == 0
    assert by_path["step"].stored == "int" and by_path["key"].entries == 1
    assert found.total.entries == sum(row.entries for row in found.rows) == 8 + 64 + 1 + 1 + 64
    assert found.total.kept == found.total.entries - 48
    assert found.total.bytes == sum(row.bytes for row in found.rows)


def test_without_a_mask_everything_is_kept():
    params, _ = model()
    found = report.leaves(params)
    assert found.total.kept == found.total.entries and found.total.sparsity == 0


def test_the_file_adds_up(tmp_path):
    params, mask = model()
    info = export.save(tmp_path / "model.safetensors", params, mask=mask)
    found = report.leaves(params, mask=mask, file_bytes=info.leaves)
    assert found.total.file_bytes == info.bytes
    kernel = next(row for row in found.rows if row.path == "dense/kernel")
    assert kernel.file_bytes == 8 + 8 + 32 and kernel.bits == 8 * 48 / 64
    assert found.rows[-1].path == "(header)" and found.rows[-1].shape is None
    text = found.table(title="Leaves").text()
    assert text.splitlines()[-1].split()[0] == "total" and "(header)" in text
    assert "file" in text.splitlines()[1]


def test_empty_params():
    found = report.leaves({})
    assert found.rows == () and found.total.bits == 0
    assert found.table().text().splitlines()[-1].startswith("total")


def test_a_mask_of_another_model_is_refused():
    with pytest.raises(StructureError, match="`mask`"):
        report.leaves({"a": jnp.ones(3)}, mask={"b": None})
