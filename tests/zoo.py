"""Tiny models of every structure that people use, with what a graph of each must contain.

Each model says by hand how many FLOPs its contractions take and where every leaf goes, so that
`jaxcompress.graph` can be held against it: images first, then sequences, then oddities. Models
worth reading live in `examples/models/`.
"""

import importlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from zoo_registry import ZOO as ZOO
from zoo_registry import Model as Model

for part in ("zoo_images", "zoo_sequences"):  # importing them fills the zoo, in this order
    importlib.import_module(part)
