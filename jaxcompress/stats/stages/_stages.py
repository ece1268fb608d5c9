"""A captured call in stages, between which its params may change.

`Stages` cuts a function at the sites of chosen leaves. A batch goes through it stage by stage,
each equation that depends on inputs running once; what depends on params only is computed from
the params of the moment, wherever it is needed. What a later stage reads is carried there, and
nothing else. Stages that do the same, such as those of repeated layers, compile once.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import tree
from jaxcompress.graph import Axes, Equation, Site, Traced
from jaxcompress.graph.program import (
    Cells,
    Literal,
    Program,
    capture_program,
    construct,
    rebuild_construct,
)
from jaxcompress.graph.sites import (
    CONDITION,
    Observer,
    call_of,
    choose_sites,
    make_observe_layer,
    plan_layers,
    refuse_inside,
    visit_layers,
)
from jaxcompress.stats.stages._canonical import CompiledSteps, Keys, Op, Shared, program_op
from jaxcompress.stats.stages._flat import Constant, Flat, FlatStop, LeafPart, Visit, flatten


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """A place between two stages.

    Attributes:
        sites: The sites whose activation is known there and that have not run yet. Axes and
            counts are those of the slice of the leaf that they read.
        slices: `{path: {axis of the leaf: index}}`: which slice that is; empty for a whole leaf.
        iteration: The iterations of the scans that were taken apart, outermost first.
    """

    sites: tuple[Site, ...]
    slices: Mapping[str, Mapping[int, int]]
    iteration: tuple[int, ...]


class _Stage(NamedTuple):
    """What leads to a stop: a compiled function, its results, and what stays after the stop."""

    compiled: CompiledSteps | None
    outputs: tuple[int, ...]
    kept: frozenset[int]


class _Update(NamedTuple):
    """An update of cells: the compiled function, and where its cells stand."""

    compiled: CompiledSteps
    names: tuple[str, ...]
    cells: Mapping[int, int]  # variable -> number of the flat cell


class Stages:
    """A function cut at the sites that `where` selects.

    Args:
        fn: `fn(params, *inputs) -> outputs`, pure; or a `Traced` of a call of it.
        where: Leaves at whose sites to stop; see `tree.matches`.
        host: Keep what batches carry between stages as NumPy arrays.
        sharding: Where the cells of observers live, if not wherever the compiler likes.
    """

    def __init__(
        self,
        fn: Callable[..., Any] | Traced,
        where: tree.Where,
        *,
        host: bool = False,
        sharding: jax.sharding.Sharding | None = None,
    ):
        self._fn, self._where, self._host = fn, where, host
        self._shared, self._sharding = Shared(Keys()), sharding
        self._pipelines: dict[Any, Pipeline] = {}

    @property
    def compiled(self) -> int:
        """How many different functions there are so far, of stages, observers and calls."""
        return len(self._shared.functions)

    def call(self, f: Callable[..., Any], *args: Any) -> Any:
        """Call `f(*args)` jitted, compiled once for all functions that do the same."""
        return self._shared.call(f, *args, sharding=self._sharding)

    def make_pipeline(self, params: tree.Params, inputs: Sequence[Any]) -> "Pipeline":
        """Cut the function for inputs of some shapes; inputs of the same shapes share it."""
        leaves, structure = jax.tree.flatten(tuple(inputs))
        key = structure, tuple(jax.typeof(x) for x in leaves)
        if key not in self._pipelines:
            traced = call_of(self._fn, params, tuple(inputs), {})
            names = choose_sites(traced, self._where)
            refuse_inside(traced, names, CONDITION, "nothing can leave the condition of a loop")
            self._pipelines[key] = Pipeline(
                traced, names, self._shared, host=self._host, sharding=self._sharding
            )
        return self._pipelines[key]


class Pipeline:
    """The stages for inputs of one set of shapes.

    Attributes:
        traced: The captured call.
        boundaries: What is at each stop, in order; stage k leads to stop k.
    """

    def __init__(
        self,
        traced: Traced,
        names: Sequence[str],
        shared: Shared,
        *,
        host: bool,
        sharding: jax.sharding.Sharding | None,
    ):
        self.traced, self._shared, self._host, self._sharding = traced, shared, host, sharding
        self._flat = flatten(traced, names, shared.keys)
        self._fresh = itertools.count(len(self._flat.avals))
        self._stages = self._cut(self._flat)
        self._programs: dict[Any, tuple[Program, list[Any]]] = {}
        self._updates: dict[int, list[_Update]] = {}
        self.boundaries = tuple(_describe_boundary(stop) for stop in self._flat.stops)

    def start(self, inputs: Sequence[Any]) -> "BatchRun":
        """Let a batch begin."""
        values = zip(self._flat.inputs, jax.tree.leaves(tuple(inputs)), strict=True)
        needed = self._needed
        return BatchRun(self, {v: _offload(x, self._host) for v, x in values if v in needed})

    def _cut(self, flat: Flat) -> list[_Stage]:
        """Go backwards through the steps; keep those that a stop needs, and what they need."""
        stages: list[_Stage] = []
        needed: set[int] = set()
        for k in reversed(range(len(flat.stops))):
            stop = flat.stops[k]
            begin = flat.stops[k - 1].index if k else 0
            kept = frozenset(needed)
            needed |= _roots_at(flat, stop)
            wanted, mine = frozenset(needed), []
            for number in reversed(range(begin, stop.index)):
                op = flat.ops[number]
                if flat.is_recomputed(op):
                    continue
                if number in flat.lasting or needed.intersection(op.outputs):
                    mine.append(number)
                    needed -= set(op.outputs)
                    needed |= flat.roots_of(op.inputs)
            made = {v for number in mine for v in flat.ops[number].outputs}
            outputs = tuple(sorted(made & wanted))
            compiled = self._compile(mine, [], outputs) if mine else None
            stages.append(_Stage(compiled, outputs, kept))
        self._needed = frozenset(needed)
        return stages[::-1]

    def _compile(
        self,
        numbers: Sequence[int],
        further: Sequence[Op],
        outputs: Sequence[int],
        avals: Mapping[int, Any] | None = None,
    ) -> CompiledSteps:
        """Compile steps with the recomputed ones that they read."""
        flat, needed = self._flat, set(numbers)
        left = [a for n in numbers for a in flat.ops[n].inputs]
        left += [a for op in further for a in op.inputs]
        while left:
            atom = left.pop()
            number = None if isinstance(atom, Literal) else flat.maker.get(atom)
            if number is not None and number not in needed and flat.is_recomputed(flat.ops[number]):
                needed.add(number)
                left += flat.ops[number].inputs
        ops = [*(flat.ops[n] for n in sorted(needed)), *further]
        more = avals or {}
        return self._shared.compile(
            ops,
            outputs,
            lambda v: more[v] if v in more else flat.avals[v],
            donated=frozenset(more),
            sharding=self._sharding if more else None,
        )

    # --- observers -----------------------------------------------------------------------------

    def list_updates(
        self, k: int, observers: Mapping[str, Observer], cells: Cells
    ) -> list[_Update]:
        """Compile the observers at stop k; cells give the shapes of their states."""
        if k not in self._updates:
            updates = []
            for visit in self._flat.stops[k].visits:
                names = tuple(site.name for site in visit.sites if site.name in observers)
                if names:
                    mine = {name: cells[name] for name in names}
                    updates.append(self._compile_update(visit, observers, mine))
            self._updates[k] = updates
        return self._updates[k]

    def _compile_update(
        self, visit: Visit, observers: Mapping[str, Observer], cells: Cells
    ) -> _Update:
        key = visit.position, tuple((name, observers[name]) for name in cells)
        variables = [a for a in visit.operands if not isinstance(a, Literal)]
        if key not in self._programs:  # iterations of a scan share it
            observe = functools.partial(_observe_visit, self.traced, visit, observers)
            shapes = [_struct(self._flat.avals[v]) for v in variables]
            program, _ = capture_program(observe, (cells, shapes))
            self._programs[key] = program, jax.tree.leaves(cells)
        program, flat_cells = self._programs[key]
        states = [next(self._fresh) for _ in flat_cells]
        results = [next(self._fresh) for _ in program.outvars]
        op = program_op(self._shared.keys, program, [*states, *variables], results)
        avals = {v: jax.typeof(x) for v, x in zip(states, flat_cells, strict=True)}
        compiled = self._compile([], [op], results, avals)
        return _Update(compiled, tuple(cells), {v: k for k, v in enumerate(states)})


def _observe_visit(
    traced: Traced,
    visit: Visit,
    observers: Mapping[str, Observer],
    cells: Cells,
    variables: Sequence[Any],
) -> Cells:
    """Run an equation for the sake of the observers at it or in it; returns their cells."""
    given = iter(variables)
    operands = [a.val if isinstance(a, Literal) else next(given) for a in visit.operands]

    layers = {name: [make_observe_layer(observers[name])] for name in cells}
    eqn = visit.eqn
    if construct(eqn.primitive.name) is None:
        equation = Equation(eqn.primitive, eqn.params, visit.sites, eqn)
        return visit_layers(layers, equation, operands, cells)[1]
    plan = plan_layers(traced, layers, fills=True)
    return rebuild_construct(plan, visit.position, eqn, operands, cells)[1]


class BatchRun:
    """The run of one batch through a pipeline; `_env` holds what the batch carries."""

    def __init__(self, pipeline: Pipeline, env: dict[int, Any]):
        self.pipeline, self._env, self._next = pipeline, env, 0

    def advance(
        self, leaves: Sequence[Any], observers: Mapping[str, Observer], cells: Cells
    ) -> Cells:
        """Go on to the next stop, and update the cells of the observers there.

        Args:
            leaves: The arrays of params, flat.
            observers: `{Site.name: observer}`; sites that are not at this stop are left aside.
            cells: `{Site.name: state}` of the observers at this stop. They are used up.

        Returns:
            The updated cells.
        """
        pipeline, k = self.pipeline, self._next
        self._next += 1
        stage, arrays = pipeline._stages[k], {}

        def value(var: int) -> Any:
            if var not in arrays:
                base = pipeline._flat.base.get(var)
                if isinstance(base, LeafPart):
                    arrays[var] = leaves[base.number]
                elif isinstance(base, Constant):
                    arrays[var] = base.value
                else:
                    arrays[var] = _load(self._env[var])
            return arrays[var]

        if stage.compiled is not None:
            results = stage.compiled.function(*map(value, stage.compiled.inputs))
            arrays.update(zip(stage.outputs, results, strict=True))
        cells = dict(cells)
        for update in pipeline.list_updates(k, observers, cells):
            mine = {name: cells[name] for name in update.names}
            states, structure = jax.tree.flatten(mine)
            results = update.compiled.function(
                *(
                    states[update.cells[v]] if v in update.cells else value(v)
                    for v in update.compiled.inputs
                )
            )
            cells |= jax.tree.unflatten(structure, results)
        self._env = {
            v: self._env[v] if v in self._env else _offload(arrays[v], pipeline._host)
            for v in stage.kept
        }
        return cells


class _Offloaded(NamedTuple):
    """An array on the host, and where it came from."""

    value: np.ndarray
    sharding: Any
    key: Any  # the implementation, if they are random keys


def _offload(x: Any, host: bool) -> Any:
    if not host or not isinstance(x, jax.Array):
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return _Offloaded(np.asarray(jax.random.key_data(x)), None, jax.random.key_impl(x))
    return _Offloaded(np.asarray(x), x.sharding, None)


def _load(x: Any) -> Any:
    if not isinstance(x, _Offloaded):
        return x
    if x.key is not None:
        return jax.random.wrap_key_data(jnp.asarray(x.value), impl=x.key)
    return jax.device_put(x.value, x.sharding)


def _roots_at(flat: Flat, stop: FlatStop) -> set[int]:
    return set().union(*(flat.roots_of(visit.operands) for visit in stop.visits))


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _describe_boundary(stop: FlatStop) -> Boundary:
    sites = [site for visit in stop.visits for site in visit.sites]
    depth = len(stop.iteration)
    return Boundary(
        sites=tuple(_slice_site(site, stop.picks.get(site.path, {}), depth) for site in sites),
        slices={site.path: stop.picks.get(site.path, {}) for site in sites},
        iteration=stop.iteration,
    )


def _slice_site(site: Site, picks: Mapping[int, int], depth: int) -> Site:
    """Describe a site as one of a slice of its leaf, inside scans that were taken apart."""
    times = int(np.prod(site.stack[:depth], dtype=np.int64))

    def renumber(axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(a - sum(p < a for p in picks) for a in axes if a not in picks)

    return replace(
        site,
        axes=Axes(**{role: renumber(axes) for role, axes in vars(site.axes).items()}),
        stack=site.stack[depth:],
        layers=tuple(
            None if axis is None else renumber((axis,))[0] for axis in site.layers[depth:]
        ),
        repeats=site.repeats // times,
        flops=site.flops // times,
        bytes=site.bytes // times,
    )
