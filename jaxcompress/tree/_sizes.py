"""Entries of leaves: how many, their bits and bytes as XLA keeps them, and checks of them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress.errors import NonFiniteError
from jaxcompress.tree._paths import LeafNode, Params, leaves, shorten


def is_floating(leaf: Any) -> bool:
    """Tell whether a leaf is a floating-point array (bfloat16 and float8 too).

    Args:
        leaf: An array, a `ShapeDtypeStruct`, a `LeafNode`, or anything else.

    Returns:
        Whether it is one; `False` for integers, random keys and non-arrays.
    """
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def count(params: Params) -> int:
    """Count the entries of all leaves.

    Args:
        params: Any pytree of arrays (shapes are enough).

    Returns:
        The number of entries; a random key counts as one.

    Example:
        >>> count({"kernel": np.ones((3, 4)), "bias": np.ones(4)})
        16
    """
    return sum(math.prod(leaf.shape) for leaf in leaves(params))


def nbytes(params: Params) -> int:
    """Sum the bytes that XLA keeps for all leaves; int4 entries take half a byte.

    Args:
        params: Any pytree of arrays (shapes are enough).

    Returns:
        Bytes.

    Example:
        >>> nbytes({"kernel": jnp.ones((3, 4), jnp.bfloat16), "w": jnp.ones((3, 3), jnp.int4)})
        29
    """
    return sum(_leaf_bytes(leaf) for leaf in leaves(params))


def _leaf_bytes(leaf: Any) -> int:
    if isinstance(leaf, LeafNode):
        return leaf.nbytes
    return -(-math.prod(leaf.shape) * bits_of(leaf.dtype) // 8)


def bits_of(dtype: Any) -> int:
    """Give the bits that one entry takes in memory: 4 for int4, 8 for bool.

    Args:
        dtype: A NumPy, JAX or ml_dtypes dtype.

    Returns:
        Bits per entry.

    Example:
        >>> bits_of(jnp.int4), bits_of(jnp.bfloat16), bits_of(bool)
        (4, 16, 8)
    """
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return 8 * dtype.itemsize if hasattr(dtype, "itemsize") else 8 * np.dtype(dtype).itemsize


def require_finite(leaves: Mapping[str, Any], *, fix: str) -> None:
    """Refuse leaves that hold NaN or infinity, where values can be looked at.

    Args:
        leaves: Arrays by path; traced ones pass.
        fix: What to do about it, for the error.

    Raises:
        NonFiniteError: Naming the leaves.
    """
    bad = [p for p, x in leaves.items() if not isinstance(x, Tracer) and not _is_finite(x)]
    if bad:
        raise NonFiniteError(
            "params", got=f"NaN or infinity in {shorten(bad)}", expected="finite weights", fix=fix
        )


@jax.jit
def _is_finite(x: Any) -> jax.Array:
    return jnp.isfinite(x).all()
