"""The training loop: evaluate, log, stop early, checkpoint, resume."""

import collections
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.errors import ArgumentError, require_at_least
from jaxcompress.train._checkpoint import Checkpoints
from jaxcompress.train._data import Data, prefetch_batches
from jaxcompress.train._evaluate import evaluate as evaluate_on
from jaxcompress.train._ledger import EarlyStopping, Ledger
from jaxcompress.train._log import Bar, Row, open_log
from jaxcompress.train._sharding import shard
from jaxcompress.train._state import State
from jaxcompress.tree import Params

if TYPE_CHECKING:
    from jaxcompress.train._store import Store


def fit(
    state: State,
    step: Callable[[State, Any], tuple[State, Mapping[str, jax.Array]]],
    data: Data,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    validation: Data | None = None,
    evaluate: Callable[[Params, Any], Mapping[str, ArrayLike]] | None = None,
    report_every: int | None = None,
    early_stopping: EarlyStopping | None = None,
    checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
    log: str | os.PathLike[str] | None = None,
    progress: bool = True,
    prefetch: int = 2,
    callbacks: Sequence[Callable[[State, Row], None]] = (),
) -> tuple[State, list[Row]]:
    """Train from `state.step` to the given length, and resume if it was interrupted.

    Step i trains on `data[i]`, so a resumed run consumes what the interrupted one would have:
    its params, optimizer state, masks, rows and log are those of an uninterrupted run, bit for
    bit, on the same devices.

    Args:
        state: Where to start; a `make_step` step donates it, so do not read it afterwards.
        step: `(state, batch) -> (state, metrics)`, as from `make_step`.
        data: Training batches, addressed by global step; see `Batches`.
        epochs: The total length in passes over the data, counted from step 0 of the run.
        steps: The total length in steps; give one of the two.
        validation: Data to evaluate on at every report.
        evaluate: `(params, batch) -> {name: per-example values}`, averaged over all of
            `validation`; rows hold the means as `validation/name`.
        report_every: Steps per report; an epoch by default.
        early_stopping: When to stop before the end.
        checkpoints: Where to save, or a `Checkpoints` to say how often. If checkpoints are there
            already, the run goes on from the latest and `state` only gives structure and
            shardings.
        log: A `.csv` or `.jsonl` file for the rows.
        progress: Show a progress bar, if there is a terminal.
        prefetch: Batches to move to the device ahead of their step.
        callbacks: Called with state and row after each report (again for the reports that a
            resumed run repeats). They may read the state, not keep it.

    Returns:
        The final state (that of the best report, if early stopping restores it) and all rows.

    Raises:
        ArgumentError: If the length is not given once, or `validation` and `evaluate` not
            together; if the checkpoint was made with another number of steps per epoch.
        StructureError: If the checkpoint is of another model; nothing is restored then.

    Example:
        >>> import numpy as np, optax
        >>> from jaxcompress import train
        >>> data = train.Batches(np.ones((64, 1), np.float32), batch_size=16)
        >>> loss = lambda params, x, key: ((x * params - 2.0) ** 2)[:, 0]
        >>> tx = optax.sgd(0.1)
        >>> state = train.init(jnp.zeros(()), tx, key=jax.random.key(0))
        >>> state, rows = fit(state, train.make_step(loss, tx), data, epochs=5)
        >>> len(rows), rows[-1]["step"], round(float(state.params), 2)
        (5, 20, 1.98)
    """
    last = _resolve_length(data, epochs=epochs, steps=steps)
    period = data.steps_per_epoch if report_every is None else report_every
    require_at_least("report_every", period, 1, fix="Raise it.")
    require_at_least("prefetch", prefetch, 0, fix="Raise it.")
    place = getattr(step, "place", jax.device_put)
    metrics_of = _evaluator(evaluate, validation, place)
    saving = checkpoints
    if not isinstance(saving, Checkpoints | None):
        saving = Checkpoints(directory=saving)

    state = _place_on_mesh_of(step, state)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_use_mesh_of(step))
        store = stack.enter_context(_open_store(saving)) if saving else None
        best: State | None = None
        ledger = Ledger()
        if store and store.steps():
            state, best, ledger = _resume(store, state, data)
        start, stopped = int(state.step), ledger.stops(early_stopping)
        if start > last:
            raise ArgumentError(
                "steps",
                got=f"a length of {last} steps for a run that has taken {start}",
                expected=f"{start} or more",
                fix="Lengths count from step 0 of the run; ask for more, or use another "
                "checkpoint directory.",
            )
        write_row = stack.enter_context(open_log(log, ledger.rows))
        bar = stack.enter_context(Bar(start=start, total=last, enabled=progress))

        # Metrics stay on the device for a few steps, so that the host never waits for the latest.
        pending: collections.deque[Mapping[str, jax.Array]] = collections.deque()
        ahead = range(start, start if stopped else last)
        for i, batch in prefetch_batches(data, place, ahead, depth=prefetch):
            state, metrics = step(state, batch)
            pending.append(metrics)
            done = i + 1
            reports = done % period == 0 or done == last
            saves = saving is not None and (done == last or done % (saving.every or period) == 0)
            while len(pending) > (0 if reports or saves else prefetch):
                ledger = ledger.add(jax.device_get(pending.popleft()))
            if reports:
                row = {"step": done, "epoch": done / data.steps_per_epoch}
                row |= ledger.means() | metrics_of(state.params)
                ledger, improved = ledger.report(row, early_stopping)
                if improved and early_stopping and early_stopping.restore_best:
                    best = jax.tree.map(jnp.copy, state)
                write_row(row)
                for callback in callbacks:
                    callback(state, row)
                stopped = ledger.stops(early_stopping)
            if store and (saves or stopped):
                _save(store, state, best, ledger, data)
            bar.update(done, loss=ledger.latest)
            if stopped:
                break
    return state if best is None else best, list(ledger.rows)


def _resolve_length(data: Data, *, epochs: int | None, steps: int | None) -> int:
    given = [n for n in (epochs, steps) if n is not None]
    if len(given) != 1 or not isinstance(given[0], int) or given[0] < 0:
        raise ArgumentError(
            "epochs",
            got=f"epochs={epochs} and steps={steps}",
            expected="one of the two, an integer, 0 or more",
            fix="For example epochs=10.",
        )
    return given[0] * (1 if epochs is None else data.steps_per_epoch)


def _evaluator(
    evaluate: Callable[[Params, Any], Mapping[str, ArrayLike]] | None,
    validation: Data | None,
    place: Callable[[Any], Any],
) -> Callable[[Params], Row]:
    if evaluate is None or validation is None:
        if evaluate is not validation:
            raise ArgumentError(
                "evaluate",
                got="one of `validation` and `evaluate` without the other",
                expected="both or neither",
                fix="Give the data and the function.",
            )
        return lambda params: {}

    def metrics_of(params: Params) -> Row:
        means = evaluate_on(evaluate, params, validation, place=place)
        return {f"validation/{name}": value for name, value in means.items()}

    return metrics_of


def _open_store(saving: Checkpoints) -> "Store":
    from jaxcompress.train._store import Store  # loads orbax

    return Store(saving.directory, keep=saving.keep)


def _place_on_mesh_of(step: Any, state: State) -> State:
    """Place the state where the step wants it, before anything is restored in its likeness."""
    mesh = getattr(step, "mesh", None)
    return state if mesh is None else shard(state, mesh=mesh, sharding=step.sharding)


def _use_mesh_of(step: Any) -> contextlib.AbstractContextManager[Any]:
    mesh = getattr(step, "mesh", None)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _identify_data(data: Data) -> dict[str, Any]:
    """What tells one run's data from another's, as far as the data say it."""
    names = ("steps_per_epoch", "size", "batch_size", "seed", "shuffle", "drop_last")
    return {name: getattr(data, name) for name in names if hasattr(data, name)}


def _save(store: "Store", state: State, best: State | None, ledger: Ledger, data: Data) -> None:
    trees = {"state": state} if best is None else {"state": state, "best": best}
    book = {"ledger": ledger.to_json(), "data": _identify_data(data)}
    store.save(int(state.step), trees, book)


def _resume(store: "Store", like: State, data: Data) -> tuple[State, State | None, Ledger]:
    latest = store.steps()[-1]
    book = store.book(latest)
    if book["data"] != _identify_data(data):
        raise ArgumentError(
            "data",
            got=f"data with {_identify_data(data)}",
            expected=f"those of the run in the checkpoint directory, {book['data']}",
            fix="Give the same data, batch size and seed, or another directory.",
        )
    state = store.read(latest, "state", like)
    best = store.read(latest, "best", like) if "best" in book["manifest"] else None
    return state, best, Ledger.from_json(book["ledger"])
