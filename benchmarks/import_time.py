"""How long do `import jaxcompress` and `jaxcompress inspect FILE` take, over `import jax`?

Every figure is of fresh processes that have their bytecode already: the cases run in turns, and
each ratio is to the `import jax` of the same turn. To reach: 1.4 for `import jaxcompress`, 2 for
`inspect` of a small file. Each part is paid for when it is first used, so programs that use the
core (all but `train`, which loads optax, and `report`, which loads rich) and every part are timed
as well.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

import jaxcompress
from jaxcompress import export, numerics

INSPECT = "import sys; from jaxcompress.cli import main; sys.exit(main(sys.argv[1:]))"
CORE = "distill, export, graph, lowrank, numerics, quantize, sparsity, stats, structured, tree"


def write_model(folder):
    kernel = jnp.linspace(-1.0, 1.0, 64 * 64).reshape(64, 64)
    params = {"kernel": numerics.quantize(kernel, numerics.Format(numerics.int4)), "b": kernel[0]}
    return export.save(folder / "model.safetensors", params).path


def seconds(command, environment):
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()

    # The processes import the package that this one does, wherever they run.
    here = str(pathlib.Path(jaxcompress.__file__).parents[1])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
        environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": f"{folder}/bytecode"}
        file = write_model(pathlib.Path(folder))
        cases = {
            "import jax": ["import jax"],
            "import jaxcompress": ["import jaxcompress"],
            "import jax, jaxcompress": ["import jax, jaxcompress"],
            "the core": [f"from jaxcompress import {CORE}"],
            "every part": [f"from jaxcompress import {CORE}, report, train"],
            "inspect": [INSPECT, "inspect", str(file)],
        }
        times = {name: [] for name in cases}
        for repeat in range(arguments.repeats + 1):
            for name, case in cases.items():
                took = seconds([sys.executable, "-c", *case], environment)
                if repeat:  # the first turn writes bytecode
                    times[name].append(took)
    ratios = {
        name: statistics.median(t / base for t, base in zip(ts, times["import jax"], strict=True))
        for name, ts in times.items()
    }
    result = {
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "seconds": {name: round(statistics.median(ts), 3) for name, ts in times.items()},
        "over_import_jax": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "targets": {"import jaxcompress": 1.4, "inspect": 2},
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
