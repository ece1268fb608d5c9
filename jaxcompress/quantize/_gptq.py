"""GPTQ: round a matrix input by input, and let the inputs to come make up for each error."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Float

from jaxcompress import linalg, numerics, stats
from jaxcompress.errors import ArgumentError, require_at_least
from jaxcompress.numerics import Format, PerGroup, PerTensor, QArray, Scaled
from jaxcompress.quantize._method import Method
from jaxcompress.stats import Statistic

Scales = tuple[Array, Array | None]
"""Scales and zero points of all groups, `(groups, 1, out or 1[, bits])`, float32."""


@dataclass(frozen=True, kw_only=True)
class GPTQ(Method):
    """Quantize by GPTQ, refined by coordinate descent; see `gptq` for the mathematics.

    Attributes:
        damping: Fraction of the mean diagonal that is added to the Hessian.
        block: Rows per block of the solver: a matter of speed alone.
        act_order: Whether to begin with the inputs of the largest second moment.
        static_groups: Whether the scales of groups are those of the original weights, rather than
            of the weights as they are when their group's turn comes.
        refine: Passes of coordinate descent over scales and codes that follow; 0 is the paper's
            GPTQ.
        sequential: Whether activations are seen after all upstream weights have been replaced.

    Raises:
        ArgumentError: If `damping`, `block` or `refine` is out of range.

    Example:
        >>> GPTQ(refine=0).sequential
        True
    """

    damping: float = 0.01
    block: int = 128
    act_order: bool = True
    static_groups: bool = True
    refine: int = 2
    sequential: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self):
        _check_solver_options(self.damping, self.block, self.refine)

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """The second moment of the inputs."""
        return {"second_moment": stats.second_moment()}

    def alone(self, format: Format) -> Format:
        """Refuse.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(
            "policy",
            got="a rule with GPTQ where there are no activations to be seen",
            expected="a method that can do with the weights alone",
            fix="Call quantize.ptq(fn, params, batches, policy), or take another method.",
        )

    def __call__(
        self, w: Float[Array, "in out"], format: Format, seen: Mapping[str, Any]
    ) -> tuple[QArray, dict[str, Array]]:
        """Quantize one matrix; see `gptq`."""
        return gptq(
            w,
            seen["second_moment"].mean,
            format,
            damping=self.damping,
            block=self.block,
            act_order=self.act_order,
            static_groups=self.static_groups,
            refine=self.refine,
        )


def gptq(
    w: Float[ArrayLike, "in out"],
    hessian: Float[ArrayLike, "in in"],
    format: Format,
    *,
    damping: float = 0.01,
    block: int = 128,
    act_order: bool = True,
    static_groups: bool = True,
    refine: int = 2,
) -> tuple[QArray, dict[str, Array]]:
    r"""Quantize a matrix so that its outputs, rather than its entries, are close.

    Minimizes $\mathrm{tr}(E^T H E)$, $E = W - \hat W$, for $H = X^T X / n$: the mean squared error
    of the outputs. Inputs are rounded one by one, and those to come are changed to make up for
    each error; see `linalg.solve_columns`. Inputs that were always zero get zero weights, and go
    last.

    Then, `refine` times: every scale becomes the best for its codes, group by group, and every
    code the best for all the others (`linalg.descend_columns`). Neither makes the damped
    objective larger (up to the rounding of scales to float32).

    Args:
        w: Weights, contracted over the first axis; computed in float32.
        hessian: H, at any scale. All zero means that nothing was seen.
        format: `PerTensor()`, `PerChannel((-1,))` or `PerGroup(size, -2)`, of any number type;
            `format.range` finds the scales.
        damping: Fraction of H's mean diagonal to add, in (0, 10]. Raised tenfold, to 10 at most,
            while the factorization fails.
        block: Rows per block: a matter of speed alone.
        act_order: Begin with the inputs of the largest $H_{ii}$. With groups it takes static ones:
            otherwise each entry's group would have to be stored.
        static_groups: Find the scales of groups on the original weights, rather than on the
            weights as they are when their group's turn comes.
        refine: How many passes of coordinate descent follow; 0 is the paper's GPTQ.

    Returns:
        The stored form, and `{"damping": the fraction used, "succeeded": bool, "dead": number of
        inputs that were always zero}`. Where it did not succeed (nothing seen, H not finite, or
        nowhere near positive definite) every entry is rounded to nearest, and damping is 0.

    Raises:
        ArgumentTypeError: If w is not floating point.
        ArgumentError: If the shapes or the options do not go together.

    Example:
        >>> from jaxcompress.numerics import int4
        >>> w = jnp.asarray([[0.4], [0.4], [7.0]])
        >>> x = jnp.asarray([[1.0, 0.9, 0.0], [0.0, 0.0, 1.0]])  # the first two go together
        >>> q, info = gptq(w, x.T @ x, Format(int4), refine=0)
        >>> q.values.tolist(), bool(info["succeeded"])
        ([[0], [1], [7]], True)

    Reference: Frantar et al., "GPTQ" (arXiv:2210.17323), algorithm 1; activation order and static
    groups are the authors' code's. Refinement: Behdin et al., "QuantEase" (arXiv:2309.01885),
    algorithm 1, for the codes; Zhang et al., "COMQ" (arXiv:2403.07134), which treats scales as
    coordinates too.
    """
    _check_solver_options(damping, block, refine)
    w, hessian = jnp.asarray(w), jnp.asarray(hessian)
    if hessian.shape != w.shape[:1] * 2:
        raise ArgumentError(
            "hessian",
            got=f"shape {hessian.shape} for weights of shape {w.shape}",
            expected="(in, in) for weights (in, out)",
            fix="Pass XᵀX / tokens of the inputs.",
        )
    if act_order and not static_groups and isinstance(format.granularity, PerGroup):
        raise ArgumentError(
            "static_groups",
            got="False with act_order=True and PerGroup",
            expected="static groups where inputs are taken in another order",
            fix="Leave static_groups=True, or pass act_order=False.",
        )
    numerics.scale_shape(w.shape, format)  # raises where the format does not fit
    return _gptq(
        w,
        hessian.astype(jnp.float32),
        format,
        refine,
        damping=damping,
        block=block,
        act_order=act_order,
        static_groups=static_groups,
        refined=refine > 0,
    )


def _check_solver_options(damping: float, block: int, refine: int) -> None:
    if not 0 < damping <= 10:
        raise ArgumentError(
            "damping", got=damping, expected="a fraction in (0, 10]", fix="0.01 is the default."
        )
    require_at_least("block", block, 1, fix="Take a positive number of rows; 128 is the default.")
    require_at_least("refine", refine, 0, fix="Take a number of passes; 2 is the default.")


@functools.partial(
    jax.jit,
    static_argnames=("format", "damping", "block", "act_order", "static_groups", "refined"),
)
def _gptq(
    weights: Array,
    hessian: Array,
    format: Format,
    refine: ArrayLike,
    *,
    damping: float,
    block: int,
    act_order: bool,
    static_groups: bool,
    refined: bool,
) -> tuple[QArray, dict[str, Array]]:
    moments = hessian.diagonal()
    dead = moments == 0
    # Nothing seen is a failure, and not a matrix of dead inputs; factoring NaN fails.
    hessian = jnp.where(dead.all(), jnp.nan, hessian)
    grouped = isinstance(format.granularity, PerGroup) and not static_groups
    order = jnp.argsort(-moments) if act_order else jnp.arange(len(moments))
    permuted = hessian[order][:, order] if act_order else hessian
    damped = linalg.damped_cholesky(permuted, damping=damping)
    w = weights.astype(jnp.float32)
    w = jnp.where((dead & damped.succeeded)[:, None], 0, w)

    overall = numerics.fit_global_scale(w, format)
    overall = None if overall is None else overall.reshape(())
    if grouped:
        w_hat, scales = _solve_groups(w, damped.upper, format, overall, block=block)
        added = damped.added
    else:
        scales = _fit_group_scales(format.granularity.block(w), format, overall)
        round = _rounder(scales, format, order)
        w_hat, _ = linalg.solve_columns(w[order], damped.upper, round, block=block)
        place = jnp.argsort(order)
        w_hat, added = w_hat[place], damped.added[place]
    if refined:
        hessian += jnp.diag(added)
        better = lax.fori_loop(
            0,
            refine,
            lambda _, state: _refine(state, w, hessian, format, overall, block=block),
            (w_hat, scales),
        )
        w_hat, scales = jax.tree.map(
            lambda new, old: jnp.where(damped.succeeded, new, old), better, (w_hat, scales)
        )
    info = {
        "damping": damped.damping,
        "succeeded": damped.succeeded,
        "dead": dead.sum(dtype=jnp.int32),
    }
    return _encode_numbers(w_hat, scales, format, overall, weights.dtype), info


def _fit_group_scales(blocked: Array, format: Format, overall: Array | None) -> Scales:
    """Find the scales of all groups, on weights as `granularity.block` gives them.

    A global scale, found on the whole matrix beforehand, is multiplied in.
    """
    shared = format.granularity.shared(2)
    given = None if overall is None else overall.reshape((1,) * blocked.ndim)
    scale, zero = numerics.fit_scale(blocked, format, shared=shared, global_scale=given)
    scale = scale if overall is None else scale * overall
    if isinstance(format.granularity, PerGroup):
        return scale, zero
    return scale[None], None if zero is None else zero[None]  # the whole matrix is one group


def _solve_groups(
    w: Array, upper: Array, format: Format, overall: Array | None, *, block: int
) -> tuple[Array, Scales]:
    """Solve with the scales of each group found when its turn comes."""
    assert isinstance(format.granularity, PerGroup)

    def start(group: Array, rows: Array, diagonal: Array) -> Scales:
        return jax.tree.map(lambda part: part[0], _fit_group_scales(rows[None], format, overall))

    def round(index: Array, row: Array, scales: Scales) -> Array:
        return _round_row(row, scales, format)

    return linalg.solve_columns(
        w, upper, round, start=start, segment=format.granularity.size, block=block
    )


def _rounder(scales: Scales, format: Format, order: Array) -> linalg.Round:
    """Round each row by the scales of its group, where row i of the solver is `order[i]`."""
    size = len(order) // len(scales[0])

    def round(index: Array, row: Array, state: Any) -> Array:
        group = lax.dynamic_index_in_dim(order, index, keepdims=False) // size
        here = jax.tree.map(
            lambda part: lax.dynamic_index_in_dim(part, group, keepdims=False), scales
        )
        return _round_row(row, here, format)

    return round


def _round_row(row: Array, scales: Scales, format: Format) -> Array:
    """Round a row `(out,)` by scales `(1, out or 1[, bits])`."""
    values = format.qtype.to_values(row[None], *scales, limits=format.limits)
    return format.qtype.to_numbers(values, *scales)[0]


def _refine(
    state: tuple[Array, Scales],
    w: Array,
    hessian: Array,
    format: Format,
    overall: Array | None,
    *,
    block: int,
) -> tuple[Array, Scales]:
    w_hat, scales = state
    if isinstance(format.qtype, Scaled):
        w_hat, scales = _refit(w_hat, scales, w, hessian, format, overall)
    round = _rounder(scales, format, jnp.arange(len(w)))
    return linalg.descend_columns(w_hat, w, hessian, round, block=block), scales


def _refit(
    w_hat: Array,
    scales: Scales,
    w: Array,
    hessian: Array,
    format: Format,
    overall: Array | None,
) -> tuple[Array, Scales]:
    r"""Give each group in turn its best scale, codes and all other scales being what they are.

    With unit codes c: $s \leftarrow s + \langle c, H E \rangle / \langle c, H c \rangle$.
    """
    scale, zero = scales
    size = len(w) // len(scale)
    split = (len(scale), size, w.shape[1])  # (groups, size, out)
    codes = format.qtype.to_values(w_hat.reshape(split), *scales, limits=format.limits)
    units = format.qtype.to_numbers(codes, jnp.ones_like(scale), zero)
    shared = (0, 1) if isinstance(format.granularity, PerTensor) else (0,)
    unit_scale = jnp.float32(1) if overall is None else overall
    settled = functools.partial(numerics.round_scale, scale_dtype=format.scale_dtype)
    smallest = numerics.scale_bounds(format.scale_dtype)[0] * unit_scale

    def run(group: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        error, scale = carry
        at = group * size
        across = lax.dynamic_slice_in_dim(hessian, at, size)
        within = lax.dynamic_slice_in_dim(across, at, size, 1)
        unit, old = (lax.dynamic_index_in_dim(x, group, keepdims=False) for x in (units, scale))
        slope = (unit * linalg.matmul(across, error)).sum(shared, keepdims=True)
        power = (unit * linalg.matmul(within, unit)).sum(shared, keepdims=True)
        new = settled((old + slope / power) / unit_scale) * unit_scale
        change = new - old
        better = change * (2 * slope - change * power) > 0  # false where it is NaN
        better &= (new * old > 0) & (jnp.abs(new) >= smallest)
        rows = lax.dynamic_slice_in_dim(error, at, size) - jnp.where(better, change, 0) * unit
        error = lax.dynamic_update_slice_in_dim(error, rows, at, 0)
        new = jnp.where(better, new, old)
        return error, lax.dynamic_update_index_in_dim(scale, new, group, 0)

    _, scale = lax.fori_loop(0, len(scale), run, (w - w_hat, scale))
    return format.qtype.to_numbers(codes, scale, zero).reshape(w.shape), (scale, zero)


def _encode_numbers(
    w_hat: Array, scales: Scales, format: Format, overall: Array | None, dtype: Any
) -> QArray:
    """Encode numbers that the format holds: what was rounded by a scale is found again exactly."""
    if not isinstance(format.granularity, PerGroup):
        scales = jax.tree.map(lambda part: part[0], scales)
    scale, zero = scales
    if overall is not None:
        overall = overall.reshape((1,) * scale.ndim)
        # What it was before they were multiplied.
        scale = numerics.round_scale(scale / overall, format.scale_dtype)
    stored = numerics.quantize(w_hat, format, scale=scale, zero=zero, global_scale=overall)
    return dataclasses.replace(stored, dtype=dtype)
