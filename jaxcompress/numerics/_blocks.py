"""Block formats of hardware: the concrete formats of OCP MX, and NVFP4.

They group entries along axis -2, the contraction axis of a Flax kernel. Every backend computes
them exactly, for normal float32 numbers; subnormal ones count as zero where the backend has it so.
"""

import jax.numpy as jnp

from jaxcompress.numerics._format import Format
from jaxcompress.numerics._granularity import PerGroup
from jaxcompress.numerics._types import float4_e2m1fn, float8_e4m3fn, float8_e5m2, int8

mxfp8 = Format(float8_e4m3fn, PerGroup(32), scale_dtype=jnp.float8_e8m0fnu)
"""MXFP8 with E4M3 elements: a power of two per 32 entries (OCP MX 1.0, section 5.2), 8.25 bits."""

mxfp8_e5m2 = Format(float8_e5m2, PerGroup(32), scale_dtype=jnp.float8_e8m0fnu)
"""MXFP8 with E5M2 elements: 8.25 bits per entry."""

mxfp4 = Format(float4_e2m1fn, PerGroup(32), scale_dtype=jnp.float8_e8m0fnu)
"""MXFP4: E2M1 elements, a power of two per 32 entries, 4.25 bits."""

mxint8 = Format(int8, PerGroup(32), scale_dtype=jnp.float8_e8m0fnu)
"""MXINT8: integers from -127 to 127; the scale has the element type's own factor 2**-6 in it, and
so its code is 6 below the standard's."""

nvfp4 = Format(float4_e2m1fn, PerGroup(16), scale_dtype=jnp.float8_e4m3fn, global_scale=True)
"""NVFP4: E2M1 elements, an E4M3 scale per 16 entries and a float32 one per array, 4.5 bits
(NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149, appendix B)."""
