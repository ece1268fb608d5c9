"""What was made for calls of a function, kept for others of the same structure and types."""

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import jax

from jaxcompress.graph.program import _compat

T = TypeVar("T")


class Calls(Generic[T]):
    """A few things, by the structure, types and JAX's context of the calls they were made for.

    Args:
        most: How many are kept, those that were used last.
    """

    def __init__(self, most: int = 16):
        self._most, self._made = most, dict[Hashable, T]()
        self._lock = threading.Lock()

    def get(self, args: Any, make: Callable[[], T], stays: Callable[[T], bool]) -> T:
        """Give what was made for such arguments, or make it.

        Args:
            args: Any pytree of arrays and numbers, traced ones too.
            make: Makes it.
            stays: Whether it may be kept: it holds nothing of a trace that ends.

        Returns:
            It.
        """
        try:
            key = _compat.call_types(args)
            with self._lock:
                made = self._made.pop(key, None)
        except (TypeError, ValueError):  # no array, or something static that cannot be compared
            return make()
        structure = jax.tree.structure(args)
        if made is None and not (stays(made := make()) and _is_static(structure)):
            return made
        with self._lock:
            self._made[key] = made  # the last one used comes last
            while len(self._made) > self._most:
                del self._made[next(iter(self._made))]
        return made


_CONTAINERS = (dict, list, tuple, OrderedDict, defaultdict, type(None))


def _is_static(structure: Any) -> bool:
    """Tell whether the static parts of a tree can be hashed: others may change in place."""
    kind, static = structure.node_data() or (None, None)
    try:
        hash(None if kind in _CONTAINERS else static)
    except TypeError:
        return False
    return all(_is_static(child) for child in structure.children())
