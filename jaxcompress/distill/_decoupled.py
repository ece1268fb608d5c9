"""Decoupled knowledge distillation: the target class and the others, weighted apart."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.distill._softmax import expect, log_softmax, read_logits, read_temperature
from jaxcompress.errors import ArgumentError, ArgumentTypeError


def decoupled(
    student: Float[ArrayLike, "*batch classes"],
    teacher: Float[ArrayLike, "*batch classes"],
    labels: Int[ArrayLike, "*batch"],
    *,
    alpha: ArrayLike = 1.0,
    beta: ArrayLike = 8.0,
    temperature: ArrayLike = 4.0,
) -> Float[Array, "*batch"]:
    """Compute the decoupled distillation loss, `T² (α TCKD + β NCKD)`.

    TCKD is the KL divergence between the two-way distributions "the label or not"; NCKD is that
    between the distributions over the other classes alone. Hinton's loss is
    `T² (TCKD + (1 - p) NCKD)` with p the teacher's confidence in the label: it silences NCKD
    where the teacher is sure. Here the two are weighted freely. The defaults are the paper's for
    CIFAR-100; it uses T = 1 and β between 0.5 and 2 on ImageNet.

    Args:
        student: Logits, `(..., classes)`, of two classes or more.
        teacher: Logits of the same shape; no gradient flows into them.
        labels: The true classes as integers, `(...)`. A label out of range is refused; under jit,
            where it cannot be seen, its example's loss is NaN.
        alpha: Weight of the target-class part; may be traced.
        beta: Weight of the non-target part; may be traced.
        temperature: T > 0; may be traced.

    Returns:
        One value per example; for weights >= 0, >= 0 up to rounding and 0 for equal logits.

    Raises:
        ArgumentError: If shapes do not fit, a label is out of range, or T is not positive.
        ArgumentTypeError: If logits are not floating point or labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> teacher = jnp.array([4.0, 1.0, 0.0])
        >>> print(f"{decoupled(jnp.zeros(3), teacher, jnp.array(0), temperature=1.0):.3f}")
        1.705

    Reference:
        Zhao et al., Decoupled Knowledge Distillation, arXiv:2203.08679, equations 6 and 7, with
        the T² factor of their code.
    """
    student, teacher = read_logits(student, teacher)
    temperature = read_temperature(temperature, student.dtype)
    labels = _read_labels(labels, student.shape)
    classes = student.shape[-1]
    is_target = labels[..., None] == jnp.arange(classes, dtype=labels.dtype)  # (..., classes)
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    binary_p, binary_q = _binary(log_p, is_target), _binary(log_q, is_target)
    target_part = expect(binary_p, binary_p, binary_q)
    others_p = log_softmax(teacher, temperature, ~is_target)
    others_q = log_softmax(student, temperature, ~is_target)
    others_part = expect(others_p, others_p, others_q)
    alpha, beta = jnp.asarray(alpha, student.dtype), jnp.asarray(beta, student.dtype)
    loss = temperature**2 * (alpha * target_part + beta * others_part)
    return jnp.where((labels >= 0) & (labels < classes), loss, jnp.nan)


def _binary(
    log_p: Float[Array, "*batch classes"], is_target: Bool[Array, "*batch classes"]
) -> Float[Array, "*batch 2"]:
    """Compute `[log p(target), log p(any other)]`, the latter without forming `1 - p`."""
    sides = [_log_mass(log_p, is_target), _log_mass(log_p, ~is_target)]
    return jnp.stack(sides, axis=-1)


def _log_mass(
    log_p: Float[Array, "*batch classes"], among: Bool[Array, "*batch classes"]
) -> Float[Array, "*batch"]:
    among = among & (log_p != -jnp.inf)
    some = among.any(-1)
    # A side without classes would take the logarithm of 0: give it all, then overwrite it.
    mass = jax.nn.logsumexp(jnp.where(among, log_p, 0), axis=-1, where=among | ~some[..., None])
    return jnp.where(some, mass, -jnp.inf)


def _read_labels(labels: ArrayLike, shape: tuple[int, ...]) -> Int[Array, "*batch"]:
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ArgumentTypeError(
            "labels",
            got=f"{labels.dtype}{list(labels.shape)}",
            expected="integer class indices",
            fix="For one-hot labels, take jnp.argmax(labels, axis=-1).",
        )
    if labels.shape != shape[:-1] or shape[-1] < 2:
        raise ArgumentError(
            "labels",
            got=f"{list(labels.shape)} beside logits of {list(shape)}",
            expected="one class index per example, and logits over two classes or more",
            fix="Labels have the shape of the logits without the last axis.",
        )
    if not isinstance(labels, Tracer):
        values = np.asarray(labels)
        if values.size and not (values.min() >= 0 and values.max() < shape[-1]):
            raise ArgumentError(
                "labels",
                got=f"values from {values.min()} to {values.max()}",
                expected=f"class indices from 0 to {shape[-1] - 1}",
                fix="Drop the examples without a class before computing the loss.",
            )
    return labels
