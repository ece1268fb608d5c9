"""`execute`: run a function on quantized leaves, by codes wherever a kernel takes them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import numerics, tree
from jaxcompress.errors import ArgumentError, JaxCompressError, SelectionError, StructureError
from jaxcompress.graph import Equation
from jaxcompress.graph._moved import sliced
from jaxcompress.graph.program import CLOSED, Cells, Position, Visit
from jaxcompress.graph.sites import SitesAt, capture_call, make_plan
from jaxcompress.graph.sites import execute as execute_plan
from jaxcompress.numerics import QArray
from jaxcompress.quantize import kernels as kernels_of
from jaxcompress.quantize._carried import Carried, carried, follow
from jaxcompress.quantize.kernels import Choice

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
    chosen = _checked_backend(backend)

    @functools.wraps(fn)
    def executed(params: tree.Params, *inputs: Any, **kwargs: Any) -> Any:
        return _Run(chosen()).call(fn, params, inputs, kwargs)

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
    run = _Run(_checked_backend(backend)())
    jax.eval_shape(lambda *args: run.call(fn, *args), params, inputs, kwargs)
    return tuple(dict.fromkeys(run.uses))


def _checked_backend(backend: str | None) -> Callable[[], str]:
    if backend not in (None, *_BACKENDS):
        raise ArgumentError(
            "backend",
            got=repr(backend),
            expected=f"one of {', '.join(_BACKENDS)}, or None for the default backend",
            fix='A CUDA or ROCm device is "gpu".',
        )
    return jax.default_backend if backend is None else (lambda: backend)


@dataclass
class _Run:
    """One call: the carrier of its quantized leaves, and a log of what was done with them."""

    backend: str
    uses: list[SiteKernel] = field(default_factory=list)
    fills: ClassVar[bool] = False

    def call(self, fn: Callable[..., Any], params: Any, inputs: Any, kwargs: Any) -> Any:
        quantized = {path for path, leaf in tree.items(params) if isinstance(leaf, QArray)}
        if not quantized:
            raise SelectionError(
                "params",
                got="params without any QArray",
                expected="params with quantized leaves",
                fix="Make them with quantize.ptq or quantize.pack.",
            )
        dense = tree.map_with_path(
            lambda _, x: _stand_in(x) if isinstance(x, QArray) else x, params
        )
        try:
            traced = capture_call(fn, dense, inputs, kwargs, prune=True)
        except (TypeError, ValueError) as error:
            raise _not_traced(error, params, quantized) from error
        plan = make_plan(
            traced,
            lambda program, sites: self._visits(sites, quantized),
            fills=self.fills,
            carrier=self,
        )
        args = tree.map_with_path(self._start, params), inputs, kwargs
        return self._outputs(*execute_plan(traced, plan, args, {}))

    def _outputs(self, outputs: Any, filled: Cells) -> Any:
        return outputs

    def _start(self, path: str, leaf: Any) -> Any:
        if not isinstance(leaf, QArray):
            return leaf
        node = carried(leaf, path)
        if node is not None:
            return node
        self._log(path, None, Choice("dequantized", f"{leaf.format.qtype.name} has no kernel"))
        return numerics.dequantize(leaf)

    def _visits(self, sites: SitesAt, quantized: set[str]) -> dict[Position, Visit]:
        return {
            position: self._visit
            for position, found in sites.items()
            if any(s.path in quantized and not {*s.scope} & CLOSED for s in found)
        }

    def _visit(
        self, equation: Equation, operands: Sequence[Any], cells: Cells
    ) -> tuple[list, Cells]:
        nodes = [k for k, x in enumerate(operands) if isinstance(x, Carried)]
        if not nodes:  # dequantized on the way
            return [equation.bind(*operands)], {}
        first, *others = nodes
        operands = list(operands)
        for k in others:
            operands[k] = self.array(operands[k], "a contraction of two quantized leaves")
        moved = follow(equation, operands)  # a slice at a traced index looks rows up
        if moved is not None:
            return moved, {}
        result, filled = self._site(equation, operands, first)
        return [result], filled

    def _site(self, equation: Equation, operands: Sequence[Any], operand: int) -> tuple[Any, Cells]:
        """Run a site."""
        node, name = operands[operand], equation.primitive.name
        x = operands[1 - operand]
        choice = kernels_of.choose(name, equation.params, operand, node, x, self.backend)
        names = [s.name for s in equation.sites if s.path == node.path]
        self._log(node.path, names[0] if names else None, choice)
        return kernels_of.run(equation, operands, operand, choice, self.backend), {}

    # --- what a carrier does; see `graph._replay.Carrier` ---

    def follow(self, equation: Equation, operands: Sequence[Any]) -> list[Any] | None:
        return follow(equation, operands)

    def sliced(self, node: Any) -> Any:
        return sliced(node)

    def array(self, node: Any, why: str) -> Any:
        self._log(node.path, None, Choice("dequantized", f"{why} takes arrays"))
        return node.array() if node.original is None else node.original

    def _log(self, path: str, site: str | None, choice: Choice) -> None:
        self.uses.append(SiteKernel(path=path, site=site, kernel=choice.kernel, why=choice.why))


def _not_traced(error: Exception, params: tree.Params, quantized: set[str]) -> Exception:
    """Say that fn could not be run on params: they may be another model's."""
    if isinstance(error, JaxCompressError):
        return error
    shapes = {p: tuple(leaf.shape) for p, leaf in tree.items(params) if p in quantized}
    listed = ", ".join(f"{path!r} {shape}" for path, shape in list(shapes.items())[:4])
    return StructureError(
        "params",
        got=f"QArrays on which fn raises {type(error).__name__}: {str(error).splitlines()[0]}",
        expected="params and inputs of fn's own model",
        fix=f"Quantize the params of this fn; those here have {listed}.",
    )


def _stand_in(q: QArray) -> jax.ShapeDtypeStruct:
    node = carried(q, "")
    where = None if node is None else node.placement()
    return jax.ShapeDtypeStruct(q.shape, q.dtype, sharding=where)


def measure(
    fn: Callable[..., Any],
    params: tree.Params,
    quantized: tree.Params,
    inputs: Sequence[Any],
    *,
    backend: str | None = None,
) -> tuple[dict[str, float], tuple[SiteKernel, ...]]:
    """Run fn on params, and at each site the kernel of the quantized leaf beside it.

    Args:
        fn: `fn(params, *inputs) -> outputs`, pure.
        params: Params of arrays.
        quantized: The same with `QArray` leaves.
        inputs: One batch.
        backend: As in `execute`.

    Returns:
        `{Site.name: dB}`, the signal-to-quantization-noise ratio of each site's result; and what
        was run.
    """
    run = _Measured(_checked_backend(backend)(), originals=dict(tree.items(params)))
    powers = jax.jit(lambda *args: run.call(fn, *args))(quantized, tuple(inputs), {})
    ratios = {
        name: 10 * np.log10(signal / noise) if noise > 0 else np.inf
        for name, (noise, signal) in jax.device_get(powers).items()
    }
    return {name: float(ratio) for name, ratio in ratios.items()}, tuple(dict.fromkeys(run.uses))


@dataclass
class _Measured(_Run):
    """Runs fn as it was, and the kernels beside it, whose errors it sums up."""

    originals: dict[str, Any] = field(default_factory=dict)
    fills: ClassVar[bool] = True

    def _start(self, path: str, leaf: Any) -> Any:
        if not isinstance(leaf, QArray):
            return leaf
        node = carried(leaf, path, self.originals[path])
        return self.originals[path] if node is None else node

    def _outputs(self, outputs: Any, filled: Cells) -> Any:
        return {name: (noise.sum(), signal.sum()) for name, (noise, signal) in filled.items()}

    def _site(self, equation: Equation, operands: Sequence[Any], operand: int) -> tuple[Any, Cells]:
        by_kernel, _ = super()._site(equation, operands, operand)
        node, before = operands[operand], list(operands)
        before[operand] = node.original
        result = equation.bind(*before)
        off = jnp.square((by_kernel - result).astype(jnp.float32)).sum()
        power = jnp.square(result.astype(jnp.float32)).sum()
        names = [s.name for s in equation.sites if s.path == node.path]
        return result, dict.fromkeys(names, (off, power))
