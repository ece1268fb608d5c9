"""`Keep`: which units stay, as data that can be saved, compared and applied."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jaxcompress import files, graph
from jaxcompress.errors import ArgumentError, FileError
from jaxcompress.mappings import FieldMapping
from jaxcompress.structured._groups import Group, Groups, find_group

_FORMAT = "jaxcompress keep"


@dataclass(frozen=True, kw_only=True, eq=False)
class Keep(FieldMapping[np.ndarray]):
    """Indices of the units that stay, by the name of their group.

    A group that is not listed stays whole. Made by `choose`, or from indices of your own by `keep`.

    Attributes:
        indices: `{group: (K,) or (layers, K) units}`, ascending.
        sizes: `{group: number of units at full size}`.
        leaves: `{path: {axis: indices along it}}`, the same for each leaf.
        layers: `{path: axis of stacked layers}`, where these keep different indices.
        shapes: `{path: shape at full size}` of all leaves.
        traced: The call of fn that they were chosen for, to be used again by `shrink`; it is not
            saved.
    """

    indices: Mapping[str, np.ndarray]
    sizes: Mapping[str, int]
    leaves: graph.KeepIndices = field(repr=False)
    layers: Mapping[str, int] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    traced: graph.Traced | None = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        """Tell whether the same units stay of the same groups and leaves."""
        return self._plain() == other._plain() if isinstance(other, Keep) else NotImplemented

    def _plain(self) -> tuple[Any, ...]:
        indices = {name: units.tolist() for name, units in self.indices.items()}
        leaves = {
            path: {axis: units.tolist() for axis, units in axes.items()}
            for path, axes in self.leaves.items()
        }
        return indices, leaves, dict(self.sizes), dict(self.layers), dict(self.shapes)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "traced": None}  # a program is neither pickled nor copied

    def shape(self, path: str) -> tuple[int, ...]:
        """Give the shape of a leaf when it has shrunk."""
        shape = list(self.shapes[path])
        for axis, indices in self.leaves.get(path, {}).items():
            shape[axis] = indices.shape[-1]
        return tuple(shape)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a small JSON file; indices are bits in hexadecimal.

        Args:
            path: Where to write; it is written beside and renamed.
        """
        document = {
            "format": _FORMAT,
            "version": 1,
            "groups": {
                name: {"size": self.sizes[name], "keep": _bits(indices, self.sizes[name])}
                for name, indices in self.indices.items()
            },
            "shapes": {leaf: list(shape) for leaf, shape in self.shapes.items()},
            "layers": dict(self.layers),
            "leaves": {
                leaf: {
                    str(axis): _bits(indices, self.shapes[leaf][axis])
                    for axis, indices in axes.items()
                }
                for leaf, axes in self.leaves.items()
            },
        }
        files.write(path, json.dumps(document, indent=1) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Keep":
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            The same indices.

        Raises:
            FileError: If it is no such file.
        """
        try:
            with open(path) as file:
                document = json.load(file)
            if document["format"] != _FORMAT or document["version"] != 1:
                raise KeyError(document["format"])
            shapes = {leaf: tuple(shape) for leaf, shape in document["shapes"].items()}
            groups = document["groups"]
            return Keep(
                indices={name: _from_bits(g["keep"], g["size"]) for name, g in groups.items()},
                sizes={name: g["size"] for name, g in groups.items()},
                leaves={
                    leaf: {int(k): _from_bits(bits, shapes[leaf][int(k)]) for k, bits in a.items()}
                    for leaf, a in document["leaves"].items()
                },
                layers=document["layers"],
                shapes=shapes,
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FileError(
                "path",
                got=f"{os.fspath(path)!r}: {type(error).__name__} {error}",
                expected="a file that `Keep.save` wrote",
                fix="Save the indices again.",
            ) from error


def _bits(indices: np.ndarray, size: int) -> Any:
    if indices.ndim > 1:
        return [_bits(one, size) for one in indices]
    mask = np.zeros(size, bool)
    mask[indices] = True
    return np.packbits(mask).tobytes().hex()


def _from_bits(bits: Any, size: int) -> np.ndarray:
    if isinstance(bits, list):
        return np.stack([_from_bits(one, size) for one in bits])
    mask = np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=size)
    return np.flatnonzero(mask)


def keep(groups: Groups, indices: Mapping[str, ArrayLike]) -> Keep:
    """Say which units stay, by indices of your own.

    Args:
        groups: The groups.
        indices: `{group: units to keep}`, (K,), or (layers, K) for a group whose layers may differ
            (then (K,) means the same in all layers). Groups that are left out stay whole.

    Returns:
        The decision, for `shrink`.

    Raises:
        SelectionError: If there is no such group, or it is frozen.
        ArgumentError: If indices are out of range, repeated or none.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress import structured
        >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
        >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
        >>> chosen = keep(structured.groups(fn, params, jnp.ones((1, 3))), {"up": [0, 2, 5]})
        >>> chosen.shape("up"), chosen.shape("down")
        ((3, 3), (3, 2))
    """
    chosen = {
        name: _check_units(find_group(groups, name, "keep"), np.asarray(units))
        for name, units in indices.items()
    }
    chosen = {name: units for name, units in chosen.items() if units.shape[-1] < groups[name].size}
    shapes = {path: tuple(leaf.shape) for path, leaf in groups.leaves.items()}
    masks: dict[tuple[str, int], np.ndarray] = {}
    layers: dict[str, int] = {}
    for name, units in chosen.items():
        _mask_members(groups[name], units, shapes, masks, layers)
    leaves: dict[str, dict[int, np.ndarray]] = {}
    for (path, axis), mask in masks.items():
        leaves.setdefault(path, {})[axis] = _indices_of(mask, path, axis)
    return Keep(
        indices=chosen,
        sizes={name: groups[name].size for name in chosen},
        leaves=leaves,
        layers=layers,
        shapes=shapes,
        traced=groups.dims.traced if groups.dims is not None else None,
    )


def _check_units(group: Group, units: np.ndarray) -> np.ndarray:
    fits = units.ndim == 1 or (group.layers and units.shape[:-1] == group.layers)
    if not fits or units.dtype.kind not in "iu" or not units.size:
        layers = f" or {(*group.layers, 'K')}" if group.layers else ""
        raise ArgumentError(
            "keep",
            got=f"an array of shape {units.shape} and dtype {units.dtype} for {group.name!r}",
            expected=f"integers of shape (K,){layers}, at least one",
            fix="To remove a group entirely, remove its block or layer.",
        )
    ordered = np.sort(units, axis=-1)
    if ordered.min() < 0 or ordered.max() >= group.size or (np.diff(ordered) == 0).any():
        raise ArgumentError(
            "keep",
            got=f"{units.tolist()} for {group.name!r}",
            expected=f"different indices from 0 to {group.size - 1}",
            fix="Indices count the units of the group.",
        )
    if group.layers and ordered.ndim == 1:
        ordered = np.broadcast_to(ordered, (*group.layers, len(ordered)))
    return ordered


def _mask_members(
    group: Group,
    units: np.ndarray,
    shapes: Mapping[str, tuple[int, ...]],
    masks: dict[tuple[str, int], np.ndarray],
    layers: dict[str, int],
) -> None:
    gone = np.ones((*units.shape[:-1], group.size), bool)
    np.put_along_axis(gone, units, False, axis=-1)
    for member in group.members:
        key = member.path, member.axis
        size = shapes[member.path][member.axis]
        removed = np.zeros((*gone.shape[:-1], size), bool)
        # (size, m) -> the rows of the units that go; padded layers alike
        for part, flags in zip(np.atleast_2d(removed), np.atleast_2d(gone), strict=True):
            part[member.indices[flags].reshape(-1)] = True
        masks[key] = masks.get(key, np.ones(size, bool)) & ~removed
        if member.layers:
            layers[member.path] = member.layers[0]


def _indices_of(mask: np.ndarray, path: str, axis: int) -> np.ndarray:
    if mask.ndim == 1:
        return np.flatnonzero(mask)
    counts = np.unique(mask.sum(-1))
    if len(counts) > 1:
        raise ArgumentError(
            "keep",
            got=f"{mask.sum(-1).tolist()} indices in the layers of {path!r}, axis {axis}",
            expected="as many in each layer",
            fix="Keep equally many units in each layer.",
        )
    return np.stack([np.flatnonzero(one) for one in mask])
