"""Targets: the accelerators that a cost can be asked for, with their published peak figures."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcompress.errors import ArgumentError, ArgumentTypeError, require_one_of
from jaxcompress.graph.cost import _aot_devices
from jaxcompress.tree import bits_of

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Target:
    """A machine to compile for, which need not be attached, and its published peak figures.

    Build your own and pass it as `target=`; `Target.named` gives the ones that come along.

    Attributes:
        name: What the reports call it.
        platform: The compiler: `"cpu"`, `"tpu"` or `"cuda"`.
        topology: The compiler's own name of the machine: `"v5e:2x2"` is four TPU chips. Any text
            on CUDA; unused on the CPU.
        options: More for `jax.experimental.topologies.get_topology_desc`: a CUDA card's
            `target_config` (see `cuda_options`).
        rates: Peak operations per second of one device, a multiply-add counting two, by the dtype
            that is multiplied: `"bfloat16"`, `"float32"`, `"int8"`, `"float8"`, `"float64"`.
        bandwidth: Peak bytes per second between one device and its memory.
        memory: Bytes of one device's memory.
        source: Where these figures were published, and under which assumptions.

    Example:
        >>> Target.named("tpu-v5e").rate("int8") / 1e12
        393.0
        >>> slow = Target(name="one core", platform="cpu", bandwidth=1e10, rates={"float32": 5e10})
        >>> slow.rate("float16") is None
        True
    """

    name: str
    platform: Literal["cpu", "tpu", "cuda"]
    topology: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)
    rates: Mapping[str, float] = field(default_factory=dict, hash=False)
    bandwidth: float | None = None
    memory: int | None = None
    source: str = ""

    def __post_init__(self) -> None:
        fix = "These are the compilers that can be reached ahead of time."
        require_one_of("platform", self.platform, ("cpu", "tpu", "cuda"), fix=fix)

    @staticmethod
    def named(name: str) -> "Target":
        """Look a target up.

        Args:
            name: `"cpu"`, `"tpu-v4"`, `"tpu-v5e"`, `"tpu-v5p"`, `"tpu-v6e"`, `"a100"`, `"h100"`
                or `"h200"`: one device. A TPU slice has its topology behind a colon, with or
                without `tpu-`: `"tpu-v5e:4x4"`, `"v5p:4x4x8"`.

        Returns:
            The target.

        Raises:
            ArgumentError: If there is no such target.

        Example:
            >>> Target.named("v6e:2x4").topology
            'v6e:2x4'
        """
        base, colon, shape = name.removeprefix("tpu-").partition(":")
        for key in (f"tpu-{base}", base):
            known = TARGETS.get(key)
            if known is not None and (not colon or known.platform == "tpu"):
                if not colon:
                    return known
                return replace(known, name=f"{known.name}:{shape}", topology=f"{base}:{shape}")
        raise ArgumentError(
            "target",
            got=repr(name),
            expected=f"one of {', '.join(TARGETS)}, or a TPU topology such as 'tpu-v5e:4x4'",
            fix="Describe another machine with graph.Target(...).",
        )

    def devices(self) -> tuple[Any, ...]:
        """List the devices to compile for; they hold no data and run nothing (but the CPU's).

        Returns:
            JAX devices, for meshes and shardings.

        Raises:
            MissingExtraError: If the compiler's plugin is not installed.
            ArgumentError: If the compiler knows no such topology.
        """
        if self.platform == "cpu":
            return tuple(jax.devices("cpu"))
        return _aot_devices.devices(self.platform, self.topology, self.options, self.name)

    def mesh(self, shape: Sequence[int], names: Sequence[str]) -> Mesh:
        """Lay the target's devices out as a mesh, to say how arguments are sharded.

        Args:
            shape: Devices along each axis, such as `(4, 4)`.
            names: The axes' names, such as `("data", "model")`.

        Returns:
            A mesh with automatic axes. Give abstract arrays a `NamedSharding` on it and pass them
            to `cost` with this target; arguments without one are then replicated.

        Raises:
            ArgumentError: If the shape needs more devices than the target has.

        Example:
            >>> mesh = Target.named("cpu").mesh((1,), ("data",))
            >>> mesh.shape["data"]
            1
        """
        devices, needed = self.devices(), math.prod(shape)
        if needed > len(devices):
            raise ArgumentError(
                "shape",
                got=f"{tuple(shape)}: {needed} devices",
                expected=f"at most the {len(devices)} of {self.name}",
                fix="Name a larger topology, such as 'tpu-v5e:4x4'.",
            )
        return Mesh(np.array(devices[:needed]).reshape(tuple(shape)), tuple(names))

    def rate(self, dtype: Any) -> float | None:
        """Give the published peak at which numbers of this dtype are multiplied.

        A dtype without a rate of its own takes that of the next one the hardware would convert it
        to: int4 to int8, float8 and float16 and int8 to bfloat16.

        Args:
            dtype: What both operands are converted to before they are multiplied.

        Returns:
            Operations per second, or `None` if nothing suitable was published.
        """
        name: str | None = _rate_name(dtype)
        while name is not None and name not in self.rates:
            name = _WIDER.get(name)
        return None if name is None else self.rates[name]


_WIDER = {"float8": "bfloat16", "float16": "bfloat16", "int8": "bfloat16"}


def _rate_name(dtype: Any) -> str:
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer) and bits_of(dtype) <= 8:
        return "int8"
    if jnp.issubdtype(dtype, jnp.floating) and bits_of(dtype) <= 8:
        return "float8"
    return dtype.name


def resolve(target: "Target | str") -> Target:
    """Take a target, or the name of one."""
    if isinstance(target, Target):
        return target
    if isinstance(target, str):
        return Target.named(target)
    raise ArgumentTypeError(
        "target",
        got=type(target).__name__,
        expected="a name such as 'tpu-v5e', or a graph.Target",
        fix="Leave it out to count from the jaxpr alone.",
    )


def cuda_options(
    *,
    capability: tuple[int, int],
    cores: int,
    fpus_per_core: int,
    clock_ghz: float,
    bandwidth: float,
    l2_bytes: int,
    memory: int,
    shared_per_core: int,
    shared_per_block: int,
    description: str,
) -> dict[str, str]:
    """Describe a CUDA card to XLA: its `GpuTargetConfigProto`, as text.

    Args:
        capability: Compute capability, `(9, 0)` for Hopper.
        cores: Streaming multiprocessors.
        fpus_per_core: float32 units in each.
        clock_ghz: Boost clock in GHz.
        bandwidth: Memory bandwidth in bytes per second.
        l2_bytes: Bytes of second-level cache.
        memory: Bytes of device memory.
        shared_per_core: Bytes of shared memory in a multiprocessor.
        shared_per_block: Bytes of it that one block may opt in to.
        description: The card's name as its driver gives it.

    Returns:
        `Target.options` for one such card.
    """
    limit = 2**16
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": shared_per_core,
        "threads_per_core_limit": 2048,
        "core_count": cores,
        "fpus_per_core": fpus_per_core,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": limit - 1,
        "block_dim_limit_z": limit - 1,
        "memory_bandwidth": int(bandwidth),
        "l2_cache_size": l2_bytes,
        "clock_rate_ghz": clock_ghz,
        "device_memory_size": memory,
        "shared_memory_per_block_optin": shared_per_block,
        "registers_per_core_limit": limit,
        "registers_per_block_limit": limit,
    }
    lines = [f"  {key}: {value}" for key, value in fields.items()]
    major, minor = capability
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    # The library versions that JAX 0.10's CUDA 12 wheels bring.
    text = "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 patch: 0 }",
            "runtime_version { major: 12 minor: 9 patch: 0 }",
            f'device_description_str: "{description}"',
        ]
    )
    return {"topology": "1x1x1", "target_config": text}


def _tpu(name: str, topology: str, **figures: Any) -> Target:
    bf16 = figures.pop("bfloat16")
    int8 = figures.pop("int8", None)
    # JAX multiplies float32 in one bfloat16 pass unless a higher precision is asked for.
    rates = {"bfloat16": bf16, "float32": bf16} | ({"int8": int8} if int8 else {})
    page = name.removeprefix("tpu-")
    source = (
        f"Google Cloud TPU documentation, 'TPU {page}', key chip specifications (peak per chip); "
        "float32 at the bfloat16 peak, as JAX's default precision computes it"
    )
    return Target(
        name=name, platform="tpu", topology=topology, rates=rates, source=source, **figures
    )


def _cuda(
    name: str,
    *,
    rates: Mapping[str, float],
    memory: int,
    bandwidth: float,
    sheet: str,
    **machine: Any,
) -> Target:
    """Describe a card by its `machine`, as `cuda_options` takes it, and its data sheet."""
    return Target(
        name=name,
        platform="cuda",
        topology=name,
        options=cuda_options(memory=memory, bandwidth=bandwidth, **machine),
        rates=rates,
        bandwidth=bandwidth,
        memory=memory,
        source=f"NVIDIA {name.upper()} Tensor Core GPU data sheet, {sheet}; float32 at the TF32 "
        "rate, as JAX's default precision computes it",
    )


_hopper = functools.partial(
    _cuda,
    capability=(9, 0),
    cores=132,
    fpus_per_core=128,
    clock_ghz=1.98,
    l2_bytes=50 * 2**20,
    shared_per_core=228 * 1024,
    shared_per_block=227 * 1024,
    rates={
        "bfloat16": 989.5e12,
        "float32": 494.7e12,
        "float64": 67e12,
        "int8": 1979e12,
        "float8": 1979e12,
    },
    sheet="SXM, dense rates (half of the 'with sparsity' ones)",
)

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(name="cpu", platform="cpu", source="no peak figures: they differ by machine"),
        # A megacore joins the two cores of a v4 chip to one device.
        _tpu(
            "tpu-v4",
            "v4:1x1x1",
            options={"chip_config_name": "megacore"},
            bfloat16=275e12,
            int8=275e12,
            bandwidth=1.228e12,
            memory=32 * GIB,
        ),
        _tpu("tpu-v5e", "v5e:1x1", bfloat16=197e12, int8=393e12, bandwidth=819e9, memory=16 * GIB),
        _tpu(
            "tpu-v5p",
            "v5p:1x1x1",
            bfloat16=459e12,
            int8=918e12,
            bandwidth=2.765e12,
            memory=95 * GIB,
        ),
        _tpu(
            "tpu-v6e", "v6e:1x1", bfloat16=918e12, int8=1836e12, bandwidth=1.64e12, memory=32 * GIB
        ),
        _cuda(
            "a100",
            capability=(8, 0),
            cores=108,
            fpus_per_core=64,
            clock_ghz=1.41,
            bandwidth=2.039e12,
            l2_bytes=40 * 2**20,
            memory=80 * GIB,
            shared_per_core=164 * 1024,
            shared_per_block=163 * 1024,
            description="NVIDIA A100-SXM4-80GB",
            rates={"bfloat16": 312e12, "float32": 156e12, "float64": 19.5e12, "int8": 624e12},
            sheet="80GB SXM, dense rates",
        ),
        _hopper("h100", memory=80 * GIB, bandwidth=3.35e12, description="NVIDIA H100 80GB HBM3"),
        _hopper("h200", memory=141 * 10**9, bandwidth=4.8e12, description="NVIDIA H200"),
    )
}
"""The targets that come along, one device each, by name."""
