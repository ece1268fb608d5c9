"""The `jaxcompress` command."""

import sys

import tyro

from jaxcompress.cli._commands import Command, Demo, Inspect
from jaxcompress.errors import JaxCompressError


def main(args: list[str] | None = None) -> int:
    """Run the `jaxcompress` command; errors that a user can mend are printed without a trace.

    Args:
        args: Command-line arguments; `sys.argv` if `None`.

    Returns:
        The exit status: 0, or 1 after an error.
    """
    command = tyro.cli(Command, prog="jaxcompress", args=args)  # pyright: ignore[reportArgumentType, reportCallIssue]
    try:
        _run_command(command)
    except (JaxCompressError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run_command(command: Demo | Inspect) -> None:
    """Load what the command needs, and no more."""
    if isinstance(command, Demo):
        from jaxcompress.cli import _demo

        _demo.run_demo(command)
    else:
        from jaxcompress.cli import _inspect

        _inspect.inspect_file(command)
