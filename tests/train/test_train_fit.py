import csv
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from jaxcompress import sparsity, train
from jaxcompress.errors import ArgumentError, StructureError
from jaxcompress.train import _log
from jaxcompress.train._ledger import Ledger

KEY = jax.random.key(0)
TX = train.optimizer(
    "adamw", learning_rate=optax.cosine_decay_schedule(1e-2, 20), weight_decay=1e-2
)


class InterruptedRunError(Exception):
    pass


@pytest.fixture(scope="module")
def step(problem):
    return train.make_step(problem.loss, TX)


@pytest.fixture(scope="module")
def data(problem):
    return train.Batches(problem.arrays, batch_size=8, seed=1)  # 5 steps per epoch


@pytest.fixture(scope="module")
def validation(problem):
    return train.Batches(problem.arrays, batch_size=16, shuffle=False, drop_last=False)


@pytest.fixture(scope="module")
def evaluate(problem):
    return lambda params, batch: {"loss": problem.loss(params, batch, None)}


def start(problem, seed=0):
    return train.init(problem.params, TX, key=jax.random.key(seed))


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def interrupting(step, after):
    """The step, raising when it is called for the `after`-th time."""
    calls = iter(range(after))

    def stops(state, batch):
        if next(calls, None) is None:
            raise InterruptedRunError
        return step(state, batch)

    return stops


def test_equals_the_loop_by_hand(problem, step, data, validation, evaluate):
    state, losses = start(problem), []
    for i in range(10):
        state, metrics = step(state, data[i])
        losses.append(float(metrics["loss"]))
    fitted, rows = train.fit(
        start(problem), step, data, epochs=2, validation=validation, evaluate=evaluate
    )
    equal(fitted, state)
    assert [row["step"] for row in rows] == [5, 10]
    assert [row["epoch"] for row in rows] == [1.0, 2.0]
    assert rows[1]["loss"] == sum(losses[5:]) / 5
    whole = problem.loss(state.params, problem.arrays, None).mean()
    np.testing.assert_allclose(rows[1]["validation/loss"], whole, rtol=1e-6)


def test_a_custom_period_and_length(problem, step, data):
    seen = []
    _, rows = train.fit(
        start(problem),
        step,
        data,
        steps=8,
        report_every=3,
        callbacks=[lambda state, row: seen.append((int(state.step), row["step"]))],
    )
    assert seen == [(3, 3), (6, 6), (8, 8)]
    assert [row["epoch"] for row in rows] == [0.6, 1.2, 1.6]


@pytest.mark.parametrize(("after", "suffix"), [(3, "csv"), (13, "jsonl")])
def test_an_interrupted_run_resumes_bit_for_bit(
    problem, step, data, validation, evaluate, tmp_path, after, suffix
):
    def run(name, step, seed=0):
        return train.fit(
            start(problem, seed),
            step,
            data,
            epochs=4,
            validation=validation,
            evaluate=evaluate,
            early_stopping=train.EarlyStopping(patience=3),
            checkpoints=train.Checkpoints(directory=tmp_path / name, every=2),
            log=tmp_path / f"{name}.{suffix}",
        )

    state, rows = run("whole", step)
    with pytest.raises(InterruptedRunError):
        run("broken", interrupting(step, after))
    # What a kill between a row and its checkpoint leaves behind.
    with (tmp_path / f"broken.{suffix}").open("a") as file:
        file.write("a row that was never checkpointed\n")
    # The checkpoint decides, whatever the state given.
    resumed, resumed_rows = run("broken", step, seed=5)
    equal(resumed, state)
    assert resumed_rows == rows
    texts = [(tmp_path / f"{name}.{suffix}").read_text() for name in ("whole", "broken")]
    assert texts[0] == texts[1]


def test_a_finished_run_is_returned_as_it_ended(problem, step, data, tmp_path):
    state, rows = train.fit(start(problem), step, data, epochs=2, checkpoints=tmp_path)
    again, same = train.fit(
        start(problem), interrupting(step, 0), data, epochs=2, checkpoints=tmp_path
    )
    equal(again, state)
    assert same == rows
    longer, more = train.fit(start(problem), step, data, epochs=3, checkpoints=tmp_path)
    straight, _ = train.fit(start(problem), step, data, epochs=3)
    equal(longer, straight)
    assert more[:2] == rows and len(more) == 3


def test_early_stopping_returns_the_best_params(problem, step, data, validation, tmp_path):
    reported, kept = iter([3.0, 2.0, 2.5, 2.4]), []

    def scripted(params, batch):
        value = jax.pure_callback(lambda: np.float32(scripted.now), np.float32(0))
        return {"score": jnp.full(16, value)}

    scripted.now = next(reported)

    def keep(state, row):
        kept.append(jax.tree.map(np.array, state.params))
        scripted.now = next(reported, None)

    def run(step):
        return train.fit(
            start(problem),
            step,
            data,
            epochs=9,
            validation=validation,
            evaluate=scripted,
            early_stopping=train.EarlyStopping(metric="validation/score", patience=2),
            callbacks=[keep],
            checkpoints=tmp_path,
        )

    state, rows = run(step)
    np.testing.assert_allclose([row["validation/score"] for row in rows], [3.0, 2.0, 2.5, 2.4])
    equal(state.params, kept[1])
    assert int(state.step) == 10  # the whole state is that of the best report
    # Resuming a run that has stopped neither trains nor forgets which params were best.
    again, same = run(interrupting(step, 0))
    equal(again.params, kept[1])
    assert same == rows


@pytest.mark.parametrize(
    ("kwargs", "value", "best", "improves"),
    [
        ({}, 1.0, None, True),
        ({}, math.nan, None, False),
        ({}, math.nan, 1.0, False),
        ({}, 1.0, 1.0, False),
        ({"min_delta": 0.1}, 0.95, 1.0, False),
        ({"min_delta": 0.1}, 0.85, 1.0, True),
        ({"mode": "max"}, 1.1, 1.0, True),
        ({"mode": "max"}, 0.9, 1.0, False),
    ],
)
def test_what_counts_as_an_improvement(kwargs, value, best, improves):
    assert train.EarlyStopping(**kwargs).improves(value, best) == improves


def test_skipped_steps_are_counted_and_kept_out_of_the_means(problem, step, data):
    class Poisoned:
        steps_per_epoch = 5

        def __getitem__(self, i):
            return jax.tree.map(lambda x: x * np.float32(np.nan if i == 2 else 1), data[i])

    state, rows = train.fit(start(problem), step, Poisoned(), epochs=1)
    assert rows[0]["skipped"] == 1 and int(state.skipped) == 1
    assert np.isfinite(rows[0]["loss"])


def test_the_log_reads_back(problem, step, data, tmp_path):
    rows = {}
    for suffix in ("csv", "jsonl"):
        path = tmp_path / "deep" / f"log.{suffix}"
        _, rows[suffix] = train.fit(start(problem), step, data, epochs=2, log=path)
    with (tmp_path / "deep" / "log.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items()} for row in table] == rows["csv"]
    lines = (tmp_path / "deep" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows["jsonl"]


def test_the_ledger_survives_json():
    ledger = Ledger().add({"loss": 0.1, "skipped": 0.0}).add({"loss": 0.2, "skipped": 1.0})
    ledger, best = ledger.report({"step": 4, "validation/loss": 1 / 3}, train.EarlyStopping())
    assert best
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


def test_the_bar_shows_step_loss_and_rate_on_a_terminal_only(monkeypatch):
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=120)
        monkeypatch.setattr("rich.progress.get_console", lambda console=console: console)
        with _log.Bar(start=2, total=10, enabled=True) as bar:
            bar.update(3, loss=None)
            bar.update(7, loss=0.125)
        assert ("7/10" in out.getvalue() and "loss 0.1250" in out.getvalue()) == terminal
        if not terminal:
            assert out.getvalue() == ""


def test_any_step_will_do(data):
    step = lambda state, batch: (state._replace(step=state.step + 1), {"loss": jnp.ones(())})
    state = train.init({"w": jnp.ones(1)}, optax.sgd(0.1), key=KEY)
    state, rows = train.fit(state, step, data, epochs=1)
    assert rows[0]["loss"] == 1.0 and int(state.step) == 5


def test_on_a_mesh(problem, data, validation, evaluate, tmp_path):
    one, _ = train.fit(start(problem), train.make_step(problem.loss, TX), data, epochs=2)
    mesh = jax.make_mesh((8,), ("data",))
    step = train.make_step(problem.loss, TX, mesh=mesh)

    def run(**kwargs):
        state = train.init(problem.params, TX, key=KEY, mesh=mesh)
        return train.fit(
            state,
            kwargs.pop("step", step),
            data,
            epochs=2,
            validation=validation,
            evaluate=evaluate,
            **kwargs,
        )

    state, _ = run()
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # Half on one device, the rest on eight: a checkpoint restores onto other devices.
    single = train.make_step(problem.loss, TX)
    train.fit(start(problem), single, data, epochs=1, checkpoints=tmp_path)
    resumed, _ = run(checkpoints=tmp_path)
    assert len(resumed.params["first"]["kernel"].sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_model_is_refused(problem, step, data, tmp_path):
    train.fit(start(problem), step, data, steps=1, checkpoints=tmp_path)
    other = train.init({"w": jnp.ones((3, 3))}, TX, key=KEY)
    with pytest.raises(StructureError, match="'params/w' is missing"):
        train.fit(other, step, data, steps=2, checkpoints=tmp_path)
    fewer = train.Batches(data.arrays, batch_size=10)
    with pytest.raises(ArgumentError, match="'steps_per_epoch': 4"):
        train.fit(start(problem), step, fewer, steps=2, checkpoints=tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({}, "one of the two"),
        ({"epochs": 1, "steps": 1}, "one of the two"),
        ({"epochs": 1, "evaluate": lambda p, b: {}}, "both or neither"),
        ({"epochs": 1, "log": "log.txt"}, "csv"),
        ({"epochs": 1, "report_every": 0}, "report_every"),
        ({"epochs": 1, "prefetch": -1}, "prefetch"),
        ({"epochs": 1, "early_stopping": train.EarlyStopping()}, "validation/loss"),
    ],
)
def test_bad_calls_are_refused(problem, step, data, kwargs, match):
    with pytest.raises(ArgumentError, match=match):
        train.fit(start(problem), step, data, **kwargs)


def test_evaluation_wants_per_example_values(problem, validation):
    with pytest.raises(ArgumentError, match="one value per example"):
        train.evaluate(lambda p, b: {"loss": jnp.ones(())}, problem.params, validation)


def test_evaluation_compiles_once(problem, validation):
    traces = []

    def metrics(params, batch):
        traces.append(batch["x"].shape)
        return {"x": batch["x"][:, 0]}

    for _ in range(2):
        means = train.evaluate(metrics, problem.params, validation)
        np.testing.assert_allclose(means["x"], problem.arrays["x"][:, 0].mean(), rtol=1e-5)
    assert traces == [(16, 4)]


@pytest.mark.parametrize("placed", [1, 8])
def test_a_plain_state_resumes_on_a_mesh(tmp_path, placed):
    """What a plain `init` made, or one device saved, goes on under a step with a mesh."""
    mesh = jax.make_mesh((8,), ("data",))
    data = train.Batches(np.ones((16, 3), np.float32), batch_size=8)
    loss = lambda params, x, key: ((x @ params["w"]) ** 2).sum(1)
    tx = optax.adam(0.1)
    begin = lambda: train.init({"w": jnp.ones((3, 2))}, tx, key=jax.random.key(0))
    options = {
        "checkpoints": tmp_path,
        "validation": data,
        "evaluate": lambda params, x: {"loss": loss(params, x, None)},
        "early_stopping": train.EarlyStopping(patience=5),
    }
    step = train.make_step(loss, tx, mesh=mesh)
    train.fit(
        begin(), step if placed == 8 else train.make_step(loss, tx), data, epochs=1, **options
    )
    state, rows = train.fit(begin(), step, data, epochs=2, **options)
    assert [row["step"] for row in rows] == [2, 4]
    assert state.params["w"].sharding.device_set == set(mesh.devices.flat)
    whole, _ = train.fit(begin(), train.make_step(loss, tx), data, epochs=2)
    np.testing.assert_allclose(state.params["w"], whole.params["w"], rtol=1e-6)


def test_early_stopping_keeps_mask_and_params_together():
    data = train.Batches(np.eye(8, dtype=np.float32), batch_size=8)
    loss = lambda params, x, key: ((x @ params["w"] - 1) ** 2).mean(1)
    schedule = sparsity.schedules.linear(0.75, end=4)
    tx = sparsity.sparsify(optax.sgd(1e-3), schedule=schedule)
    params = {"w": jnp.ones((8, 4)) + jnp.arange(32.0).reshape(8, 4) / 100}
    for after in (0, 5):
        state, rows = train.fit(
            train.init(params, tx, key=jax.random.key(0)),
            train.make_step(loss, tx),
            data,
            steps=8,
            early_stopping=train.EarlyStopping(metric="loss", patience=9, after=after),
        )
        assert len(rows) == 8
        sparsity.check(state.params, state.opt_state)
        pruned = sparsity.sparsity_of(state.params).total
        assert pruned == sparsity.sparsity_of(sparsity.get_mask(state.opt_state)).total
        assert pruned == 0.75 if after else pruned < 0.75  # pruning hurts: the best is early


def test_reports_up_to_after_neither_improve_nor_wait():
    stopping = train.EarlyStopping(metric="loss", patience=2, after=5)
    ledger, best, waited = Ledger(), [], []
    for step, loss in ((4, 0.1), (5, 0.2), (6, 0.9), (7, 1.0), (8, 1.0)):
        ledger, improved = ledger.report({"step": step, "loss": loss}, stopping)
        best += [step] * improved
        waited.append(ledger.waited)
    assert best == [6] and ledger.best == 0.9 and waited == [0, 0, 0, 1, 2]
    assert ledger.stops(stopping) and len(ledger.rows) == 5


def test_reports_of_skipped_steps_keep_their_names(tmp_path):
    data = train.Batches(np.array([np.nan, np.nan, 1, 1], np.float32), batch_size=1, shuffle=False)
    tx = optax.sgd(0.1)
    log = tmp_path / "log.csv"
    _, rows = train.fit(
        train.init({"w": jnp.ones(())}, tx, key=jax.random.key(0)),
        train.make_step(lambda params, x, key: params["w"] * x, tx),
        data,
        steps=4,
        report_every=2,
        log=log,
    )
    assert np.isnan(rows[0]["loss"]) and rows[0]["skipped"] == 2 and rows[1]["loss"] > 0
    assert log.read_text().splitlines()[0].split(",") == list(rows[0]) == list(rows[1])


@pytest.mark.parametrize("length", [{"epochs": -1}, {"steps": 2.5}, {}, {"steps": 1, "epochs": 1}])
def test_bad_lengths_are_refused(problem, step, data, length):
    with pytest.raises(ArgumentError, match="one of the two, an integer, 0 or more"):
        train.fit(start(problem), step, data, **length)


def test_a_shorter_length_than_the_checkpoint_is_refused(problem, step, data, tmp_path):
    train.fit(start(problem), step, data, steps=6, checkpoints=tmp_path)
    with pytest.raises(ArgumentError, match="a length of 5 steps for a run that has taken 6"):
        train.fit(start(problem), step, data, steps=5, checkpoints=tmp_path)
    with pytest.raises(ArgumentError, match="'seed': 7"):
        other = train.Batches(data.arrays, batch_size=data.batch_size, seed=7)
        train.fit(start(problem), step, other, steps=8, checkpoints=tmp_path)
