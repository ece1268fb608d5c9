"""Methods: how a leaf is factorised, and which leaves each can take."""

import math
from dataclasses import dataclass
from typing import TypeAlias

from jaxcompress.errors import ArgumentError, require_at_least


@dataclass(frozen=True)
class SVD:
    """The nearest matrix of low rank, without data; see `svd`.

    A convolution is taken as the matrix of its patches, `(window * in, out)`: it becomes one
    with fewer outputs, and one over single positions.
    """


@dataclass(frozen=True, kw_only=True)
class ActivationSVD:
    """The matrix of low rank that does most nearly the same to the inputs; see `activation_svd`.

    Attributes:
        damping: What is added to the diagonal of XᵀX, as a fraction of its mean.
    """

    damping: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ArgumentError(
                "damping", got=self.damping, expected="a fraction in (0, 1]", fix="1e-4 is usual."
            )


@dataclass(frozen=True, kw_only=True)
class Tucker2:
    """A convolution between fewer channels on both sides; see `tucker2`.

    It takes convolutions with a window; in a sequence of methods the next one takes the others.

    Attributes:
        iterations: Rounds of HOOI; 0 is plain HOSVD.
    """

    iterations: int = 10

    def __post_init__(self) -> None:
        require_at_least("iterations", self.iterations, 0, fix="10 is plenty.")


Method: TypeAlias = SVD | ActivationSVD | Tucker2


def break_even(inner: int, outer: int) -> int:
    """Find the largest rank that saves anything: `rank * (in + out) < in * out`.

    Args:
        inner: The matrix's inputs.
        outer: Its outputs.

    Returns:
        The rank; 0 if there is none.

    Example:
        >>> break_even(64, 64), break_even(4, 4), break_even(2, 100)
        (31, 1, 1)
    """
    return max(math.ceil(inner * outer / (inner + outer)) - 1, 0)
