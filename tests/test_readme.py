"""The README's code runs as it is written."""

import doctest
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from jaxcompress import adapters, export, quantize, sparsity

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
LOOP, SESSION = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def names():
    module = nn.Sequential([nn.Dense(100), nn.relu, nn.Dense(10)])
    x = jax.random.normal(jax.random.key(1), (8, 128))
    fn, params = adapters.from_linen(module, module.init(jax.random.key(0), x))
    return {"fn": fn, "params": params, "batches": [x] * 3}


def test_the_training_loop(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Three batches stand for the thousand steps of the schedule.
    exec(LOOP.replace("end=1000", "end=1").replace("every=50", "every=1"), scope := dict(names))
    loaded = export.load("model.safetensors")
    assert sparsity.sparsity_of(quantize.unpack(loaded.params)).total == pytest.approx(
        0.8, abs=0.05
    )
    assert not jnp.array_equal(
        names["params"]["params"]["layers_0"]["kernel"],
        scope["params"]["params"]["layers_0"]["kernel"],
    )


def test_the_session(names):
    parsed = doctest.DocTestParser().get_doctest(
        SESSION, {"quantize": quantize, **names}, "README", None, None
    )
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(parsed)
    assert result.attempted == 1 and result.failed == 0
