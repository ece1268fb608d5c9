"""What the logit losses share: checked logits, and log-probabilities that survive masked classes.

Everything here is written so that neither a value nor a gradient meets `inf - inf` or `0 * inf`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jaxcompress.errors import ArgumentError, ArgumentTypeError


def read_logits(
    student: Float[ArrayLike, "*batch classes"], teacher: Float[ArrayLike, "*batch classes"]
) -> tuple[Float[Array, "*batch classes"], Float[Array, "*batch classes"]]:
    """Check a pair of logits, bring both to float32 (or float64), and cut the teacher's gradient.

    Args:
        student: The student's logits.
        teacher: The teacher's logits, of the same shape.

    Returns:
        Both, in one dtype.

    Raises:
        ArgumentTypeError: If either is not floating point.
        ArgumentError: If the shapes differ, or there is no class axis.
    """
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    for name, logits in {"student": student, "teacher": teacher}.items():
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise ArgumentTypeError(
                name,
                got=f"{logits.dtype}{list(logits.shape)}",
                expected="floating-point logits",
                fix="Pass what comes before the softmax, not class indices.",
            )
    if student.shape != teacher.shape or not student.ndim:
        raise ArgumentError(
            "teacher",
            got=f"{list(teacher.shape)} beside a student of {list(student.shape)}",
            expected="logits of one shape (..., classes)",
            fix="Give both models the same batch, and compare outputs over the same classes.",
        )
    dtype = loss_dtype(student, teacher)
    return student.astype(dtype), jax.lax.stop_gradient(teacher.astype(dtype))


def loss_dtype(*arrays: Array) -> Any:
    """Give the dtype that a loss of these arrays is computed in.

    Args:
        *arrays: Floating-point arrays.

    Returns:
        float64 if any of them is, else float32.
    """
    return jnp.float64 if jnp.float64 in [array.dtype for array in arrays] else jnp.float32


def read_scalar(
    value: ArrayLike, dtype: Any, *, name: str, valid: Callable[[float], bool], expected: str
) -> Array:
    """Check a scalar that may be traced; the value of a concrete one must be valid.

    Args:
        value: A number, or an array of no axes.
        dtype: What to compute in.
        name: The argument's name, for errors.
        valid: Tells whether a concrete value is allowed.
        expected: The same in words.

    Returns:
        An array of no axes.

    Raises:
        ArgumentError: If it has axes, or is concrete and not valid.
    """
    if jnp.ndim(value):
        raise ArgumentError(
            name,
            got=f"an array of shape {list(jnp.shape(value))}",
            expected=expected,
            fix="For one per example, jax.vmap the loss.",
        )
    if not isinstance(value, Tracer) and not valid(float(np.asarray(value))):
        raise ArgumentError(name, got=repr(value), expected=expected, fix="Change its value.")
    return jnp.asarray(value, dtype)


def read_temperature(temperature: ArrayLike, dtype: Any) -> Array:
    """Check a temperature: positive and finite, where that can be known.

    Args:
        temperature: A scalar, perhaps traced.
        dtype: What to compute in.

    Returns:
        An array of no axes.

    Raises:
        ArgumentError: See `read_scalar`.
    """
    return read_scalar(
        temperature,
        dtype,
        name="temperature",
        valid=lambda t: 0 < t < math.inf,
        expected="a positive, finite scalar",
    )


def log_softmax(
    logits: Float[Array, "*batch classes"],
    temperature: Array,
    among: Bool[Array, "*batch classes"] | None = None,
) -> Float[Array, "*batch classes"]:
    """Compute `log softmax(logits / T)` over the classes that exist.

    Args:
        logits: Logits; -inf marks a class that does not exist.
        temperature: T, a positive scalar.
        among: The classes to look at, if not all.

    Returns:
        Log-probabilities; -inf for classes outside, and throughout for a row without classes.
    """
    exists = logits > -jnp.inf
    # A NaN compares false; it must come out as NaN, not as a masked class.
    exists = exists | jnp.isnan(logits)
    exists = exists if among is None else exists & among
    # The division must not see -inf (its gradient in T is -inf * 0), nor the softmax an empty row.
    softened = jnp.where(exists, logits, 0) / temperature
    row = exists.any(-1, keepdims=True)
    return jnp.where(exists, jax.nn.log_softmax(softened, where=exists | ~row), -jnp.inf)


def soften(
    student: Float[ArrayLike, "*batch classes"],
    teacher: Float[ArrayLike, "*batch classes"],
    temperature: ArrayLike,
) -> tuple[Float[Array, "*batch classes"], Float[Array, "*batch classes"], Array]:
    """Check the arguments of a divergence, and compute both distributions.

    Args:
        student: The student's logits.
        teacher: The teacher's logits, of the same shape.
        temperature: T, a positive scalar.

    Returns:
        Log-probabilities of the teacher and of the student, and the temperature as an array.

    Raises:
        ArgumentTypeError: See `read_logits`.
        ArgumentError: See `read_logits` and `read_temperature`.
    """
    student, teacher = read_logits(student, teacher)
    temperature = read_temperature(temperature, student.dtype)
    return log_softmax(teacher, temperature), log_softmax(student, temperature), temperature


def expect(
    log_p: Float[Array, "*batch classes"], log_a: Array, log_b: Array
) -> Float[Array, "*batch"]:
    """Compute `Σ_c p_c (a_c - b_c)` with `0 · anything = 0`, in the value and in the gradient.

    Args:
        log_p: Log-probabilities of the weights.
        log_a: The first term, -inf only where p is 0.
        log_b: The second; -inf where p is not 0 makes the sum infinite.

    Returns:
        The sum over the last axis.
    """
    p = jnp.exp(log_p)
    # `!=` and not `>`: a NaN must reach the sum.
    counts = p != 0
    gap = jnp.where(counts, log_a, 0) - jnp.where(counts, log_b, 0)
    return jnp.sum(jnp.where(counts, p, 0) * gap, axis=-1)
