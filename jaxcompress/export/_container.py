"""The file itself: a safetensors file that is there whole or not at all, and carries its digest.

Layout: an 8-byte header length, a JSON header, and pools of entries. The header's metadata begins
with a SHA-256 of the whole file, taken with the digest's own digits as zeros. The safetensors
package reads these files, but does not write the metadata in a fixed order, so the few lines that
write the header are here.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcompress import files
from jaxcompress.errors import FileError
from jaxcompress.export._pools import DECLARED, ITEMSIZE

_FORMAT = "jaxcompress 1"
_CONVENTIONS = (
    "little-endian; row-major; masks: 1 = kept; codes fill bytes from the low bit; "
    "3 states: 5 per byte, base 3; number = (code - zero) * scale"
)
_PREFIX = b'{"__metadata__":{"digest":"'
_BLANK = b"0" * 64
_DIGEST_AT = 8 + len(_PREFIX)

MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading a description that makes no sense can raise."""

Pools = Sequence[tuple[str, Sequence[np.ndarray]]]


def write_file(path: pathlib.Path, about: Mapping[str, Any], pools: Pools) -> tuple[str, int]:
    """Write a file beside its place, sync it, and rename it there.

    Args:
        path: Where to; missing folders are made.
        about: What to say about the pools, as JSON data.
        pools: Names, and chunks of bytes.

    Returns:
        The digest, and the bytes of the header.
    """
    header = _header(about, pools)
    digest = hashlib.sha256(header)
    with files.replacing(path) as file:
        file.write(header)
        for _, chunks in pools:
            for chunk in chunks:
                file.write(chunk.data)
                digest.update(chunk.data)
        file.seek(_DIGEST_AT)
        file.write(digest.hexdigest().encode())
    return digest.hexdigest(), len(header)


def _header(about: Mapping[str, Any], pools: Pools) -> bytes:
    texts = {key: json.dumps(value, separators=(",", ":")) for key, value in about.items()}
    metadata = {"digest": _BLANK.decode(), "format": _FORMAT, "conventions": _CONVENTIONS, **texts}
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, chunks in pools:
        declared, size = DECLARED[name], sum(chunk.size for chunk in chunks)
        entries[name] = {
            "dtype": declared,
            "shape": [size // ITEMSIZE[declared]],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    assert text.startswith(_PREFIX + _BLANK)
    return len(text).to_bytes(8, "little") + text


def refuse(path: pathlib.Path, got: str) -> FileError:
    """Make the error that refuses a file.

    Args:
        path: The file.
        got: What is wrong with it.

    Returns:
        The error.
    """
    return FileError(
        "path",
        got=f"{got} ({path})",
        expected="a complete, unaltered file written by export.save",
        fix="Copy or save it again.",
    )


def read_file(
    path: pathlib.Path,
) -> tuple[Mapping[str, Any], Mapping[str, np.ndarray], str, int]:
    """Read a file, and check it against its digest before anything in it is used.

    Args:
        path: The file.

    Returns:
        What is said about the pools, the pools as bytes, the digest, the bytes of the header.

    Raises:
        FileError: If the file cannot be read, is truncated, altered, or of another kind.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise refuse(path, f"a file that cannot be read: {error.strerror}") from error
    header, size = _read_header(path, content)
    metadata = header.pop("__metadata__")
    digest = hashlib.sha256(content[:_DIGEST_AT] + _BLANK)
    digest.update(memoryview(content)[_DIGEST_AT + len(_BLANK) :])
    if metadata["digest"] != digest.hexdigest():
        raise refuse(path, "an altered file: its content does not have the digest it states")
    if metadata["format"] != _FORMAT:
        raise refuse(path, f"a file in the format {metadata['format']!r}, not {_FORMAT!r}")
    try:
        about = {key: json.loads(metadata[key]) for key in ("tree", "formats", "masked", "user")}
        body = np.frombuffer(content, np.uint8)[size:]
        pools = {name: body[slice(*entry["data_offsets"])] for name, entry in header.items()}
    except MALFORMED as error:
        raise refuse(path, f"a file with a header that makes no sense: {error}") from error
    return about, pools, digest.hexdigest(), size


def _read_header(path: pathlib.Path, content: bytes) -> tuple[dict[str, Any], int]:
    """Parse the header, and check that the file has the length that it says."""
    size = 8 + int.from_bytes(content[:8], "little")
    if len(content) < _DIGEST_AT + len(_BLANK):
        raise refuse(path, f"a truncated file of {len(content)} bytes, shorter than any header")
    if not content.startswith(_PREFIX, 8):
        raise refuse(path, "a file that does not begin with the header of export.save")
    if len(content) < size:
        raise refuse(path, f"a truncated file: {len(content)} bytes, with a header of {size}")
    try:
        header = json.loads(content[8:size])
        spans = [entry["data_offsets"] for name, entry in header.items() if name[:2] != "__"]
        total = size + max((end for _, end in spans), default=0)
        known = {"digest", "format"} <= header["__metadata__"].keys()
    except MALFORMED as error:
        raise refuse(path, f"an altered file: its header makes no sense ({error})") from error
    if len(content) != total or not known:
        what = "a truncated" if len(content) < total else "an altered"
        raise refuse(path, f"{what} file: {len(content)} bytes, where its header says {total}")
    return header, size
