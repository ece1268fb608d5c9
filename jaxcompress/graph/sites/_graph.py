"""`Graph`: what a trace of fn found, with every leaf accounted for."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxcompress import tree
from jaxcompress.graph.sites._sites import Site


@dataclass(frozen=True, kw_only=True)
class Use:
    """An equation that consumes a leaf outside any site: a bias, a norm scale, a mask.

    Attributes:
        primitive: The primitive's name; `output` where a derived value is returned.
        scope: The constructs around it, outermost first.
        repeats: How often it runs in one call of fn.
    """

    primitive: str
    scope: tuple[str, ...] = ()
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """A contraction without a leaf: attention scores, a product of two activations.

    Attributes:
        primitive: The primitive's name.
        operands: Shapes and dtypes of its operands in one run.
        output: Shape and dtype of its result in one run.
        repeats: How often it runs in one call of fn.
        bounded: `False` inside a `while` loop: one iteration counts.
        scope: The constructs around it, outermost first.
        flops: Over all repeats, 2 per multiply-add.
        bytes: Over all repeats: operands and result.
    """

    primitive: str
    operands: tuple[jax.ShapeDtypeStruct, ...]
    output: jax.ShapeDtypeStruct
    repeats: int
    bounded: bool
    scope: tuple[str, ...]
    flops: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Where fn contracts each leaf, and every other use of leaves.

    Every leaf is in at least one of `sites`, `uses`, `returned` and `unreached`.

    Attributes:
        leaves: `{path: leaf}` of params, in traversal order; shapes and dtypes matter only.
        sites: In the order in which fn runs them. Leaves that one equation contracts together
            (concatenated, or multiplied with each other) share its FLOPs by their entries.
        uses: `{path: equations that consume it outside any site}`.
        returned: Paths of leaves that are outputs as they came.
        unreached: Paths of leaves that fn does not read.
        elsewhere: Contractions without a leaf.
        opaque: Primitives that run jaxprs which are not entered, with their scope, such as
            `("scan", "pallas_call")`: what they contract is neither a site nor counted.
        flops: Of all contractions, at sites and elsewhere, 2 per multiply-add; a `cond` counts
            its costliest branch, a `while` loop one iteration.
        outputs: The tree of fn's results, as shapes and dtypes.
    """

    leaves: Mapping[str, Any]
    sites: tuple[Site, ...]
    uses: Mapping[str, tuple[Use, ...]]
    returned: tuple[str, ...]
    unreached: tuple[str, ...]
    elsewhere: tuple[Contraction, ...]
    opaque: tuple[tuple[str, ...], ...]
    flops: int
    outputs: Any = field(repr=False)

    def sites_of(self, path: str) -> tuple[Site, ...]:
        """List the sites of one leaf, such as both ends of a tied embedding.

        Args:
            path: The leaf's path.

        Returns:
            Its sites, in the order in which they run; empty if it has none.
        """
        return self._by_path.get(path, ())

    def why_no_site(self, path: str) -> str | None:
        """Say why a leaf has no site, as a predicate: "is not read by fn".

        Args:
            path: The leaf's path.

        Returns:
            The words; `None` if it has a site.
        """
        if self.sites_of(path):
            return None
        if path in self.uses:
            names = ", ".join(dict.fromkeys(use.primitive for use in self.uses[path]))
            return f"is used outside any contraction or lookup ({names})"
        return "is returned as it came" if path in self.returned else "is not read by fn"

    @functools.cached_property
    def _by_path(self) -> dict[str, tuple[Site, ...]]:
        several: dict[str, list[Site]] = {}
        for site in self.sites:
            several.setdefault(site.path, []).append(site)
        return {path: tuple(sites) for path, sites in several.items()}

    @functools.cached_property
    def _by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    def __getitem__(self, name: str) -> Site:
        """Look up a site by name."""
        return self._by_name[name]


def describe_stored(leaf: Any) -> str:
    """Say in which dtypes a leaf is kept, `int4 + float32` for codes and scales."""
    parts = jax.tree.leaves(leaf) if isinstance(leaf, tree.LeafNode) else [leaf]
    return " + ".join(str(part.dtype) for part in parts)
