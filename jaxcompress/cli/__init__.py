"""The `jaxcompress` command: `jaxcompress demo`, `jaxcompress inspect FILE`."""

from jaxcompress.cli._main import main as main
