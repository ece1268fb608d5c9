"""`ptq`: post-training quantization of any function, from a policy and a few batches."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxcompress import graph, numerics, stats, tree
from jaxcompress.batches import open_stream
from jaxcompress.errors import NonFiniteError
from jaxcompress.quantize._execute import measure
from jaxcompress.quantize._plan import ResolvedPolicy, list_untouched, resolve_policy
from jaxcompress.quantize._policy import Policy
from jaxcompress.quantize._report import QLeaf, QReport
from jaxcompress.quantize._work import Work


@dataclass(frozen=True, kw_only=True)
class QResult:
    """What `ptq` gives.

    Attributes:
        params: Params with a `QArray` in place of every quantized leaf: what
            `quantize.execute(fn)` takes, and `export.save` writes.
        report: What was done, leaf by leaf.
    """

    params: tree.Params
    report: QReport


def ptq(
    fn: Callable[..., Any],
    params: tree.Params,
    batches: Iterable[Any],
    policy: Policy,
    *,
    strict: bool = False,
    host: bool = False,
    progress: bool = False,
) -> QResult:
    """Quantize a function's params after training.

    fn is traced to its sites. Each leaf follows the first rule of the policy that selects it:
    brought into matrices by the axes that its site contracts (any layout; stacked layers, experts
    and feature groups apart), it is quantized by the rule's method from what the batches show of
    the activations, once, however many sites it has. `PerChannel()`, `PerGroup(n)` and
    `PerTensor()` mean: a scale per output, groups along the contraction, a scale per layer; an
    embedding that is only looked up has them per row and along the features.

    Methods that are `sequential` (GPTQ) see activations after all upstream weights have been
    replaced, as do the ranges of static activations beside them; all batches are then kept.
    Otherwise everything is collected in one pass, which keeps none (layers that fn picks from a
    stacked leaf by number, outside of a scan, need the batches kept too). A tied embedding is
    quantized where it is contracted: lookups upstream are seen with the rows as they were.

    Args:
        fn: `fn(params, *inputs) -> outputs`, pure, as it is used for inference.
        params: Any pytree of arrays.
        batches: An iterable of input tuples; a lone array counts as a one-tuple. Representative
            inputs, a few hundred examples or more; rules without data look at the first only.
        policy: The rules, for example `quantize.presets.int4_gptq`.
        strict: Raise when a leaf cannot follow its rule or a rule decides no leaf, rather than
            reporting it.
        host: Keep what batches carry between the sites in host memory, for sequential methods.
        progress: Show a progress bar, if the output is a terminal.

    Returns:
        The quantized params, and the report.

    Raises:
        SelectionError: If no leaf can follow its rule, or under `strict` if any cannot.
        NonFiniteError: If weights or activations that were read are not finite; it names them.
        ArgumentError: If there are no batches, or static ranges would be of zeros only.

    Example:
        >>> import jax
        >>> from jaxcompress.quantize import execute, presets
        >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params = {"up": jax.random.normal(keys[0], (8, 16))}
        >>> params["down"] = jax.random.normal(keys[1], (16, 4))
        >>> x = jax.random.normal(keys[2], (32, 8))
        >>> result = ptq(fn, params, [x], presets.int8_static)
        >>> [use.kernel for leaf in result.report.leaves for use in leaf.kernels]
        ['codes', 'codes']
        >>> float(abs(execute(fn)(result.params, x) - fn(params, x)).max()) < 0.2
        True
    """
    first, rest = open_stream(batches)
    traced = graph.capture(fn, params, *first)
    plan = resolve_policy(graph.trace(traced), params, policy, strict=strict)
    leaves = tree.items(params)
    works = {path: Work(plan.tasks[path], x) for path, x in leaves if path in plan.tasks}
    tree.require_finite(
        {path: work.leaf for path, work in works.items()},
        fix="Find where they come from; quantizing would spread them over whole slices.",
    )
    stream = itertools.chain([first], rest)
    try:
        if plan.replaces or any(task.is_indexed for task in plan.tasks.values()):
            _in_sequence(traced, params, stream, plan, works, host=host, progress=progress)
        else:
            _in_one_pass(traced, params, stream, plan, works, progress=progress)
    except NonFiniteError as error:  # its advice is for those who call `stats`
        raise NonFiniteError(
            error.argument,
            got=error.got,
            expected=error.expected,
            fix="Look at the inputs of that batch, and at the weights before the first site named.",
        ) from error
    done = {path: work.finish() for path, work in works.items()}
    quantized = tree.map_with_path(lambda path, x: done.get(path, x), params)
    if any(task.mean_key for task in plan.tasks.values()):
        quantized = _correct_biases(traced, quantized, works)
    return QResult(params=quantized, report=_report(fn, params, quantized, first, plan, works))


# --- Two ways through the batches ----------------------------------------------------------------


def _in_one_pass(
    traced: graph.Traced,
    params: tree.Params,
    batches: Iterable[Any],
    plan: ResolvedPolicy,
    works: Mapping[str, Work],
    *,
    progress: bool,
) -> None:
    """Collect what is needed of activations as they are in fn, then quantize."""
    collected: Mapping[str, Any] = {}
    if plan.statistics:
        collected = stats.collect(
            traced, params, batches, plan.statistics, where=plan.is_watched, progress=progress
        )
    for path, work in works.items():
        task = plan.tasks[path]
        found = [(site, collected[site.name]) for site in task.sites] if task.keys else []
        for site, results in found:
            work.watch(site, results, {})
        work.quantize(work.leaf, found, {})


def _in_sequence(
    traced: graph.Traced,
    params: tree.Params,
    batches: Iterable[Any],
    plan: ResolvedPolicy,
    works: Mapping[str, Work],
    *,
    host: bool,
    progress: bool,
) -> None:
    """Advance all batches together, and quantize leaves, or their slices, by what reaches them.

    Activations are those after all upstream weights have been replaced, if `plan.replaces`.
    """
    # What needs no data is replaced beforehand: it is upstream of something, or of nothing.
    ready = {
        path: work.quantize(work.leaf, [], {})
        for path, work in works.items()
        if not plan.tasks[path].method_keys
    }
    upstream = ready if plan.replaces else {}
    started = tree.map_with_path(lambda path, x: upstream.get(path, x), params)

    def visit(stop: stats.Stop) -> dict[str, Any]:
        replaced: dict[str, Any] = {}
        for site in stop.sites:
            path, work = site.path, works[site.path]
            picks = {k: i for k, i in enumerate(stop.index[path]) if not isinstance(i, slice)}
            if site.name not in {s.name for s in plan.tasks[path].sites}:
                continue
            work.watch(site, stop.results[site.name], picks)
            if path not in ready and not work.has(picks):
                found = [(site, stop.results[site.name])]
                replaced[path] = work.quantize(stop.leaves[path], found, picks)
        return replaced if plan.replaces else {}

    stats.sequential(
        traced,
        started,
        batches,
        plan.statistics,
        visit,
        where=plan.is_watched,
        host=host,
        progress=progress,
    )


# --- Bias correction ----------------------------------------------------------------------------


def _correct_biases(
    traced: graph.Traced, quantized: tree.Params, works: Mapping[str, Work]
) -> tree.Params:
    """Take the mean errors of outputs out of what is added to them."""
    chains = graph.affine(traced)
    for work in works.values():
        if work.task.mean_key is None:
            continue
        site, form = work.task.sites[0], work.task.form
        chain = chains.get(site.name)
        source = [*site.axes.stacked, *site.axes.batch]
        single = len(work.task.sites) == 1 and sorted(source) == list(form.lead)
        shift = work.shift() if single else None
        if not single:
            why = "the leaf has several sites, or its slices are told apart outside of scans"
        elif chain is None or chain.unshiftable is not None:
            why = "there is no bias" if chain is None else chain.unshiftable
        elif shift is None:
            why = "nothing reached some of its slices"
        else:
            order = [form.lead.index(k) for k in source]
            shift = jnp.transpose(shift, [*order, *range(len(order), shift.ndim)])
            quantized = chain.shifted(quantized, -shift)
            continue
        work.notes.append(f"no bias was corrected: {why}")
    return quantized


# --- The report ----------------------------------------------------------------------------------


def _report(
    fn: Callable[..., Any],
    params: tree.Params,
    quantized: tree.Params,
    first: tuple[Any, ...],
    plan: ResolvedPolicy,
    works: Mapping[str, Work],
) -> QReport:
    ratios, uses = measure(fn, params, quantized, first)
    rows = []
    for path, q in tree.items(quantized):
        if path not in works:
            continue
        work, task = works[path], plan.tasks[path]
        names = {site.name for site in plan.graph.sites_of(path)}
        rows.append(
            QLeaf(
                path=path,
                format=q.format,
                activations=task.activations,
                static=task.range_key is not None,
                method=type(task.method).__name__,
                bytes_before=tree.nbytes(work.leaf),
                bytes=q.nbytes,
                weight_sqnr=float(numerics.sqnr(work.leaf, q)),
                output_sqnr={name: db for name, db in ratios.items() if name in names},
                kernels=tuple(use for use in uses if use.path == path),
                notes=tuple(work.notes),
                diagnostics=work.diagnostics,
            )
        )
    return QReport(
        leaves=tuple(rows),
        excluded=plan.rest.excluded,
        unselected=plan.rest.unselected,
        exempt=plan.rest.exempt,
        unused_rules=plan.unused_rules,
        untouched=list_untouched(plan),
        bytes_before=tree.nbytes(params),
        bytes=tree.nbytes(quantized),
    )
