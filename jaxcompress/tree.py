"""Params as an addressed set of leaves: paths, `where`, selection, partition, sizes.

Every pytree of arrays is welcome: Linen `variables` dicts, `FrozenDict`, `nnx.State`, Equinox
modules, tuples and lists. A leaf's *path* is its address as text, `encoder/layer_0/mlp/kernel`.
`None` stands for "no leaf here" and is skipped everywhere.
"""

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.errors import ArgumentTypeError, SelectionError, StructureError

Params: TypeAlias = Any
"""Any pytree of arrays."""

Where: TypeAlias = str | re.Pattern[str] | Callable[[str, Any], bool] | Sequence["Where"]
"""What selects leaves: a glob over paths, a compiled regex, a predicate, or any of several."""


class LeafNode:
    """Base class of pytree nodes that every function here counts as one leaf.

    A `QArray` is one: it stands where an array stood, keeps its path, and is selected, counted
    and written as a whole. Subclasses have `shape`, `dtype`, `size` and `nbytes`.
    """

    shape: tuple[int, ...]
    dtype: Any
    size: int
    nbytes: int


def _is_leaf(x: Any) -> bool:
    return isinstance(x, LeafNode)


# --- Paths ------------------------------------------------------------------------------------


def path_str(keypath: tuple[Any, ...]) -> str:
    """Write a JAX key path as text, `encoder/layer_0/mlp/kernel`.

    The `.value` that an `nnx.State` puts after each of its dictionary keys is left out, so that
    an NNX leaf has the path its Linen twin has.

    Args:
        keypath: A key path of `jax.tree_util.tree_flatten_with_path`.

    Returns:
        The path; the empty string for a tree that is itself one leaf.

    Example:
        >>> path_str((jax.tree_util.DictKey("mlp"), jax.tree_util.SequenceKey(0)))
        'mlp/0'
    """
    keys = list(keypath)
    if (
        len(keys) > 1
        and isinstance(keys[-1], jax.tree_util.GetAttrKey)
        and keys[-1].name == "value"
        and isinstance(keys[-2], jax.tree_util.DictKey)
    ):
        keys.pop()
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def items(params: Params) -> Iterator[tuple[str, Any]]:
    """Iterate over `(path, leaf)` in traversal order (dictionaries by sorted key).

    Args:
        params: Any pytree of arrays.

    Returns:
        An iterator of pairs; `None` leaves are skipped.

    Example:
        >>> [path for path, _ in items({"b": {"kernel": 1.0}, "a": [2.0, None]})]
        ['a/0', 'b/kernel']
    """
    for keypath, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_leaf)[0]:
        yield path_str(keypath), leaf


def paths(params: Params) -> list[str]:
    """List the paths of all leaves, in traversal order.

    Args:
        params: Any pytree of arrays.

    Returns:
        One path per leaf.
    """
    return [path for path, _ in items(params)]


def leaves(params: Params) -> list[Any]:
    """List all leaves, in traversal order, a `LeafNode` counting as one.

    Args:
        params: Any pytree of arrays.

    Returns:
        One entry per leaf.
    """
    return jax.tree.leaves(params, is_leaf=_is_leaf)


def map_with_path(f: Callable[..., Any], params: Params, *rest: Params) -> Params:
    """Map `f(path, leaf, *others)` over params.

    Args:
        f: Called once per leaf with its path, the leaf, and the entries of `rest` there.
        params: Any pytree of arrays.
        *rest: Trees with the structure of params; where params has a leaf, an entry may be
            `None` or a whole subtree, and is handed over as it is.

    Returns:
        A tree with the structure of params and f's results for leaves.

    Raises:
        StructureError: If a tree of `rest` has another structure.

    Example:
        >>> map_with_path(lambda path, x: f"{path}={x}", {"a": 1, "b": [2]})
        {'a': 'a=1', 'b': ['b/0=2']}
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_leaf)
    columns = [flatten_like(params, tree, name=f"rest[{i}]") for i, tree in enumerate(rest)]
    results = [
        f(path_str(keypath), leaf, *others)
        for (keypath, leaf), *others in zip(flat, *columns, strict=True)
    ]
    return jax.tree.unflatten(treedef, results)


def flatten_like(params: Params, other: Params, *, name: str) -> list[Any]:
    """List `other`'s entries at the leaves of params: the way to read a mask beside params.

    Args:
        params: The tree that gives the structure.
        other: A tree that mirrors it; an entry may be `None` or a subtree.
        name: What to call `other` in an error.

    Returns:
        One entry per leaf of params.

    Raises:
        StructureError: If `other` does not mirror params.

    Example:
        >>> flatten_like({"a": 1, "b": 2}, {"a": None, "b": True}, name="mask")
        [None, True]
    """
    treedef = jax.tree.structure(params, is_leaf=_is_leaf)
    try:
        return treedef.flatten_up_to(other)
    except (ValueError, TypeError) as error:
        raise StructureError(
            name,
            got=_describe_difference(params, other),
            expected="a tree that mirrors params, leaf for leaf",
            fix="Build it from the same params (with None for untouched leaves).",
        ) from error


def _describe_difference(params: Params, other: Params) -> str:
    def names(tree: Params) -> set[str]:
        flat = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda x: x is None or _is_leaf(x)
        )[0]
        return {path_str(keypath) for keypath, _ in flat}

    missing, extra = sorted(names(params) - names(other)), sorted(names(other) - names(params))
    parts = []
    if missing:
        parts.append(f"no entry for {_shorten(missing)}")
    if extra:
        parts.append(f"entries for unknown {_shorten(extra)}")
    return "; ".join(parts) or f"a tree of other node types ({type(other).__name__})"


# --- Where ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _glob_regex(glob: str) -> re.Pattern[str]:
    """Translate a glob: `**` spans segments (none too), `*` and `?` stay inside one."""
    out, i = "", 0
    while i < len(glob):
        rest = glob[i:]
        if rest.startswith("**/"):
            out, i = out + "(?:.*/)?", i + 3
        elif rest.startswith("**"):
            out, i = out + ".*", i + 2
        elif glob[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif glob[i] == "?":
            out, i = out + "[^/]", i + 1
        elif alternatives := re.match(r"\{([^{}]*)\}", rest):
            options = "|".join(map(re.escape, alternatives[1].split(",")))
            out, i = out + f"(?:{options})", i + alternatives.end()
        elif bracket := re.match(r"\[!?[^\]/]+\]", rest):
            out, i = out + bracket[0].replace("[!", "[^"), i + bracket.end()
        else:
            out, i = out + re.escape(glob[i]), i + 1
    return re.compile(out)


def matches(where: Where, path: str, leaf: Any = None) -> bool:
    """Tell whether `where` selects the leaf at `path`.

    Args:
        where: A glob (`*` and `?` within a segment, `**` across segments, `{a,b}`, `[ab]`), a
            compiled regex (searched, so anchor it where that matters), a predicate
            `(path, leaf) -> bool`, or a sequence of these, of which any may match.
        path: The leaf's path.
        leaf: The leaf, for predicates.

    Returns:
        Whether it matches.

    Raises:
        ArgumentTypeError: If `where` is none of these.

    Example:
        >>> matches("**/kernel", "kernel"), matches("*/kernel", "a/b/kernel")
        (True, False)
        >>> matches(["**/bias", re.compile("layer_[0-3]/")], "layer_2/kernel")
        True
    """
    if isinstance(where, str):
        return _glob_regex(where).fullmatch(path) is not None
    if isinstance(where, re.Pattern):
        return where.search(path) is not None
    if callable(where):
        return bool(where(path, leaf))
    if isinstance(where, Sequence):
        return any(matches(one, path, leaf) for one in where)
    raise ArgumentTypeError(
        "where",
        got=f"{where!r} ({type(where).__name__})",
        expected="a glob, a compiled regex, a predicate (path, leaf) -> bool, or a sequence",
        fix='For example where="**/kernel".',
    )


def weights(path: str, leaf: Any) -> bool:
    """Select the leaves worth compressing: floating point, with at least two axes.

    This predicate is the default `where` throughout: it takes kernels and embeddings and leaves
    biases, norm scales, counters and random keys alone.

    Args:
        path: The leaf's path (not looked at).
        leaf: An array, a `ShapeDtypeStruct` or a `LeafNode`.

    Returns:
        Whether it is a weight.
    """
    del path
    return is_floating(leaf) and len(leaf.shape) >= 2


def without(where: Where, excluded: Where) -> Where:
    """Select what `where` selects, without what `excluded` selects.

    Args:
        where: What to select.
        excluded: What to leave out of that.

    Returns:
        A predicate, itself a `where`.

    Example:
        >>> list(select({"head": {"kernel": 1}, "mlp": {"kernel": 2}},
        ...             without("**/kernel", "head/**")))
        ['mlp/kernel']
    """
    return lambda path, leaf: matches(where, path, leaf) and not matches(excluded, path, leaf)


def select(params: Params, where: Where) -> dict[str, Any]:
    """Collect the leaves that `where` selects.

    Args:
        params: Any pytree of arrays.
        where: See `matches`.

    Returns:
        `{path: leaf}` in traversal order, never empty.

    Raises:
        SelectionError: If nothing matches; it lists the nearest paths.

    Example:
        >>> select({"mlp": {"kernel": 1.0, "bias": 2.0}}, "**/bias")
        {'mlp/bias': 2.0}
    """
    chosen = {path: leaf for path, leaf in items(params) if matches(where, path, leaf)}
    if not chosen:
        raise _nothing_selected(params, where)
    return chosen


def _nothing_selected(params: Params, where: Where) -> SelectionError:
    known = paths(params)
    near = _nearest(where, known) or known
    return SelectionError(
        "where",
        got=f"{where!r}, which matches none of {len(known)} leaves",
        expected="a `where` that selects at least one leaf of params",
        fix=f"The nearest paths are: {_shorten(near)}." if near else "The tree has no leaves.",
    )


def _nearest(where: Where, known: Sequence[str]) -> list[str]:
    """List the paths whose last segments look most like the glob's literal part."""
    if not isinstance(where, str):
        several = where if isinstance(where, Sequence) else ()
        return list(dict.fromkeys(path for one in several for path in _nearest(one, known)))
    literal = where.replace("**/", "").replace("*", "")
    depth = literal.count("/") + 1
    tails = {path: "/".join(path.split("/")[-depth:]) for path in known}
    close = difflib.get_close_matches(literal, set(tails.values()), n=3, cutoff=0.4)
    close += difflib.get_close_matches(where, known, n=3, cutoff=0.4)
    return [path for path in known if tails[path] in close or path in close]


def _shorten(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


# --- Partition, merge, map --------------------------------------------------------------------


def partition(params: Params, where: Where) -> tuple[Params, Params]:
    """Split params into the leaves that `where` selects and the rest.

    Args:
        params: Any pytree of arrays.
        where: See `matches`.

    Returns:
        `(selected, rest)`: both have the containers of params, with `None` for the leaves that
        went to the other. `merge` undoes it.

    Raises:
        SelectionError: If nothing matches.

    Example:
        >>> partition({"kernel": 1.0, "bias": 2.0}, "kernel")
        ({'bias': None, 'kernel': 1.0}, {'bias': 2.0, 'kernel': None})
    """
    chosen = select(params, where)
    return (
        map_with_path(lambda path, leaf: leaf if path in chosen else None, params),
        map_with_path(lambda path, leaf: None if path in chosen else leaf, params),
    )


def merge(*trees: Params) -> Params:
    """Overlay trees of one structure: at each place the first entry that is not `None`.

    Args:
        *trees: Trees of one structure, `None` standing for a missing leaf.

    Returns:
        The merged tree.

    Raises:
        StructureError: If the structures differ.

    Example:
        >>> merge({"a": None, "b": 2}, {"a": 1, "b": None})
        {'a': 1, 'b': 2}
    """
    try:
        return jax.tree.map(
            lambda *xs: next((x for x in xs if x is not None), None),
            *trees,
            is_leaf=lambda x: x is None or _is_leaf(x),
        )
    except (ValueError, TypeError) as error:
        raise StructureError(
            "trees",
            got=_describe_difference(trees[0], trees[-1]),
            expected="trees of one structure",
            fix="Merge what `partition` gave for the same params.",
        ) from error


def map_where(f: Callable[[Any], Any], params: Params, where: Where) -> Params:
    """Apply `f` to the leaves that `where` selects; the others pass through untouched.

    Args:
        f: `leaf -> leaf`.
        params: Any pytree of arrays.
        where: See `matches`.

    Returns:
        Params with the selected leaves replaced.

    Raises:
        SelectionError: If nothing matches.

    Example:
        >>> map_where(lambda x: 10 * x, {"kernel": 1.0, "bias": 2.0}, "bias")
        {'bias': 20.0, 'kernel': 1.0}
    """
    chosen = select(params, where)
    return map_with_path(lambda path, leaf: f(leaf) if path in chosen else leaf, params)


# --- Accounting -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What happens to every leaf of params; together the three name each leaf once.

    Attributes:
        touched: Paths of the leaves that are compressed.
        unselected: Paths of the leaves that no rule selects.
        exempt: Selected leaves that are left alone all the same, `{path: reason}`.
    """

    touched: tuple[str, ...] = ()
    unselected: tuple[str, ...] = ()
    exempt: Mapping[str, str] = field(default_factory=dict)


def cover(
    params: Params,
    where: Where,
    obstacle: Callable[[str, Any], str | None],
    *,
    strict: bool = False,
) -> Coverage:
    """Decide for every leaf whether it is compressed, and if not why: the "no silent no-op" rule.

    Args:
        params: Any pytree of arrays.
        where: See `matches`.
        obstacle: `(path, leaf) -> reason` why a selected leaf cannot be compressed, or `None`.
        strict: Raise when a selected leaf meets an obstacle, rather than exempting it.

    Returns:
        The coverage, with at least one leaf touched.

    Raises:
        SelectionError: If `where` selects nothing, if every selected leaf meets an obstacle, or
            under `strict` if any does.

    Example:
        >>> params = {"kernel": np.ones((4, 4)), "step": np.zeros((), int)}
        >>> cover(params, "**", lambda path, x: None if x.ndim else "is a scalar").exempt
        {'step': 'is a scalar'}
    """
    chosen = select(params, where)
    reasons = {path: obstacle(path, leaf) for path, leaf in chosen.items()}
    exempt = {path: reason for path, reason in reasons.items() if reason is not None}
    if len(exempt) == len(chosen) or (strict and exempt):
        listed = "; ".join(f"{path!r} {reason}" for path, reason in list(exempt.items())[:5])
        raise SelectionError(
            "where",
            got=f"{len(exempt)} of {len(chosen)} selected leaves that cannot be compressed: "
            f"{listed}",
            expected="leaves that can be compressed",
            fix="Narrow `where`"
            + (", or pass strict=False to leave them alone." if strict else "."),
        )
    return Coverage(
        touched=tuple(path for path in chosen if path not in exempt),
        unselected=tuple(path for path in paths(params) if path not in chosen),
        exempt=exempt,
    )


def is_floating(leaf: Any) -> bool:
    """Tell whether a leaf is a floating-point array (bfloat16 and float8 too).

    Args:
        leaf: An array, a `ShapeDtypeStruct`, a `LeafNode`, or anything else.

    Returns:
        Whether it is one; `False` for integers, random keys and non-arrays.
    """
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def count(params: Params) -> int:
    """Count the entries of all leaves.

    Args:
        params: Any pytree of arrays (shapes are enough).

    Returns:
        The number of entries; a random key counts as one.

    Example:
        >>> count({"kernel": np.ones((3, 4)), "bias": np.ones(4)})
        16
    """
    return sum(math.prod(leaf.shape) for leaf in leaves(params))


def nbytes(params: Params) -> int:
    """Sum the bytes that XLA keeps for all leaves; int4 entries take half a byte.

    Args:
        params: Any pytree of arrays (shapes are enough).

    Returns:
        Bytes.

    Example:
        >>> nbytes({"kernel": jnp.ones((3, 4), jnp.bfloat16), "w": jnp.ones((3, 3), jnp.int4)})
        29
    """
    return sum(_leaf_bytes(leaf) for leaf in leaves(params))


def _leaf_bytes(leaf: Any) -> int:
    if isinstance(leaf, LeafNode):
        return leaf.nbytes
    return -(-math.prod(leaf.shape) * bits_of(leaf.dtype) // 8)


def bits_of(dtype: Any) -> int:
    """Give the bits that one entry takes in memory: 4 for int4, 8 for bool.

    Args:
        dtype: A NumPy, JAX or ml_dtypes dtype.

    Returns:
        Bits per entry.

    Example:
        >>> bits_of(jnp.int4), bits_of(jnp.bfloat16), bits_of(bool)
        (4, 16, 8)
    """
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return 8 * dtype.itemsize if hasattr(dtype, "itemsize") else 8 * np.dtype(dtype).itemsize
