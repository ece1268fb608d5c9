"""Which leaves can be factorised, by which method, and why the others cannot."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxcompress import tree
from jaxcompress.errors import ArgumentTypeError
from jaxcompress.graph import Graph, Site
from jaxcompress.graph.leaves import place_parts
from jaxcompress.graph.sites import Form, form_at, form_of, list_observed
from jaxcompress.lowrank._candidate import Candidate, saving
from jaxcompress.lowrank._conv_leaf import TuckerCandidate
from jaxcompress.lowrank._execute import places
from jaxcompress.lowrank._matrix_leaf import MatrixCandidate
from jaxcompress.lowrank._methods import SVD, ActivationSVD, Method, Tucker2


def read_methods(method: Any) -> tuple[Method, ...]:
    """Read `method`, one or several."""
    methods = tuple(method) if isinstance(method, Sequence) else (method,)
    kinds = SVD | ActivationSVD | Tucker2
    if not methods or not all(isinstance(one, kinds) for one in methods):
        raise ArgumentTypeError(
            "method",
            got=repr(method),
            expected="SVD(), ActivationSVD(), Tucker2(), or a sequence of these",
            fix="The first of a sequence that can take a leaf does.",
        )
    return methods


def find_candidates(
    fn: Callable[..., Any],
    params: tree.Params,
    inputs: Sequence[Any],
    graph: Graph,
    methods: Sequence[Method],
    *,
    where: tree.Where,
    multiple: int,
    strict: bool,
) -> tuple[dict[str, Candidate], tree.Coverage]:
    """Find the leaves that can be factorised.

    Args:
        fn: The function.
        params: Its params.
        inputs: Its inputs, perhaps abstract.
        graph: The trace of it.
        methods: In the order in which they are tried.
        where: The leaves that are asked for.
        multiple: What ranks are multiples of.
        strict: Whether a leaf that was asked for and cannot be factorised is an error.

    Returns:
        The candidates by path, and what became of every leaf.

    Raises:
        SelectionError: As `factorize`.
    """
    found = {
        path: _candidate(graph, path, leaf, methods, multiple)
        for path, leaf in tree.select(params, where).items()
    }
    found |= _find_needed_whole(fn, params, inputs, found)

    def obstacle(path: str, leaf: Any) -> str | None:
        one = found[path]
        return one if isinstance(one, str) else None

    coverage = tree.cover(params, where, obstacle, strict=strict)
    taken = {path: one for path, one in found.items() if not isinstance(one, str)}
    return taken, coverage


def _find_needed_whole(
    fn: Callable[..., Any],
    params: tree.Params,
    inputs: Sequence[Any],
    found: dict[str, Candidate | str],
) -> dict[str, str]:
    """Run all candidates by factors, in the abstract: some are needed as arrays somewhere."""
    templates = {
        path: one.template((1,) * (2 if isinstance(one, TuckerCandidate) else 1))
        for path, one in found.items()
        if not isinstance(one, str)
    }
    if not templates:
        return {}
    trial = tree.map_with_path(lambda path, x: templates.get(path, x), params)
    return {
        place.path: f"is needed as an array: {place.why}"
        for place in places(fn, trial, *inputs)
        if not place.by_factors
    }


def _candidate(
    graph: Graph, path: str, leaf: Any, methods: Sequence[Method], multiple: int
) -> Candidate | str:
    """Find how a leaf is factorised; a string says why it is not."""
    reason = _leaf_obstacle(leaf) or graph.why_no_site(path)
    if reason:
        return reason
    sites = graph.sites_of(path)
    if any(site.axes.lookup for site in sites):
        return "is looked up"
    if any(site.feature_groups > 1 for site in sites):
        return "is a convolution with feature groups"
    form = form_at(leaf.shape, sites)
    if not form.inner or not form.outer or not all(_alike(leaf, s, form) for s in sites):
        return "is contracted along axes that differ from site to site, or along all or none"
    reasons = []
    for method in methods:
        one = _try_method(method, path, leaf, form, sites)
        if not isinstance(one, str) and not saving(one, multiple):
            of = f" that is a multiple of {multiple}" if multiple > 1 else ""
            one = f"has no rank{of} below break-even"
        if not isinstance(one, str):
            return one
        reasons.append(one)
    return "; ".join(dict.fromkeys(reasons))


def _leaf_obstacle(leaf: Any) -> str | None:
    if isinstance(leaf, tree.LeafNode):
        return "is compressed already"
    if not tree.is_floating(leaf):
        return "is no floating-point array"
    return "has fewer than two axes" if leaf.ndim < 2 else None


def _alike(leaf: Any, site: Site, form: Form) -> bool:
    """Tell whether a site contracts a leaf along the axes of its matrices, either way round."""
    here = form_of(leaf.shape, site.axes)
    longer = lambda axes: {k for k in axes if leaf.shape[k] > 1}
    sides = longer(here.inner), longer(here.outer)
    mine = longer(form.inner), longer(form.outer)
    return here.lead == form.lead and sides in (mine, mine[::-1])


def _try_method(
    method: Method, path: str, leaf: Any, form: Form, sites: tuple[Site, ...]
) -> Candidate | str:
    if isinstance(method, Tucker2):
        axes = sites[0].axes
        window = [k for k in axes.spatial if leaf.shape[k] > 1]
        if not window or len(axes.contract) != 1 or len(axes.output) != 1 or len(sites) > 1:
            return "is no convolution with a window, for Tucker-2"
        return TuckerCandidate(path, leaf, form, sites, method)
    if isinstance(method, ActivationSVD):
        seen = list_observed(sites, form)
        if not seen:
            return "has its entries moved about before they are contracted, for ActivationSVD"
        if any(site.axes.sliced for site in seen):
            return "is picked from by number, so that its slices are not told apart by their inputs"
    return MatrixCandidate(path, leaf, form, sites, method)


def place_factors(factors: Any, leaf: Any) -> Any:
    """Shard factors like the array that they replace.

    Args:
        factors: The factors.
        leaf: The array.

    Returns:
        The factors, each axis split as the leaf's was; as they are without a mesh.
    """
    return place_parts(factors, leaf, lambda part: range(leaf.ndim))
