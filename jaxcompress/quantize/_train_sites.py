"""Which sites of fn round their activations in training, and why others do not."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxcompress import tree
from jaxcompress.errors import SelectionError
from jaxcompress.graph import UNREACHABLE, Site
from jaxcompress.graph.sites import form_at
from jaxcompress.numerics import Format, PerToken
from jaxcompress.quantize._matrix import LeafFormat, resolve_format
from jaxcompress.quantize._policy import Coverage, Rule

_TOKENS_KNOWN = ("dot_general", "conv_general_dilated", "ragged_dot_general")


@dataclass(frozen=True, kw_only=True)
class TrainCoverage:
    """What training with a policy does to every leaf and at every site of fn.

    Attributes:
        leaves: What becomes of each leaf, with the format that its rule comes to at its sites;
            see `coverage`.
        rounded: `{site name: format}` where activations are rounded.
        unrounded: `{site name: reason}` where the rule has a format for activations that cannot
            be rounded.
        elsewhere: Paths of leaves that have a format though fn neither contracts nor looks them
            up: they are rounded as they will be stored.
        notes: `{path: what}` where a leaf's format is not what the rule says, and why.
    """

    leaves: Coverage
    rounded: Mapping[str, Format] = field(default_factory=dict)
    unrounded: Mapping[str, str] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Met:
    """The activations that meet one leaf: they are rounded alike, by one range per layer.

    Attributes:
        path: The leaf's path.
        rule: Its rule, with a format for activations.
        sites: The sites where they do.
        layers: The leaf axes that tell stacked layers apart, at every site.
        shape: As many axes as the leaf, of length 1 but for `layers`.
    """

    path: str
    rule: Rule
    sites: tuple[Site, ...]
    layers: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def format(self) -> Format:
        """The format of the activations."""
        assert self.rule.activations is not None
        return self.rule.activations

    def at(self, x: Array, site: Site) -> Array:
        """Give every run of a site its entry: `shape` to `Site.stack`."""
        kept = [axis for axis in site.layers if axis in self.layers]  # in the order of the scans
        x = x.reshape([self.shape[axis] for axis in self.layers])
        x = x.transpose([self.layers.index(axis) for axis in kept])
        lengths = zip(site.stack, site.layers, strict=True)
        x = x.reshape([n if axis in self.layers else 1 for n, axis in lengths])
        return jnp.broadcast_to(x, site.stack)

    def over(self, xs: Sequence[Array], reduce: Callable[..., Array]) -> Array:
        """Reduce what all runs of all sites have to `shape`: the inverse of `at`."""
        whole = []
        for x, site in zip(xs, self.sites, strict=True):
            others = tuple(k for k, axis in enumerate(site.layers) if axis not in self.layers)
            kept = [axis for axis in site.layers if axis in self.layers]
            x = reduce(x, axis=others).transpose([kept.index(axis) for axis in self.layers])
            whole.append(x.reshape(self.shape))
        return reduce(jnp.stack(whole), axis=0)


def target_at(path: str, leaf: Any, format: Format, sites: Sequence[Site]) -> LeafFormat:
    """Say what a rule's format means for a leaf, as `ptq` does; without a site, its own axes.

    Args:
        path: The leaf's path.
        leaf: An array, or its shape.
        format: The rule's format.
        sites: Of fn.
    """
    mine = [site for site in sites if site.path == path]
    if not mine:
        return LeafFormat(leaf=format, matrix=None)
    return resolve_format(format, form_at(leaf.shape, mine))


def meet(
    sites: Sequence[Site], rules: Mapping[str, Rule], leaves: Mapping[str, Any]
) -> tuple[dict[str, Met], dict[str, str]]:
    """Find the activations to round: `{path: where}` and `{site name: why not}`.

    Args:
        sites: Of fn.
        rules: The rule of each leaf that has a format.
        leaves: `{path: leaf}` of params.

    Raises:
        SelectionError: If no leaf has a site, or no activation can be rounded though some rule
            has a format for them.
    """
    if not any(site.path in rules for site in sites):
        known = list(dict.fromkeys(site.path for site in sites))
        raise SelectionError(
            "policy",
            got=f"rules for {tree.shorten(list(rules))}, none of which fn contracts or looks up",
            expected="a rule for at least one leaf with a site",
            fix=f"The leaves with sites are: {tree.shorten(known)}."
            if known
            else "fn has no sites: it contracts none of its params.",
        )
    rounded: dict[str, list[Site]] = {}
    unrounded: dict[str, str] = {}
    for site in sites:
        rule = rules.get(site.path)
        if rule is None or rule.activations is None:
            continue
        reason = _obstacle(site, rule.activations)
        if reason is None:
            rounded.setdefault(site.path, []).append(site)
        else:
            unrounded[site.name] = reason
    if unrounded and not rounded:
        raise SelectionError(
            "policy",
            got="formats for activations that none of its sites can take: "
            + "; ".join(f"{name!r} {reason}" for name, reason in list(unrounded.items())[:3]),
            expected="at least one site whose activation can be rounded",
            fix="Leave `activations` out of the rule, or widen `where` to contracted leaves.",
        )
    return {
        path: _met(path, rules[path], found, leaves[path]) for path, found in rounded.items()
    }, unrounded


def _met(path: str, rule: Rule, sites: list[Site], leaf: Any) -> Met:
    common = set.intersection(*(set(site.layers) for site in sites))
    layers = tuple(sorted(axis for axis in common if axis is not None))
    shape = tuple(n if k in layers else 1 for k, n in enumerate(leaf.shape))
    return Met(path, rule, tuple(sites), layers, shape)


def _obstacle(site: Site, format: Format) -> str | None:
    inside = [label for label in site.scope if label in UNREACHABLE]
    if inside:
        return f"lies inside {inside[0]}, whose operands cannot be reached"
    if site.axes.lookup:
        return "looks the leaf up: what meets it are indices"
    if site.beside:
        return f"contracts the leaf together with {tree.shorten(site.beside)}"
    if not jnp.issubdtype(site.activation.dtype, jnp.floating):
        return f"meets an activation of dtype {site.activation.dtype}"
    if math.prod(site.activation.shape) == 0:
        return "meets an activation without entries"
    if isinstance(format.granularity, PerToken) and site.primitive not in _TOKENS_KNOWN:
        return f"is a {site.primitive}, whose tokens are not known"
    return None
