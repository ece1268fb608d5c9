"""Kill `fit` with SIGKILL at random moments, resume, and compare with an uninterrupted run.

    python tests/train/sigkill.py --trials 10

Each trial trains a small network (pruned by `sparsify`, fake-quantized, with noise from the run's
key, early-stopping bookkeeping, checkpoints and a log) in a process that is killed one to three
times; what the last process ends with must equal the uninterrupted run bit for bit: params,
optimizer state, masks, counters, random key and log. Exits with 1 if a trial differs.
"""

import argparse
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

STEPS, STEPS_PER_EPOCH, SECONDS_PER_STEP = 40, 4, 0.02


class SlowBatches:
    """Batches that take a while, so that there is something to interrupt."""

    def __init__(self, batches, seconds):
        self.batches, self.seconds = batches, seconds
        self.steps_per_epoch = batches.steps_per_epoch

    def __getitem__(self, i):
        time.sleep(self.seconds)
        return self.batches[i]


def train_once(folder: pathlib.Path) -> None:
    """Train to the end, from the checkpoints in the folder if there are any."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxcompress import quantize, sparsity, train, tree

    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    arrays = {"x": x, "y": np.sin(x[:, :4])}
    params = {
        "first": {"kernel": jnp.asarray(rng.normal(size=(8, 16)) / 3, jnp.float32)},
        "second": {"kernel": jnp.asarray(rng.normal(size=(16, 4)) / 4, jnp.float32)},
        "batch_stats": {"mean": jnp.zeros(16)},
    }

    def loss(params, batch, key):
        quantized = quantize.fake_quant(params, quantize.presets.int8_weights)
        hidden = jnp.tanh(batch["x"] @ quantized["first"]["kernel"])
        hidden = hidden * jax.random.bernoulli(key, 0.9, hidden.shape)
        error = hidden @ quantized["second"]["kernel"] - batch["y"]
        mean = 0.9 * params["batch_stats"]["mean"] + 0.1 * hidden.mean(0)
        return jnp.mean(error**2, axis=1), train.Aux(state={"batch_stats": {"mean": mean}})

    def evaluate(params, batch):
        return {"loss": loss(params, batch, jax.random.key(0))[0]}

    inner = train.optimizer("adamw", learning_rate=optax.cosine_decay_schedule(1e-2, STEPS))
    schedule = sparsity.schedules.cubic(0.8, end=STEPS // 2)
    tx = sparsity.sparsify(inner, schedule=schedule, every=3)
    batches = train.Batches(arrays, batch_size=16, seed=3)
    state, rows = train.fit(
        train.init(params, tx, key=jax.random.key(1)),
        train.make_step(loss, tx),
        SlowBatches(batches, SECONDS_PER_STEP),
        steps=STEPS,
        validation=batches,
        evaluate=evaluate,
        early_stopping=train.EarlyStopping(patience=STEPS, restore_best=False),
        checkpoints=train.Checkpoints(directory=folder / "checkpoints", every=3, keep=2),
        log=folder / "log.csv",
        callbacks=[lambda state, row: print(row["step"], flush=True)],
    )
    final = {path: np.asarray(leaf) for path, leaf in tree.items(state._replace(key=None))}
    final["key"] = np.asarray(jax.random.key_data(state.key))
    kept = np.mean(np.asarray(sparsity.get_mask(state.opt_state)["first"]["kernel"]))
    assert abs(kept - 0.2) < 0.01, f"the mask keeps {kept}"
    np.savez(folder / "final.npz", **final)
    (folder / "rows.json").write_text(json.dumps(rows))


def start(folder: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--worker", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def run_to_the_end(folder: pathlib.Path) -> None:
    """Train, or go on training, without interruption."""
    process = start(folder)
    process.communicate()
    assert process.returncode == 0, "training failed"


def run_with_kills(folder: pathlib.Path, kills: int, rng: random.Random) -> list[int]:
    """Train in processes that are killed at random moments; the last steps they reported."""
    moments = []
    # Late enough to have trained, early enough not to have finished before the signal arrives.
    for step in sorted(rng.sample(range(1, STEPS - 2 * STEPS_PER_EPOCH), kills)):
        process = start(folder)
        reported = next(int(line) for line in process.stdout if int(line) >= step)
        time.sleep(rng.uniform(0, STEPS_PER_EPOCH * SECONDS_PER_STEP))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"exit status {process.returncode}"
        moments.append(reported)
    run_to_the_end(folder)
    return moments


def differences(a: pathlib.Path, b: pathlib.Path) -> list[str]:
    """Name what two finished runs do not have in common, bit for bit."""
    import numpy as np

    x, y = np.load(a / "final.npz"), np.load(b / "final.npz")
    different = sorted(set(x.files) ^ set(y.files))
    for name in set(x.files) & set(y.files):
        if x[name].tobytes() != y[name].tobytes() or x[name].dtype != y[name].dtype:
            different.append(name)
    for name in ("log.csv", "rows.json"):
        if (a / name).read_bytes() != (b / name).read_bytes():
            different.append(name)
    return different


def main(trials: int, kills: int, seed: int) -> int:
    rng, failures = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = pathlib.Path(scratch) / "whole"
        whole.mkdir()
        run_to_the_end(whole)
        for trial in range(trials):
            folder = pathlib.Path(scratch) / f"trial{trial}"
            folder.mkdir()
            moments = run_with_kills(folder, rng.randint(1, kills), rng)
            different = differences(whole, folder)
            failures += bool(different)
            verdict = f"differs in {', '.join(different)}" if different else "bit for bit equal"
            print(f"trial {trial}: killed after steps {moments}, {verdict}", flush=True)
    print(f"{trials - failures} of {trials} trials equal the uninterrupted run")
    return int(failures > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--kills", type=int, default=3, help="at most, per trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        train_once(arguments.worker)
    else:
        sys.exit(main(arguments.trials, arguments.kills, arguments.seed))
