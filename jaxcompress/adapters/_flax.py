"""Flax, or an error that says how to install it."""

from jaxcompress.errors import explain_missing

with explain_missing("The adapter of Flax modules", package="flax"):
    import flax.linen as nn
    from flax import nnx

__all__ = ["nn", "nnx"]
