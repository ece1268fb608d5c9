"""The exception classes, and the one form every message takes.

A message names the argument, says what came, what was expected, and how to mend it.
"""

from typing import Any


class JaxCompressError(Exception):
    """Base class of every exception that jaxcompress raises on purpose."""


class _MisuseError(JaxCompressError):
    """Carries the four things that a user needs to mend a call."""

    def __init__(self, argument: str, *, got: Any, expected: str, fix: str):
        self.argument, self.got, self.expected, self.fix = argument, got, expected, fix
        super().__init__(f"`{argument}`: expected {expected}, got {got}. {fix}")


class ArgumentError(_MisuseError, ValueError):
    """An argument has a value that cannot be used."""


class ArgumentTypeError(_MisuseError, TypeError):
    """An argument has a type that cannot be used."""


class SelectionError(ArgumentError):
    """A `where` selected nothing, or nothing that can be compressed."""


class StructureError(ArgumentError):
    """Two pytrees that must mirror each other do not."""


class NonFiniteError(ArgumentError):
    """Weights, scores or statistics hold NaN or infinity."""


class FileError(ArgumentError):
    """A file is truncated, altered, or not what its name promises."""


class MissingExtraError(JaxCompressError, ImportError):
    """A feature needs an optional dependency that is not installed.

    Args:
        feature: What was asked for, in words.
        package: The package that is missing.
        extra: The jaxcompress extra that brings it.
    """

    def __init__(self, feature: str, *, package: str, extra: str):
        super().__init__(
            f"{feature} needs `{package}`, which is not installed. "
            f"Install it with: pip install 'jaxcompress[{extra}]'"
        )
