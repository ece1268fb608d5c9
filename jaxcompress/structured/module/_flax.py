"""Flax, or an error that says how to install it."""

from jaxcompress.errors import explain_missing

with explain_missing("`structured.to_module`", package="flax"):
    import flax.linen as nn
    from flax import nnx

__all__ = ["nn", "nnx"]
