"""The number types that come with the package: instances of the classes in `_qtypes`."""

import itertools

from jaxcompress.errors import ArgumentError
from jaxcompress.numerics._basis import Basis
from jaxcompress.numerics._qtypes import Codebook, Float, Int

int2, int3, int4, int5, int6, int7, int8 = (Int(name=f"int{b}", bits=b) for b in range(2, 9))
"""Signed integers of so many bits."""
uint4, uint8 = (Int(name=f"uint{b}", bits=b, signed=False) for b in (4, 8))
"""Unsigned integers of so many bits."""

float4_e2m1fn = Float(name="float4_e2m1fn", bits=4)
"""4-bit floats: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and their negatives."""
float8_e4m3fn = Float(name="float8_e4m3fn", bits=8)
"""8-bit floats with 4 exponent bits, up to 448."""
float8_e5m2 = Float(name="float8_e5m2", bits=8)
"""8-bit floats with 5 exponent bits, up to 57,344."""

ternary = Codebook(name="ternary", bits=2, levels=(-1.0, 0.0, 1.0))
"""-1, 0 and 1."""
binary = Codebook(name="binary", bits=1, levels=(-1.0, 1.0))
"""-1 and 1."""

nf4 = Codebook(
    name="nf4",
    bits=4,
    levels=(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)
"""NormalFloat: 16 quantiles of a standard normal, with an exact zero.

Eight are positive and seven negative: Dettmers et al., "QLoRA" (arXiv:2305.14314), appendix E.
"""


def binary_basis(bits: int) -> Basis:
    """Make the type of linear combinations of k sign vectors; see `Basis`.

    Args:
        bits: k, 1 to 8.

    Returns:
        The type.

    Raises:
        ArgumentError: If `bits` is out of range.

    Example:
        >>> binary_basis(3).name
        'binary_basis3'
    """
    return Basis(name=f"binary_basis{bits}", bits=bits)


def power_of_two(bits: int, *, terms: int = 1) -> Codebook:
    r"""Make the type of signed powers of two, or of sums of two: multiplications become shifts.

    With one term an entry is 0 or $\pm 2^{-e}$, $e = 0, \ldots, 2^{bits-1} - 2$. With two, it is
    $\pm \gamma (p_0 + p_1)$ with $p_i \in \{0, 2^{-i}, 2^{-i-2}, 2^{-i-4}, \ldots\}$ and
    $\gamma$ such that the largest is 1.

    Args:
        bits: Width, 2 to 6 with one term; 3, 5 or 7 with two, since each takes half of
            what the sign leaves.
        terms: 1 or 2.

    Returns:
        The type.

    Raises:
        ArgumentError: If `bits` and `terms` do not go together.

    Example:
        >>> power_of_two(3).levels
        (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)

    Reference: Zhou et al., "Incremental Network Quantization" (arXiv:1702.03044), equation 1; Li et
    al., "Additive Powers-of-Two Quantization" (arXiv:1909.13144), equation 4.
    """
    widths = {1: range(2, 7), 2: range(3, 8, 2)}
    if bits not in widths.get(terms, ()):
        raise ArgumentError(
            "bits" if terms in widths else "terms",
            got=f"bits={bits}, terms={terms}",
            expected="2 to 6 bits with one term, or 3, 5 or 7 bits with two",
            fix="For example power_of_two(5, terms=2).",
        )
    powers = 2 ** ((bits - 1) // terms) - 1  # non-zero choices of one term
    choices = [[0.0, *(2.0 ** -(term + terms * j) for j in range(powers))] for term in range(terms)]
    sums = sorted({sum(chosen) for chosen in itertools.product(*choices)})
    positive = [level / sums[-1] for level in sums[1:]]
    levels = (*(-level for level in reversed(positive)), 0.0, *positive)
    return Codebook(name=f"power_of_two{bits}_{terms}", bits=bits, levels=levels)
