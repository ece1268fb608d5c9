"""jaxcompress: model compression for JAX as pure functions over parameter pytrees."""

from jaxcompress import adapters as adapters
from jaxcompress import budget as budget
from jaxcompress import distill as distill
from jaxcompress import errors as errors
from jaxcompress import export as export
from jaxcompress import graph as graph
from jaxcompress import lowrank as lowrank
from jaxcompress import numerics as numerics
from jaxcompress import quantize as quantize
from jaxcompress import report as report
from jaxcompress import sparsity as sparsity
from jaxcompress import structured as structured
from jaxcompress import train as train
from jaxcompress import tree as tree

__version__ = "0.1.0"
