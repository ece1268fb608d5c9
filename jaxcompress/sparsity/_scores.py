"""Scores: how much each entry of a leaf would be missed.

A `Score` is a few pure functions of one leaf. Scores that need gradients accumulate them over
batches in an array beside the leaf, in float32 or wider.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxcompress import linalg, tree
from jaxcompress.errors import ArgumentError, require_one_of

Mean: TypeAlias = Callable[[jax.Array], jax.Array]
"""Averages an array like the leaf over the entries of each unit of a pattern."""


class Accumulated(NamedTuple):
    """A running mean of what a gradient score needs, over the gradients seen so far.

    Attributes:
        total: Decayed sum, of the shape of the leaf.
        weight: Decayed number of gradients in it, a scalar.
    """

    total: jax.Array
    weight: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The mean, 0 before the first gradient."""
        return self.total / jnp.maximum(self.weight, 1e-30)


def _accumulate_nothing(path: str, p: jax.Array) -> Any:
    """Accumulate nothing."""


def _keep_unchanged(accumulated: Any, p: jax.Array, g: jax.Array) -> Any:
    """Learn nothing from a gradient."""
    return accumulated


@dataclass(frozen=True, kw_only=True)
class Score:
    """How much we would miss each entry of a leaf; the lowest scores are pruned first.

    Write your own by giving `evaluate`; the rest has defaults.

    Attributes:
        evaluate: `(accumulated, p) -> scores`, an array of the shape of the leaf p.
        init: `(path, p) -> accumulated`, any pytree of arrays; `None` by default.
        update: `(accumulated, p, g) -> accumulated`, given a gradient of the leaf.
        evaluate_units: `(accumulated, p, mean) -> scores` of the units of a pattern, where
            `mean` averages an array like p over the entries of each unit. The default is the
            mean of the entries' scores: per entry, so that units of all sizes compare.
        needs_grads: Whether it means nothing before the first `update`.
    """

    evaluate: Callable[[Any, jax.Array], jax.Array]
    init: Callable[[str, jax.Array], Any] = _accumulate_nothing
    update: Callable[[Any, jax.Array, jax.Array], Any] = _keep_unchanged
    evaluate_units: Callable[[Any, jax.Array, Mean], jax.Array] | None = None
    needs_grads: bool = False


def random(key: jax.Array) -> Score:
    """Score uniformly at random: the baseline that every other score must beat.

    Each path has a key of its own, folded from `key` and the path alone, and the score does not
    change from one evaluation to the next, so that masks of rising sparsity are nested.

    Args:
        key: A random key.

    Returns:
        The score; its accumulator holds the key's data.

    Example:
        >>> score = random(jax.random.key(0))
        >>> score.evaluate(score.init("kernel", jnp.ones(2)), jnp.ones(2)).shape
        (2,)
    """
    key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    impl = jax.random.key_impl(key)

    def init(path: str, p: jax.Array) -> jax.Array:
        # Plain integers rather than a typed key: every checkpointer and optax wrapper takes them.
        return jax.random.key_data(jax.random.fold_in(key, zlib.crc32(path.encode())))

    def evaluate(data: jax.Array, p: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.wrap_key_data(data, impl=impl), p.shape, jnp.float32)

    return Score(init=init, evaluate=evaluate)


def magnitude(*, order: int = 1) -> Score:
    """Score by size: |p|, and for a unit S mean(|p|) (L1) or sqrt(mean(p^2)) (L2).

    Entry by entry the two are the same.

    Args:
        order: 1 for L1, 2 for L2.

    Returns:
        The score.

    Raises:
        ArgumentError: If the order is neither.

    Example:
        >>> magnitude().evaluate(None, jnp.array([-2.0, 1.0]))
        Array([2., 1.], dtype=float32)

    Reference:
        "Learning both weights and connections for efficient neural networks",
        arXiv:1506.02626; for filters "Pruning filters for efficient ConvNets", arXiv:1608.08710.
    """
    require_one_of("order", order, (1, 2), fix="Use order=1 for L1.")

    def root_mean_square(_: None, p: jax.Array, mean: Mean) -> jax.Array:
        largest = jnp.max(jnp.abs(linalg.widen(p)), initial=0)
        scale = jnp.where(largest > 0, largest, 1)  # the squares of small weights would vanish
        return scale * jnp.sqrt(mean(jnp.square(linalg.widen(p) / scale)))

    return Score(
        evaluate=lambda _, p: jnp.abs(p), evaluate_units=root_mean_square if order == 2 else None
    )


def saliency(*, decay: float = 1.0) -> Score:
    """Score by the effect of a gate on each entry: |p g|, g the mean gradient; mean over a unit.

    "SNIP: single-shot network pruning based on connection sensitivity" (arXiv:1810.02340),
    without its normalisation by the sum over all entries, which changes no order.

    Args:
        decay: Factor on the past at each new gradient; 1 weighs all gradients alike.

    Returns:
        The score; it needs gradients.
    """

    def evaluate(accumulated: Accumulated, p: jax.Array) -> jax.Array:
        return jnp.abs(linalg.widen(p) * accumulated.mean)

    return _from_grads(lambda p, g: g, evaluate, decay)


def taylor(*, decay: float = 1.0) -> Score:
    """Score by the first-order change of the loss when a unit S goes: |mean_S(p g)|.

    The terms p g are averaged over gradients and *added with their signs* inside a unit, as the
    gradient of a gate on the unit is, where `saliency` adds |p g|; entry by entry the two differ
    only while p changes. This is the absolute form of "Pruning convolutional neural networks for
    resource efficient inference" (arXiv:1611.06440), put on weights as in "Importance
    estimation for neural network pruning" (arXiv:1906.10771), which squares it.

    Args:
        decay: Factor on the past at each new gradient; 1 weighs all gradients alike.

    Returns:
        The score; it needs gradients.
    """

    def evaluate_units(accumulated: Accumulated, p: jax.Array, mean: Mean) -> jax.Array:
        return jnp.abs(mean(accumulated.mean))

    return _from_grads(
        lambda p, g: p * g, lambda accumulated, p: jnp.abs(accumulated.mean), decay, evaluate_units
    )


def fisher(*, decay: float = 1.0) -> Score:
    """Score by the second-order change of the loss: p^2 F / 2, F = mean(g^2); mean over a unit.

    Optimal brain damage with the diagonal Fisher information for the Hessian: "Faster gaze
    prediction with dense networks and Fisher pruning" (arXiv:1801.05787). F is exact when
    each gradient is that of one example; gradients of batches underestimate it.

    Args:
        decay: Factor on the past at each new gradient; 1 weighs all gradients alike.

    Returns:
        The score; it needs gradients.
    """

    def evaluate(accumulated: Accumulated, p: jax.Array) -> jax.Array:
        return jnp.square(linalg.widen(p)) * accumulated.mean / 2

    return _from_grads(lambda p, g: jnp.square(g), evaluate, decay)


def movement(*, decay: float = 1.0) -> Score:
    """Score by how far training moves entries away from zero: mean(-p g); mean over a unit.

    Signed: entries that shrink score below zero and go first. "Movement pruning: adaptive
    sparsity by fine-tuning" (arXiv:2005.07683), as a mean over steps, not a sum.

    Args:
        decay: Factor on the past at each new gradient; 1 weighs all gradients alike.

    Returns:
        The score; it needs gradients.
    """
    return _from_grads(lambda p, g: -p * g, lambda accumulated, p: accumulated.mean, decay)


def _from_grads(
    contribution: Callable[[jax.Array, jax.Array], jax.Array],
    evaluate: Callable[[Accumulated, jax.Array], jax.Array],
    decay: float,
    evaluate_units: Callable[[Accumulated, jax.Array, Mean], jax.Array] | None = None,
) -> Score:
    if not 0 <= decay <= 1:
        raise ArgumentError(
            "decay", got=f"{decay}", expected="a factor from 0 to 1", fix="Use 1 to forget nothing."
        )

    def init(path: str, p: jax.Array) -> Accumulated:
        total = jnp.zeros_like(p, linalg.common_float(p.dtype, jnp.float32))
        return Accumulated(total=total, weight=jnp.zeros((), total.dtype))

    def update(accumulated: Accumulated, p: jax.Array, g: jax.Array) -> Accumulated:
        new = contribution(linalg.widen(p), g.astype(accumulated.total.dtype))
        return Accumulated(decay * accumulated.total + new, decay * accumulated.weight + 1)

    return Score(
        init=init,
        update=update,
        evaluate=evaluate,
        evaluate_units=evaluate_units,
        needs_grads=True,
    )


# --- Over whole trees -------------------------------------------------------------------------


def init_scores(
    params: tree.Params, *, score: Score, where: tree.Where = tree.weights
) -> tree.Params:
    """Start accumulating a score: what `update_scores` carries and `make_mask(grads=)` takes.

    Args:
        params: Any pytree of arrays.
        score: What to accumulate for.
        where: The leaves to accumulate for.

    Returns:
        A tree like params with an accumulator per selected leaf, `None` elsewhere.

    Raises:
        SelectionError: If nothing is selected.
    """
    chosen = tree.select(params, where)
    return tree.map_with_path(
        lambda path, p: score.init(path, p) if path in chosen else None, params
    )


def update_scores(
    accumulated: tree.Params, params: tree.Params, grads: tree.Params, *, score: Score
) -> tree.Params:
    """Add one gradient to the accumulators, as one would in a loop over batches.

    Args:
        accumulated: From `init_scores` or this function.
        params: The params at which the gradient was taken.
        grads: Their gradient.
        score: What the accumulators are for.

    Returns:
        The new accumulators.

    Raises:
        StructureError: If the trees do not mirror params.

    Example:
        >>> params, grads = {"kernel": jnp.full((2, 2), 3.0)}, {"kernel": jnp.ones((2, 2))}
        >>> accumulated = init_scores(params, score=movement())
        >>> update_scores(accumulated, params, grads, score=movement())["kernel"].mean[0, 0]
        Array(-3., dtype=float32)
    """
    return tree.map_with_path(
        lambda path, p, old, g: None if old is None else score.update(old, p, g),
        params,
        accumulated,
        grads,
    )
