"""Small functions with their groups written by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import structured

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def member(path, axis, size, *, m=1, kind="", layers=(), offset=0):
    """`kind` has "p" where the leaf's site computes the units, "r" where it reads them."""
    indices = offset + np.arange(size * m).reshape(size, m)
    return structured.Member(
        path=path,
        axis=axis,
        indices=indices,
        produces="p" in kind,
        reads="r" in kind,
        layers=layers,
    )


def group(name, size, *members, layers=()):
    return structured.Group(
        name=name,
        size=size,
        members=members,
        role="hidden",
        description=name,
        layers=layers,
    )


# --- Two layers with a norm scale, one group of 4 and its batch statistics ------------------------

MLP = {
    "params": {
        "up": {"kernel": normal(3, 4), "bias": normal(4)},
        "norm": {"scale": normal(4), "bias": normal(4)},
        "down": {"kernel": normal(4, 2), "bias": normal(2)},
    },
    "batch_stats": {"norm": {"mean": 100 + normal(4)}},
}


def mlp(params, x):
    p = params["params"]
    hidden = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
    hidden = (hidden - params["batch_stats"]["norm"]["mean"] / 100) * p["norm"]["scale"]
    return (hidden + p["norm"]["bias"]) @ p["down"]["kernel"] + p["down"]["bias"]


MLP_GROUPS = {
    "up": group(
        "up",
        4,
        member("params/up/kernel", 1, 4, kind="p"),
        member("params/up/bias", 0, 4),
        member("params/norm/scale", 0, 4),
        member("params/norm/bias", 0, 4),
        member("params/down/kernel", 0, 4, kind="r"),
        member("batch_stats/norm/mean", 0, 4),
    )
}

# --- Two scanned layers, each with hidden units of its own and a residual stream for both ---------

STACK = {"up": normal(2, 3, 4), "bias": normal(2, 4), "down": normal(2, 4, 3)}


def stack(params, x):
    def layer(x, p):
        return x + jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"], None

    return jax.lax.scan(layer, x, params)[0]


STACK_GROUPS = {
    "hidden": group(
        "hidden",
        4,
        member("up", 2, 4, kind="p", layers=(0,)),
        member("bias", 1, 4, layers=(0,)),
        member("down", 1, 4, kind="r", layers=(0,)),
        layers=(2,),
    ),
    "stream": group("stream", 3, member("up", 1, 3, kind="r"), member("down", 2, 3, kind="p")),
}

# --- Heads of two features, their kernels split (heads, features) and merged ----------------------

HEADS = {"value": normal(3, 4), "out": normal(2, 2, 3)}


def heads(params, x):
    values = (x @ params["value"]).reshape(*x.shape[:-1], 2, 2)  # (tokens, heads, features)
    return jnp.einsum("...hd,hdm->...m", jnp.tanh(values), params["out"])


HEAD_GROUPS = {
    "value": group("value", 2, member("value", 1, 2, m=2, kind="p"), member("out", 0, 2, kind="r"))
}


def entries(params, member):
    """Entries of each unit in each layer, `[*layers][unit]`, by loops in NumPy."""
    leaf = params
    for key in member.path.split("/"):
        leaf = leaf[key]
    leaf = np.asarray(leaf, np.float64)
    layers = [leaf[k] for k in range(leaf.shape[0])] if member.layers else [leaf]
    axis = member.axis - len(member.layers)
    found = [[np.take(x, row, axis) for row in member.indices] for x in layers]
    return found if member.layers else found[0]
