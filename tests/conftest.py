"""Eight CPU devices for the sharding tests, deterministic property tests, strict promotion."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import pathlib

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "jaxcompress", deadline=None, derandomize=True, max_examples=25, database=None
)
hypothesis.settings.load_profile("jaxcompress")


@pytest.fixture
def strict_promotion():
    """Run under strict dtype promotion, as all of our own numerics must."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data and pretrained networks; the test is skipped where it is absent."""
    default = pathlib.Path(__file__).parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("JAXCOMPRESS_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set JAXCOMPRESS_DATA")
    return folder
