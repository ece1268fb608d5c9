"""Data addressed by seed and index, and its way onto the device."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, require_at_least


@runtime_checkable
class Data(Protocol):
    """What `fit` trains on: batches addressed by the global step, so that a run can resume."""

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches in one pass over the data."""
        ...

    def __getitem__(self, i: int, /) -> Any:
        """Give the batch of global step i, the same one however often it is asked for."""
        ...


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches from arrays in memory (or memory-mapped); batch i is a function of seed and i alone.

    Epoch e shuffles by a permutation drawn from `(seed, e)`.

    Attributes:
        arrays: A pytree of NumPy arrays of one leading size.
        batch_size: Examples per batch.
        seed: The seed of the permutations.
        shuffle: Permute the examples anew each epoch, rather than keep their order.
        drop_last: Leave out the examples after the last full batch of each epoch, rather than
            end with a smaller batch (which compiles the step once more).

    Example:
        >>> data = Batches({"x": np.arange(10)}, batch_size=4, shuffle=False, drop_last=False)
        >>> data.steps_per_epoch, data[1]["x"], data[2]["x"], data[3]["x"]
        (3, array([4, 5, 6, 7]), array([8, 9]), array([0, 1, 2, 3]))
    """

    arrays: Any
    _: KW_ONLY
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = True

    def __post_init__(self):
        object.__setattr__(self, "arrays", jax.tree.map(np.asarray, self.arrays))
        sizes = {path: x.shape[0] if x.ndim else None for path, x in tree.items(self.arrays)}
        if len(set(sizes.values())) != 1 or None in sizes.values():
            raise ArgumentError(
                "arrays",
                got=f"leading sizes {sizes}",
                expected="arrays of one leading size",
                fix="Give every array one entry per example.",
            )
        if not 1 <= self.batch_size <= self.size:
            raise ArgumentError(
                "batch_size",
                got=self.batch_size,
                expected=f"1 to {self.size}, the number of examples",
                fix="Choose a smaller batch.",
            )

    @property
    def size(self) -> int:
        """The number of examples."""
        return jax.tree.leaves(self.arrays)[0].shape[0]

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches in one pass over the data."""
        full, left = divmod(self.size, self.batch_size)
        return full + bool(left and not self.drop_last)

    def __getitem__(self, i: int) -> Any:
        """Give the batch of a global step.

        Args:
            i: The step, 0 or more; steps beyond the first epoch go on into the next.

        Returns:
            A batch like `arrays`.
        """
        require_at_least("i", i, 0, fix="Count from the first step.")
        epoch, step = divmod(i, self.steps_per_epoch)
        chosen = slice(step * self.batch_size, (step + 1) * self.batch_size)
        if self.shuffle:
            chosen = _permutation(self.size, self.seed, epoch)[chosen]
        return jax.tree.map(lambda x: x[chosen], self.arrays)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the batches of the first epoch."""
        return (self[i] for i in range(self.steps_per_epoch))


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def prefetch_batches(
    data: Data, place: Callable[[Any], Any], steps: Iterable[int], *, depth: int
) -> Iterator[tuple[int, Any]]:
    """Give `(i, data[i])` with the next few batches already on their way to the device.

    Args:
        data: Addressed by step.
        place: Starts the transfer of a batch; it must not wait for it.
        steps: Which batches, in order.
        depth: How many batches to hold beyond the one given out.

    Yields:
        Step and placed batch.
    """
    queue: collections.deque[tuple[int, Any]] = collections.deque()
    for i in steps:
        queue.append((i, place(data[i])))
        if len(queue) > depth:
            yield queue.popleft()
    yield from queue
