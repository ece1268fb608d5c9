"""Where and how often a run saves, and what it saved."""

import os
import pathlib
from dataclasses import dataclass

from jaxcompress.errors import FileError, require_at_least
from jaxcompress.train._state import State


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where and how often `fit` saves. A run whose directory holds a checkpoint continues from it.

    Attributes:
        directory: One run's own folder.
        every: Steps between checkpoints; `None` saves at every report. The last step is always
            saved.
        keep: How many of the latest to keep.
    """

    directory: str | os.PathLike[str]
    every: int | None = None
    keep: int = 3

    def __post_init__(self):
        require_at_least("every", self.every, 1, fix="Raise it.", optional=True)
        require_at_least("keep", self.keep, 1, fix="Raise it.")


def restore(directory: str | os.PathLike[str], *, like: State, step: int | None = None) -> State:
    """Read a state that `fit` saved.

    Args:
        directory: The folder of the checkpoints.
        like: A state of the same model and optimizer, as `init` makes. The result has its
            shardings, whatever the devices it was saved from.
        step: Which checkpoint; the latest by default.

    Returns:
        The state.

    Raises:
        FileError: If there is no such checkpoint.
        StructureError: If it is of another model or optimizer; nothing is restored then.
        MissingExtraError: If orbax is not installed.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, optax, tempfile
        >>> from jaxcompress import train
        >>> data = train.Batches(np.ones((8, 1), np.float32), batch_size=4)
        >>> tx, loss = optax.sgd(0.1), lambda w, x, key: ((x * w - 2.0) ** 2)[:, 0]
        >>> state = train.init(jnp.zeros(()), tx, key=jax.random.key(0))
        >>> step = train.make_step(loss, tx)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state, _ = train.fit(state, step, data, epochs=2, checkpoints=folder)
        ...     restored = train.restore(folder, like=state, step=2)
        >>> int(restored.step), round(float(restored.params), 2)
        (2, 0.72)
    """
    from jaxcompress.train._store import Store  # loads orbax

    path = pathlib.Path(directory)
    with Store(path, create=False) as store:
        found = store.steps()
        chosen = step if step is not None else max(found, default=None)
        if chosen is None or chosen not in found:
            raise FileError(
                "directory",
                got=f"{path} with checkpoints of steps {found}",
                expected="a checkpoint" if step is None else f"a checkpoint of step {step}",
                fix="Check the path, or train with checkpoints=...",
            )
        return store.read(chosen, "state", like)
