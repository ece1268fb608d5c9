"""Accounting for every leaf: compressed, left alone by a rule, or left alone with a reason."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxcompress.errors import SelectionError
from jaxcompress.tree._paths import Params, paths
from jaxcompress.tree._where import Where, select


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Which leaves are compressed, and why the others are not; each leaf is in one of the three.

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
        >>> import numpy as np
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
