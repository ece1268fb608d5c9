"""Formats as JSON, and back from a list of classes that may be built: a file runs no code."""

import dataclasses
import enum
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from jaxcompress import numerics
from jaxcompress.errors import ArgumentTypeError

Part = TypeVar("Part", bound=type)

_CLASSES: dict[str, type] = {}

# Types with many levels are written by name; the name must keep its meaning for ever.
_NAMED = {"nf4": numerics.nf4}


def allow(part: Part) -> Part:
    """Let files hold formats with a class of your own: a qtype, a granularity or a range.

    The class is rebuilt from the values of its fields, which must be numbers, text, tuples of
    these, or other such classes. Use it as a decorator, before saving and before loading.

    Args:
        part: A frozen dataclass or an enum; its name must be free.

    Returns:
        The same class.

    Raises:
        ArgumentTypeError: If it is neither, or another class has its name.

    Example:
        >>> import dataclasses
        >>> @allow
        ... @dataclasses.dataclass(frozen=True)
        ... class PerHead(numerics.Granularity):
        ...     heads: int
    """
    known = _CLASSES.get(part.__name__, part)
    if known is not part or not (dataclasses.is_dataclass(part) or issubclass(part, enum.Enum)):
        raise ArgumentTypeError(
            "part",
            got=f"{part.__module__}.{part.__qualname__}",
            expected="a frozen dataclass or an enum under a name that is still free",
            fix="Rename it, or make it a dataclass.",
        )
    _CLASSES[part.__name__] = part
    return part  # pyright: ignore[reportReturnType]


for _part in (
    *(numerics.Format, numerics.Convention),
    *(numerics.Int, numerics.Float, numerics.Codebook, numerics.Basis),
    *(numerics.PerTensor, numerics.PerChannel, numerics.PerGroup, numerics.PerToken),
    *(numerics.AbsMax, numerics.MSE, numerics.Percentile, numerics.LeastSquares, numerics.Entropy),
):
    allow(_part)


def to_json(value: Any) -> Any:
    """Describe a format, or a part of one.

    Args:
        value: An instance of an allowed class, a dtype, or plain data.

    Returns:
        What `json` can write. Fields at their defaults are left out.

    Raises:
        ArgumentTypeError: If a class is not allowed.
    """
    if isinstance(value, numerics.QType) and _NAMED.get(value.name) == value:
        return {"named": value.name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [to_json(entry) for entry in value]
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    kind = type(value)
    if _CLASSES.get(kind.__name__) is not kind:
        raise ArgumentTypeError(
            "params",
            got=f"a format with a {kind.__module__}.{kind.__qualname__}",
            expected="formats of the classes in `numerics`",
            fix="Make the class known with `export.allow`, before saving and before loading.",
        )
    if isinstance(value, enum.Enum):
        return {kind.__name__: value.name}
    fields = {
        f.name: to_json(getattr(value, f.name))
        for f in dataclasses.fields(value)
        if getattr(value, f.name) != f.default
    }
    return {kind.__name__: fields}


def from_json(data: Any) -> Any:
    """Rebuild what `to_json` described.

    Args:
        data: What was read.

    Returns:
        The format, or a part of one.

    Raises:
        ValueError: If it names a class that is not allowed.
    """
    if isinstance(data, list):
        return tuple(from_json(entry) for entry in data)
    if not isinstance(data, dict):
        return data
    ((name, content),) = data.items()
    if name == "dtype":
        return jnp.dtype(content)
    if name == "named":
        return _NAMED[content]
    if name not in _CLASSES:
        raise ValueError(
            f"it uses the format class {name!r}, which is unknown here; if it is yours, make it "
            "known with `export.allow`"
        )
    kind = _CLASSES[name]
    if issubclass(kind, enum.Enum):
        return kind[content]
    return kind(**{field: from_json(entry) for field, entry in content.items()})
