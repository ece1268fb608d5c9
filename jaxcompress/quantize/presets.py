"""Ready policies. All of them take the weights (`tree.weights`), and leave the rest alone.

Formats in groups have bfloat16 scales, which costs no accuracy (weights are divided by what is
stored) and saves the compilers of TPUs a wider copy. A leaf that a group size does not divide is
left alone and named by `quantize.coverage`; `ptq` takes the nearest smaller divisor.
"""

from typing import Any

import jax.numpy as jnp

from jaxcompress import numerics
from jaxcompress.numerics import (
    MSE,
    Convention,
    Format,
    Granularity,
    LeastSquares,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    binary,
    binary_basis,
    float8_e4m3fn,
    int3,
    power_of_two,
    ternary,
)
from jaxcompress.numerics import int4 as _int4
from jaxcompress.numerics import int8 as _int8
from jaxcompress.numerics import nf4 as _nf4
from jaxcompress.quantize._clip import ClipSearch
from jaxcompress.quantize._gptq import GPTQ
from jaxcompress.quantize._policy import Policy, Rule


def _all_weights(format: Format, **options: Any) -> Policy:
    return Policy((Rule(weights=format, **options),))


def _int4_format(granularity: Granularity, dtype: Any = jnp.float32) -> Format:
    # All sixteen codes, the extra one on the side of the larger extreme: a seventh less error
    # than without it, and less than by the conventions that always have it below.
    return Format(_int4, granularity, range=MSE(), scale_dtype=dtype, convention=Convention.SIGNED)


int8 = _all_weights(Format(_int8, PerChannel()), activations=Format(_int8, PerToken()))
"""8-bit weights and activations: a scale per output, and per token as it comes."""

int8_static = _all_weights(
    Format(_int8, PerChannel()), activations=Format(_int8, PerTensor(), range=MSE()), static=True
)
"""8-bit weights and activations, whose ranges are settled by `ptq`: one scale per activation."""

int8_weights = _all_weights(Format(_int8, PerChannel()))
"""8-bit integers, a scale per output from the largest magnitude."""

int4 = _all_weights(_int4_format(PerChannel()), method=ClipSearch())
"""4-bit integers, a scale per output, cut where the squared error of the outputs is least."""

int4_g128 = _all_weights(_int4_format(PerGroup(128), jnp.bfloat16), method=ClipSearch())
"""4-bit integers, a scale per output and 128 inputs, cut where the outputs' error is least."""

int4_gptq = _all_weights(_int4_format(PerChannel()), method=GPTQ())
"""4-bit integers by GPTQ, a scale per output; for `ptq` only."""

int4_gptq_g128 = _all_weights(_int4_format(PerGroup(128), jnp.bfloat16), method=GPTQ())
"""4-bit integers by GPTQ, a scale per output and 128 inputs; for `ptq` only."""

int3_g128 = _all_weights(Format(int3, PerGroup(128), scale_dtype=jnp.bfloat16, range=MSE()))
"""3-bit integers (stored in 4), a scale per output and 128 inputs, least squared error."""

float8 = _all_weights(
    Format(float8_e4m3fn, PerChannel()), activations=Format(float8_e4m3fn, PerToken())
)
"""float8 weights and activations: a scale per output, and per token as it comes."""

float8_weights = _all_weights(Format(float8_e4m3fn, PerChannel()))
"""float8 with 4 exponent bits, a scale per output from the largest magnitude."""

nf4 = _all_weights(Format(_nf4, PerGroup(64), scale_dtype=jnp.bfloat16))
"""NormalFloat of QLoRA (arXiv:2305.14314), a scale per output and 64 inputs."""

mxfp8 = _all_weights(numerics.mxfp8)
"""OCP MXFP8 (E4M3), a power of two per output and 32 inputs: 8.25 bits."""

mxfp4 = _all_weights(numerics.mxfp4)
"""OCP MXFP4 (E2M1), a power of two per output and 32 inputs: 4.25 bits."""

nvfp4 = _all_weights(numerics.nvfp4)
"""NVFP4, an E4M3 scale per output and 16 inputs under one scale per leaf: 4.5 bits."""

power_of_two_weights = _all_weights(Format(power_of_two(5, terms=2), PerChannel(), range=MSE()))
"""Sums of two signed powers of two, 5 bits (stored in 8), a scale per output."""

ternary_weights = _all_weights(Format(ternary, PerChannel(), range=LeastSquares()))
"""-1, 0 and 1, a least-squares scale per output."""

binary_weights = _all_weights(Format(binary, PerChannel(), range=LeastSquares()))
"""-1 and 1 (stored in 2 bits), the mean magnitude as the scale of each output."""

binary_basis2_weights = _all_weights(Format(binary_basis(2), PerChannel()))
"""Two sign vectors, two least-squares scales per output."""
