"""jaxcompress: model compression for JAX as pure functions over parameter pytrees."""

from jaxcompress import adapters as adapters
from jaxcompress import errors as errors
from jaxcompress import tree as tree

__version__ = "0.1.0"
