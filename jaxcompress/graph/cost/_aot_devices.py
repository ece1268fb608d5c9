"""Devices of machines that are not attached, from the compilers in JAX's plugins.

The plugins are loaded into this process rather than a child: shardings need the devices here, and
JAX's own caches then make a second compile cheap. What makes that safe was tried out: libtpu and
the CUDA plugin load before or after JAX's backend has started, beside it, for several topologies,
and in several processes at once, given the environment below at the moment they load.
"""

import glob
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import topologies

from jaxcompress.errors import ArgumentError, MissingExtraError

_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to wait for
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling takes no chip, so needs no lock file
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # what a metadata server would say; compiles for all
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
}
# The plugin would refuse to load on a machine without a driver.
_CUDA_ENVIRONMENT = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
_CUDA_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")

_devices: dict[Any, tuple[Any, ...]] = {}
_lock = threading.RLock()


def devices(platform: str, topology: str, options: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    """Give the devices of a topology, the same objects each time.

    Args:
        platform: `"tpu"` or `"cuda"`.
        topology: The compiler's name of the machine.
        options: More for `get_topology_desc`.
        name: The target's name, for messages.

    Returns:
        Devices to compile for.

    Raises:
        MissingExtraError: If the plugin is not installed.
        ArgumentError: If the compiler knows no such topology.
    """
    key = (platform, topology, tuple(sorted(options.items())))
    with _lock:
        if key not in _devices:
            load = _load_tpu if platform == "tpu" else _load_cuda
            try:
                _devices[key] = tuple(load(topology, options, name))
            except jax.errors.JaxRuntimeError as error:
                raise ArgumentError(
                    "target",
                    got=f"topology {topology!r} ({_first_line(error)})",
                    expected=f"a topology that the {platform} compiler knows",
                    fix="TPU slices read 'v5e:2x4' (two numbers) and 'v5p:2x2x1' (three).",
                ) from error
        return _devices[key]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:160]


def _load_tpu(topology: str, options: Mapping[str, Any], name: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise MissingExtraError(f"Compiling for {name}", package="libtpu", extra="tpu")
    environment = _TPU_ENVIRONMENT
    if _has_tpu():  # then JAX sets libtpu up for the chips here, and first
        jax.devices()
        environment = {}
    if set(topology.partition(":")[2].split("x")) == {"1"}:
        # One chip is less than what some versions of libtpu take for a host.
        options = {"chips_per_host_bounds": [1, 1, 1], **options}
    with _defaults(environment):
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices


def _has_tpu() -> bool:
    vendors = (_read_text(path) for path in glob.glob("/sys/bus/pci/devices/*/vendor"))
    google = any(vendor.strip() == "0x1ae0" for vendor in vendors)
    return google and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _read_text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _load_cuda(topology: str, options: Mapping[str, Any], name: str) -> list[Any]:
    plugins = [plugin for plugin in _CUDA_PLUGINS if _is_installed(plugin)]
    if not plugins:
        raise MissingExtraError(
            f"Compiling for {name}", package="jax-cuda12-plugin", extra="cuda12"
        )

    def load() -> list[Any]:
        return topologies.get_topology_desc(topology, platform="cuda", **options).devices

    with _defaults(_CUDA_ENVIRONMENT):
        try:
            return load()
        except NotImplementedError:
            # JAX started without a driver and has dropped the plugin: register it by hand.
            importlib.import_module(plugins[0]).initialize()
            return load()


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def _defaults(environment: Mapping[str, str]) -> Iterator[None]:
    """Set what is not set, and take it back: child processes shall not inherit it."""
    added = {key: value for key, value in environment.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
