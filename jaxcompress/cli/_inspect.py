"""What is in a packed file, leaf by leaf."""

import rich.console

from jaxcompress import export, report
from jaxcompress.cli._commands import Inspect


def inspect_file(inspect: Inspect) -> None:
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
