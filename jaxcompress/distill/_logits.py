"""Divergences between the class distributions of a student and its teacher."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxcompress.distill._softmax import expect, read_logits, soften


def kl(
    student: Float[ArrayLike, "*batch classes"],
    teacher: Float[ArrayLike, "*batch classes"],
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*batch"]:
    """Compute Hinton's distillation loss, the softened `KL(teacher ‖ student)`.

    `T² Σ_c p_c (log p_c - log q_c)` with `p = softmax(teacher / T)`, `q = softmax(student / T)`.
    It covers the teacher's modes. As T grows it tends to half the mean squared difference of the
    centred logits.

    Args:
        student: Logits, `(..., classes)`.
        teacher: Logits of the same shape; no gradient flows into them.
        temperature: T > 0; may be traced.

    Returns:
        One value per example, >= 0 up to rounding, and exactly 0 for equal logits.

    Raises:
        ArgumentError: If shapes differ or T is not positive and finite.
        ArgumentTypeError: If logits are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> teacher = jnp.array([[2.0, 0.0], [1.0, 1.0]])
        >>> [f"{loss:.3f}" for loss in kl(jnp.zeros((2, 2)), teacher, temperature=2.0)]
        ['0.444', '0.000']

    Reference:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, arXiv:1503.02531,
        section 2. They write the cross-entropy; it differs by the teacher's entropy, a constant.
    """
    log_p, log_q, temperature = soften(student, teacher, temperature)
    return temperature**2 * expect(log_p, log_p, log_q)


def reverse_kl(
    student: Float[ArrayLike, "*batch classes"],
    teacher: Float[ArrayLike, "*batch classes"],
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*batch"]:
    """Compute the softened `KL(student ‖ teacher)`, which seeks the teacher's largest mode.

    `T² Σ_c q_c (log q_c - log p_c)` with p the teacher's and q the student's distribution. A
    student too small to cover every mode is not pushed to spread its mass between them.

    Args:
        student: Logits, `(..., classes)`.
        teacher: Logits of the same shape; no gradient flows into them.
        temperature: T > 0; may be traced.

    Returns:
        One value per example, >= 0 up to rounding, and exactly 0 for equal logits.

    Raises:
        ArgumentError: If shapes differ or T is not positive and finite.
        ArgumentTypeError: If logits are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{reverse_kl(jnp.array([0.0, 0.0]), jnp.array([2.0, 0.0])):.3f}")
        0.434

    Reference:
        Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, arXiv:2306.08543,
        equation 1, here per position rather than over sampled sequences.
    """
    log_p, log_q, temperature = soften(student, teacher, temperature)
    return temperature**2 * expect(log_q, log_q, log_p)


def jensen_shannon(
    student: Float[ArrayLike, "*batch classes"],
    teacher: Float[ArrayLike, "*batch classes"],
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*batch"]:
    """Compute the Jensen-Shannon divergence: symmetric, and bounded by `T² log 2`.

    `T² (KL(p ‖ m) + KL(q ‖ m)) / 2` with p the teacher's distribution, q the student's and
    `m = (p + q) / 2`. It is finite even where one side masks a class that the other does not.

    Args:
        student: Logits, `(..., classes)`.
        teacher: Logits of the same shape; no gradient flows into them.
        temperature: T > 0; may be traced.

    Returns:
        One value per example, >= 0 up to rounding, and 0 (to rounding) for equal logits.

    Raises:
        ArgumentError: If shapes differ or T is not positive and finite.
        ArgumentTypeError: If logits are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> opposite = jensen_shannon(jnp.array([99.0, 0.0]), jnp.array([0.0, 99.0]))
        >>> print(f"{opposite:.4f}")
        0.6931

    Reference:
        Lin, Divergence Measures Based on the Shannon Entropy (IEEE Trans. Inf. Theory, 1991),
        equation 4.1; for distillation, Agarwal et al., arXiv:2306.13649, equation 1 with β = ½.
    """
    log_p, log_q, temperature = soften(student, teacher, temperature)
    exists = (log_p != -jnp.inf) | (log_q != -jnp.inf)
    log_m = jnp.logaddexp(jnp.where(exists, log_p, 0), jnp.where(exists, log_q, 0)) - jnp.log(2.0)
    return temperature**2 * (expect(log_p, log_p, log_m) + expect(log_q, log_q, log_m)) / 2


def soft_cross_entropy(
    student: Float[ArrayLike, "*batch classes"],
    teacher: Float[ArrayLike, "*batch classes"],
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*batch"]:
    """Compute the cross-entropy of the student against the teacher's soft targets.

    `-T² Σ_c p_c log q_c`: `kl` plus T² times the teacher's entropy, so the same gradient, on the
    scale of an ordinary cross-entropy.

    Args:
        student: Logits, `(..., classes)`.
        teacher: Logits of the same shape; no gradient flows into them.
        temperature: T > 0; may be traced.

    Returns:
        One value per example, >= 0, and never below T² times the teacher's entropy.

    Raises:
        ArgumentError: If shapes differ or T is not positive and finite.
        ArgumentTypeError: If logits are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{soft_cross_entropy(jnp.zeros(4), jnp.arange(4.0)):.4f}")  # log 4
        1.3863

    Reference:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, arXiv:1503.02531,
        section 2.
    """
    log_p, log_q, temperature = soften(student, teacher, temperature)
    return temperature**2 * expect(log_p, jnp.zeros_like(log_q), log_q)


def logit_mse(
    student: Float[ArrayLike, "*batch classes"],
    teacher: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch"]:
    """Compute the mean squared difference of the raw logits over the classes.

    `mean_c (student_c - teacher_c)²`. Unlike the divergences it fixes the logits' offset too, so
    adding a constant to one side changes it.

    Args:
        student: Logits, `(..., classes)`.
        teacher: Logits of the same shape; no gradient flows into them.

    Returns:
        One value per example, >= 0, and exactly 0 for equal logits. Classes that are -inf on both
        sides are left out of the mean.

    Raises:
        ArgumentError: If shapes differ.
        ArgumentTypeError: If logits are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> print(logit_mse(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])))
        2.0

    Reference:
        Ba and Caruana, Do Deep Nets Really Need to be Deep?, arXiv:1312.6184, equation 1, with a
        mean over the classes where they have half the sum.
    """
    student, teacher = read_logits(student, teacher)
    exists = (student != -jnp.inf) | (teacher != -jnp.inf)
    gap = jnp.where(exists, student, 0) - jnp.where(exists, teacher, 0)
    classes = jnp.maximum(jnp.sum(exists, axis=-1), 1).astype(gap.dtype)
    return jnp.sum(gap**2, axis=-1) / classes
