"""The unit of work."""

from collections.abc import Callable
from typing import Any, TypeAlias

Fn: TypeAlias = Callable[..., Any]
"""A pure `fn(params, *inputs) -> outputs`: the unit of work everywhere."""
