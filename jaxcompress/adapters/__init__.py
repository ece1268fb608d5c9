"""From a model of any library to `(fn, params)`, and back.

Everything in jaxcompress works on a pure `fn(params, *inputs)`. These adapters make one from a
Linen, NNX or Equinox model, and fill Flax params from a PyTorch checkpoint. Each is loaded when it
is first used, and its library with it.
"""

from typing import TYPE_CHECKING

from jaxcompress import lazy
from jaxcompress.adapters._fn import Fn as Fn
from jaxcompress.adapters._learnable import learnable as learnable

if TYPE_CHECKING:
    from jaxcompress.adapters._equinox import from_equinox as from_equinox
    from jaxcompress.adapters._equinox import to_equinox as to_equinox
    from jaxcompress.adapters._linen import from_linen as from_linen
    from jaxcompress.adapters._nnx import from_nnx as from_nnx
    from jaxcompress.adapters._nnx import to_nnx as to_nnx
    from jaxcompress.adapters._torch import from_torch_state as from_torch_state
else:
    __getattr__, __dir__ = lazy.attach(
        __name__,
        names={
            "_equinox": ["from_equinox", "to_equinox"],
            "_linen": ["from_linen"],
            "_nnx": ["from_nnx", "to_nnx"],
            "_torch": ["from_torch_state"],
        },
    )
