"""Random scores: the baseline that every other must beat."""

import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from jaxcompress.structured._groups import Group
from jaxcompress.structured.importance._method import Given, Method


@dataclass(frozen=True, kw_only=True, eq=False)
class Random(Method):
    """Score uniformly at random in [0, 1): the baseline that every other method must beat.

    Each group has a key of its own, folded from `key` and its name alone. Params may be shapes.

    Attributes:
        key: A random key.
    """

    joint = True
    key: jax.Array

    def parts(self, group: Group, given: Given, prepared: Any) -> list[ArrayLike]:
        """Draw a number per unit."""
        key = jax.random.fold_in(self.key, zlib.crc32(group.name.encode()))
        return [jax.random.uniform(key, (*group.layers, group.size), jnp.float32)]
