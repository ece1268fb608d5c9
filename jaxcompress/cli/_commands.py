"""The commands and their arguments, apart from what runs them: `--help` loads no more than this."""

import pathlib
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import tyro

ModelName: TypeAlias = Literal["conv", "vit"]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train, prune, distil, quantize and pack a model of scikit-learn's digits; no download.

    Attributes:
        out: Where to write the report, the plots, the results and the packed models.
        seed: Seeds the split, the initial weights and the order of the data.
        model: The teacher: a small convolutional net, or a small vision transformer.
        sparsity: The fraction of weights to prune, from 0 to 1.
        steps: Training steps of the dense teacher; every later stage takes half as many.
    """

    out: pathlib.Path = pathlib.Path("jaxcompress-demo")
    seed: int = 0
    model: ModelName = "conv"
    sparsity: float = 0.8
    steps: int = 800


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """List what a file written by `export.save` holds: every leaf, its format and its bytes.

    Attributes:
        path: The file; its content hash is checked.
    """

    path: Annotated[pathlib.Path, tyro.conf.Positional]


Command: TypeAlias = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)
