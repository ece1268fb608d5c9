"""Compiling ahead of time, and what the compiler then says."""

import math
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxcompress.errors import ArgumentError
from jaxcompress.graph.cost import _aot_loops
from jaxcompress.graph.cost._targets import Target
from jaxcompress.tree import bits_of

_KEYS = {"flops": "flops", "bytes accessed": "bytes", "optimal_seconds": "seconds"}
_POWERS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSALS = (
    re.compile(r"required[^()]*\(([\d.]+)([KMGT]?)\) exceeds available"),
    re.compile(r"Used ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm", re.IGNORECASE),
)


class Outcome(NamedTuple):
    """What came of compiling.

    Attributes:
        program: The compiled program; `None` if it needs more memory than there is.
        figures: `flops`, `bytes` and `seconds` of one device, loops counted in full, as far as
            the compiler gives them.
        devices: How many devices the program runs on.
        arguments: Bytes of the arguments that one device holds, by their shapes.
        required: Bytes that the compiler says it would need, if it refused and said so.
        refusal: The compiler's own words, if it refused.
    """

    program: Any
    figures: Mapping[str, float]
    devices: int
    arguments: int
    required: int | None = None
    refusal: str = ""


_outcomes: "weakref.WeakKeyDictionary[Any, dict[Any, Outcome]]" = weakref.WeakKeyDictionary()


def compile_for(
    fn: Callable[..., Any], args: Sequence[Any], target: Target, donate: Sequence[int]
) -> Outcome:
    """Compile fn for a target; the same thing twice compiles once.

    Args:
        fn: `fn(*args) -> outputs`.
        args: Arrays or abstract arrays, in any pytrees.
        target: What to compile for.
        donate: Which of args are donated.

    Returns:
        The outcome; too little memory is one, not an error.

    Raises:
        ArgumentError: If an argument is sharded over devices that are not the target's.
        MissingExtraError: If the compiler's plugin is not installed.
    """
    args, devices = _place_arguments(tuple(args), target)
    leaves, structure = jax.tree.flatten(args)
    key = (structure, tuple(map(_describe_argument, leaves)), target, tuple(donate))
    try:
        known = _outcomes.setdefault(fn, {})
    except TypeError:  # cannot be referenced weakly
        known = {}
    if key not in known:
        known[key] = _compile(fn, args, devices, tuple(donate))
    return known[key]


def _describe_argument(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.shape, str(leaf.dtype), leaf.sharding, leaf.weak_type
    return type(leaf).__name__


def _place_arguments(args: tuple[Any, ...], target: Target) -> tuple[tuple[Any, ...], int]:
    """Make all arguments abstract, on the target's mesh if one names it, else on one device."""
    available = target.devices()
    default: Any = SingleDeviceSharding(available[0])
    for sharding in map(_find_named_sharding, jax.tree.leaves(args)):
        if sharding is None:
            continue
        if not sharding.device_set <= set(available):
            raise ArgumentError(
                "inputs",
                got=f"shardings over {next(iter(sharding.device_set)).device_kind} devices",
                expected=f"devices of {target.name}",
                fix="Make the mesh with Target.named(...).mesh(shape, names).",
            )
        default = NamedSharding(sharding.mesh, PartitionSpec())

    def abstract(leaf: Any) -> Any:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            return leaf
        return jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=_find_named_sharding(leaf) or default,
            weak_type=getattr(leaf, "weak_type", False),
        )

    return jax.tree.map(abstract, args), len(default.device_set)


def _find_named_sharding(leaf: Any) -> NamedSharding | None:
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding
    return None


def _compile(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    devices: int,
    donate: tuple[int, ...],
) -> Outcome:
    traced = jax.jit(fn, donate_argnums=donate).trace(*args)
    arguments = sum(map(_device_bytes, jax.tree.leaves(args)))
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        words = str(error).splitlines()[0]
        return Outcome(None, {}, devices, arguments, _read_required(words), words)
    figures = _figures(program)
    bodies = {
        loop: _body(traced.jaxpr, loop, args, donate)
        for loop in (_aot_loops.loops(traced.jaxpr) if figures else ())
    }
    return Outcome(program, _aot_loops.multiply_loops(figures, bodies), devices, arguments)


def _body(
    jaxpr: Any, loop: _aot_loops.Loop, args: tuple[Any, ...], donate: tuple[int, ...]
) -> Mapping[str, float]:
    """Find what one step of some scans costs; nothing is known if that cannot be compiled."""
    given = [index in donate for index, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
    donated = [k for k, is_given in enumerate(given) if is_given]

    def lowered(steps: int) -> Any:
        jitted = jax.jit(_aot_loops.run_steps(jaxpr, loop, steps), donate_argnums=donated)
        return jitted.lower(*jax.tree.leaves(args))

    try:
        programs = lowered(2), lowered(3)
    except (NameError, TypeError, ValueError):
        return {}  # a step that cannot be traced alone: inside shard_map, on explicit axes
    try:
        two, three = (_figures(program.compile()) for program in programs)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return {}
    return {key: three[key] - two[key] for key in two.keys() & three.keys()}


def _read_required(words: str) -> int | None:
    for pattern in _REFUSALS:
        found = pattern.search(words)
        if found is not None:
            return round(float(found.group(1)) * _POWERS[found.group(2).upper()])
    return None


def _device_bytes(leaf: Any) -> int:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return np.asarray(leaf).nbytes
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return -(-math.prod(shape) * bits_of(leaf.dtype) // 8)


def _figures(program: Any) -> dict[str, float]:
    """Read the compiler's figures; one that is not positive says nothing."""
    analysis = program.cost_analysis() or {}  # CUDA's compiler gives none
    return {
        name: float(analysis[key]) for key, name in _KEYS.items() if float(analysis.get(key, 0)) > 0
    }
