"""jaxcompress: model compression for JAX as pure functions over parameter pytrees.

Each part is loaded when it is first used.
"""

from typing import TYPE_CHECKING

from jaxcompress import lazy

if TYPE_CHECKING:
    from jaxcompress import adapters as adapters
    from jaxcompress import budget as budget
    from jaxcompress import distill as distill
    from jaxcompress import errors as errors
    from jaxcompress import export as export
    from jaxcompress import graph as graph
    from jaxcompress import linalg as linalg
    from jaxcompress import lowrank as lowrank
    from jaxcompress import numerics as numerics
    from jaxcompress import quantize as quantize
    from jaxcompress import report as report
    from jaxcompress import sparsity as sparsity
    from jaxcompress import stats as stats
    from jaxcompress import structured as structured
    from jaxcompress import train as train
    from jaxcompress import tree as tree
else:
    __getattr__, __dir__ = lazy.attach(
        __name__,
        submodules=[
            "adapters",
            "budget",
            "distill",
            "errors",
            "export",
            "graph",
            "linalg",
            "lowrank",
            "numerics",
            "quantize",
            "report",
            "sparsity",
            "stats",
            "structured",
            "train",
            "tree",
        ],
    )

__version__ = "0.1.0"
