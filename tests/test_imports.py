"""What is loaded when: modules that a program does not use are not imported, nor needed."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

import jaxcompress
from jaxcompress import export, numerics

HEAVY = {
    "chex",
    "dm_pix",
    "equinox",
    "flax",
    "jinja2",
    "matplotlib",
    "optax",
    "orbax",
    "safetensors",
    "sklearn",
    "tensorstore",
    "torch",
    "treescope",
}
CORE = (
    "adapters budget distill errors export graph linalg lowrank numerics quantize sparsity stats "
    "structured tree"
)


def run(code, *arguments):
    """Run code in a fresh process; give what it prints last, as JSON."""
    root = str(pathlib.Path(jaxcompress.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loaded_by(code, *arguments):
    """List the modules that code loads in a fresh process, whole names and first parts."""
    ending = "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    names = run(code + ending, *arguments)
    return set(names) | {name.split(".")[0] for name in names}


def test_importing_the_package_loads_nothing_else():
    loaded = loaded_by("import jaxcompress")
    assert not loaded & (HEAVY | {"jax", "numpy", "rich", "tyro"})
    ours = {name for name in loaded if name.startswith("jaxcompress")}
    assert ours == {"jaxcompress", "jaxcompress.lazy"}


def test_a_part_loads_on_first_use_and_is_the_same_whichever_way():
    code = """
import jaxcompress, sys
assert "graph" in dir(jaxcompress) and "jaxcompress.graph" not in sys.modules
graph = jaxcompress.graph
assert graph is sys.modules["jaxcompress.graph"] is vars(jaxcompress)["graph"]
import jaxcompress.sparsity
from jaxcompress import sparsity
from jaxcompress.sparsity import sparsify
assert sparsity is jaxcompress.sparsity and sparsity.sparsify is sparsify
"""
    loaded = loaded_by(code)
    assert "jaxcompress.structured" not in loaded and "optax" in loaded


def test_the_core_loads_neither_flax_nor_orbax_nor_optax():
    loaded = loaded_by(f"from jaxcompress import {', '.join(CORE.split())}")
    assert not loaded & (HEAVY | {"rich", "tyro"})
    assert "jaxcompress.structured.module" not in loaded


def test_training_loads_neither_flax_nor_orbax_nor_dm_pix():
    loaded = loaded_by("from jaxcompress import report, train")
    assert loaded & HEAVY <= {"optax", "chex"} and "optax" in loaded


@pytest.fixture
def packed(tmp_path):
    kernel = jnp.linspace(-1, 1, 64).reshape(8, 8)
    params = {"kernel": numerics.quantize(kernel, numerics.Format(numerics.int4)), "b": kernel[0]}
    return export.save(tmp_path / "model.safetensors", params).path


def test_inspect_loads_what_reads_and_prints_a_file(packed):
    loaded = loaded_by(
        "import sys; from jaxcompress.cli import main; assert main(['inspect', sys.argv[1]]) == 0",
        packed,
    )
    assert not loaded & HEAVY
    ours = {name.split(".")[1] for name in loaded if name.startswith("jaxcompress.")}
    assert ours == {
        "cli",
        "errors",
        "export",
        "files",
        "lazy",
        "numerics",
        "report",
        "text",
        "tree",
    }


def test_help_loads_no_jax():
    code = """
from jaxcompress.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
"""
    assert not loaded_by(code) & (HEAVY | {"jax", "numpy"})


# --- Without Flax, orbax and dm-pix -------------------------------------------------------------

HIDE = """
import importlib.abc, json, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"flax", "orbax", "dm_pix"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
"""


def test_the_core_works_without_them(tmp_path):
    program = (pathlib.Path(__file__).parent / "core_program.py").read_text()
    assert run(HIDE + program, tmp_path / "model.safetensors") == []


NEEDS = [
    ("from jaxcompress import adapters; adapters.from_nnx", "Flax modules", "flax"),
    ("from jaxcompress.adapters import from_linen", "Flax modules", "flax"),
    ("from jaxcompress import structured; structured.to_module", "`structured.to_m", "flax"),
    ("from jaxcompress.cli import main; main(['demo'])", "The demo", "flax"),
    (
        "import jax, jax.numpy as jnp; from jaxcompress import train; "
        "train.augment.pad_crop_flip(jax.random.key(0), jnp.ones((1, 2, 2, 3)))",
        "Augmentation",
        "dm-pix",
    ),
    (
        "from jaxcompress import train; train.restore('x', like=None)",
        "Saving and restoring checkpoints",
        "orbax-checkpoint",
    ),
]


@pytest.fixture(scope="module")
def messages():
    """What each line of `NEEDS` raises, or prints as its error, in one process without them."""
    program = """
import contextlib, io
from jaxcompress.errors import MissingExtraError

def message_of(code):
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            exec(code, {})
    except MissingExtraError as error:
        return str(error)
    return errors.getvalue()

print(json.dumps([message_of(code) for code in json.loads(sys.argv[1])]))
"""
    return run(HIDE + program, json.dumps([code for code, *_ in NEEDS]))


@pytest.mark.parametrize("index", range(len(NEEDS)), ids=[need[0] for need in NEEDS])
def test_what_needs_them_says_how_to_install_them(messages, index):
    _, feature, package = NEEDS[index]
    assert feature in messages[index]
    assert f"Install it with: pip install {package}" in messages[index]
