"""Certificates: how far a smaller function is from three references, and what it costs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxcompress import graph, tree
from jaxcompress.graph import Leak as Leak
from jaxcompress.graph.sites import call_of


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far outputs are from a reference's.

    Attributes:
        absolute: The largest absolute difference of an entry.
        relative: The same over the largest absolute entry of the reference output that it is in.
    """

    absolute: float
    relative: float

    def __str__(self) -> str:
        return f"{self.relative:.1e}"


@dataclass(frozen=True, kw_only=True)
class Distances:
    """The three distances of a smaller function, on one set of inputs.

    Attributes:
        structural: To fn with everything that is removed set to zero as it runs (to the neutral
            element before a maximum, a minimum or a product). Rounding, or the surgery is wrong.
        weights: To fn with the removed entries of params set to zero, and nothing else: what a
            mask in training sees. Normalisations and biases that see the removed width show here.
        dense: To fn: what the decision costs before any recovery.
    """

    structural: Distance
    weights: Distance
    dense: Distance


@dataclass(frozen=True, kw_only=True)
class Size:
    """Params, bytes and FLOPs of a function.

    Attributes:
        params: Entries of params.
        bytes: Bytes of params.
        flops: Operations of its contractions, counted from the jaxpr, 2 per multiply-add.
        compiled_flops: Operations that the CPU's compiler counts; `None` where it was not asked.
    """

    params: int
    bytes: int
    flops: int
    compiled_flops: float | None


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """How far a smaller function is from three references, and what it costs.

    Attributes:
        given: Distances on the inputs that were given; `None` if they were shapes only.
        random: Distances on random inputs of the same shapes; `None` likewise for params.
        tolerance: The largest structural distance, relative, that is rounding for the dtypes.
        leaks: What explains a distance to the masked params, largest effect first.
        before: Size of fn.
        after: Size of the smaller function.
        notes: What was not done, and why.
    """

    given: Distances | None
    random: Distances | None
    tolerance: float
    leaks: tuple[Leak, ...]
    before: Size
    after: Size
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every structural distance is at rounding level, and some was measured."""
        measured = [d.structural.relative for d in (self.given, self.random) if d is not None]
        return bool(measured) and all(value <= self.tolerance for value in measured)

    def __str__(self) -> str:
        lines = [f"certificate: {'holds' if self.holds else 'DOES NOT HOLD'}"]
        if self.given is None and self.random is None:
            lines = ["certificate: nothing was run, params are shapes"]
        for name, distances in (("given", self.given), ("random", self.random)):
            if distances is not None:
                lines.append(
                    f"  {name} inputs: to fn re-masked {distances.structural} "
                    f"(at most {self.tolerance:.0e}), to masked params {distances.weights}, "
                    f"to dense {distances.dense}"
                )
        for leak in self.leaks:
            lines.append(
                f"  {leak.where or 'fn'}: {leak.primitive} of masked params sees up to "
                f"{leak.magnitude:.2g} at removed indices, which moves outputs by {leak.effect:.1e}"
            )
        before, after = self.before, self.after
        lines.append(
            f"  params {before.params:,} -> {after.params:,}, bytes {before.bytes:,} -> "
            f"{after.bytes:,}, FLOPs {before.flops:,} -> {after.flops:,}"
        )
        if before.compiled_flops is not None and after.compiled_flops is not None:
            lines.append(
                f"  FLOPs by the compiler {before.compiled_flops:,.0f} -> "
                f"{after.compiled_flops:,.0f}"
            )
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def distance(outputs: Any, reference: Any) -> Distance:
    """Measure how far two trees of outputs are apart; integers are compared as numbers.

    Args:
        outputs: Any pytree of arrays.
        reference: A tree of the same structure and shapes.

    Returns:
        The distance, infinite between different dtypes; NaN in both at one entry is no
        difference, in one of them an infinite one.

    Example:
        >>> distance({"y": jnp.array([1.0, 4.0])}, {"y": jnp.array([1.0, 5.0])})
        Distance(absolute=1.0, relative=0.2)
    """
    absolute, relative = 0.0, 0.0
    for x, y in zip(jax.tree.leaves(outputs), jax.tree.leaves(reference), strict=True):
        assert jnp.shape(x) == jnp.shape(y), (jnp.shape(x), jnp.shape(y))
        if x.dtype != y.dtype:  # it computes something else, whatever the numbers
            return Distance(absolute=np.inf, relative=np.inf)
        if not x.size or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            continue
        a, b = (np.asarray(z, np.complex128 if np.iscomplexobj(z) else np.float64) for z in (x, y))
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore"):
            gap = np.where(same, 0.0, np.abs(a - b))
        worst = float(np.max(np.where(np.isnan(gap), np.inf, gap)))
        scale = float(np.max(np.abs(b), initial=0.0, where=np.isfinite(b)))
        if not np.isfinite(b).any():  # shows nothing
            worst = np.inf
        absolute = max(absolute, worst)
        relative = max(relative, worst / scale if scale else (np.inf if worst else 0.0))
    return Distance(absolute=absolute, relative=relative)


def random_like(inputs: Any, *, seed: int = 0) -> Any:
    """Draw other inputs of the same shapes: normal floats; integers and booleans in the range.

    Integers are drawn between the extremes of what was given, since they are mostly indices; for
    shapes alone, zeros and ones.

    Args:
        inputs: Any pytree of arrays or `ShapeDtypeStruct`s.
        seed: Seeds the draw.

    Returns:
        A tree of arrays like it, sharded alike. Random keys, and what is no array, stay.
    """
    rng = np.random.default_rng(seed)

    def draw(x: Any) -> Any:
        dtype = getattr(x, "dtype", None)
        if dtype is None or jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return x
        if jnp.issubdtype(dtype, jnp.inexact):
            return place(jnp.asarray(rng.standard_normal(x.shape), dtype), x)
        if isinstance(x, jax.ShapeDtypeStruct) or not np.size(x):
            low, high = 0, 1
        else:
            low, high = int(np.min(x)), int(np.max(x))
        return place(jnp.asarray(rng.integers(low, high + 1, x.shape), dtype), x)

    def place(drawn: jax.Array, x: Any) -> jax.Array:
        where = getattr(x, "sharding", None)
        concrete = isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh)
        return jax.device_put(drawn, where) if concrete else drawn

    return jax.tree.map(draw, inputs)


def tolerance_of(params: Any, inputs: Any, outputs: Any) -> float:
    """Give the relative difference that is rounding: a hundred of the coarsest dtype's.

    At most 0.05: of 8 bits and fewer, rounding alone shows little.
    """
    eps = [
        float(jnp.finfo(x.dtype).eps)
        for x in jax.tree.leaves((params, inputs, outputs))
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    return min(100 * max(eps, default=0.0), 0.05)


def widen_outputs(values: Any) -> Any:
    """Cast floats of fewer than 32 bits to float32."""

    def cast(x: Any) -> Any:
        narrow = tree.is_floating(x) and tree.bits_of(x.dtype) < 32
        return jnp.asarray(x, jnp.float32) if narrow else x

    return jax.tree.map(cast, values)


def is_abstract(*trees: Any) -> bool:
    """Tell whether any leaf is a shape only."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(trees))


def size_of(traced: graph.Traced, params: Any, *, compiled: bool = False) -> Size:
    """Count what a captured call takes; `compiled` asks the CPU's compiler, too."""
    found = graph.cost(traced, target="cpu").compiled if compiled else None
    flops = found.flops if found is not None else None
    return Size(
        params=tree.count(params),
        bytes=tree.nbytes(params),
        flops=graph.trace(traced).flops,
        compiled_flops=None if flops is None else float(flops.value),
    )


def capture_exactly(
    fn: Callable[..., Any] | graph.Traced, params: Any, inputs: Any, kwargs: Any
) -> graph.Traced:
    """Trace a call in full precision: accelerators multiply float32 in fewer bits otherwise."""
    with jax.default_matmul_precision("highest"):
        return call_of(fn, params, inputs, kwargs)
