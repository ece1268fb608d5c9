"""One training step: loss, gradients, update, guard; jitted, donated, sharded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError, StructureError, require_at_least
from jaxcompress.train._precision import Precision
from jaxcompress.train._sharding import (
    Rules,
    batch_shardings,
    make_automatic,
    shard,
    state_shardings,
)
from jaxcompress.train._state import State
from jaxcompress.train._trainable import default_trainable, split
from jaxcompress.tree import Params, Where

Batch: TypeAlias = Any
"""A pytree of arrays of one leading size."""


class Aux(NamedTuple):
    """What a loss may return beside its value.

    Attributes:
        metrics: `{name: per-example values or a scalar}`; reported averaged, as the loss is.
        state: New values of leaves that do not learn, such as what Linen's `mutable` gives:
            any tree whose paths are paths of params.
        weights: One weight per example, for a weighted mean of losses and metrics. Zeros mask
            the padding of a ragged batch.
    """

    metrics: Mapping[str, ArrayLike] | None = None
    state: Params = None
    weights: ArrayLike | None = None


Loss: TypeAlias = Callable[[Params, Batch, jax.Array], Any]
"""`(params, batch, key) -> loss` or `(loss, Aux)`; the loss is per example, or a scalar mean."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """A compiled training step, `(state, batch) -> (state, metrics)`. The state is donated.

    Attributes:
        update: The jitted function.
        mesh: Where state and batch live, with Auto axes; `None` is wherever they already are.
        sharding: How params are split over the mesh.
        data_axis: The mesh axis over which batches are split.
    """

    update: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]
    mesh: Mesh | None = None
    sharding: Rules | None = None
    data_axis: str | tuple[str, ...] = "data"

    def __call__(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """Take one step.

        Args:
            state: The state; its buffers are reused, so do not read it afterwards. A state that
                is not on the mesh yet is copied there.
            batch: The batch; a host batch is placed first.

        Returns:
            The new state, and the metrics `loss`, `grad_norm`, those of the loss, and, with the
            guard on, `skipped` (1 if the update was left out).
        """
        if self.mesh is None:
            return self.update(state, batch)
        if state.step.sharding.device_set != set(self.mesh.devices.flat):
            state = shard(state, mesh=self.mesh, sharding=self.sharding)
        # Under set_mesh, a loss can write with_sharding_constraint(x, PartitionSpec("data")).
        with jax.set_mesh(self.mesh):
            return self.update(state, self.place(batch))

    def place(self, batch: Batch) -> Batch:
        """Start moving a batch to where the step wants it.

        Args:
            batch: A host batch.

        Returns:
            The batch on the devices, split over `data_axis` if there is a mesh.
        """
        if self.mesh is None:
            return jax.device_put(batch)
        return jax.device_put(batch, batch_shardings(batch, self.mesh, self.data_axis))


def make_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    trainable: Where | None = None,
    mesh: Mesh | None = None,
    sharding: Rules | None = None,
    data_axis: str | tuple[str, ...] = "data",
    accumulate: int = 1,
    precision: Precision | None = None,
    remat: bool | Callable[..., bool] = False,
    skip_nonfinite: bool = True,
    donate: bool = True,
) -> Step:
    r"""Compile a loss and an optimizer into a training step.

    $$p \leftarrow p + \mathrm{tx}\Big(\nabla_p \frac{\sum_i w_i \ell_i(p)}{\sum_i w_i}\Big)$$

    over the trainable leaves. Model, teacher, masks and fake-quantization are the loss's own
    business: it closes over them.

    Args:
        loss: `(params, batch, key) -> loss` or `(loss, Aux)`. Per-example losses are averaged.
        tx: The optax transformation that `init` was given. It receives the loss as `value`.
        trainable: The leaves that learn, as given to `init`; see `default_trainable`.
        mesh: Run on these devices, data-parallel over `data_axis`. Explicit axes become Auto.
        sharding: `{where: PartitionSpec}`: how params, and with them masks and optimizer state,
            are split; see `shard`.
        data_axis: The mesh axis, or axes, over which the batch's first axis is split.
        accumulate: Split each batch into this many microbatches, one after the other, to save
            memory. Losses and gradients are those of the whole batch; BatchNorm sees the
            microbatches, and mutable state is updated once for each.
        precision: A dtype policy.
        remat: Recompute in the backward pass those activations of the loss that a policy of
            `jax.checkpoint_policies` does not save, such as `save_only_these_names(...)`. `True`
            saves none; as it recomputes all at once, it seldom lowers the peak. To recompute
            layer by layer, which does, put `jax.checkpoint` in the model.
        skip_nonfinite: If the loss or a gradient is not finite, leave params, mutable state and
            optimizer state as they are, bit for bit, and count it in `State.skipped`.
        donate: Reuse the old state's buffers for the new one.

    Returns:
        The step.

    Raises:
        ArgumentError: If `accumulate` is not positive, or, at the first call, does not divide
            the batch.
        StructureError: At the first call, if `Aux.state` holds what is not mutable state.

    Example:
        >>> from jaxcompress import train
        >>> def loss(params, batch, key):
        ...     return (params["w"] * batch["x"] - batch["y"]) ** 2
        >>> tx = optax.sgd(0.1)
        >>> state = train.init({"w": jnp.zeros(())}, tx, key=jax.random.key(0))
        >>> step = make_step(loss, tx)
        >>> for _ in range(20):
        ...     state, metrics = step(state, {"x": jnp.ones(4), "y": 3 * jnp.ones(4)})
        >>> round(float(state.params["w"]), 1)
        3.0
    """
    require_at_least("accumulate", accumulate, 1, fix="Use 1 for whole batches.")
    mesh = None if mesh is None else make_automatic(mesh)
    policy = precision or Precision()
    if remat is not False:
        loss = jax.checkpoint(loss, policy=None if remat is True else remat)
    tx = optax.with_extra_args_support(tx)

    def update(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        where = default_trainable(state.params) if trainable is None else trainable
        learned, rest = split(state.params, where)
        _check_state(state, learned, tx, policy)
        key = jax.random.fold_in(state.key, state.step)
        objective = _objective(loss, policy)
        grads, rest, metrics = _gradients(objective, learned, rest, batch, key, accumulate)
        metrics["grad_norm"] = optax.tree.norm(jax.tree.map(policy.widen, grads))
        updates, opt_state = tx.update(
            grads, state.opt_state, learned, value=metrics["loss"], grad=grads
        )
        params = tree.merge(optax.apply_updates(learned, updates), rest)
        new = State(state.step, params, opt_state, state.skipped, state.key)
        if skip_nonfinite:
            finite = _all_finite((metrics["loss"], grads))
            new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
            new = new._replace(skipped=state.skipped + (~finite).astype(jnp.int32))
            metrics["skipped"] = policy.widen(~finite)
        new = new._replace(step=state.step + 1)
        if mesh is not None:
            shardings = state_shardings(new, mesh, sharding)
            new = jax.lax.with_sharding_constraint(new, shardings)
        return new, metrics

    jitted = jax.jit(update, donate_argnums=(0,) if donate else ())
    return Step(update=jitted, mesh=mesh, sharding=sharding, data_axis=data_axis)


def _check_state(
    state: State, learned: Params, tx: optax.GradientTransformation, policy: Precision
) -> None:
    """Refuse a state that `init` made with other options than this step has."""
    wanted = jax.eval_shape(policy.store, learned)
    for (path, leaf), want in zip(tree.items(learned), tree.leaves(wanted), strict=True):
        if leaf.dtype != want.dtype:
            raise StructureError(
                "state",
                got=f"{path!r} in {leaf.dtype}",
                expected=f"params in {want.dtype}, as this step's precision says",
                fix="Give the same `precision` to init and make_step.",
            )
    mirrored = jax.eval_shape(tx.init, learned)
    if jax.tree.structure(mirrored) != jax.tree.structure(state.opt_state):
        raise StructureError(
            "state",
            got="an optimizer state that does not mirror the leaves that learn",
            expected="the state that tx.init makes for them",
            fix="Give the same `tx` and the same `trainable` to init and make_step.",
        )


_RESERVED = ("loss", "grad_norm", "skipped", "step", "epoch")


def _read_output(out: Any) -> tuple[Any, Aux]:
    """Tell a loss from `(loss, Aux)`, and refuse anything else."""
    values, aux = out if isinstance(out, tuple) and len(out) == 2 else (out, Aux())
    if not isinstance(aux, Aux) or not tree.is_floating(values):
        raise ArgumentTypeError(
            "loss",
            got=jax.tree.map(lambda x: getattr(x, "dtype", type(x).__name__), out),
            expected="a floating-point array, or (array, train.Aux(...))",
            fix="Return (loss, train.Aux(metrics={...})).",
        )
    taken = [name for name in aux.metrics or {} if name in _RESERVED]
    if taken:
        raise ArgumentError(
            "Aux.metrics",
            got=taken,
            expected=f"names other than {', '.join(_RESERVED)}",
            fix="Rename the metric.",
        )
    return values, aux


class _Sums(NamedTuple):
    """Sums over examples, all divided by the number of examples in a microbatch."""

    weight: jax.Array
    metrics: dict[str, jax.Array]


def _objective(loss: Loss, policy: Precision) -> Callable[..., tuple[jax.Array, Any]]:
    """Wrap the loss: `(learned, rest, batch, key) -> weighted sum / batch size, (sums, rest)`."""

    def objective(
        learned: Params, rest: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[_Sums, Params]]:
        size = _leading_size(batch)
        params = policy.lower(tree.merge(learned, rest))
        out = loss(params, policy.lower_batch(batch), key)
        values, aux = _read_output(out)
        named = {"loss": values, **(aux.metrics or {})}
        weights = None if aux.weights is None else policy.widen(jnp.asarray(aux.weights))
        weight = jnp.ones(()) if weights is None else jnp.sum(weights) / size
        means = {
            name: _average_examples(name, policy.widen(jnp.asarray(x)), weights, weight, size)
            for name, x in named.items()
        }
        return means["loss"], (_Sums(weight, means), _merge_state(rest, learned, aux.state))

    return objective


def _average_examples(
    name: str, x: jax.Array, weights: jax.Array | None, weight: jax.Array, size: int
) -> jax.Array:
    """Sum weighted per-example values and divide by the batch size, or weigh a scalar alike."""
    if x.ndim == 0:
        return x * weight.astype(x.dtype)
    if x.shape != (size,) or (weights is not None and weights.shape != (size,)):
        shapes = f"{x.shape}" + ("" if weights is None else f" with weights {weights.shape}")
        raise ArgumentError(
            name,
            got=f"shape {shapes} for a batch of {size}",
            expected=f"one value per example, ({size},), or a scalar",
            fix="Average over all axes but the first in the loss.",
        )
    return jnp.mean(x) if weights is None else jnp.sum(weights.astype(x.dtype) * x) / size


def _gradients(
    objective: Callable[..., tuple[jax.Array, Any]],
    learned: Params,
    rest: Params,
    batch: Batch,
    key: jax.Array,
    accumulate: int,
) -> tuple[Params, Params, dict[str, jax.Array]]:
    """Differentiate the mean loss over the batch, in one piece or in microbatches."""
    grad = jax.grad(objective, has_aux=True)
    if accumulate == 1:
        grads, (sums, rest) = grad(learned, rest, batch, key)
    else:
        micro = _microbatches(batch, accumulate)
        add_wide = lambda total, x: total + x.astype(total.dtype)

        def body(carry: Any, i_and_batch: Any) -> tuple[Any, None]:
            rest, total = carry
            i, batch = i_and_batch
            grads, (sums, rest) = grad(learned, rest, batch, jax.random.fold_in(key, i))
            return (rest, jax.tree.map(add_wide, total, (grads, sums))), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(grad, learned, rest, first, key)
        # Many narrow terms add up badly, so sums are float32 at least until they are divided.
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)),
            (shapes[0], shapes[1][0]),
        )
        (rest, (grads, sums)), _ = jax.lax.scan(
            body, (rest, zeros), (jnp.arange(accumulate), micro)
        )
    grads = jax.tree.map(
        lambda g, p: (g / sums.weight.astype(g.dtype)).astype(p.dtype), grads, learned
    )
    metrics = {name: x / sums.weight.astype(x.dtype) for name, x in sums.metrics.items()}
    return grads, rest, metrics


def _microbatches(batch: Batch, n: int) -> Batch:
    size = _leading_size(batch)
    if size % n:
        raise ArgumentError(
            "accumulate",
            got=f"{n} for a batch of {size}",
            expected="a divisor of the batch size",
            fix="Change `accumulate` or the batch size.",
        )
    # (B, ...) -> (B/n, n, ...) -> (n, B/n, ...): example i goes to microbatch i % n, so that each
    # device finds its share of every microbatch in the shard it already holds.
    return jax.tree.map(lambda x: x.reshape(size // n, n, *x.shape[1:]).swapaxes(0, 1), batch)


def _leading_size(batch: Batch) -> int:
    sizes = {path: leaf.shape[0] if leaf.shape else 0 for path, leaf in tree.items(batch)}
    if len(set(sizes.values())) != 1:
        raise ArgumentError(
            "batch", got=sizes, expected="arrays of one leading size", fix="Stack the examples."
        )
    return next(iter(sizes.values()))


def _merge_state(rest: Params, learned: Params, state: Params) -> Params:
    """Put the new values of mutable state in the place of the old, by path."""
    new, old = dict(tree.items(state)), dict(tree.items(rest))
    learns = [path for path, _ in tree.items(learned) if path in new]
    wrong = [path for path, leaf in new.items() if path in old and leaf.shape != old[path].shape]
    unknown = [path for path in new if path not in old and path not in learns]
    for paths, what in ((learns, "trainable"), (unknown, "unknown"), (wrong, "reshaped")):
        if paths:
            raise StructureError(
                "Aux.state",
                got=f"{what} {', '.join(map(repr, paths[:5]))}",
                expected="new values, of the same shapes, for leaves of params that do not learn",
                fix="Return what the model's `mutable` gives, or narrow `trainable`.",
            )
    return tree.map_with_path(
        lambda path, x: (
            jax.lax.convert_element_type(new[path], x.dtype)
            if path in new and new[path].dtype != x.dtype
            else new.get(path, x)
        ),
        rest,
    )


def _all_finite(xs: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(xs)]))
