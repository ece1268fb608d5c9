"""Dims: which indices of which axes are the same index, and the function on fewer of them."""

from jaxcompress.graph.dims import _contract as _contract
from jaxcompress.graph.dims import _linalg as _linalg
from jaxcompress.graph.dims import _made as _made
from jaxcompress.graph.dims import _rules as _rules
from jaxcompress.graph.dims._remask import fill_removed as fill_removed
from jaxcompress.graph.dims._removed import Removed as Removed
from jaxcompress.graph.dims._removed import mask_of as mask_of
from jaxcompress.graph.dims._removed import removed_by as removed_by
from jaxcompress.graph.dims._walk import state_outputs as state_outputs
