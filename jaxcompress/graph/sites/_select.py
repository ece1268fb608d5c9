"""Choosing sites for what is done there, and refusing those that it cannot be done at."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, SelectionError, StructureError, require_one_of
from jaxcompress.graph.sites._trace import Traced, suggest_sites

Side: TypeAlias = Literal["input", "output"]
"""Which of a site's arrays: the activation that goes in, or the result of the contraction."""
CONDITION = ("while condition",)
"""Where nothing can leave or enter, as `Site.scope` names it."""


def choose_sites(traced: Traced, where: tree.Where) -> list[str]:
    """List the names of the sites of the leaves that `where` selects."""
    sites = traced.sites
    names = [s.name for s in sites if tree.matches(where, s.path, traced.leaves[s.path])]
    if not names:
        raise SelectionError(
            "where",
            got=f"{where!r}, which selects no leaf that fn contracts or looks up",
            expected="a `where` that selects at least one site",
            fix=suggest_sites(traced),
        )
    return names


def find_named(traced: Traced, names: Mapping[str, Any], argument: str) -> list[str]:
    known = [site.name for site in traced.sites]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SelectionError(
            argument,
            got=f"{tree.shorten(unknown)}, which fn has no site of" if unknown else "none",
            expected="names of sites",
            fix=f"The sites are: {tree.shorten(known)}." if known else suggest_sites(traced),
        )
    return [name for name in known if name in names]


def refuse_inside(traced: Traced, names: Sequence[str], labels: Sequence[str], why: str) -> None:
    """Raise if a site of these names lies inside a construct of these labels, and say why."""
    for site in traced.sites:
        inside = [label for label in site.scope if label in labels]
        if site.name in names and inside:
            raise ArgumentError(
                "where",
                got=f"the site {site.name!r} inside {inside[0]}: {why}",
                expected="sites whose values can be reached",
                fix="Leave it out, with `tree.without`.",
            )


def check_states(traced: Traced, states: Mapping[str, Any], names: Sequence[str]) -> None:
    fix = "Make one state per observer, with Site.stack as leading axes of its arrays."
    if set(states) != set(names):
        raise StructureError(
            "states",
            got=f"entries for {sorted(states)}",
            expected=f"one entry for each of {list(names)}",
            fix=fix,
        )
    for site in traced.sites:
        for leaf in jax.tree.leaves(states.get(site.name)):
            shape = jnp.shape(leaf)
            if shape[: len(site.stack)] != site.stack:
                raise StructureError(
                    "states",
                    got=f"an array of shape {shape} for {site.name!r}",
                    expected=f"leading axes {site.stack}",
                    fix=fix,
                )


def check_side(at: Any) -> None:
    """Refuse what names neither side of a site."""
    require_one_of("at", at, ("input", "output"), fix="Choose one of the two.")
