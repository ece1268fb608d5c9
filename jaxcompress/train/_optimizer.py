"""Optimizer chains from a small frozen config; every piece is optax's own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import optax
import optax.contrib

from jaxcompress import tree
from jaxcompress.errors import ArgumentError
from jaxcompress.train import schedules
from jaxcompress.tree import Params, Where


@dataclass(frozen=True, kw_only=True)
class GD:
    """Gradient descent: give it the whole data set as one batch. The update rule is SGD's."""


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent without momentum, `p - lr * g` on minibatches."""


@dataclass(frozen=True, kw_only=True)
class Momentum:
    """SGD with heavy-ball momentum.

    Attributes:
        momentum: The decay of the trace, in [0, 1).
    """

    momentum: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Nesterov:
    """SGD with Nesterov's momentum.

    Attributes:
        momentum: The decay of the trace, in [0, 1).
    """

    momentum: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Adagrad:
    """Adagrad (Duchi et al., JMLR 2011).

    Attributes:
        initial: What the sum of squares starts from.
        eps: Added to it under the root.
    """

    initial: float = 0.1
    eps: float = 1e-7


@dataclass(frozen=True, kw_only=True)
class RMSProp:
    """RMSProp (Tieleman and Hinton, 2012).

    Attributes:
        decay: The decay of the mean square, in [0, 1).
        eps: Added to it under the root.
    """

    decay: float = 0.9
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam as published, with bias correction (arXiv:1412.6980).

    Attributes:
        b1: The decay of the mean, in [0, 1).
        b2: The decay of the mean square, in [0, 1).
        eps: Added to the root.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101).

    Attributes:
        b1: The decay of the mean, in [0, 1).
        b2: The decay of the mean square, in [0, 1).
        eps: Added to the root.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class Lion:
    """Lion, with decoupled weight decay (arXiv:2302.06675).

    Attributes:
        b1: The weight of the mean in the update, in [0, 1).
        b2: The decay of the mean, in [0, 1).
    """

    b1: float = 0.9
    b2: float = 0.99


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon on the matrices and Adam on the rest, with decoupled weight decay on both.

    As in `optax.contrib.muon`, a leaf with other than two axes (a convolution, a stack of layers)
    is one of "the rest".

    Attributes:
        beta: The decay of the momentum, in [0, 1).
        steps: Newton-Schulz iterations.
        b1: Adam's decay of the mean.
        b2: Adam's decay of the mean square.
    """

    beta: float = 0.95
    steps: int = 5
    b1: float = 0.9
    b2: float = 0.999


Method: TypeAlias = GD | SGD | Momentum | Nesterov | Adagrad | RMSProp | Adam | AdamW | Lion | Muon
"""Any of the update rules."""

_DECOUPLED = (AdamW, Lion, Muon)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What `optimizer` builds a chain from: clip, decay, method, schedule.

    Attributes:
        method: The update rule with its own hyperparameters.
        learning_rate: The peak learning rate.
        schedule: The learning rate over time, as a fraction of the peak.
        warmup: Steps of linear warm-up from 0 before the schedule begins.
        clip_value: Clip each gradient entry to `[-clip_value, clip_value]`, first of all.
        clip_norm: Scale the gradient down to this global norm, after `clip_value`.
        weight_decay: Decoupled, `p - lr * weight_decay * p`, for AdamW, Lion and Muon. For the
            others the classical L2 term, `g + weight_decay * p` after clipping, which adaptive
            methods then rescale.
    """

    method: Method = field(default_factory=AdamW)
    learning_rate: float = 1e-3
    schedule: schedules.Schedule = field(default_factory=schedules.Constant)
    warmup: int = 0
    clip_value: float | None = None
    clip_norm: float | None = None
    weight_decay: float = 0.0

    def __post_init__(self):
        for name in ("learning_rate", "clip_value", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                fix = "Try 1e-3." if name == "learning_rate" else "Use None not to clip."
                raise ArgumentError(name, got=value, expected="a positive number", fix=fix)
        for name in {"momentum", "decay", "b1", "b2", "beta"} & vars(self.method).keys():
            value = getattr(self.method, name)
            if not 0 <= value < 1:
                raise ArgumentError(
                    f"method.{name}", got=value, expected="a decay in [0, 1)", fix="0.9 is usual."
                )
        if not self.weight_decay >= 0:
            raise ArgumentError(
                "weight_decay", got=self.weight_decay, expected="0 or more", fix="Use 0 for none."
            )


def optimizer(
    config: OptimizerConfig, *, decay: Where = tree.weights
) -> optax.GradientTransformationExtraArgs:
    """Build the optax chain that a config describes.

    Args:
        config: The update rule, its learning rate over time, clipping and weight decay.
        decay: Which leaves `config.weight_decay` pulls to zero; by default the weights, so not
            biases and norm scales. If the decay is not 0, it must select something.

    Returns:
        An optax transformation. `make_step` hands it the loss as `value`, which `Plateau` reads.

    Raises:
        ArgumentError: If the schedule or the warm-up cannot be used.

    Example:
        >>> import jax.numpy as jnp
        >>> config = OptimizerConfig(method=Momentum(), learning_rate=0.1, clip_norm=1.0)
        >>> tx = optimizer(config)
        >>> params, grads = {"w": jnp.zeros(())}, {"w": jnp.full((), 2.0)}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> round(float(updates["w"]), 3)
        -0.1
    """
    rate = schedules.learning_rate(config.learning_rate, config.schedule, warmup=config.warmup)

    def decayed(params: Params) -> Params:
        chosen = tree.select(params, decay)
        return tree.map_with_path(lambda path, _: path in chosen, params)

    links = []
    if config.clip_value is not None:
        links.append(optax.clip(config.clip_value))
    if config.clip_norm is not None:
        links.append(optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay and not isinstance(config.method, _DECOUPLED):
        links.append(optax.add_decayed_weights(config.weight_decay, decayed))
    links.append(_method(config.method, rate, config.weight_decay, decayed))
    if isinstance(config.schedule, schedules.Plateau):
        links.append(config.schedule.transformation(warmup=config.warmup))
    return optax.with_extra_args_support(optax.chain(*links))


def _method(
    method: Method,
    rate: optax.Schedule,
    weight_decay: float,
    decayed: Callable[[Params], Params],
) -> optax.GradientTransformation:
    mask = decayed if weight_decay else None
    match method:
        case GD() | SGD():
            return optax.sgd(rate)
        case Momentum(momentum=momentum):
            return optax.sgd(rate, momentum)
        case Nesterov(momentum=momentum):
            return optax.sgd(rate, momentum, nesterov=True)
        case Adagrad(initial=initial, eps=eps):
            return optax.adagrad(rate, initial, eps)
        case RMSProp(decay=smoothing, eps=eps):
            return optax.rmsprop(rate, smoothing, eps)
        case Adam(b1=b1, b2=b2, eps=eps):
            return optax.adam(rate, b1, b2, eps)
        case AdamW(b1=b1, b2=b2, eps=eps):
            return optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)
        case Lion(b1=b1, b2=b2):
            return optax.lion(rate, b1, b2, weight_decay=weight_decay, mask=mask)
        case Muon():
            # optax.contrib.muon cannot mask the decay of its Adam half, so decay comes after both.
            direction = optax.contrib.muon(
                1.0, beta=method.beta, ns_steps=method.steps, adam_b1=method.b1, adam_b2=method.b2
            )
            decay = optax.add_decayed_weights(-weight_decay, mask)
            return optax.chain(direction, decay, optax.scale_by_schedule(rate))
