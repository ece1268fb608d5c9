"""What is in a packed file, leaf by leaf."""

import pathlib
from dataclasses import dataclass
from typing import Annotated

import rich.console
import tyro

from jaxcompress import export, report


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """List what a file written by `export.save` holds: every leaf, its format and its bytes.

    Attributes:
        path: The file; its content hash is checked.
    """

    path: Annotated[pathlib.Path, tyro.conf.Positional]


def run(inspect: Inspect) -> None:
    """Print the table of a file's leaves.

    Args:
        inspect: Which file.

    Raises:
        FileError: If the file is truncated, altered or of another kind.
    """
    loaded = export.load(inspect.path)
    leaves = report.leaves(loaded.params, mask=loaded.mask, file_bytes=loaded.info.leaves)
    table = leaves.table(title=f"{inspect.path}, {loaded.info.bytes:,} bytes")
    print(table.text(width=rich.console.Console().width))
    for name, value in loaded.metadata.items():
        print(f"{name}: {value}")
