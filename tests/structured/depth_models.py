"""Small functions with residual blocks, written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / 2, jnp.float32)


X = draw(99, 5, 4)


def layer(x, p):
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


def unrolled(params, x):
    """Three layers one after the other, and a head."""
    for name in ("layer_0", "layer_1", "layer_2"):
        x = layer(x, params[name])
    return x @ params["head"]


def unrolled_params():
    names = ("layer_0", "layer_1", "layer_2")
    layers = {n: {"up": draw(k, 4, 3), "down": draw(k + 9, 3, 4)} for k, n in enumerate(names)}
    return {**layers, "head": draw(50, 4, 2)}


def scanned(params, x):
    """The same in one scan over stacked leaves."""
    x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), x, params["layers"])
    return x @ params["head"]


def stacked_params():
    params = unrolled_params()
    layers = [params[f"layer_{k}"] for k in range(3)]
    return {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers), "head": params["head"]}


def without(params, *gone):
    """What the unrolled function gives if its layers are run by hand, some left out."""
    x = np.asarray(X)
    for k in range(3):
        if k not in gone:
            p = {n: np.asarray(leaf) for n, leaf in params[f"layer_{k}"].items()}
            x = x + np.tanh(x @ p["up"]) @ p["down"]
    return x @ np.asarray(params["head"])
