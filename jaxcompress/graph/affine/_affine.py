"""Chains: the affine functions, with coefficients from params, that follow a site's result.

Inference BatchNorm, a bias, a layer scale: `y -> A y + B` with `A` and `B` per output channel.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.graph.affine._chain import Chain, ChainStep, Holder, choose_preferred
from jaxcompress.graph.affine._reads import Known, Reads, read_all
from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._constructs import CLOSED, construct, is_call
from jaxcompress.graph.program._interpret import Position
from jaxcompress.graph.program._live import variables
from jaxcompress.graph.program._primitives import ARRANGES, MOVES, arrange
from jaxcompress.graph.sites._sites import Site
from jaxcompress.graph.sites._trace import Traced, capture
from jaxcompress.graph.sites._views import AxisFactors, Factor, split_factors

_AFFINE = ("mul", "div", "add", "sub")
_ADDS = {("add", 0), ("add", 1), ("sub", 0)}
"""The kinds of step, and the operand that the result is, that add something or its negative."""


def affine(
    fn: Callable[..., Any] | Traced, params: tree.Params = None, *inputs: Any, **kwargs: Any
) -> dict[str, Chain]:
    """Find the affine function that follows each contraction: a bias, BatchNorm, a layer scale.

    A chain goes on while one equation alone reads the result, and either multiplies, divides, adds
    or subtracts something that is computed from params alone and differs between output channels
    only, or casts or rearranges the result without mixing channels and positions. It passes through
    the borders of `jit` and `checkpoint`. Inference BatchNorm is such a chain, with
    `A = scale / sqrt(var + eps)` and `B = bias - mean A`; so are a bias and a layer scale.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; or a `Traced`, without arguments.
        params: Any pytree of arrays; shapes are enough.
        *inputs: fn's other arguments.
        **kwargs: fn's keyword arguments.

    Returns:
        `{Site.name: chain}` for the sites of `dot_general` and `conv_general_dilated`, in fn's
        order. A chain may have no steps.

    Raises:
        ArgumentTypeError: As `trace`.

    Example:
        >>> import jax.numpy as jnp
        >>> def fn(params, x):
        ...     return jnp.tanh((x @ params["w"] - params["mean"]) * params["scale"])
        >>> leaf = jnp.array([2.0, 4.0])
        >>> params = {"w": jnp.ones((3, 2)), "mean": leaf, "scale": leaf}
        >>> chain = affine(fn, params, jnp.ones((5, 3)))["w"]
        >>> chain.leaves, chain.stopped
        (('mean', 'scale'), 'tanh is not affine in its result')
        >>> A, B = chain.affine(params)
        >>> A.tolist(), B.tolist()
        ([2.0, 4.0], [-4.0, -16.0])
    """
    return chains_of(capture(fn, params, *inputs, **kwargs))


def chains_of(traced: Traced) -> dict[str, Chain]:
    """Find the chains of a captured call; a site of each name."""
    reads = read_all(traced)
    return {
        found.site.name: _Follower(traced, reads, found.position, found.site).chain()
        for found in traced.record.sites
        if found.site.primitive in ("dot_general", "conv_general_dilated")
    }


class _Cursor(NamedTuple):
    """A variable, the body that it is in, and the factors of the site's output in its axes."""

    prefix: Position
    var: Any
    factors: tuple[AxisFactors, ...]


class _StopError(Exception):
    """The chain ends here, and why."""


class _Follower:
    """Follows one site's result."""

    def __init__(self, traced: Traced, reads: Reads, position: Position, site: Site):
        self._traced, self._reads, self._position, self._site = traced, reads, position, site
        self._steps: list[ChainStep] = []
        self._kernel, self._outputs = Known(), ()
        self._unread = position[:-1] not in reads.walk.bodies
        if not self._unread:
            eqn = reads.walk.equation(position)
            self._kernel = reads.walk.read(position[:-1], eqn.invars[site.operand]) or Known()
            self._outputs = _output_axes(site, eqn)
        self._channels = {axis for axis in self._outputs if axis is not None}

    def chain(self) -> Chain:
        site, position = self._site, self._position
        stopped = self._follow()
        holders = tuple(self._holders())
        leaves = frozenset[str]().union(*(s.side.leaves for s in self._steps if s.side))
        slots = {step.slot for step in self._steps}
        in_order = [path for path in self._traced.leaves if path in leaves]
        last = [holder.path for holder in holders if holder.number + 1 == len(self._steps)]
        unshiftable = self._why_no_shift(stopped, holders)
        return Chain(
            site=site,
            steps=tuple(self._steps),
            leaves=tuple(in_order),
            shared=tuple(p for p in in_order if not self._reads.contacts[p] <= slots),
            stopped=stopped,
            bias=last[0] if last else None,
            shifts=choose_preferred(holders).path if holders else None,
            unfoldable=self._why_no_fold(stopped, unshiftable),
            unshiftable=unshiftable,
            _holders=holders,
            _kernel=self._kernel,
            _outputs=self._outputs,
            _position=position,
            _reads=self._reads,
        )

    # --- following ------------------------------------------------------------------------------

    def _follow(self) -> str:
        if self._unread:
            return "nothing before it depends on fn's inputs"
        eqn = self._reads.walk.equation(self._position)
        shape = self._site.output.shape
        factors = tuple((Factor((k,), n),) if n > 1 else () for k, n in enumerate(shape))
        cursor = _Cursor(self._position[:-1], eqn.outvars[0], factors)
        try:
            while True:
                cursor = self._next(cursor)
        except _StopError as stop:
            return str(stop)

    def _next(self, cursor: _Cursor) -> _Cursor:
        program = self._reads.program(cursor.prefix)
        readers = self._reads.readers(cursor.prefix, cursor.var)
        results = [k for k, atom in enumerate(program.outvars) if atom is cursor.var]
        if len(readers) + len(results) > 1:
            raise _StopError(self._several(program, cursor.var, readers, bool(results)))
        if results:
            return self._leave(cursor, results[0])
        if not readers:
            raise _StopError("nothing reads its result")
        (number,) = readers
        eqn, here = program.eqns[number], (*cursor.prefix, number)
        operands = [k for k, atom in enumerate(eqn.invars) if atom is cursor.var]
        name = eqn.primitive.name
        if len(operands) > 1:
            raise _StopError(f"{_name_function(eqn)} is not affine in its result")
        if is_call(name):
            inner = self._reads.program((*here, 0))
            return cursor._replace(prefix=(*here, 0), var=inner.invars[operands[0]])
        if name in MOVES:
            return self._move(cursor, eqn)
        if name == "neg":
            self._steps.append(ChainStep(here, "neg", 0, None, cursor.factors))
            return cursor._replace(var=eqn.outvars[0])
        if name not in _AFFINE or (name == "div" and operands[0] == 1):
            raise _StopError(f"{_name_function(eqn)} is not affine in its result")
        self._combine(cursor, eqn, here, operands[0])
        return cursor._replace(var=eqn.outvars[0])

    def _leave(self, cursor: _Cursor, k: int) -> _Cursor:
        """Go on in the body around, if the construct gives the result out as it is."""
        if not cursor.prefix:
            raise _StopError("its result is what fn returns")
        outer = cursor.prefix[:-1]
        eqn = self._reads.walk.equation(outer)
        if not is_call(eqn.primitive.name):
            rule = construct(eqn.primitive.name)
            label = rule.bodies(eqn)[cursor.prefix[-1]].label if rule else eqn.primitive.name
            raise _StopError(f"its result is what {label} gives out")
        return cursor._replace(prefix=outer[:-1], var=eqn.outvars[k])

    def _move(self, cursor: _Cursor, eqn: Any) -> _Cursor:
        name, factors = eqn.primitive.name, cursor.factors
        shape = eqn.outvars[0].aval.shape
        if name == "convert_element_type" and not jnp.issubdtype(
            eqn.params["new_dtype"], jnp.inexact
        ):
            raise _StopError(f"{name} is not affine in its result")
        if name == "reshape":
            factors = split_factors([f for axis in factors for f in axis], shape)
        elif name in ARRANGES:
            factors = arrange(eqn, factors, lambda n: (Factor((), n),) if n > 1 else ())
        if factors is None or any(self._kind(axis) is None for axis in factors):
            raise _StopError(f"{name} mixes its channels with its positions")
        return cursor._replace(var=eqn.outvars[0], factors=tuple(factors))

    def _kind(self, axis: AxisFactors) -> bool | None:
        """Tell whether an axis holds channels, or (`None`) not channels alone."""
        kinds = {bool(set(factor.axes) & self._channels) for factor in axis}
        if len(kinds) > 1 or not all(factor.exact for factor in axis):
            return None
        return True in kinds

    def _combine(self, cursor: _Cursor, eqn: Any, here: Position, operand: int) -> None:
        """Add the step of an equation with an operand beside the result."""
        name, atom = eqn.primitive.name, eqn.invars[1 - operand]
        side = self._reads.walk.read(cursor.prefix, atom)
        if side is None:
            raise _StopError(f"the other operand of {name} depends on fn's inputs")
        if not side.levels <= self._kernel.levels:
            raise _StopError(
                f"the other operand of {name} differs between uses of its kernel in a scan"
            )
        shape, out = atom.aval.shape, eqn.outvars[0].aval.shape
        if cursor.var.aval.shape != out:
            raise _StopError(f"{name} repeats its result")
        for axis, factors in enumerate(cursor.factors if shape else ()):
            even = shape[axis] == 1 or axis in side.constant
            if not even and not self._kind(factors):
                raise _StopError(f"the other operand of {name} differs between positions")
        self._steps.append(ChainStep(here, name, operand, side, cursor.factors))

    def _several(self, program: Any, var: Any, readers: Sequence[int], returned: bool) -> str:
        """Say what a result with several readers is read by: statistics of its own, maybe."""
        derived, reduced = {var}, set[Any]()
        for number, eqn in enumerate(program.eqns):
            reads = set(variables(eqn.invars))
            if number in readers and eqn.primitive.name in _AFFINE and reads & reduced:
                return "it is normalised by its own statistics, which depend on fn's inputs"
            if reads & reduced or (reads & derived and _reduces(eqn)):
                reduced.update(eqn.outvars)
            elif reads & derived:
                derived.update(eqn.outvars)
        names = dict.fromkeys(_name_function(program.eqns[n]) for n in readers)
        where = [*names, "fn's results"] if returned else list(names)
        return f"its result is read at {len(readers) + returned} places: {', '.join(where)}"

    # --- what can be done with the chain --------------------------------------------------------

    def _entries(self, shape: Sequence[int]) -> int:
        """Count the entries of an array of this shape over the scans that split the kernel."""
        lengths = (self._reads.walk.equation(s).params["length"] for s in self._kernel.levels)
        return math.prod(shape) * math.prod(lengths)

    def _holders(self) -> Iterator[Holder]:
        """List the leaves that are added alone, one entry to a channel: each can hold a shift."""
        entries = self._entries([self._site.output.shape[k] for k in self._channels])
        for number, step in enumerate(self._steps):
            side = step.side
            if side is None or side.same is None or (step.kind, step.operand) not in _ADDS:
                continue
            fits = math.prod(self._traced.leaves[side.same].shape) == entries
            alone = self._reads.contacts[side.same] == {step.slot}
            if fits and alone and side.levels == self._kernel.levels:
                yield Holder(side.same, number, -1 if step.kind == "sub" else 1)

    def _closed(self) -> str | None:
        label = next((label for label in self._site.scope if label in CLOSED), None)
        return None if label is None else f"it lies inside a {label}"

    def _why_no_shift(self, stopped: str, holders: Sequence[Holder]) -> str | None:
        if closed := self._closed():
            return closed
        if holders:
            return None
        added = [s.side.same for s in self._steps if s.side and (s.kind, s.operand) in _ADDS]
        paths = list(dict.fromkeys(path for path in added if path is not None))
        shared = [
            path for path in paths if self._reads.contacts[path] - {s.slot for s in self._steps}
        ]
        if shared:
            return f"{', '.join(shared)}, added to it, is read at other places as well"
        if paths:
            return f"{', '.join(paths)}, added to it, has no entry of its own for each channel"
        if any(s.side.leaves for s in self._steps if s.side and not s.scales):
            return "no step adds a leaf to it as it is"
        return f"no leaf is added to its result: {stopped}"

    def _why_no_fold(self, stopped: str, unshiftable: str | None) -> str | None:
        path, kernel = self._site.path, self._kernel
        leaf = self._traced.leaves[path]
        if isinstance(leaf, tree.LeafNode):
            return "its kernel is quantized already"
        if closed := self._closed():
            return closed
        if not any(s.scales and s.side and s.side.leaves for s in self._steps):
            return f"no leaf scales its result: {stopped}"
        if kernel.same != path or math.prod(leaf.shape) != self._entries(self._site.weight.shape):
            return "its kernel is computed, sliced or repeated before it is contracted"
        if self._reads.contacts[path] != {(self._position, self._site.operand)}:
            return "its kernel is read at other places as well"
        return unshiftable


def _output_axes(site: Site, eqn: Any) -> tuple[int | None, ...]:
    """For each axis of the weight as the equation sees it: which axis of the output it is."""
    rank = len(site.weight.shape)
    if site.primitive == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        out = {numbers.rhs_spec[0]: numbers.out_spec[1]}
        return tuple(out.get(k) for k in range(rank))
    contracts, batches = eqn.params["dimension_numbers"]
    contract, batch = contracts[site.operand], batches[site.operand]
    free = [k for k in range(rank) if k not in (*contract, *batch)]
    first = len(batch)
    if site.operand == 1:  # the activation's free axes come before
        first = len(site.output.shape) - len(free)
    out = dict(zip(batch, range(len(batch)), strict=True))
    out |= {k: first + i for i, k in enumerate(free)}
    return tuple(out.get(k) for k in range(rank))


def _name_function(eqn: Any) -> str:
    return _compat.function_name(eqn) or eqn.primitive.name


def _reduces(eqn: Any) -> bool:
    """Tell whether an equation, or one inside it, reduces an array to statistics."""
    rule = construct(eqn.primitive.name)
    inside = [e for body in rule.bodies(eqn) for e in body.program.eqns] if rule else []
    return eqn.primitive.name.startswith("reduce_") or any(map(_reduces, inside))
