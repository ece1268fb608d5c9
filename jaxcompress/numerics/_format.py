"""A format: a number type plus everything else that decides how an array is rounded to it."""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.errors import ArgumentError
from jaxcompress.numerics._basis import Basis
from jaxcompress.numerics._granularity import Granularity, PerTensor
from jaxcompress.numerics._qtypes import Int, Limits, QType, Scaled
from jaxcompress.numerics._range import AbsMax, Convention, LeastSquares, Range
from jaxcompress.numerics._scales import NARROW, POWERS, WIDE


@dataclass(frozen=True)
class Format:
    """A number type, granularity, symmetry, range method, scale dtypes and convention.

    Invariant: `range` is never `None`, nor is `convention` where there is a choice: where they are
    not given, the constructor sets the defaults.

    Attributes:
        qtype: The number type.
        granularity: Which entries share a scale.
        symmetric: Whether the code 0 stands for the number 0; if not (integers only), each slice
            has an integer zero point, and its range is made to include 0, so that 0 stays exact.
        range: How a slice's range is found: `AbsMax()`, `MSE()`, `Percentile(p)` or
            `LeastSquares()`. By default `AbsMax()`, and `LeastSquares()` for a `Basis`.
        scale_dtype: The dtype that scales are rounded to, before anything is divided by them:
            float32, bfloat16 or float16, or one of the two of block formats, `float8_e8m0fnu`
            and `float8_e4m3fn`. Scales saturate at the ends of its normal range (of
            `float8_e4m3fn`'s subnormal one), and are 1 for a slice of zeros. With
            `float8_e8m0fnu` they are the powers of two that OCP MX prescribes: the largest code
            has the exponent of the largest entry, and entries above the largest code saturate.
        convention: For symmetric signed integers, `Convention.NARROW` by default; else `None`.
        global_scale: Whether a float32 scale of the whole array stands above the slices' scales,
            for `float8_e4m3fn`, which has little range of its own; see `fit_global_scale`.

    Raises:
        ArgumentError: If the parts do not go together.

    Example:
        >>> from jaxcompress.numerics import PerGroup, int4
        >>> Format(int4, PerGroup(128)).limits
        (-7.0, 7.0)
        >>> Format(int4, PerGroup(128), symmetric=False).limits
        (-8.0, 7.0)
    """

    qtype: QType
    granularity: Granularity = field(default_factory=PerTensor)
    symmetric: bool = True
    range: Range | None = None
    scale_dtype: Any = jnp.float32
    convention: Convention | None = None
    global_scale: bool = False

    def __post_init__(self):
        is_basis = isinstance(self.qtype, Basis)
        if self.range is None:
            object.__setattr__(self, "range", LeastSquares() if is_basis else AbsMax())
        object.__setattr__(self, "scale_dtype", np.dtype(self.scale_dtype))
        self._check(is_basis)
        if self._takes_convention and self.convention is None:
            object.__setattr__(self, "convention", Convention.NARROW)

    @property
    def _takes_convention(self) -> bool:
        return isinstance(self.qtype, Int) and self.qtype.signed and self.symmetric

    def _check(self, is_basis: bool) -> None:
        if not self.symmetric and not isinstance(self.qtype, Int):
            raise ArgumentError(
                "symmetric",
                got=f"False with {self.qtype.name}",
                expected="an integer type where there is a zero point",
                fix="Leave symmetric=True, or use int2 to int8.",
            )
        if is_basis and not isinstance(self.range, LeastSquares):
            raise ArgumentError(
                "range",
                got=f"{self.range} with {self.qtype.name}",
                expected="LeastSquares(), since a basis has several scales per slice",
                fix="Leave `range` out.",
            )
        if self.convention is not None and not self._takes_convention:
            raise ArgumentError(
                "convention",
                got=f"{self.convention} with {self.qtype.name}, symmetric={self.symmetric}",
                expected="a symmetric signed integer format where a convention is chosen",
                fix="Leave `convention` out.",
            )
        self._check_scales()

    def _check_scales(self) -> None:
        if self.scale_dtype not in (*WIDE, POWERS, NARROW):
            raise ArgumentError(
                "scale_dtype",
                got=self.scale_dtype,
                expected="float32, bfloat16, float16, float8_e8m0fnu or float8_e4m3fn",
                fix="float32 is the default; 16 bits save 2 bytes per slice, 8 bits 3.",
            )
        if self.global_scale and self.scale_dtype != NARROW:
            raise ArgumentError(
                "global_scale",
                got=f"True with scale_dtype={self.scale_dtype}",
                expected="scale_dtype=float8_e4m3fn where a global scale is asked for",
                fix="The other dtypes have the range to do without: leave `global_scale` out.",
            )
        if self.scale_dtype == POWERS and (
            not self.symmetric
            or self.convention is Convention.SIGNED
            or isinstance(self.range, LeastSquares)
        ):
            raise ArgumentError(
                "scale_dtype",
                got=f"{self.scale_dtype} with symmetric={self.symmetric}, "
                f"convention={self.convention}, range={self.range}",
                expected="a symmetric format, positive scales, and a range that is not solved for, "
                "where scales are powers of two",
                fix="Take AbsMax() or MSE(), or another `scale_dtype`.",
            )

    @property
    def limits(self) -> Limits | None:
        """The smallest and the largest code in use; `None` for a `Basis`."""
        if not isinstance(self.qtype, Scaled):
            return None
        low, high = self.qtype.limits
        return (-high, high) if self.convention is Convention.NARROW else (low, high)

    @property
    def clips(self) -> bool:
        """Whether a number can lie so far outside its slice's range that it is clipped."""
        if not isinstance(self.range, AbsMax) or self.scale_dtype != jnp.float32:
            return True
        least = self.limits[0] if self.limits else 0
        whole = self.convention in (None, Convention.NARROW, Convention.TIGHT)
        return not (whole and (least < 0 or not self.symmetric))

    def obstacle(self, shape: tuple[int, ...], dtype: Any) -> str | None:
        """Say why an array cannot be brought into this format.

        Args:
            shape: The array's shape.
            dtype: The array's dtype.

        Returns:
            The reason, which continues a sentence about the array; `None` if it can.

        Example:
            >>> from jaxcompress.numerics import PerGroup, int4
            >>> Format(int4, PerGroup(128)).obstacle((100, 4), jnp.float32)
            'has 100 entries along axis -2, which do not divide into groups of 128'
        """
        if not jnp.issubdtype(dtype, jnp.floating):
            return f"is of dtype {dtype}, not floating point"
        if not shape:
            return "is a scalar"
        if 0 in shape:
            return "has no entries"
        return self.granularity.obstacle(shape)
