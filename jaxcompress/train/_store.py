"""Orbax checkpoints of a run: asynchronous, atomic, keep-n, checked before anything is restored."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, StructureError, explain_missing

with explain_missing("Saving and restoring checkpoints", package="orbax-checkpoint"):
    import orbax.checkpoint as ocp


class Store:
    """A directory of checkpoints. Each holds named pytrees of arrays and a JSON book."""

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int | None = None, create: bool = True
    ):
        latest = ocp.checkpoint_managers.LatestN(keep) if keep else None
        self._path = pathlib.Path(directory).absolute()
        self._create = create
        self._options = ocp.CheckpointManagerOptions(
            create=create,
            read_only=not create,
            preservation_policy=latest,
            # What a killed run left half-written.
            cleanup_tmp_directories=create,
        )

    def __enter__(self) -> "Store":
        """Open the directory."""
        self._manager = (
            ocp.CheckpointManager(self._path, options=self._options)
            if self._create or self._path.is_dir()
            else None
        )
        return self

    def __exit__(self, *details: Any) -> None:
        """Wait for what is being written."""
        if self._manager is not None:
            self._manager.close()

    def steps(self) -> list[int]:
        """List the steps that have a complete checkpoint.

        Returns:
            Steps, ascending.
        """
        return [] if self._manager is None else sorted(self._manager.all_steps())

    def save(self, step: int, trees: Mapping[str, Any], book: Mapping[str, Any]) -> None:
        """Start writing a checkpoint; it appears whole, or not at all.

        Args:
            step: Its number.
            trees: Named pytrees of arrays, which may be donated as soon as this returns.
            book: Whatever else must be remembered, fit for JSON.
        """
        assert self._manager is not None
        manifest = {name: _manifest(value) for name, value in trees.items()}
        items = {name: ocp.args.StandardSave(_to_storable(value)) for name, value in trees.items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                book=ocp.args.JsonSave({"manifest": manifest, **book}), **items
            ),
            force=True,
        )

    def book(self, step: int) -> dict[str, Any]:
        """Read the book of a checkpoint.

        Args:
            step: Its number.

        Returns:
            What `save` was given, and the `manifest` of shapes and dtypes.
        """
        assert self._manager is not None
        args = ocp.args.Composite(book=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["book"]

    def read(self, step: int, name: str, like: Any) -> Any:
        """Read one pytree of a checkpoint, onto the devices of `like`.

        Args:
            step: The checkpoint's number.
            name: The pytree's name.
            like: A pytree of arrays with its structure, shapes and dtypes.

        Returns:
            The pytree, with the shardings of `like`.

        Raises:
            StructureError: If `like` is of another model; nothing is restored then.
        """
        assert self._manager is not None
        saved, wanted = self.book(step)["manifest"].get(name, {}), _manifest(like)
        if saved != wanted:
            raise StructureError(
                "checkpoint",
                got=f"{self._path}/{step}, where {_differences(saved, wanted)}",
                expected="a checkpoint of this model and optimizer",
                fix="Give the model and optimizer it was saved with, or another directory.",
            )
        target = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for path, x in _to_storable(like).items()
        }
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(target)})
        return _put_back(like, self._manager.restore(step, args=args)[name])


# Trees are stored as `{path: array}`: the file then does not depend on the classes of containers.


def _flat(tree_of_arrays: Any) -> dict[str, jax.Array]:
    # Without is_leaf, so that a QArray is stored by its parts.
    flat = jax.tree_util.tree_flatten_with_path(tree_of_arrays)[0]
    named = {tree.path_str(keypath): jnp.asarray(leaf) for keypath, leaf in flat}
    if len(named) != len(flat):
        raise ArgumentError(
            "params",
            got="two leaves whose paths read the same",
            expected="distinct paths",
            fix="Rename the keys that contain '/'.",
        )
    return named


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _to_storable(tree_of_arrays: Any) -> dict[str, jax.Array]:
    """Flatten, with random keys as their bits and without empty arrays, which orbax refuses."""
    return {
        path: jax.random.key_data(x) if _is_key(x) else x
        for path, x in _flat(tree_of_arrays).items()
        if x.size
    }


def _put_back(like: Any, stored: Mapping[str, jax.Array]) -> Any:
    def rebuild(path: str, x: jax.Array) -> jax.Array:
        if path not in stored:
            return x
        if _is_key(x):
            return jax.random.wrap_key_data(stored[path], impl=jax.random.key_impl(x))
        return stored[path]

    leaves = [rebuild(path, x) for path, x in _flat(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _manifest(tree_of_arrays: Any) -> dict[str, str]:
    return {path: f"{x.dtype}{list(x.shape)}" for path, x in _flat(tree_of_arrays).items()}


def _differences(saved: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    missing = [f"{path!r} is missing" for path in wanted if path not in saved]
    extra = [f"{path!r} is not of this model" for path in saved if path not in wanted]
    other = [
        f"{path!r} is {saved[path]} instead of {wanted[path]}"
        for path in wanted
        if path in saved and saved[path] != wanted[path]
    ]
    found = other + missing + extra
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return "; ".join(found[:6]) + more
