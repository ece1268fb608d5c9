"""How good a classifier is, and whether two of them differ by more than chance.

`correct` and `cross_entropy` are per example, fit for `evaluate`; the others describe a whole set.
"""

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxcompress.errors import ArgumentError, explain_missing, require_at_least
from jaxcompress.linalg import widen


def correct(logits: ArrayLike, labels: ArrayLike, *, k: int = 1) -> Float[Array, " batch"]:
    """Tell for each example whether its label is among the k highest logits.

    Of equal logits the lower class ranks first, as in `argmax`; logits with a NaN are wrong, and
    so, under `jit`, are labels outside the classes.

    Args:
        logits: `(batch, classes)`.
        labels: `(batch,)`, integers in `[0, classes)`.
        k: How many guesses count, at least 1.

    Returns:
        1.0 or 0.0 per example.

    Raises:
        ArgumentError: If the shapes do not fit, a concrete label is no class, or `k` is below 1.

    Example:
        >>> correct(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1]))
        Array([1., 0.], dtype=float32)
    """
    logits, labels = _check_labels(logits, labels)
    require_at_least("k", k, 1, fix="Use 1 for plain accuracy.")
    return _correct(logits, labels, k)


@functools.partial(jax.jit, static_argnums=2)
def _correct(logits: Array, labels: Array, k: int) -> Array:
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    known = (labels >= 0) & (labels < logits.shape[1])
    earlier = jnp.arange(logits.shape[1])[None, :] < labels[:, None]
    above = jnp.sum((logits > own) | ((logits == own) & earlier), axis=1)
    numbers = ~jnp.any(jnp.isnan(logits), axis=1)
    return jnp.astype((above < k) & known & numbers, jnp.float32)


def cross_entropy(logits: ArrayLike, labels: ArrayLike) -> Float[Array, " batch"]:
    """Compute `-log softmax(logits)[label]` for each example, in float32 or wider.

    Args:
        logits: `(batch, classes)`.
        labels: `(batch,)`, integers in `[0, classes)`.

    Returns:
        Nats per example.

    Raises:
        ArgumentError: If the shapes do not fit.

    Example:
        >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
        Array([1.3862944], dtype=float32)
    """
    logits, labels = _check_labels(logits, labels)
    return _cross_entropy(logits, labels)


@jax.jit
def _cross_entropy(logits: Array, labels: Array) -> Array:
    # A negative label would wrap around; NaN is what optax gives for one that is too large.
    labels = jnp.where(labels < 0, logits.shape[1], labels)
    return optax.softmax_cross_entropy_with_integer_labels(widen(logits), labels)


def accuracy(logits: ArrayLike, labels: ArrayLike) -> Float[Array, ""]:
    """Compute the fraction of examples whose highest logit is the label's.

    Args:
        logits: `(batch, classes)`.
        labels: `(batch,)`, integers in `[0, classes)`.

    Returns:
        A fraction in [0, 1].
    """
    return jnp.mean(correct(logits, labels))


def top_k_accuracy(logits: ArrayLike, labels: ArrayLike, *, k: int) -> Float[Array, ""]:
    """Compute the fraction of examples whose label is among the k highest logits.

    Args:
        logits: `(batch, classes)`.
        labels: `(batch,)`, integers in `[0, classes)`.
        k: How many guesses count, at least 1.

    Returns:
        A fraction in [0, 1].
    """
    return jnp.mean(correct(logits, labels, k=k))


def f1(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    average: Literal["macro", "micro", "weighted"] = "macro",
) -> float:
    """Compute the F1 score, by scikit-learn.

    Args:
        logits: `(batch, classes)`.
        labels: `(batch,)`, integers in `[0, classes)`.
        average: How the scores of the classes are combined. Classes that neither occur nor are
            predicted do not count.

    Returns:
        A score in [0, 1].

    Raises:
        MissingExtraError: If scikit-learn is not installed.

    Example:
        >>> f1(jnp.eye(3), jnp.array([0, 1, 2]))
        1.0
    """
    logits, labels = _check_labels(logits, labels)
    predicted = np.asarray(jnp.argmax(logits, axis=1))
    score = _sklearn("The F1 score").f1_score
    return float(score(np.asarray(labels), predicted, average=average, zero_division=0.0))


def confusion(logits: ArrayLike, labels: ArrayLike) -> Int[np.ndarray, "classes classes"]:
    """Count the examples of each class (row) that were given each label (column).

    Args:
        logits: `(batch, classes)`.
        labels: `(batch,)`, integers in `[0, classes)`.

    Returns:
        The confusion matrix, by scikit-learn.

    Raises:
        MissingExtraError: If scikit-learn is not installed.

    Example:
        >>> confusion(jnp.eye(2)[jnp.array([0, 0, 1])], jnp.array([0, 1, 1]))
        array([[1, 0], [1, 1]])
    """
    logits, labels = _check_labels(logits, labels)
    predicted = np.asarray(jnp.argmax(logits, axis=1))
    count = _sklearn("The confusion matrix").confusion_matrix
    return count(np.asarray(labels), predicted, labels=np.arange(logits.shape[1]))


def expected_calibration_error(
    logits: ArrayLike, labels: ArrayLike, *, bins: int = 15
) -> Float[Array, ""]:
    r"""Compute how far confidence is from accuracy, over bins of equal width.

    $$\sum_b \frac{n_b}{n} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|$$

    where bin b holds the examples whose highest probability lies in `(b / bins, (b + 1) / bins]`.

    Args:
        logits: `(batch, classes)`.
        labels: `(batch,)`, integers in `[0, classes)`.
        bins: The number of bins.

    Returns:
        The error, in [0, 1].

    Raises:
        ArgumentError: If the shapes do not fit, or `bins` is below 1.

    Example:
        >>> expected_calibration_error(jnp.zeros((4, 2)), jnp.array([0, 1, 0, 1]))
        Array(0., dtype=float32)

    Reference: "On Calibration of Modern Neural Networks" (arXiv:1706.04599, eq. 3).
    """
    require_at_least("bins", bins, 1, fix="15 is usual.")
    return _calibration_error(*_check_labels(logits, labels), bins)


@functools.partial(jax.jit, static_argnums=2)
def _calibration_error(logits: Array, labels: Array, bins: int) -> Array:
    right = _correct(logits, labels, 1)
    confidence = jnp.max(jax.nn.softmax(widen(logits), axis=1), axis=1)
    index = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    gaps = jax.ops.segment_sum(right.astype(confidence.dtype) - confidence, index, bins)
    return jnp.sum(jnp.abs(gaps)) / confidence.size


class Interval(NamedTuple):
    """An estimate with its bootstrap interval.

    Attributes:
        value: The estimate from all examples.
        low: The lower end of the interval.
        high: The upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two classifiers on the same examples; differences are b minus a.

    Attributes:
        agreement: The fraction of examples to which both give the same label.
        accuracy: The difference of accuracies, as a fraction.
        cross_entropy: The difference of cross-entropies, in nats.
        accuracies: The accuracy of a and of b.
        cross_entropies: The cross-entropy of a and of b, in nats.
        confidence: The level of the intervals.
        examples: How many examples.
    """

    agreement: Interval
    accuracy: Interval
    cross_entropy: Interval
    accuracies: tuple[float, float]
    cross_entropies: tuple[float, float]
    confidence: float
    examples: int

    def __str__(self) -> str:
        (a, b), (ce_a, ce_b) = self.accuracies, self.cross_entropies
        same, gain, loss = self.agreement, self.accuracy, self.cross_entropy
        return "\n".join(
            (
                f"agreement      {same.value:.2%}  [{same.low:.2%}, {same.high:.2%}]",
                f"accuracy       {a:.2%} -> {b:.2%}, {100 * gain.value:+.2f} points  "
                f"[{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]",
                f"cross-entropy  {ce_a:.4f} -> {ce_b:.4f}, {loss.value:+.4f}  "
                f"[{loss.low:+.4f}, {loss.high:+.4f}]",
                f"{self.examples} examples, paired bootstrap intervals at {self.confidence:.0%}",
            )
        )


def compare(
    a_logits: ArrayLike,
    b_logits: ArrayLike,
    labels: ArrayLike,
    *,
    key: jax.Array,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Comparison:
    """Compare two classifiers on the same examples, by the paired percentile bootstrap.

    Every resample draws examples, with both classifiers' answers to them, so that what is hard
    for both cancels in the differences.

    Args:
        a_logits: `(batch, classes)`, the reference.
        b_logits: `(batch, classes)`, the contender.
        labels: `(batch,)`, integers in `[0, classes)`.
        key: A random key.
        resamples: The number of bootstrap resamples.
        confidence: The level of the intervals, in (0, 1).

    Returns:
        Agreement, and the differences in accuracy and cross-entropy, each with its interval.

    Raises:
        ArgumentError: If the shapes do not fit, or the level is not in (0, 1).

    Example:
        >>> labels = jnp.arange(10) % 2
        >>> result = compare(jnp.eye(2)[labels], jnp.zeros((10, 2)), labels, key=jax.random.key(0))
        >>> result.accuracies, result.agreement.value, round(result.cross_entropy.value, 3)
        ((1.0, 0.5), 0.5, 0.38)

    Reference: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    if not 0 < confidence < 1:
        raise ArgumentError(
            "confidence", got=confidence, expected="a level in (0, 1)", fix="0.95 is usual."
        )
    require_at_least("resamples", resamples, 1, fix="Raise it.")
    a, labels = _check_labels(a_logits, labels)
    b = jnp.asarray(b_logits)
    if a.shape != b.shape:
        raise ArgumentError(
            "b_logits",
            got=f"shape {b.shape}",
            expected=f"{a.shape}, the shape of a_logits",
            fix="Compare models of one task on the same examples.",
        )
    right, losses, columns, means = _compare(key, a, b, labels, resamples)
    tail = 50 * (1 - confidence)
    lows, highs = np.percentile(np.asarray(means), [tail, 100 - tail], axis=0)
    values = np.mean(np.asarray(columns, np.float64), axis=0)
    agreement, gain, loss = (
        Interval(float(value), float(low), float(high))
        for value, low, high in zip(values, lows, highs, strict=True)
    )
    return Comparison(
        agreement=agreement,
        accuracy=gain,
        cross_entropy=loss,
        accuracies=(float(jnp.mean(right[0])), float(jnp.mean(right[1]))),
        cross_entropies=(float(jnp.mean(losses[0])), float(jnp.mean(losses[1]))),
        confidence=confidence,
        examples=len(columns),
    )


@functools.partial(jax.jit, static_argnums=4)
def _compare(
    key: jax.Array, a: Array, b: Array, labels: Array, resamples: int
) -> tuple[Array, Array, Array, Array]:
    right = jnp.stack([_correct(a, labels, 1), _correct(b, labels, 1)])
    losses = jnp.stack([_cross_entropy(a, labels), _cross_entropy(b, labels)])
    same = jnp.argmax(a, axis=1) == jnp.argmax(b, axis=1)
    # (batch, 3)
    columns = [same, right[1] - right[0], losses[1] - losses[0]]
    columns = jnp.stack([column.astype(losses.dtype) for column in columns], axis=1)
    size = columns.shape[0]

    # A few at a time: all at once would hold resamples * batch indices.
    def resample(key: jax.Array) -> Array:
        return jnp.mean(columns[jax.random.randint(key, (50, size), 0, size)], axis=1)

    # (groups, 50, 3) -> (resamples, 3)
    means = jax.lax.map(resample, jax.random.split(key, -(-resamples // 50)))
    means = means.reshape(-1, 3)[:resamples]
    return right, losses, columns, means


def _check_labels(logits: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ArgumentError(
            "labels",
            got=f"labels of shape {labels.shape} for logits of shape {logits.shape}",
            expected="labels (batch,) and logits (batch, classes)",
            fix="Flatten any further axes into the batch.",
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ArgumentError(
            "labels", got=labels.dtype, expected="integer classes", fix="Use argmax of one-hot."
        )
    if not isinstance(labels, Tracer) and labels.size:
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most >= logits.shape[1]:
            raise ArgumentError(
                "labels",
                got=f"labels from {least} to {most}",
                expected=f"classes from 0 to {logits.shape[1] - 1}",
                fix="Count classes from 0, and leave out examples that have none.",
            )
    return logits, labels


def _sklearn(feature: str) -> Any:
    with explain_missing(feature, package="scikit-learn", extra="demo"):
        return importlib.import_module("sklearn.metrics")
