"""One small regression problem, shared by the tests of training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest


class Problem(NamedTuple):
    params: Any
    loss: Any
    arrays: Any


@pytest.fixture(scope="session")
def problem() -> Problem:
    """A two-layer MLP with a per-example loss; sizes divide by 8 for the meshes."""
    rng = np.random.default_rng(0)
    params = {
        "first": {"kernel": rng.normal(size=(4, 8)) / 2, "bias": np.zeros(8)},
        "second": {"kernel": rng.normal(size=(8, 2)) / 3, "bias": np.zeros(2)},
    }
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    x = np.asarray(rng.normal(size=(40, 4)), np.float32)
    y = np.stack([np.sin(x[:, 0]), x[:, 1] * x[:, 2]], axis=1)

    def loss(params, batch, key):
        hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"])
        out = hidden @ params["second"]["kernel"] + params["second"]["bias"]
        return jnp.mean((out - batch["y"]) ** 2, axis=1)

    return Problem(params, loss, {"x": x, "y": y})


@pytest.fixture(scope="session")
def batch(problem):
    return jax.tree.map(lambda x: x[:16], problem.arrays)
