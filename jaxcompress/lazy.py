"""Packages whose modules load on first use (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(
    package: str,
    *,
    submodules: Sequence[str] = (),
    names: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Give the `__getattr__` and `__dir__` of a package that loads its modules on first use.

    A package says the same to type checkers by ordinary imports:

        if TYPE_CHECKING:
            from jaxcompress.adapters._nnx import from_nnx as from_nnx
        else:
            __getattr__, __dir__ = lazy.attach(__name__, names={"_nnx": ["from_nnx"]})

    Args:
        package: The package's `__name__`.
        submodules: Modules of the package that are exported themselves.
        names: What is exported from which module of the package: `{module: names}`.

    Returns:
        `(__getattr__, __dir__)`. A name that neither lists raises `AttributeError`, as ever.

    Example:
        >>> load, names = attach(
        ...     "jaxcompress", submodules=["tree"], names={"errors": ["FileError"]}
        ... )
        >>> load("FileError").__name__, "tree" in names()
        ('FileError', True)
    """
    module_of = {name: module for module, listed in (names or {}).items() for name in listed}

    def load(name: str) -> Any:
        here = sys.modules[package]
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        if name not in module_of:
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}", name=name, obj=here
            )
        value = getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
        setattr(here, name, value)  # found without this function from now on
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *submodules, *module_of})

    return load, list_names
