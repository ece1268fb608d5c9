"""Params as an addressed set of leaves: paths, `where`, selection, partition, sizes.

Every pytree of arrays is welcome: Linen `variables` dicts, `FrozenDict`, `nnx.State`, Equinox
modules, tuples and lists. A leaf's *path* is its address as text, `encoder/layer_0/mlp/kernel`.
`None` stands for "no leaf here" and is skipped everywhere.
"""

from jaxcompress.tree._coverage import Coverage as Coverage
from jaxcompress.tree._coverage import cover as cover
from jaxcompress.tree._partition import map_where as map_where
from jaxcompress.tree._partition import merge as merge
from jaxcompress.tree._partition import partition as partition
from jaxcompress.tree._paths import LeafNode as LeafNode
from jaxcompress.tree._paths import Params as Params
from jaxcompress.tree._paths import flatten_like as flatten_like
from jaxcompress.tree._paths import is_leaf as is_leaf
from jaxcompress.tree._paths import items as items
from jaxcompress.tree._paths import leaves as leaves
from jaxcompress.tree._paths import map_with_path as map_with_path
from jaxcompress.tree._paths import path_str as path_str
from jaxcompress.tree._paths import paths as paths
from jaxcompress.tree._paths import shorten as shorten
from jaxcompress.tree._sizes import bits_of as bits_of
from jaxcompress.tree._sizes import count as count
from jaxcompress.tree._sizes import is_floating as is_floating
from jaxcompress.tree._sizes import nbytes as nbytes
from jaxcompress.tree._where import Where as Where
from jaxcompress.tree._where import matches as matches
from jaxcompress.tree._where import select as select
from jaxcompress.tree._where import weights as weights
from jaxcompress.tree._where import without as without
