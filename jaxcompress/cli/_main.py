"""The `jaxcompress` command."""

import sys
from typing import Annotated

import tyro

from jaxcompress.cli import _demo, _inspect
from jaxcompress.cli._demo import Demo
from jaxcompress.cli._inspect import Inspect
from jaxcompress.errors import JaxCompressError

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def main(args: list[str] | None = None) -> int:
    """Run the `jaxcompress` command; errors that a user can mend are printed without a trace.

    Args:
        args: Command-line arguments; `sys.argv` if `None`.

    Returns:
        The exit status: 0, or 1 after an error.
    """
    command = tyro.cli(Command, prog="jaxcompress", args=args)  # pyright: ignore[reportArgumentType, reportCallIssue]
    try:
        _demo.run(command) if isinstance(command, Demo) else _inspect.run(command)
    except (JaxCompressError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
