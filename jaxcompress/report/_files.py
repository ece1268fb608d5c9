"""Files that are there whole or not at all."""

import os
import pathlib
import secrets


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file beside its place and rename it there.

    Args:
        path: Where to; missing folders are made.
        text: What to write, as UTF-8.
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside its place and rename it there.

    Args:
        path: Where to; missing folders are made.
        content: What to write.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
