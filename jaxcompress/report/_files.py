"""Files that are there whole or not at all."""

import os
import pathlib
import tempfile


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
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes it private; a report is as public as any other new file.
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
