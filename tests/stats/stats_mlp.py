"""The small network and batches that the tests of `collect` share."""

import jax.numpy as jnp
import numpy as np

RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


MLP = {
    "up": {"kernel": normal(4, 6), "bias": normal(6)},
    "down": {"kernel": normal(6, 3), "bias": normal(3)},
    "spare": normal(2, 2),
}
BATCHES = [normal(5, 4), normal(5, 4), normal(2, 4)]


def mlp(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"]
