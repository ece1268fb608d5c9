"""What was trained rounded, converted and executed by codes gives what training saw."""

import jax
import jax.numpy as jnp
import pytest

from jaxcompress import quantize
from jaxcompress.numerics import (
    Format,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    int4,
    int8,
    uint8,
)

INT8, INT4 = Format(int8, PerChannel()), Format(int4, PerChannel())
UINT8 = Format(uint8, PerTensor(), symmetric=False)
CASES = {
    "ste, per token": (INT8, Format(int8, PerToken()), False, {}),
    "ste, followed range": (INT8, UINT8, True, {}),
    "ste, groups": (Format(int4, PerGroup(4)), Format(int8, PerToken()), False, {}),
    "lsq": (
        INT4,
        Format(int8, PerTensor()),
        True,
        {"weights": quantize.LSQ(), "activations": quantize.LSQ()},
    ),
    "lsq+": (INT4, UINT8, True, {"activations": quantize.LSQPlus()}),
    "pact": (INT4, UINT8, True, {"activations": quantize.PACT()}),
}


def fn(params, x):
    """Convolve, rectify, and contract: `(batch, 6, 6, 4)` to `(batch, 8)`."""
    y = jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = jax.nn.relu(y).reshape(len(x), -1, 8).mean(1)
    return jax.nn.relu(y @ params["up"]) @ params["down"]


@pytest.fixture(scope="module")
def model():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "conv": jax.random.normal(keys[0], (3, 3, 4, 8)) / 6,
        "up": jax.random.normal(keys[1], (8, 16)) / 2,
        "down": jax.random.normal(keys[2], (16, 8)) / 4,
    }
    return params, jnp.abs(jax.random.normal(keys[3], (12, 6, 6, 4)))


@pytest.mark.parametrize("case", CASES)
def test_execution_gives_what_training_saw(model, case):
    params, x = model
    weights, activations, static, quantizers = CASES[case]
    where = ["up", "down"] if case == "ste, groups" else "*"
    rule = quantize.Rule(where=where, weights=weights, activations=activations, static=static)
    qat = quantize.train(fn, quantize.Policy((rule,)), **quantizers)
    variables = qat.init(params, x) if qat.has_state else params
    if qat.has_state:
        _, state = qat.observe(variables, x)
        variables = {**variables, "quantizers": variables["quantizers"] | state["quantizers"]}
    trained = jax.jit(qat)(variables, x)
    packed = qat.convert(variables, x)
    executed = jax.jit(quantize.execute(fn))(packed, x)
    scale = jnp.abs(trained).max()
    # A sum that lies between two codes can round to either downstream; almost all do not.
    off = jnp.abs(executed - trained) / scale
    assert (off < 1e-5).mean() > 0.9 and off.max() < 0.02
    assert (executed.argmax(-1) == trained.argmax(-1)).mean() > 0.9
    kernels = {use.kernel.split()[0] for use in quantize.site_kernels(fn, packed, x)}
    assert kernels == {"codes"}
