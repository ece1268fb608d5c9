"""What a training run carries from step to step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxcompress.train._precision import Precision
from jaxcompress.train._sharding import Rules, shard
from jaxcompress.train._trainable import default_trainable, split
from jaxcompress.tree import Params, Where


class State(NamedTuple):
    """Everything that a step reads and writes; arrays only, so it can be saved and sharded whole.

    Attributes:
        step: Batches consumed so far, skipped ones included; it is also the position in the data.
        params: All params: trainable leaves, frozen ones and mutable state such as `batch_stats`.
        opt_state: The optimizer's state, over the trainable leaves.
        skipped: Updates left out because the loss or a gradient was not finite.
        key: The run's random key; step i uses `fold_in(key, i)`.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    skipped: jax.Array
    key: jax.Array


def init(
    params: Params,
    tx: optax.GradientTransformation,
    *,
    key: jax.Array,
    trainable: Where | None = None,
    precision: Precision | None = None,
    mesh: Mesh | None = None,
    sharding: Rules | None = None,
) -> State:
    """Start a training run. The arrays are copied, so that donating them later is safe.

    Args:
        params: Any pytree of arrays; fn's whole params, mutable state included.
        tx: An optax transformation, such as `optimizer` builds.
        key: A random key, `jax.random.key(seed)`.
        trainable: Which leaves the optimizer sees and changes; see `default_trainable`.
        precision: Params are stored in its `params` dtype.
        mesh: Place the state on these devices.
        sharding: How to split params over the mesh; see `shard`.

    Returns:
        The state before the first step.

    Raises:
        SelectionError: If `trainable` or a sharding rule selects nothing.
        ArgumentTypeError: If `trainable` selects a leaf that has no gradient.

    Example:
        >>> from jaxcompress import tree
        >>> params = {"w": jnp.ones((2, 2)), "batch_stats": {"mean": jnp.zeros(2)}}
        >>> state = init(params, optax.sgd(0.1, momentum=0.9), key=jax.random.key(0))
        >>> tree.paths(state.opt_state)
        ['0/trace/w']
    """
    where = default_trainable(params) if trainable is None else trainable
    params = jax.tree.map(jnp.copy, (precision or Precision()).store(params))
    learned, _ = split(params, where)
    state = State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.tree.map(jnp.copy, tx.init(learned)),
        skipped=jnp.zeros((), jnp.int32),
        key=jnp.copy(key),
    )
    return state if mesh is None else shard(state, mesh=mesh, sharding=sharding)
