"""`Chain`: an affine function of a site's result, evaluated, folded and shifted."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, StructureError
from jaxcompress.graph.affine._reads import Known, Reads, Slot
from jaxcompress.graph.program._compat import Program
from jaxcompress.graph.program._interpret import Position
from jaxcompress.graph.sites._sites import Site
from jaxcompress.graph.sites._views import AxisFactors


class ChainStep(NamedTuple):
    """One equation of a chain.

    Attributes:
        position: Where it is.
        kind: `mul`, `div`, `add`, `sub` or `neg`.
        operand: Which of its operands is the result that is followed.
        side: What the other operand is; `None` for `neg`.
        factors: The axes of the site's output in the axes of the result, as it is here.
    """

    position: Position
    kind: str
    operand: int
    side: Known | None
    factors: tuple[AxisFactors, ...]

    @property
    def slot(self) -> Slot:
        return self.position, 1 - self.operand

    @property
    def scales(self) -> bool:
        return self.kind in ("mul", "div", "neg")


class Holder(NamedTuple):
    """A leaf that is added alone, one entry to a channel: its step, and the sign it has there."""

    path: str
    number: int
    sign: int


def choose_preferred(holders: Sequence[Holder]) -> Holder:
    """Choose the first that is added, rather than subtracted as the mean of a norm is."""
    return min(holders, key=lambda holder: -holder.sign)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The affine function `A y + B` that is applied to a site's result `y`.

    Arrays by channel have the shape `(*stack, *batch, outputs)` of one row of
    `Site.output_rows`, `stack` being the lengths of those enclosing scans that take the kernel
    apart (layers).

    Attributes:
        site: The site.
        steps: The equations, in order, without casts and rearrangements.
        leaves: Paths of the leaves that they read.
        shared: Those of them that are read at other places as well, or returned.
        stopped: Why the chain is not longer.
        bias: The leaf that is the last to be added, with nothing but casts and rearrangements
            after it; `None` if there is none that has an entry of its own for each channel.
        shifts: The leaf that `shifted` changes: the first to be added, `None` if there is none.
        unfoldable: Why `folded` cannot be done; `None` if it can.
        unshiftable: Why `shifted` cannot be done; `None` if it can.
    """

    site: Site
    steps: tuple[ChainStep, ...] = field(repr=False, compare=False)
    leaves: tuple[str, ...]
    shared: tuple[str, ...]
    stopped: str
    bias: str | None
    shifts: str | None
    unfoldable: str | None
    unshiftable: str | None
    _holders: tuple[Holder, ...] = field(repr=False, compare=False)
    _kernel: Known = field(repr=False, compare=False)
    _outputs: tuple[int | None, ...] = field(repr=False, compare=False)
    _position: Position = field(repr=False, compare=False)
    _reads: Reads = field(repr=False, compare=False)

    def affine(self, params: tree.Params) -> tuple[Array, Array]:
        """Evaluate the chain's coefficients, in float32 or wider.

        Args:
            params: Params of fn; only the chain's leaves are read.

        Returns:
            `(A, B)`, each of shape `(*stack, *batch, outputs)`.

        Raises:
            ArgumentError: If nothing is known of the site: it is inside a `shard_map`, or reads
                params alone.
        """
        if not self._outputs:
            raise ArgumentError(
                "chain",
                got=f"that of {self.site.name!r}: {self.unshiftable}",
                expected="the chain of a site that was followed",
                fix="Leave out the sites inside a shard_map, and those that read params alone.",
            )
        A, B = self._coefficients(dict(tree.items(params)), self.steps)
        return self._mapped(self._to_rows)(A), self._mapped(self._to_rows)(B)

    def shifted(self, params: tree.Params, shift: ArrayLike) -> tree.Params:
        """Change params such that the chain computes with `y + shift` instead of `y`.

        The leaf `shifts` takes it, times what has multiplied the
        result before. Bias correction needs nothing else.

        Args:
            params: Params of fn. The kernel may have been quantized since the chain was found.
            shift: What to add to the site's result, of shape `(*stack, *batch, outputs)`.

        Returns:
            Params with one leaf changed.

        Raises:
            ArgumentError: If no leaf can take it; `unshiftable` says why.
            StructureError: If the shift has another shape.

        Example:
            >>> import jax.numpy as jnp
            >>> from jaxcompress import graph
            >>> fn = lambda params, x: 3 * (x @ params["w"]) + params["b"]
            >>> params = {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}
            >>> chain = graph.affine(fn, params, jnp.ones((5, 2)))["w"]
            >>> chain.shifted(params, jnp.array([1.0, 2.0]))["b"].tolist()
            [3.0, 6.0]
        """
        if self.unshiftable is not None:
            raise ArgumentError(
                "shift",
                got=f"one for {self.site.name!r}: {self.unshiftable}",
                expected="a site whose result a leaf of its own is added to",
                fix="Leave the site out, or give its layer a bias.",
            )
        rows = jax.eval_shape(self._mapped(self._to_rows), self._like()).shape
        if jnp.shape(shift) != rows:
            raise StructureError(
                "shift",
                got=f"shape {jnp.shape(shift)} for {self.site.name!r}",
                expected=f"shape {rows}: (*stack, *batch, outputs)",
                fix="Sum over tokens what `Site.output_rows` gives.",
            )
        leaves, holder = dict(tree.items(params)), choose_preferred(self._holders)
        (to_channels,) = jax.linear_transpose(self._mapped(self._to_rows), self._like())(
            jnp.asarray(shift, jnp.float32)
        )
        A, _ = self._coefficients(leaves, self.steps[: holder.number])
        more, old = self._to_leaf(holder, A * to_channels.astype(A.dtype)), leaves[holder.path]
        new = (old.astype(more.dtype) + holder.sign * more).astype(old.dtype)
        return tree.map_with_path(lambda path, x: new if path == holder.path else x, params)

    def folded(self, leaves: Mapping[str, Any]) -> dict[str, Array]:
        """Compute the leaves that change when the chain is folded into the kernel.

        The kernel is multiplied by `A`, and a leaf that is added to the result becomes `B`. If
        some leaf scales the result, and each of the others added to it is zero where a leaf of
        its own is, these are set to make the chain `y -> y + B`.

        Args:
            leaves: `{path: leaf}` of params.

        Returns:
            `{path: new leaf}` of the same shapes and dtypes.

        Raises:
            ArgumentError: If it cannot be folded; `unfoldable` says why.
        """
        if self.unfoldable is not None:
            raise ArgumentError(
                "leaves",
                got=f"those of {self.site.name!r}: {self.unfoldable}",
                expected="leaves of a chain that can be folded",
                fix="Leave out the sites whose `unfoldable` is not None.",
            )
        A, B = self._coefficients(leaves, self.steps)
        holder, path = self._keeper, self.site.path
        factors, kernel = self._on_kernel(A), leaves[path]
        changed = {
            path: (kernel.astype(factors.dtype) * factors).astype(kernel.dtype),
            holder.path: (holder.sign * self._to_leaf(holder, B)).astype(leaves[holder.path].dtype),
        }
        return changed | self._neutral(leaves, holder)

    @property
    def _keeper(self) -> Holder:
        """The leaf that becomes B: the last to be added."""
        return choose_preferred(self._holders[::-1])

    @property
    def skipped(self) -> tuple[tuple[Position, int], ...]:
        """List the equations that a folded function leaves out, and the operand it gives on."""
        kept = self._keeper.number
        steps = enumerate(self.steps)
        return tuple((step.position, step.operand) for n, step in steps if n != kept)

    def body(self, prefix: Position) -> Program:
        """Find the program that equations at a prefix are of."""
        return self._reads.program(prefix)

    # --- leaves that make the chain y + B ---------------------------------------------------------

    def _neutral(self, leaves: Mapping[str, Any], holder: Holder) -> dict[str, Array]:
        """Find new leaves for the others of the chain, such that all of it is `y + B`, if any."""
        before = any(step.scales for step in self.steps[: holder.number])
        after = any(step.scales for step in self.steps[holder.number :])
        if before and after:
            return {}
        zeros: dict[str, Array] = {}
        for number, step in enumerate(self.steps):
            if step.scales or number == holder.number:
                continue
            mine = self._own(step)
            if not mine:
                return {}
            zeros |= {path: jnp.zeros_like(leaves[path]) for path in mine[:1]}
        entries = math.prod(self._like().shape)
        for step in self.steps:
            sized = [p for p in self._own(step) if math.prod(leaves[p].shape) == entries]
            alike = step.side is not None and step.side.levels == self._kernel.levels
            if step.kind == "mul" and alike and sized:
                return {**zeros, sized[0]: self._reciprocal(leaves, sized[0])}
        return {}

    def _own(self, step: ChainStep) -> list[str]:
        """List the leaves that a step is a multiple of, and that nothing else reads."""
        linear = step.side.linear if step.side is not None else ()
        return [path for path in sorted(linear) if self._reads.contacts[path] == {step.slot}]

    def _reciprocal(self, leaves: Mapping[str, Any], path: str) -> Array:
        """Solve `A = 1` for a leaf that `A` is a multiple of: one over A at a leaf of ones."""
        ones = jnp.ones_like(leaves[path])

        def scale(leaf: Array) -> Array:
            return self._coefficients({**leaves, path: leaf}, self.steps)[0]

        A, pull = jax.vjp(scale, ones)
        (at_one,) = pull(jnp.ones_like(A))
        # A channel of zeros comes out of the kernel as zeros, whatever scales it.
        return jnp.where(at_one == 0, ones, ones / at_one)

    # --- channels ---------------------------------------------------------------------------------
    # Arrays by channel are kept as (*stack, *output), the site's output with positions of size 1.

    @functools.cached_property
    def _stack(self) -> list[tuple[bool, int]]:
        """For each enclosing scan, whether it takes the kernel apart, and its length."""
        scans = self._reads.scans(self._position)
        length = lambda scan: self._reads.walk.equation(scan).params["length"]
        return [(scan in self._kernel.levels, length(scan)) for scan in scans]

    @property
    def _shape(self) -> tuple[int, ...]:
        channels = set(self._outputs)
        return tuple(n if k in channels else 1 for k, n in enumerate(self.site.output.shape))

    def _like(self) -> jax.ShapeDtypeStruct:
        stack = [length for kept, length in self._stack if kept]
        return jax.ShapeDtypeStruct((*stack, *self._shape), jnp.float32)

    def _mapped(self, function: Callable[..., Array], *, all_scans: bool = False) -> Callable:
        for kept, _ in self._stack:
            function = jax.vmap(function) if kept or all_scans else function
        return function

    def _own_iterations(self, x: Array) -> Array:
        """Drop the axes of scans whose iterations share the kernel: they are all the same."""
        for axis in reversed(range(len(self._stack))):
            x = x if self._stack[axis][0] else x[(slice(None),) * axis + (0,)]
        return x

    def _to_rows(self, x: Array) -> Array:
        return self.site.output_rows(x)[..., 0, :]  # the one token

    def _coefficients(
        self, leaves: Mapping[str, Any], steps: Sequence[ChainStep]
    ) -> tuple[Array, Array]:
        values = self._reads.evaluate(leaves, [s.slot for s in steps if s.side is not None])
        dtype = _wide(*(x.dtype for x in values.values()))
        A, B = jnp.ones(self._like().shape, dtype), jnp.zeros(self._like().shape, dtype)
        for step in steps:
            if step.side is None:
                A, B = -A, -B
                continue
            lower = self._mapped(functools.partial(self._channels_of, step), all_scans=True)
            s = self._own_iterations(lower(values[step.slot])).astype(dtype)
            if step.kind == "mul":
                A, B = A * s, B * s
            elif step.kind == "div":
                A, B = A / s, B / s
            elif step.kind == "add":
                B = B + s
            elif step.operand == 0:
                B = B - s
            else:
                A, B = -A, s - B
        return A, B

    def _channels_of(self, step: ChainStep, x: Array) -> Array:
        """Bring the other operand of a step, in one iteration, to the axes of the output."""
        if x.ndim == 0:
            return jnp.broadcast_to(x, self._shape)
        channels, pieces = set(self._outputs), []
        for axis, factors in reversed(list(enumerate(step.factors))):
            mine = [factor for factor in factors if channels & set(factor.axes)]
            if not mine:  # positions: equal along them
                x = jax.lax.index_in_dim(x, 0, axis, keepdims=False)
                continue
            size = math.prod(factor.size for factor in mine)
            x = jnp.broadcast_to(x, (*x.shape[:axis], size, *x.shape[axis + 1 :]))
            pieces = mine + pieces
        x = x.reshape([piece.size for piece in pieces])
        # Within an axis of the output the larger stride is the major part.
        by_axis = sorted(range(len(pieces)), key=lambda i: (pieces[i].axes, -pieces[i].stride))
        return x.transpose(by_axis).reshape(self._shape)

    def _to_leaf(self, holder: Holder, x: Array) -> Array:
        """Arrange an array by channel as the leaf that is added at a step."""
        step = self.steps[holder.number]

        def channels(leaf: Array) -> Array:
            found = self._reads.evaluate({holder.path: leaf}, [step.slot], moves_only=True)
            lower = functools.partial(self._channels_of, step)
            return self._own_iterations(self._mapped(lower, all_scans=True)(found[step.slot]))

        return _solve_rearranged(channels, self._leaf_like(holder.path), x)

    def _on_kernel(self, A: Array) -> Array:
        """Give each entry of the kernel the factor of its output channel."""
        slot, path = (self._position, self.site.operand), self.site.path

        def spread(A: Array) -> Array:
            ours = [k for k in self._outputs if k is not None]
            A = A.reshape([self._shape[k] for k in sorted(ours)])
            A = A.transpose([sorted(ours).index(k) for k in ours])
            shape = self.site.weight.shape
            shown = [1 if k is None else n for k, n in zip(self._outputs, shape, strict=True)]
            return jnp.broadcast_to(A.reshape(shown), shape)

        def weight(leaf: Array) -> Array:
            found = self._reads.evaluate({path: leaf}, [slot], moves_only=True)
            return self._own_iterations(found[slot])

        return _solve_rearranged(weight, self._leaf_like(path), self._mapped(spread)(A))

    def _leaf_like(self, path: str) -> jax.ShapeDtypeStruct:
        var = self._reads.program(()).invars[self._reads.paths.index(path)]
        return jax.ShapeDtypeStruct(var.aval.shape, _wide(var.aval.dtype))


def _wide(*dtypes: Any) -> Any:
    """Find the dtype to compute with: float32, or wider if any of these is."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def _solve_rearranged(
    rearrange: Callable[[Array], Array], like: jax.ShapeDtypeStruct, x: Array
) -> Array:
    """Solve `rearrange(leaf) = x`, which takes every entry to one place: by its transpose."""
    (leaf,) = jax.linear_transpose(rearrange, like)(x.astype(like.dtype))
    return leaf
