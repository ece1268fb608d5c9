"""How the codes of one weight matrix are chosen: the contract of all methods, and the plainest."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from jaxcompress import numerics
from jaxcompress.numerics import Format, QArray
from jaxcompress.stats import Statistic


@dataclass(frozen=True)
class Method(abc.ABC):
    """Chooses the stored form of one weight matrix: the base class of all methods.

    A method is a pure function of one matrix `(in, out)` and of what was seen of the activations
    `(tokens, in)` that it multiplies. `ptq` does the rest: it brings leaves of any layout into
    that form, streams the batches, and maps over stacked layers and experts by `vmap`.
    """

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """What it has to see of the activations, by name; nothing by default."""
        return {}

    @property
    def sequential(self) -> bool:
        """Whether activations are seen after all upstream weights have been replaced."""
        return False

    def alone(self, format: Format) -> Format:
        """Give the format to round to where params are all there is (`pack`, `fake_quant`).

        Args:
            format: The rule's format.

        Returns:
            The format itself, unless a method says otherwise.

        Raises:
            ArgumentError: If the method is nothing without activations.
        """
        return format

    @abc.abstractmethod
    def __call__(
        self, w: Float[Array, "in out"], format: Format, seen: Mapping[str, Any]
    ) -> tuple[QArray, dict[str, Array]]:
        """Quantize one matrix; traceable.

        Args:
            w: The weights, float32; contracted over the first axis.
            format: In terms of the matrix: per tensor, per channel of axis -1, or in groups along
                axis -2.
            seen: `{name: result}` of `statistics`.

        Returns:
            The stored form, and scalars that say how it went, by name.
        """


@dataclass(frozen=True)
class RoundToNearest(Method):
    """Round each entry to the nearest code of its slice's range; see `Format.range`."""

    def __call__(
        self, w: Float[Array, "in out"], format: Format, seen: Mapping[str, Any]
    ) -> tuple[QArray, dict[str, Array]]:
        """Round; see `Method.__call__`."""
        return numerics.quantize(w, format), {}
