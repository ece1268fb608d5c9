"""The exception classes, and the one form every message takes.

A message names the argument, says what came, what was expected, and how to mend it.
"""

import contextlib
from collections.abc import Iterator, Sequence
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


def require_at_least(
    argument: str, value: float | None, least: float, *, fix: str, optional: bool = False
) -> None:
    """Refuse a number that is too small.

    Args:
        argument: The name of the argument.
        value: Its value.
        least: The smallest that can be used.
        fix: What to do about it.
        optional: Whether it may be `None`.

    Raises:
        ArgumentError: If it is smaller, NaN, or `None`.
    """
    if not (optional if value is None else value >= least):
        raise ArgumentError(argument, got=value, expected=f"{least} or more", fix=fix)


def require_one_of(argument: str, value: Any, choices: Sequence[Any], *, fix: str) -> None:
    """Refuse a value that is none of a few.

    Args:
        argument: The name of the argument.
        value: Its value.
        choices: What can be used.
        fix: What to do about it.

    Raises:
        ArgumentError: If it is none of them.
    """
    if value not in choices:
        *others, last = map(repr, choices)
        expected = f"{', '.join(others)} or {last}"
        raise ArgumentError(argument, got=repr(value), expected=expected, fix=fix)


class MissingExtraError(JaxCompressError, ImportError):
    """A feature needs a package that cannot be imported.

    Args:
        feature: What was asked for, in words.
        package: The package that is missing.
        extra: The jaxcompress extra that brings it; `None` if it is installed by itself.
    """

    def __init__(self, feature: str, *, package: str, extra: str | None = None):
        wanted = package if extra is None else f"'jaxcompress[{extra}]'"
        super().__init__(
            f"{feature} needs `{package}`, which is not installed. "
            f"Install it with: pip install {wanted}"
        )


@contextlib.contextmanager
def explain_missing(feature: str, *, package: str, extra: str | None = None) -> Iterator[None]:
    """Say what an import is for, and how to install what it misses.

    Args:
        feature: What needs the import, in words.
        package: The package, as it is installed.
        extra: The jaxcompress extra that brings it; `None` if it is installed by itself.

    Yields:
        Nothing; the body imports.

    Raises:
        MissingExtraError: If the body finds no module of some name.

    Example:
        >>> with explain_missing("Plotting", package="matplotlib", extra="report"):
        ...     import matplotlib_that_is_not_there
        Traceback (most recent call last):
        jaxcompress.errors.MissingExtraError: Plotting needs `matplotlib`, which is not installed...
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(feature, package=package, extra=extra) from error
