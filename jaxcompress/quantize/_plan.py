"""Which leaf is quantized how: a policy resolved against the sites of a function."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxcompress import tree
from jaxcompress.graph import Graph, Site
from jaxcompress.graph.sites import Form, form_at, list_observed
from jaxcompress.numerics import Format
from jaxcompress.quantize import _ranges
from jaxcompress.quantize._matrix import LeafFormat, resolve_format
from jaxcompress.quantize._method import Method, RoundToNearest
from jaxcompress.quantize._policy import Coverage, Policy, Rule, find_obstacle, follow_rules
from jaxcompress.stats import Statistic, mean_covariance


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be done with one leaf.

    Attributes:
        path: Its path.
        rule: Its rule.
        method: The rule's method, or `RoundToNearest()` where that cannot be followed.
        form: Its matrices.
        target: Its format.
        sites: The sites whose activations show what the method and the ranges need.
        method_keys: `{name: key}` of the method's statistics.
        range_key: The key of the statistic for a static range, or `None`.
        mean_key: The key of the mean, for bias correction, or `None`.
        activations: The format of the activations that it meets, or `None`.
        notes: What is done otherwise than the rule says, and why.
    """

    path: str
    rule: Rule
    method: Method
    form: Form
    target: LeafFormat
    sites: tuple[Site, ...]
    method_keys: Mapping[str, str]
    range_key: str | None
    mean_key: str | None
    activations: Format | None
    notes: tuple[str, ...]

    @property
    def is_indexed(self) -> bool:
        """Whether fn picks slices of the leaf by number, so that only a stop tells which."""
        return bool(self.keys) and any(site.axes.sliced for site in self.sites)

    @property
    def keys(self) -> set[str]:
        """The statistics that it needs."""
        return {*self.method_keys.values(), self.range_key, self.mean_key} - {None}


@dataclass(frozen=True, kw_only=True)
class ResolvedPolicy:
    """A policy resolved.

    Attributes:
        graph: The trace of fn.
        tasks: What is to be done, `{path: task}` in traversal order.
        statistics: What has to be seen of activations, by key.
        rest: What became of all other leaves.
        unused_rules: Numbers of the rules that decide no leaf.
    """

    graph: Graph
    tasks: Mapping[str, Task]
    statistics: Mapping[str, Statistic]
    rest: Coverage
    unused_rules: tuple[int, ...]

    @property
    def replaces(self) -> bool:
        """Whether activations are seen after all upstream weights have been replaced."""
        return any(task.method.sequential for task in self.tasks.values())

    def is_watched(self, path: str, leaf: Any) -> bool:
        """Tell whether something of the activations that a leaf meets has to be seen."""
        return path in self.tasks and bool(self.tasks[path].keys)


def resolve_policy(
    graph: Graph, params: tree.Params, policy: Policy, *, strict: bool
) -> ResolvedPolicy:
    """Decide for every leaf what is done with it.

    Args:
        graph: The trace of fn on params.
        params: Params.
        policy: The rules.
        strict: Whether a leaf that cannot follow its rule, and an unused rule, are errors.

    Returns:
        The plan; it has at least one task.

    Raises:
        SelectionError: As `ptq`.
    """
    book = _Book()

    def follow(path: str, leaf: Any, rule: Rule) -> Task | str:
        reason = graph.why_no_site(path) or find_obstacle(leaf, None)
        return reason or _task(graph, path, leaf, rule, book)

    tasks, rest, unused = follow_rules(params, policy, follow, strict=strict, allow_unused=True)
    return ResolvedPolicy(
        graph=graph, tasks=tasks, statistics=book.statistics, rest=rest, unused_rules=unused
    )


class _Book:
    """Gives each distinct statistic a key."""

    def __init__(self):
        self.statistics: dict[str, Statistic] = {}
        self._keys: dict[Any, str] = {}

    def key(self, identity: Any, statistic: Statistic) -> str:
        key = self._keys.setdefault(identity, f"{len(self._keys)}")
        self.statistics.setdefault(key, statistic)
        return key


def _task(graph: Graph, path: str, leaf: Any, rule: Rule, book: _Book) -> Task | str:
    """Resolve one leaf's rule; a string says why it cannot be followed."""
    assert rule.weights is not None
    sites, notes = graph.sites_of(path), []
    contracting = [site for site in sites if not site.axes.lookup]
    form = form_at(leaf.shape, sites)
    target = resolve_format(rule.weights, form)
    why = find_obstacle(leaf, target.leaf)
    if why:
        return why
    notes += [target.note] if target.note else []
    # What is seen must be of these matrices: the same axes, in the leaf's own order.
    alike = list_observed(contracting, form)
    method, why = rule.method, ""
    if target.matrix is None:
        why = f"{rule.weights.granularity} does not follow its matrices"
    elif method.statistics and not contracting:
        why = "it is only looked up"
    elif method.statistics and not alike:
        why = "its entries are moved about before they are contracted"
    if why and method != RoundToNearest():
        notes.append(f"rounded to nearest, since {why}")
        method = RoundToNearest()
    if method.sequential and len(alike) > 1 and not any(site.axes.sliced for site in alike):
        notes.append("codes were chosen by what its first site sees")
    if rule.correct_bias and (why or not alike):
        why = why or "its entries are moved about, or it is only looked up"
        notes.append(f"no bias was corrected: {why}")
    activations = rule.activations if contracting else None
    if rule.activations is not None and not contracting:
        notes.append("no activation is contracted with it")
    static = activations if rule.static else None
    return Task(
        path=path,
        rule=rule,
        method=method,
        form=form,
        target=target,
        sites=alike if method.statistics else tuple(contracting),
        method_keys={
            name: book.key((method, name), one) for name, one in method.statistics.items()
        },
        range_key=None if static is None else book.key(static, _ranges.statistic(static)),
        mean_key=book.key("mean", mean_covariance(diagonal=True))
        if rule.correct_bias and alike and target.matrix is not None
        else None,
        activations=activations,
        notes=tuple(notes),
    )


def list_untouched(plan: ResolvedPolicy) -> dict[str, str]:
    """Say of each site whose weight stays as it is why.

    Args:
        plan: The plan.

    Returns:
        `{Site.name: reason}`, in fn's order.
    """
    reasons = dict(plan.rest.exempt)
    reasons |= dict.fromkeys(plan.rest.excluded, "is excluded by a rule")
    reasons |= dict.fromkeys(plan.rest.unselected, "is selected by no rule")
    return {s.name: reasons[s.path] for s in plan.graph.sites if s.path in reasons}
