"""`execute`: run a function on quantized leaves, by codes wherever a kernel takes them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import numerics, tree
from jaxcompress.errors import require_one_of
from jaxcompress.graph import Equation
from jaxcompress.graph.leaves import (
    Converted,
    LeafKind,
    LeafUse,
    SiteResult,
    SiteRule,
    list_uses,
    run_leaves,
)
from jaxcompress.numerics import QArray
from jaxcompress.quantize import kernels as kernels_of
from jaxcompress.quantize._carried import CarriedCodes, carry_codes

_BACKENDS = ("cpu", "gpu", "tpu")


@dataclass(frozen=True, kw_only=True)
class SiteKernel:
    """What `execute` runs in one place where a quantized leaf is read.

    Attributes:
        path: The leaf's path.
        site: The name of the site, as in `graph.trace`; `None` for a use outside any.
        kernel: "codes" (codes by codes, int8 or float8), "codes in groups", "codes as patches",
            "weights" (float activations by codes, scaled after the sum), "weights in groups",
            "rows" (a lookup) or "dequantized".
        why: Why codes could not be used, where it is dequantized.
    """

    path: str
    site: str | None
    kernel: str
    why: str = ""


def execute(fn: Callable[..., Any], *, backend: str | None = None) -> Callable[..., Any]:
    """Make a function that takes params with `QArray` leaves, and multiplies codes.

    fn is traced on the arrays that the leaves stand for, and run with codes in their place: they
    are transposed, reshaped and sliced as fn does its arrays, through `jit`, `checkpoint`, `scan`,
    `cond` and `while`, until a site is reached. There one table chooses by backend and formats:

    * weights and activations both quantized (`QArray.activation`): int8 by int8 summed in int32,
      float8 by float8 in float32, group by group where scales vary along the sum; convolutions as
      they are, or as patches and a matmul;
    * weights alone: float activations by codes, scaled after the sum; by scaled codes over
      `(groups, size)` at once where groups have scales;
    * lookups: rows of codes and their scales.

    Elsewhere, and at the border of functions with their own differentiation rule, a leaf is
    dequantized; `site_kernels` says where and why. The result differs from fn on `unpack(params)`,
    with activations rounded as the formats say, by float rounding.

    It works under `jit`, `vmap`, `scan`, `checkpoint`, `jax.export` and shardings, and is
    differentiable in activations and in unquantized leaves: rounding passes gradients on where it
    does not clip. Quantized leaves count as constants where codes meet codes.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        backend: "cpu", "gpu" or "tpu": what to choose kernels for, when compiling ahead of time
            for another machine; the default backend by default.

    Returns:
        A function of the same arguments.

    Raises:
        ArgumentError: If `backend` is unknown.
        SelectionError: When called, if params have no `QArray`.

    Example:
        >>> from jaxcompress.quantize import pack, presets
        >>> fn = lambda params, x: x @ params["kernel"]
        >>> params = pack({"kernel": jnp.eye(3)}, presets.int8_weights)
        >>> execute(fn)(params, jnp.array([[1.0, 2.0, 3.0]]))
        Array([[1., 2., 3.]], dtype=float32)
    """
    chosen = _read_backend(backend)

    @functools.wraps(fn)
    def executed(params: tree.Params, *inputs: Any, **kwargs: Any) -> Any:
        return run_leaves(_describe_kind(chosen()), fn, params, inputs, kwargs).outputs

    return executed


def site_kernels(
    fn: Callable[..., Any],
    params: tree.Params,
    *inputs: Any,
    backend: str | None = None,
    **kwargs: Any,
) -> tuple[SiteKernel, ...]:
    """List what `execute(fn)` runs where it reads a quantized leaf; nothing is computed.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        params: Params with `QArray` leaves (shapes are enough).
        *inputs: fn's other arguments.
        backend: As in `execute`.
        **kwargs: fn's keyword arguments.

    Returns:
        One entry per place, in fn's order.

    Raises:
        ArgumentError: If `backend` is unknown.
        SelectionError: If params have no `QArray`.

    Example:
        >>> from jaxcompress.quantize import pack, presets
        >>> fn = lambda params, x: jnp.abs(params["kernel"]).sum() + x @ params["kernel"]
        >>> params = pack({"kernel": jnp.eye(3)}, presets.int8_weights)
        >>> for use in site_kernels(fn, params, jnp.ones((1, 3))):
        ...     print(use.kernel, use.why)
        dequantized abs takes arrays
        weights
    """
    kind = _describe_kind(_read_backend(backend)())
    return _site_kernels(list_uses(kind, fn, params, inputs, kwargs))


def _read_backend(backend: str | None) -> Callable[[], str]:
    fix = 'None is the default backend; a CUDA or ROCm device is "gpu".'
    require_one_of("backend", backend, (*_BACKENDS, None), fix=fix)
    return jax.default_backend if backend is None else (lambda: backend)


def _describe_kind(backend: str) -> LeafKind:
    """Describe quantized leaves on a backend."""
    return LeafKind(
        leaf_type=QArray,
        start=_start,
        run_site=functools.partial(_run_by_codes, backend=backend),
        converted="dequantized",
        adjective="quantized",
        makers="quantize.ptq or quantize.pack",
    )


def _start(leaf: QArray, path: str) -> CarriedCodes | Converted:
    node = carry_codes(leaf, path)
    if node is not None:
        return node
    return Converted(numerics.dequantize(leaf), f"{leaf.format.qtype.name} has no kernel")


def _run_by_codes(
    equation: Equation, operands: Sequence[Any], operand: int, *, backend: str
) -> SiteResult:
    name, node, x = equation.primitive.name, operands[operand], operands[1 - operand]
    choice = kernels_of.choose_kernel(name, equation.params, operand, node, x, backend)
    result = kernels_of.run_kernel(equation, operands, operand, choice, backend)
    return SiteResult(result, choice.kernel, choice.why)


def _site_kernels(uses: Sequence[LeafUse]) -> tuple[SiteKernel, ...]:
    return tuple(SiteKernel(path=u.path, site=u.site, kernel=u.how, why=u.why) for u in uses)


def measure(
    fn: Callable[..., Any],
    params: tree.Params,
    quantized: tree.Params,
    inputs: Sequence[Any],
) -> tuple[dict[str, float], tuple[SiteKernel, ...]]:
    """Run fn on params, and at each site the kernel of the quantized leaf beside it.

    Args:
        fn: `fn(params, *inputs) -> outputs`, pure.
        params: Params of arrays.
        quantized: The same with `QArray` leaves.
        inputs: One batch.

    Returns:
        `{Site.name: dB}`, the signal-to-quantization-noise ratio of each site's result; and what
        was run.
    """
    kind = _describe_kind(jax.default_backend())
    originals = dict(tree.items(params))
    uses: list[LeafUse] = []

    def start(leaf: QArray, path: str) -> CarriedCodes | Converted:
        node = carry_codes(leaf, path, originals[path])
        why = f"{leaf.format.qtype.name} has no kernel"
        return Converted(originals[path], why) if node is None else node

    def run(params: tree.Params, inputs: Any) -> Any:
        beside = replace(
            kind, start=start, run_site=functools.partial(_run_beside, kind.run_site), fills=True
        )
        _, powers, used = run_leaves(beside, fn, params, inputs, {})
        uses.extend(used)
        return {name: (noise.sum(), signal.sum()) for name, (noise, signal) in powers.items()}

    powers = jax.device_get(jax.jit(run)(quantized, tuple(inputs)))
    ratios = {
        name: 10 * np.log10(signal / noise) if noise > 0 else np.inf
        for name, (noise, signal) in powers.items()
    }
    return {name: float(ratio) for name, ratio in ratios.items()}, _site_kernels(uses)


def _run_beside(
    run_site: SiteRule, equation: Equation, operands: Sequence[Any], operand: int
) -> SiteResult:
    """Run a site as it was, and its kernel beside it, whose errors are summed up."""
    by_kernel = run_site(equation, operands, operand)
    assert isinstance(by_kernel, SiteResult)
    node, before = operands[operand], list(operands)
    before[operand] = node.array()
    result = equation.bind(*before)
    off = jnp.square((by_kernel.result - result).astype(jnp.float32)).sum()
    power = jnp.square(result.astype(jnp.float32)).sum()
    names = [s.name for s in equation.sites if s.path == node.path]
    return by_kernel._replace(result=result, filled=dict.fromkeys(names, (off, power)))
