"""Calls that run once: optimising them would take most of their time."""

from collections.abc import Callable
from typing import Any

import jax


def run_once(fn: Callable[..., Any], *args: Any) -> Any:
    """Compile `fn(*args)` without optimising it, and run it."""
    return jax.jit(fn).lower(*args).compile({"xla_backend_optimization_level": 0})(*args)
