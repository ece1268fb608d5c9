"""Data classes that are mappings as well."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

_Entry = TypeVar("_Entry")


class FieldMapping(Mapping[str, _Entry]):
    """A data class that is also a mapping: its entries are those of its first field.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Scores(FieldMapping[float]):
        ...     scores: Mapping[str, float]
        ...     missing: tuple[str, ...] = ()
        >>> found = Scores({"a": 1.0, "b": 0.5})
        >>> found["a"], list(found), len(found)
        (1.0, ['a', 'b'], 2)
    """

    @property
    def _entries(self) -> Mapping[str, _Entry]:
        itself: Any = self
        return getattr(self, dataclasses.fields(itself)[0].name)

    def __getitem__(self, name: str) -> _Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
