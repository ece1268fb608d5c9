"""`where`: selecting leaves by glob, regex or predicate, never silently nothing."""

import difflib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from jaxcompress.errors import ArgumentTypeError, SelectionError
from jaxcompress.tree._paths import Params, items, paths, shorten
from jaxcompress.tree._sizes import is_floating

Where: TypeAlias = str | re.Pattern[str] | Callable[[str, Any], bool] | Sequence["Where"]
"""What selects leaves: a glob over paths, a compiled regex, a predicate, or any of several."""


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
    """Select the leaves worth compressing: floating point, at least two axes, and not a `bias`.

    This predicate is the default `where` throughout: it takes kernels and embeddings and leaves
    biases (which have several axes in attention layers), norm scales, counters and random keys
    alone.

    Args:
        path: The leaf's path.
        leaf: An array, a `ShapeDtypeStruct` or a `LeafNode`.

    Returns:
        Whether it is a weight.
    """
    is_bias = path.rsplit("/", 1)[-1] == "bias"
    return is_floating(leaf) and len(leaf.shape) >= 2 and not is_bias


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
        raise _explain_nothing(params, where)
    return chosen


def _explain_nothing(params: Params, where: Where) -> SelectionError:
    known = paths(params)
    near = _list_nearest(where, known) or known
    return SelectionError(
        "where",
        got=f"{where!r}, which matches none of {len(known)} leaves",
        expected="a `where` that selects at least one leaf of params",
        fix=f"The nearest paths are: {shorten(near)}." if near else "The tree has no leaves.",
    )


def _list_nearest(where: Where, known: Sequence[str]) -> list[str]:
    """List the paths whose last segments look most like the glob's literal part."""
    if not isinstance(where, str):
        several = where if isinstance(where, Sequence) else ()
        return list(dict.fromkeys(path for one in several for path in _list_nearest(one, known)))
    literal = where.replace("**/", "").replace("*", "")
    depth = literal.count("/") + 1
    tails = {path: "/".join(path.split("/")[-depth:]) for path in known}
    close = difflib.get_close_matches(literal, set(tails.values()), n=3, cutoff=0.4)
    close += difflib.get_close_matches(where, known, n=3, cutoff=0.4)
    return [path for path in known if tails[path] in close or path in close]
