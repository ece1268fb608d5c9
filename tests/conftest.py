"""How the tests run: eight CPU devices, quick compilation, the same examples each time.

Nearly all of the suite's time goes into compiling programs that run once. So XLA optimises little,
and keeps in `.pytest_cache` what took 30 ms or more, for the other worker and for the next run.
`JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` compiles as users do.
"""

import importlib.metadata
import os
import pathlib

import hypothesis
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def set_up_compilation() -> None:
    """Set what JAX and XLA read when JAX is imported, here and in programs that tests start."""
    flags = ["--xla_force_host_platform_device_count=8"]
    if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0":
        flags.append("--xla_cpu_parallel_codegen_split_count=1")
        if importlib.metadata.version("jax").startswith("0.10."):  # newer ones have one emitter
            flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "programs"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.03")


set_up_compilation()

hypothesis.settings.register_profile(
    "jaxcompress", deadline=None, derandomize=True, max_examples=25, database=None
)
hypothesis.settings.load_profile("jaxcompress")


@pytest.fixture
def strict_promotion():
    """Run under strict dtype promotion, as all of our own numerics must."""
    import jax  # not before the settings above

    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data and pretrained networks; the test is skipped where it is absent."""
    default = ROOT.parent / "shared" / "data"
    folder = pathlib.Path(os.environ.get("JAXCOMPRESS_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set JAXCOMPRESS_DATA")
    return folder
