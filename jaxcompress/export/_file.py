"""`save` and `load`: params, mask and metadata in one file."""

import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError, StructureError
from jaxcompress.export import _container as container
from jaxcompress.export import _formats as formats
from jaxcompress.export import _leaves as leaves
from jaxcompress.export import _structure as structure
from jaxcompress.export._pools import Reader, Writer

HEADER = "(header)"


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """What a file takes, and which it is.

    Attributes:
        path: Where it is.
        bytes: Its size.
        digest: SHA-256 of its content, in hexadecimal digits.
        leaves: Bytes by path of leaf (values, scales and mask together), and of `(header)`; they
            add up to `bytes`.
    """

    path: pathlib.Path
    bytes: int
    digest: str
    leaves: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a file holds.

    Attributes:
        params: The params.
        mask: Their mask, or `None` if they were saved without one.
        metadata: What the user saved with them.
        info: The file's size and digest.
    """

    params: tree.Params
    mask: tree.Params | None
    metadata: Mapping[str, Any]
    info: FileInfo


def save(
    path: str | os.PathLike[str],
    params: tree.Params,
    *,
    mask: tree.Params | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> FileInfo:
    """Write params, with masks and QArrays, into one safetensors file.

    Every leaf comes back bit for bit. Codes take exactly the bits of their qtype (int4 two per
    byte, ternary five); of a leaf with a mask only the kept entries are written, after a bitmap
    of one bit per entry. A pruned entry comes back as +0, or a QArray's code of 0. The file is
    written beside its place, synced and renamed there: a crash leaves the old one. Sharded
    arrays are gathered on the host.

    Args:
        path: Where to; missing folders are made.
        params: Any pytree of arrays, QArrays, random keys and Python numbers.
        mask: What pruning keeps, mirroring params, `None` for untouched leaves. The pruned
            entries must be exactly 0.
        metadata: Whatever JSON can hold, to keep with them.

    Returns:
        The file's size, digest, and bytes per leaf.

    Raises:
        ArgumentError: If a pruned entry is not exactly 0, or two leaves have one path.
        ArgumentTypeError: If a leaf is no array, or metadata is not JSON.
        StructureError: If the mask does not mirror params.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> from jaxcompress import numerics
        >>> kernel = numerics.quantize(jnp.ones((64, 64)), numerics.Format(numerics.int4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     info = save(f"{folder}/model.safetensors", {"kernel": kernel})
        ...     loaded = load(f"{folder}/model.safetensors")
        >>> info.leaves["kernel"], loaded.params["kernel"]
        (2052, QArray(float32[64,64] as int4, PerTensor()))
    """
    writer, formats_met, sizes = Writer(), [], {}
    masks = iter(
        [None] * len(tree.leaves(params))
        if mask is None
        else tree.flatten_like(params, mask, name="mask")
    )

    def record(keypath: structure.KeyPath, leaf: Any) -> list[Any]:
        name, before = tree.path_str(keypath), writer.written
        if name in sizes:
            raise ArgumentError(
                "params",
                got=f"two leaves at {name!r}",
                expected="one leaf per path",
                fix="Rename the key that has a slash in it.",
            )
        entry = leaves.write_leaf(name, leaf, next(masks), formats_met, writer)
        sizes[name] = writer.written - before
        return entry

    about = {
        "tree": structure.describe_tree(params, record),
        "formats": [formats.to_json(one) for one in formats_met],
        "masked": mask is not None,
        "user": _check_metadata(metadata),
    }
    path = pathlib.Path(path)
    digest, sizes[HEADER] = container.write_file(path, about, writer.pools())
    return FileInfo(path=path, bytes=path.stat().st_size, digest=digest, leaves=sizes)


def load(path: str | os.PathLike[str], *, like: tree.Params | None = None) -> Loaded:
    """Read what `save` wrote; nothing in the file is executed.

    Args:
        path: The file.
        like: A pytree with the structure that params shall have: an `nnx.State`, a `FrozenDict`,
            an Equinox module, a dataclass; shapes are enough (`jax.eval_shape`). Leaves are
            matched by path and shape; their dtypes and formats are the file's. Without it,
            dictionaries, lists and tuples come back as they were, and other nodes as
            dictionaries.

    Returns:
        Params, mask and metadata. Arrays are on the default device; 64-bit ones stay NumPy
        arrays where JAX has x64 switched off.

    Raises:
        FileError: If the file is missing, truncated, altered, or no such file; it says which.
        StructureError: If the leaves of `like` are not those of the file.
    """
    path = pathlib.Path(path)
    about, pools, digest, header_bytes = container.read_file(path)
    sizes, reader = {HEADER: header_bytes}, Reader(pools)
    try:
        known = [formats.from_json(one) for one in about["formats"]]

        def read(keypath: structure.KeyPath, record: list[Any]) -> structure.LoadedLeaf:
            name, before = tree.path_str(keypath), reader.read
            leaf, mask = leaves.read_leaf(record, known, reader)
            sizes[name] = sizes.get(name, 0) + reader.read - before
            return structure.LoadedLeaf(keypath, leaf, mask)

        found = list(structure.walk(about["tree"], read))
        reader.finish()
        metadata, masked = dict(about["user"]), about["masked"] is True
        as_saved = [
            structure.rebuild_tree(about["tree"], iter([getattr(one, part) for one in found]))
            for part in ("leaf", "mask")
        ]
    except container.MALFORMED as error:
        raise container.refuse(path, f"a file that cannot be decoded: {error}") from error
    params, mask = as_saved if like is None else _arrange_like(found, like)
    info = FileInfo(path=path, bytes=sum(sizes.values()), digest=digest, leaves=sizes)
    return Loaded(params=params, mask=mask if masked else None, metadata=metadata, info=info)


def _arrange_like(found: list[structure.LoadedLeaf], like: Any) -> tuple[Any, Any]:
    """Put leaves and masks into the containers of `like`."""
    by_path = {tree.path_str(one.path): one for one in found}
    wanted = dict(tree.items(like))
    missing, extra = sorted(wanted.keys() - by_path.keys()), sorted(by_path.keys() - wanted.keys())
    odd = [
        f"{path!r} is {list(np.shape(by_path[path].leaf))} in the file and {list(leaf.shape)} here"
        for path, leaf in wanted.items()
        if path in by_path and hasattr(leaf, "shape")
        if tuple(np.shape(by_path[path].leaf)) != tuple(leaf.shape)
    ]
    if missing or extra or odd:
        parts = [f"not in the file: {', '.join(missing[:5])}"] if missing else []
        parts += [f"only in the file: {', '.join(extra[:5])}"] if extra else []
        raise StructureError(
            "like",
            got=f"a tree of {len(wanted)} leaves for a file of {len(found)}; "
            + "; ".join(parts + odd[:5]),
            expected="a tree with the paths and shapes of the file's leaves",
            fix="Build it from the model that was saved, or load without `like`.",
        )
    treedef = jax.tree.structure(like, is_leaf=tree.is_leaf)
    order = [by_path[path] for path in wanted]
    return (
        jax.tree.unflatten(treedef, [one.leaf for one in order]),
        jax.tree.unflatten(treedef, [one.mask for one in order]),
    )


def _check_metadata(metadata: Mapping[str, Any] | None) -> Mapping[str, Any]:
    try:
        plain = dict(metadata or {})
        same = json.loads(json.dumps(plain)) == plain
    except (TypeError, ValueError):
        plain, same = {}, False
    if not same:
        raise ArgumentTypeError(
            "metadata",
            got=repr(metadata)[:80],
            expected="a mapping from text to what JSON can hold: text, numbers, lists, mappings",
            fix="Convert arrays with .tolist(), and tuples to lists.",
        )
    return plain
