"""Which number types a step stores, computes and reduces in."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from jaxcompress import linalg, tree
from jaxcompress.train._trainable import default_trainable
from jaxcompress.tree import Params

FloatType: TypeAlias = Literal["float16", "bfloat16", "float32", "float64"]
"""The name of a floating-point dtype."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A dtype policy. Mutable state such as `batch_stats` keeps its own dtype throughout.

    Attributes:
        params: What `init` stores params in, and so what gradients and optimizer see; `None`
            keeps each leaf's dtype.
        compute: What the loss receives params and floating batch leaves in; `None` leaves them.
            Gradients come back in the dtype of the stored params.
        output: What per-example losses and metrics are averaged in; `None` is float32, or the
            loss's own dtype if that is wider.
    """

    params: FloatType | None = None
    compute: FloatType | None = None
    output: FloatType | None = None

    def store(self, params: Params) -> Params:
        """Cast params for storage.

        Args:
            params: Any pytree of arrays.

        Returns:
            Params with floating leaves, mutable state aside, in the `params` dtype.
        """
        return _cast(params, self.params)

    def lower(self, params: Params) -> Params:
        """Cast params for computing.

        Args:
            params: Any pytree of arrays.

        Returns:
            Params with floating leaves, mutable state aside, in the `compute` dtype.
        """
        return _cast(params, self.compute)

    def lower_batch(self, batch: Any) -> Any:
        """Cast a batch for computing.

        Args:
            batch: Any pytree of arrays.

        Returns:
            The batch with floating leaves in the `compute` dtype.
        """
        if self.compute is None:
            return batch
        return jax.tree.map(lambda x: x.astype(self.compute) if tree.is_floating(x) else x, batch)

    def widen(self, x: jax.Array) -> jax.Array:
        """Cast a loss or a metric for averaging.

        Args:
            x: An array of any dtype.

        Returns:
            It in the `output` dtype.
        """
        return x.astype(self.output) if self.output else linalg.widen(x)


def _cast(params: Params, dtype: FloatType | None) -> Params:
    if dtype is None:
        return params
    learned = default_trainable(params)
    return tree.map_with_path(
        lambda path, x: jnp.asarray(x, dtype) if tree.matches(learned, path, x) else x, params
    )
