"""A ResNet-20 at 2.1 times fewer multiply-adds: is ours nearer to the dense one than theirs?

    python -m venv peer && peer/bin/pip install torch torch-pruning
    python benchmarks/shrink_vs_torch_pruning.py --peer peer/bin/python [--epochs 8] [--json PATH]

The pretrained network of data/README, shrunk by us and, in PyTorch, by Torch-Pruning, then
distilled from the dense network: the same augmented images with the same targets in the same order,
the same loss (KL at temperature 4), steps and optimizer (SGD with Nesterov momentum, cosine from
0.02, gradients clipped at 5), 3 seeds of the order. Each side first tries its criteria by a short
distillation and takes the one that is nearest to the dense network on augmented training images
held back; test images are read once, at the end.

Torch-Pruning takes the zero-padded shortcuts of this network for elementwise and removes channels
that are not connected (`without_hints`: asked to remove channels that are zero throughout, it
changes the outputs). So its criteria are also tried with the hint to leave the residual stream
alone. Ours needs no hints.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from cifar import TEMPERATURE, data_folder, load_network, normalise

from jaxcompress import distill, structured, train
from jaxcompress.train import augment, metrics

HELD = 500  # training images at the end: no criterion sees them, but for the choice between
METHODS = {
    "magnitude": structured.Magnitude(),
    "FPGM": structured.FPGM(),
}
RESIDUAL = (0.8, 0.9, 1.0)  # the least of the residual stream's channels to keep


def prepare(data, network, settings):
    """Draw the images, have the dense network answer, and take all that the peer needs."""
    arrays = np.load(data / "cifar10.npz")
    pixels, cut = arrays["x_train"], len(arrays["x_train"]) - HELD
    predict = jax.jit(lambda x: network.forward(network.params, normalise(x)))
    answer = lambda x: np.concatenate([predict(part) for part in np.split(x, len(x) // 250)])
    draw = lambda seed, x: np.asarray(augment.pad_crop_flip(jax.random.key(seed), x))
    pool = np.concatenate([draw(epoch, pixels) for epoch in range(settings["epochs"])])
    held = draw(1000, pixels[cut:])
    return {
        "settings": json.dumps(settings),
        "pool": pool,
        "teacher": answer(pool),
        "calibration": draw(1001, pixels[:1000]),
        "calibration_labels": arrays["y_train"][:1000].astype(np.int64),
        "held": held,
        "held_teacher": answer(held),
        "test": arrays["x_test"],
        "test_teacher": answer(arrays["x_test"]),
        "test_labels": arrays["y_test"],
        **{f"model/{k}": v for k, v in load_file(data / "resnet20_cifar10.safetensors").items()},
    }


class Ours:
    """Chooses, shrinks, trains and predicts."""

    def __init__(self, network, work, settings):
        self.network, self.work, self.settings = network, work, settings
        self.groups = structured.groups(network.forward, network.params, jnp.zeros((1, 32, 32, 3)))
        self.budget = structured.Flops(1 / settings["ratio"])
        self.compiled = {}

    def fit(self, fn, params, *, steps, seed, mask=None):
        """Distil on the pool in the order of the seed; zeros of a mask stay so."""
        settings, work = self.settings, self.work
        size = settings["batch"]
        order = np.random.default_rng(seed).permutation(len(work["pool"]))

        def loss(params, batch, key):
            logits, updates = fn(params, normalise(batch["pixels"].astype(jnp.float32)))
            return (
                distill.kl(logits, batch["teacher"], temperature=TEMPERATURE),
                train.Aux(state=updates),
            )

        schedule = optax.cosine_decay_schedule(settings["learning_rate"], steps)
        tx = train.optimizer("nesterov", learning_rate=schedule, clip_norm=settings["clip_norm"])
        if (fn, steps) not in self.compiled:
            self.compiled[fn, steps] = train.make_step(loss, tx)
        step, state = self.compiled[fn, steps], train.init(params, tx, key=jax.random.key(seed))
        for i in range(steps):
            batch = order[i * size : (i + 1) * size]
            batch = {"pixels": work["pool"][batch], "teacher": work["teacher"][batch]}
            state, _ = step(state, batch)
            if mask is not None:
                state = state._replace(params=_product(state.params, mask))
        return state.params

    def choose(self):
        """Take the criterion with the least distance, after a short trial, held back.

        Trials run at full size with removed channels set to zero, which BatchNorm's bias included
        is the same function (the certificate says so) and needs one compilation for all of them.
        """
        rows, keeps = [], []
        dense, seen = self.network, self.seen()
        ones = jax.tree.map(jnp.ones_like, dense.params)
        distance = jax.jit(
            lambda params, x, teacher: distill.kl(
                dense.forward(params, x), teacher, temperature=TEMPERATURE
            ).mean()
        )
        held = normalise(jnp.asarray(self.work["held"]))
        for name, method in METHODS.items():
            scores = structured.importance(self.groups, dense.params, method=method)
            for least in RESIDUAL:
                keep = structured.choose(
                    self.groups,
                    scores,
                    budget=self.budget,
                    scope="isomorphic",
                    bounds={"residual": (least, 1.0)},
                )
                mask = structured.mask_params(ones, keep)
                start = structured.mask_params(dense.params, keep)
                steps = self.settings["trial"]
                params = self.fit(dense.forward_train, start, steps=steps, seed=0, mask=mask)
                params = structured.reestimate(dense.forward_train, params, seen)
                found = float(distance(params, held, self.work["held_teacher"]))
                rows.append({"criterion": name, "residual": least, "distance": round(found, 3)})
                keeps.append(keep)
                print("ours", rows[-1], flush=True)
        best = int(np.argmin([row["distance"] for row in rows]))
        return rows, rows[best], keeps[best]

    def seen(self):
        """Give the calibration images, which are augmented already."""
        x = self.work["calibration"]
        return [normalise(jnp.asarray(part)) for part in np.split(x, len(x) // 250)]

    def run(self):
        """Give the report and the test logits of each seed."""
        rows, best, keep = self.choose()
        dense = self.network
        small, fewer, certificate = structured.shrink(
            dense.forward, dense.params, keep, self.seen()[0][:8]
        )
        small_train, predict = structured.rebuild(dense.forward_train, keep), jax.jit(small)
        test = normalise(jnp.asarray(self.work["test"]))
        runs, logits = [], {}
        for seed in self.settings["seeds"]:
            start = time.perf_counter()
            params = self.fit(small_train, fewer, steps=self.settings["steps"], seed=seed)
            seconds = time.perf_counter() - start
            logits[f"seed{seed}"] = np.asarray(predict(params, test))
            runs.append({"seconds": round(seconds, 1)})
            print("ours", runs[-1], flush=True)
        return {
            "tried": rows,
            "chosen": best,
            "certificate": str(certificate).splitlines(),
            "macs": round(certificate.before.flops / certificate.after.flops, 3),
            "widths": {n: len(keep[n]) if n in keep else g.size for n, g in self.groups.items()},
            "runs": runs,
        }, logits


@jax.jit
def _product(params, mask):
    return jax.tree.map(jnp.multiply, params, mask)


@contextlib.contextmanager
def peer(python, work):
    """Run Torch-Pruning's side in its interpreter meanwhile; yields what waits for the result."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(pathlib.Path(folder) / name) for name in ("work.npz", "result.npz")]
        np.savez(paths[0], **work)
        script = pathlib.Path(__file__).with_name("torch_pruning_resnet.py")
        # Threads that spin while they wait would take the cores from our side, and the reverse.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        process = subprocess.Popen([python, str(script), *paths], env=environment)

        def result():
            if process.wait():
                raise RuntimeError(f"{script} failed")
            found = dict(np.load(paths[1]))
            return json.loads(str(found.pop("report"))), found

        try:
            yield result
        finally:
            process.kill()


def compared(work, logits):
    """Compare each seed with the dense network on the test images, and average."""
    rows = []
    for name, found in logits.items():
        against = metrics.compare(
            work["test_teacher"], found, work["test_labels"], key=jax.random.key(0)
        )
        rows.append(
            {
                "seed": name,
                "cross_entropy": round(float(against.cross_entropies[1]), 4),
                "accuracy": round(float(against.accuracies[1]), 4),
                "agreement": round(float(against.agreement.value), 4),
            }
        )
    keys = ("cross_entropy", "accuracy", "agreement")
    mean = {key: round(float(np.mean([row[key] for row in rows])), 4) for key in keys}
    return {"seeds": rows, "mean": mean}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=sys.executable, help="Python with torch-pruning")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--trial", type=int, default=20, help="steps for each criterion")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=pathlib.Path, default=data_folder())
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    settings = {
        "ratio": 2.1,
        "epochs": args.epochs,
        "steps": args.epochs * 62,
        "trial": args.trial,
        "batch": 64,
        "learning_rate": 0.02,
        "clip_norm": 5.0,
        "temperature": TEMPERATURE,
        "seeds": list(range(args.seeds)),
    }
    network = load_network(args.data)
    work = prepare(args.data, network, settings)
    report = {"jax": jax.__version__, "settings": settings}
    with peer(args.peer, work) as result:
        sides = {"ours": Ours(network, work, settings).run, "torch-pruning": result}
        for name, side in sides.items():
            found, logits = side()
            report[name] = {**compared(work, logits), **found}
            if args.json:
                args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
