"""Which blocks are dropped, as data: chosen by name, saved, loaded, applied to params."""

import json
import operator
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcompress import files, tree
from jaxcompress.errors import (
    ArgumentError,
    ArgumentTypeError,
    FileError,
    SelectionError,
    StructureError,
)
from jaxcompress.structured.depth._blocks import Analysis, Block, Layer
from jaxcompress.structured.depth._residuals import find_closest
from jaxcompress.structured.depth._surgery import take_rows
from jaxcompress.structured.depth._without import GONE, drop_marked

Chosen: TypeAlias = (
    str | Block | Layer | Mapping[str, Sequence[int]] | Sequence[str | Block | Layer]
)
"""Names or globs of blocks and layers, `layers[3]` for one layer of a stack, or
`{name of the stack: [3, 5]}`."""


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A decision to drop blocks: all that `rebuild_layers` needs.

    Attributes:
        blocks: Names of the blocks that go, in all layers if they are in a stack.
        iterations: `{layers: indices}` of the layers of stacks that go.
        removed: Paths of the leaves that go.
        rows: `{path: (axis, rows that stay)}` of the leaves that lose rows.
        leaves: `{path: (shape, dtype)}` of the params before.
    """

    blocks: tuple[str, ...]
    iterations: Mapping[str, tuple[int, ...]]
    removed: tuple[str, ...]
    rows: Mapping[str, tuple[int, tuple[int, ...]]]
    leaves: Mapping[str, tuple[tuple[int, ...], str]] = field(repr=False)

    def apply(self, params: tree.Params) -> tree.Params:
        """Take out of params, or of a tree like them, what goes.

        Args:
            params: Params before: arrays or shapes. A moving average of them will do as well.

        Returns:
            Params without the leaves and rows that go. A dictionary that is emptied goes, too;
            in other containers `None` stands for what went.

        Raises:
            StructureError: If params are not those that blocks were dropped from.
        """
        self.check(params)

        def cut(path: str, leaf: Any) -> Any:
            if path in self.removed:
                return GONE
            return take_rows(leaf, *self.rows[path]) if path in self.rows else leaf

        return drop_marked(tree.map_with_path(cut, params))

    def check(self, params: tree.Params) -> None:
        """Raise unless params have the leaves that blocks were dropped from.

        Args:
            params: Params before.

        Raises:
            StructureError: If a leaf is missing, is new, or has another shape.
        """
        expected = {path: shape for path, (shape, _) in self.leaves.items()}
        check_leaves(params, expected, "the dense params that the blocks were dropped from")

    def check_smaller(self, params: tree.Params) -> None:
        """Raise unless params are those that `apply` gives.

        Args:
            params: Params after.

        Raises:
            StructureError: If a leaf is missing, is new, or has another shape.
        """
        expected = {}
        for path, (shape, _) in self.leaves.items():
            if path in self.rows:
                axis, kept = self.rows[path]
                shape = (*shape[:axis], len(kept), *shape[axis + 1 :])
            if path not in self.removed:
                expected[path] = shape
        check_leaves(params, expected, "the params that were returned with this function")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the decision to a small file, which is there whole or not at all.

        Args:
            path: Where to.
        """
        content = {"kind": _KIND, "version": 1, **vars(self)}
        files.write(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Dropped":
        """Read a decision from a file.

        Args:
            path: Where `save` wrote it.

        Returns:
            The decision.

        Raises:
            FileError: If the file holds something else.
        """
        try:
            content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            if (content["kind"], content["version"]) != (_KIND, 1):
                raise ValueError(f"kind {content['kind']!r}, version {content['version']!r}")
            return cls(
                blocks=tuple(map(str, content["blocks"])),
                iterations={k: tuple(map(int, v)) for k, v in content["iterations"].items()},
                removed=tuple(map(str, content["removed"])),
                rows={k: (int(a), tuple(map(int, r))) for k, (a, r) in content["rows"].items()},
                leaves={
                    k: (tuple(map(int, shape)), str(dtype))
                    for k, (shape, dtype) in content["leaves"].items()
                },
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(
                "path",
                got=f"{os.fspath(path)}, which cannot be read ({error})",
                expected="a file that Dropped.save wrote",
                fix="Save the decision again.",
            ) from error


_KIND = "jaxcompress dropped layers"


def check_leaves(
    params: tree.Params, expected: Mapping[str, tuple[int, ...]], what: str
) -> dict[str, Any]:
    """List the leaves of params, which must have these paths and shapes."""
    given = dict(tree.items(params))
    wrong = [f"no {path!r}" for path in expected if path not in given]
    wrong += [f"{path!r} too many" for path in given if path not in expected]
    wrong += [
        f"shape {tuple(given[path].shape)} for {tuple(shape)} at {path!r}"
        for path, shape in expected.items()
        if path in given and tuple(given[path].shape) != tuple(shape)
    ]
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise StructureError(
            "params",
            got="; ".join(wrong[:4]) + more,
            expected=what,
            fix="Dropped.apply takes the right leaves out of dense params.",
        )
    return given


def describe_type(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), str(leaf.dtype)


# --- choosing -------------------------------------------------------------------------------------


def choose_dropped(
    analysis: Analysis, chosen: Chosen
) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Find what is meant: names of blocks, and the layers of stacks that go.

    Raises:
        SelectionError: If something is no block of fn.
        ArgumentError: If it cannot be dropped.
    """
    names, iterations = collect_chosen(analysis, chosen)
    error = find_emptied(analysis, names, iterations)
    if error is not None:
        raise error
    return names, iterations


def collect_chosen(
    analysis: Analysis, chosen: Chosen
) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Find what is meant, whatever stays."""
    names: dict[str, None] = {}
    iterations: dict[str, set[int]] = {}
    for one in _items(chosen):
        found, index = _resolve(analysis, one)
        if index is None:
            names |= dict.fromkeys(found)
        else:
            iterations.setdefault(found[0], set()).update(index)
    ordered = [name for name in analysis.blocks if name in names]
    return ordered, {name: tuple(sorted(indices)) for name, indices in iterations.items()}


Item: TypeAlias = tuple[str, tuple[int, ...] | None]


def _items(chosen: Chosen) -> list[Item]:
    if isinstance(chosen, Mapping):
        return [(str(name), _to_indices(indices)) for name, indices in chosen.items()]
    several = [chosen] if isinstance(chosen, str | Block | Layer) else chosen
    if not isinstance(several, Sequence) or not all(
        isinstance(one, str | Block | Layer) for one in several
    ):
        raise ArgumentTypeError(
            "blocks",
            got=repr(chosen),
            expected="names, globs, Blocks or Layers, or {name of stacked layers: indices}",
            fix="structured.blocks(fn, params, *inputs) lists them.",
        )
    if not several:
        raise SelectionError(
            "blocks",
            got="nothing",
            expected="at least one block or layer",
            fix="structured.blocks(fn, params, *inputs) lists them.",
        )
    return [(one if isinstance(one, str) else one.name, None) for one in several]


def _to_indices(given: Any) -> tuple[int, ...]:
    several = given if isinstance(given, Iterable) else (given,)
    try:
        return tuple(operator.index(i) for i in several)
    except TypeError:
        raise ArgumentTypeError(
            "blocks",
            got=f"the indices {given!r}",
            expected="integers: which layers of a stack go",
            fix='For example {"layers": [3, 5]}.',
        ) from None


def _resolve(analysis: Analysis, item: Item) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    name, indices = item
    if indices is not None:
        return (name,), _check_indices(analysis, name, indices)
    if name in analysis.blocks:
        return (name,), None
    if name in analysis.layers:
        return analysis.layers[name].blocks, None
    if name in analysis.rejected:
        raise _make_rejected_error(name, analysis.rejected[name])
    indexed = re.fullmatch(r"(.+)\[(-?\d+)\]", name)
    if indexed and indexed[1] in {*analysis.layers, *analysis.blocks}:
        return (indexed[1],), _check_indices(analysis, indexed[1], (int(indexed[2]),))
    layers = [layer.blocks for n, layer in analysis.layers.items() if tree.matches(name, n)]
    found = [n for n in analysis.blocks if tree.matches(name, n)]
    found += [block for blocks in layers for block in blocks]
    if found:
        return tuple(dict.fromkeys(found)), None
    for known, reason in analysis.rejected.items():
        if tree.matches(name, known):
            raise _make_rejected_error(known, reason)
    raise _make_unknown_error(analysis, name)


def _make_unknown_error(analysis: Analysis, name: str) -> SelectionError:
    known = list(dict.fromkeys([*analysis.blocks, *analysis.layers]))
    return SelectionError(
        "blocks",
        got=f"{name!r}, which is no residual block of fn",
        expected="names or globs of blocks and layers",
        fix=f"The nearest are: {find_closest(name, known)}."
        if known
        else "fn has no residual block: no sum x + f(x) with a contraction of params in f.",
    )


def _make_rejected_error(name: str, reason: str) -> ArgumentError:
    return ArgumentError(
        "blocks",
        got=f"{name!r}: {reason}",
        expected="a residual block x + f(x)",
        fix="It cannot be dropped; structured.blocks(fn, params, *inputs) lists those that can.",
    )


def _check_indices(analysis: Analysis, name: str, indices: Sequence[int]) -> tuple[int, ...]:
    layer = analysis.layers.get(name)
    if layer is None and name not in analysis.blocks:
        raise _make_unknown_error(analysis, name)
    if layer is None or layer.length is None:
        home = analysis.layers[analysis.layer_of(name)] if layer is None else layer
        if home.length is None:
            fix = f"Drop it by its name, {name!r}."
        else:
            fix = (
                f"Drop the whole layer, '{home.name}[{indices[0] if indices else 0}]', or the "
                f"block in all layers, {name!r}."
            )
        raise ArgumentError(
            "blocks",
            got=f"{name!r} with the indices {list(indices)}",
            expected="indices of whole layers of a stack; leaves of one branch alone would have "
            "fewer rows than the others, which the scan reads side by side",
            fix=fix,
        )
    wrong = [i for i in indices if not 0 <= i < layer.length]
    if wrong or not indices:
        raise ArgumentError(
            "blocks",
            got=f"the indices {list(indices)} of {name!r}",
            expected=f"indices from 0 to {layer.length - 1}, at least one",
            fix=f"It has {layer.length} layers.",
        )
    return tuple(indices)


def find_emptied(
    analysis: Analysis, names: Sequence[str], iterations: Mapping[str, Sequence[int]]
) -> ArgumentError | None:
    """Say what is wrong if a whole stack, or the last residual block, would go."""
    for name, gone in iterations.items():
        length = analysis.layers[name].length
        if len(gone) == length:
            return ArgumentError(
                "blocks",
                got=f"all {length} layers of {name!r}",
                expected="at least one layer that stays",
                fix="Keep one, or drop the blocks of the stack by their names, without indices.",
            )
    if set(names) == set(analysis.blocks) and not analysis.rejected:
        return ArgumentError(
            "blocks",
            got=f"all {len(names)} residual blocks of fn",
            expected="at least one that stays",
            fix="Keep the one with the highest score.",
        )
    return None


def set_zero(params: tree.Params, dropped: Dropped) -> tree.Params:
    """Set what goes to zero where it stands; integers stay, but for those that scales multiply."""

    def floats_to_zero(x: Any) -> Any:
        return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    def zero(path: str, leaf: Any) -> Any:
        if path in dropped.removed:
            return jax.tree.map(floats_to_zero, leaf)
        if path in dropped.rows and jnp.issubdtype(leaf.dtype, jnp.inexact):
            axis, kept = dropped.rows[path]
            stays = jnp.isin(jnp.arange(leaf.shape[axis]), jnp.asarray(kept))
            stays = stays.reshape([-1 if k == axis else 1 for k in range(leaf.ndim)])
            return jnp.where(stays, leaf, jnp.zeros((), leaf.dtype))
        return leaf

    return tree.map_with_path(zero, params)
