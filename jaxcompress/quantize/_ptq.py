"""`ptq`: post-training quantization of any function, from a policy and a few batches."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import graph, numerics, stats, tree
from jaxcompress.errors import NonFiniteError
from jaxcompress.graph import Site
from jaxcompress.numerics import Activation, QArray
from jaxcompress.quantize import _ranges, _seen
from jaxcompress.quantize._execute import measure
from jaxcompress.quantize._matrix import assemble
from jaxcompress.quantize._method import Method, RoundToNearest
from jaxcompress.quantize._plan import Plan, Task, make_plan, untouched
from jaxcompress.quantize._policy import Policy
from jaxcompress.quantize._report import QLeaf, QReport
from jaxcompress.stats._collect import matching, opened


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
    Otherwise everything is collected in one pass, which keeps none.

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
    first, stream = opened(batches)
    plan = make_plan(graph.trace(fn, params, *first), params, policy, strict=strict)
    works = {path: _Work(task, leaf) for path, task, leaf in _with_leaves(plan, params)}
    stream = itertools.chain([first], matching(stream, first))
    if any(task.method.sequential for task in plan.tasks.values()):
        _in_sequence(fn, params, stream, plan, works, host=host, progress=progress)
    else:
        _in_one_pass(fn, params, stream, plan, works, progress=progress)
    done = {path: work.finish() for path, work in works.items()}
    quantized = tree.map_with_path(lambda path, x: done.get(path, x), params)
    return QResult(params=quantized, report=_report(fn, params, quantized, first, plan, works))


def _with_leaves(plan: Plan, params: tree.Params) -> Iterable[tuple[str, Task, Any]]:
    leaves = dict(tree.items(params))
    for path, task in plan.tasks.items():
        _require_finite(path, leaves[path])
        yield path, task, leaves[path]


def _require_finite(path: str, leaf: Any) -> None:
    if not bool(jnp.isfinite(leaf).all()):
        raise NonFiniteError(
            "params",
            got=f"NaN or infinity in {path!r}",
            expected="finite weights",
            fix="Find where they come from; quantizing would spread them over whole slices.",
        )


# --- Two ways through the batches ----------------------------------------------------------------


def _in_one_pass(
    fn: Callable[..., Any],
    params: tree.Params,
    batches: Iterable[Any],
    plan: Plan,
    works: Mapping[str, "_Work"],
    *,
    progress: bool,
) -> None:
    """Collect what is needed of activations as they are in fn, then quantize."""
    wanted = {path for path, task in plan.tasks.items() if task.keys}
    collected: Mapping[str, Any] = {}
    if wanted:
        where = lambda path, _: path in wanted
        collected = stats.collect(
            fn, params, batches, plan.statistics, where=where, progress=progress
        )
    for path, work in works.items():
        task = plan.tasks[path]
        results = {site: collected[site.name] for site in task.sites} if task.keys else {}
        for site, found in zip(task.sites, results.values(), strict=False):
            work.watch(site, found, {})
        work.quantize(work.leaf, list(results.items()), {})


def _in_sequence(
    fn: Callable[..., Any],
    params: tree.Params,
    batches: Iterable[Any],
    plan: Plan,
    works: Mapping[str, "_Work"],
    *,
    host: bool,
    progress: bool,
) -> None:
    """Advance all batches together, and quantize leaves by what reaches them then."""
    wanted = {path for path, task in plan.tasks.items() if task.keys}
    # What needs no data is replaced beforehand: it is upstream of something, or of nothing.
    ready = {
        path: work.quantize(work.leaf, [], {})
        for path, work in works.items()
        if not plan.tasks[path].method_keys
    }
    started = tree.map_with_path(lambda path, x: ready.get(path, x), params)

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
        return replaced

    stats.sequential(
        fn,
        started,
        batches,
        plan.statistics,
        visit,
        where=lambda path, _: path in wanted,
        host=host,
        progress=progress,
    )


# --- One leaf ------------------------------------------------------------------------------------


class _Work:
    """One leaf on its way to its stored form, whole or slice by slice.

    Args:
        task: What is to be done with it.
        leaf: The leaf.
    """

    def __init__(self, task: Task, leaf: Any):
        self.task, self.leaf = task, leaf
        self.notes = list(task.notes)
        self.diagnostics: dict[str, float] = {}
        self._parts: dict[tuple[tuple[int, int], ...], QArray] = {}
        static = task.activations if task.range_key else None
        apart = {k for s in task.sites for k in (*s.axes.stacked, *s.axes.sliced)}
        self._ranges = static and _ranges.Ranges(task.path, task.form, static, apart)

    def has(self, picks: Mapping[int, int]) -> bool:
        """Tell whether a slice (`{axis: index}`) has been quantized."""
        return tuple(sorted(picks.items())) in self._parts

    def watch(self, site: Site, results: Mapping[str, Any], picks: dict[int, int]) -> None:
        """Take in the range of the activation at a site."""
        if self._ranges is None or self.task.range_key not in results:
            return
        form = self.task.form
        left = [k for k in range(len(form.shape)) if k not in picks]
        axes, _ = _seen.scans(site, form.without(tuple(picks)))
        named = tuple(None if k is None else left[k] for k in axes)
        self._ranges.add(results[self.task.range_key], named, picks)

    def quantize(
        self,
        leaf: Any,
        found: list[tuple[Site, Mapping[str, Any]]],
        picks: Mapping[int, int],
    ) -> jax.Array:
        """Quantize the leaf, or a slice of it.

        Args:
            leaf: The array.
            found: Sites, with what was seen there.
            picks: `{axis: index}` of the slice; empty for the whole leaf.

        Returns:
            The array that the stored form stands for.
        """
        task, form = self.task, self.task.form.without(tuple(picks))
        if task.target.matrix is None:
            q = numerics.quantize(leaf, task.target.leaf)
            self._parts[()] = q
            return numerics.dequantize(q)
        seen = {
            name: _seen.together([_seen.by_matrix(r[key], s, form) for s, r in found])
            for name, key in task.method_keys.items()
        }
        matrices = form.to_matrices(jnp.asarray(leaf).astype(jnp.float32))
        parts, info = _quantized(matrices, seen, task.method, task.target.matrix)
        for name, values in info.items():
            worst = float(np.max(np.asarray(values)))
            self.diagnostics[name] = max(worst, self.diagnostics.get(name, worst))
        self._parts[tuple(sorted(picks.items()))] = parts
        return form.to_leaf(numerics.dequantize(parts)).astype(leaf.dtype)

    def finish(self) -> QArray:
        """Put the slices together, with the form of the activations beside them."""
        task = self.task
        if task.target.matrix is None:
            q = self._parts[()]
        else:
            q = assemble(self._together(), task.form, task.target, self.leaf.dtype)
        if task.activations is not None:
            static = None if self._ranges is None else self._ranges.settle()
            q = replace(q, activation=static or Activation(format=task.activations))
        return _placed(q, self.leaf)

    def _together(self) -> QArray:
        """Stack the slices along the lead axes that were picked from."""
        if () in self._parts:
            return self._parts[()]
        form = self.task.form
        axes = [k for k, _ in next(iter(self._parts))]
        missing = 0
        rows = []
        for index in itertools.product(*(range(form.shape[k]) for k in axes)):
            picks = dict(zip(axes, index, strict=True))
            if not self.has(picks):
                missing += 1
                where = tuple(picks.get(k, slice(None)) for k in range(len(form.shape)))
                self._fill(self.leaf[where], picks)
            rows.append(self._parts[tuple(sorted(picks.items()))])
        if missing:
            self.notes.append(f"{missing} slices rounded to nearest, since nothing reached them")
        rest = [k for k in form.lead if k not in axes]
        order = [[*axes, *rest].index(k) for k in form.lead]

        def stack(*parts: jax.Array) -> jax.Array:
            x = jnp.stack(parts)
            x = x.reshape(*(form.shape[k] for k in axes), *x.shape[1:])
            return jnp.transpose(x, [*order, *range(len(order), x.ndim)])

        return jax.tree.map(stack, *rows)

    def _fill(self, leaf: jax.Array, picks: dict[int, int]) -> None:
        task, form = self.task, self.task.form.without(tuple(picks))
        assert task.target.matrix is not None
        matrices = form.to_matrices(leaf.astype(jnp.float32))
        parts, _ = _quantized(matrices, {}, RoundToNearest(), task.target.matrix)
        self._parts[tuple(sorted(picks.items()))] = parts


@functools.partial(jax.jit, static_argnums=(2, 3))
def _quantized(
    matrices: jax.Array, seen: Mapping[str, Any], method: Method, format: numerics.Format
) -> tuple[QArray, dict[str, jax.Array]]:
    """Map a method over `(*lead, in, out)`."""
    call = lambda w, seen: method(w, format, seen)
    for _ in range(matrices.ndim - 2):
        call = jax.vmap(call)
    return call(matrices, seen)


def _placed(q: QArray, leaf: Any) -> QArray:
    """Shard the parts like the leaf that they replace, as far as their sizes allow."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return q
    return jax.device_put(q, shardings(q, sharding))


def shardings(q: QArray, sharding: jax.sharding.NamedSharding) -> QArray:
    """Say where the parts of a quantized leaf live, if the leaf lived there.

    Args:
        q: The quantized leaf (shapes are enough).
        sharding: The leaf's sharding.

    Returns:
        A `QArray` of shardings: each axis split as the leaf's was where its length divides, the
        groups of an axis in its place.
    """
    mesh, ndim = sharding.mesh, len(q.shape)
    names = (*sharding.spec, *(None,) * ndim)[:ndim]
    blocked: list[Any] = list(names)
    if isinstance(q.format.granularity, numerics.PerGroup):
        blocked.insert(q.format.granularity.axis % ndim + 1, None)

    def place(part: Any) -> jax.sharding.NamedSharding:
        spec = names if part.ndim == ndim else blocked
        kept = [
            name if name is not None and n % _ways(mesh, name) == 0 and n > 1 else None
            for n, name in zip(part.shape, [*spec, *(None,) * part.ndim], strict=False)
        ]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*kept))

    return jax.tree.map(place, q)


def _ways(mesh: Any, names: Any) -> int:
    names = (names,) if isinstance(names, str) else names
    return int(np.prod([mesh.shape[name] for name in names]))


# --- The report ----------------------------------------------------------------------------------


def _report(
    fn: Callable[..., Any],
    params: tree.Params,
    quantized: tree.Params,
    first: tuple[Any, ...],
    plan: Plan,
    works: Mapping[str, _Work],
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
        excluded=plan.excluded,
        unselected=plan.unselected,
        exempt=plan.exempt,
        unused_rules=plan.unused_rules,
        untouched=untouched(plan),
        bytes_before=tree.nbytes(params),
        bytes=tree.nbytes(quantized),
    )
