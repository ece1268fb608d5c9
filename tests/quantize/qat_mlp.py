"""What the tests of quantization-aware training share: an MLP, formats, a policy."""

import jax
import jax.numpy as jnp

from jaxcompress.numerics import (
    Format,
    PerChannel,
    PerTensor,
    PerToken,
    int4,
    int8,
)
from jaxcompress.quantize import Policy, Rule

W8, W4 = Format(int8, PerChannel()), Format(int4, PerChannel())
A8 = Format(int8, PerToken())
A8_STATIC = Format(int8, PerTensor(), symmetric=False)


def policy(weights=W8, **options):
    return Policy((Rule(weights=weights, **options),))


def mlp(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"] + params["bias"]


def draw_params():
    a, b = jax.random.split(jax.random.key(0))
    return {
        "a": jax.random.normal(a, (6, 8)),
        "b": jax.random.normal(b, (8, 4)),
        "bias": jnp.ones(4),
    }


def draw_inputs():
    return jax.random.normal(jax.random.key(2), (5, 6))


def put(variables, state):
    return {**variables, "quantizers": {**variables["quantizers"], **state["quantizers"]}}
