"""Optimizers by name: optax's own, behind clipping, with weight decay on chosen leaves."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import optax
import optax.contrib

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, require_at_least
from jaxcompress.tree import Params, Where

Method: TypeAlias = Literal[
    "gd", "sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw", "lion", "muon"
]
"""The name of an update rule."""

_BUILD: Mapping[Method, Callable[..., optax.GradientTransformation]] = {
    "gd": optax.sgd,
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "nesterov": functools.partial(optax.sgd, momentum=0.9, nesterov=True),
    "adagrad": optax.adagrad,
    "rmsprop": optax.rmsprop,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lion": optax.lion,
    "muon": optax.contrib.muon,
}
_OURS = {
    "mask": "decayed",
    "weight_decay_mask": "decayed",
    "adam_weight_decay": "weight_decay",
    "adam_learning_rate": "learning_rate",
}
"""Arguments of optax's functions, and the one of `optimizer` that says the same."""
_DECAYS = {"momentum", "decay", "b1", "b2", "beta", "adam_b1", "adam_b2"}


def optimizer(
    method: Method,
    *,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    decayed: Where = tree.weights,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Build one of optax's optimizers by name, with clipping and weight decay.

    What `train` and `sparsity` do, they do with any optax transformation. This function is for
    programs that choose by a name, and for decaying some leaves and not others by a `where`.

    Args:
        method: `"gd"` (give it the whole data set as one batch), `"sgd"`, `"momentum"`,
            `"nesterov"` (both 0.9 by default), `"adagrad"`, `"rmsprop"`, `"adam"`
            (bias-corrected, arXiv:1412.6980), `"adamw"` (arXiv:1711.05101), `"lion"`
            (arXiv:2302.06675), or `"muon"` on the matrices with Adam on the rest.
        learning_rate: A positive number, or an optax schedule, `step -> learning rate`.
        weight_decay: Decoupled, `p - learning_rate * weight_decay * p`, for adamw, lion and muon.
            For the others the classical L2 term, `g + weight_decay * p` after clipping, which
            adaptive methods then rescale. 0 for none, whatever optax's default is.
        decayed: Which leaves `weight_decay` pulls to zero; by default the weights, so not
            biases and norm scales. With a weight decay, it must select something.
        clip_norm: Scale the gradient down to this global norm, after `clip_value`.
        clip_value: Clip each gradient entry to `[-clip_value, clip_value]`, first of all.
        **options: Further arguments of optax's function, by its names: `b1`, `eps`,
            `mu_dtype`, `momentum`, `ns_steps`, ...

    Returns:
        An optax transformation. `make_step` hands it the loss as `value`, for whatever is chained
        behind it, such as `optax.contrib.reduce_on_plateau`.

    Raises:
        ArgumentError: If the method or an option is unknown, or a number is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> schedule = optax.schedules.cosine_decay_schedule(0.1, decay_steps=1000)
        >>> tx = optimizer("momentum", learning_rate=schedule, clip_norm=1.0, momentum=0.95)
        >>> params, grads = {"w": jnp.zeros(())}, {"w": jnp.full((), 2.0)}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> round(float(updates["w"]), 3)
        -0.1
    """
    if method not in _BUILD:
        raise ArgumentError(
            "method",
            got=repr(method),
            expected="the name of an update rule",
            fix=_suggest_names(str(method), get_args(Method)),
        )
    _check_numbers(learning_rate, weight_decay, clip_norm, clip_value)
    _check_names(method, options)
    build = functools.partial(_BUILD[method], **options)
    mask = functools.partial(_select_decayed, decayed) if weight_decay else None
    links = []
    if clip_value is not None:
        links.append(optax.clip(clip_value))
    if clip_norm is not None:
        links.append(optax.clip_by_global_norm(clip_norm))
    if method in ("adamw", "lion"):
        links.append(build(learning_rate, weight_decay=weight_decay, mask=mask))
    elif method == "muon":
        # optax.contrib.muon cannot mask the decay of its Adam half, so decay comes after both.
        decay = optax.add_decayed_weights(-weight_decay, mask)
        rate = optax.scale_by_learning_rate(learning_rate, flip_sign=False)
        links += [build(1.0), decay, rate]
    else:
        if weight_decay:
            links.append(optax.add_decayed_weights(weight_decay, mask))
        links.append(build(learning_rate))
    return optax.with_extra_args_support(optax.chain(*links))


def _select_decayed(decayed: Where, params: Params) -> Params:
    chosen = tree.select(params, decayed)
    return tree.map_with_path(lambda path, _: path in chosen, params)


def _check_numbers(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    clip_norm: float | None,
    clip_value: float | None,
) -> None:
    if isinstance(learning_rate, int | float) and not learning_rate > 0:
        raise ArgumentError(
            "learning_rate",
            got=learning_rate,
            expected="a positive number, or an optax schedule",
            fix="Try 1e-3.",
        )
    for name, value in (("clip_norm", clip_norm), ("clip_value", clip_value)):
        if value is not None and not value > 0:
            raise ArgumentError(
                name, got=value, expected="a positive number", fix="Use None not to clip."
            )
    require_at_least("weight_decay", weight_decay, 0, fix="Use 0 for none.")


def _check_names(method: Method, options: Mapping[str, Any]) -> None:
    accepted = inspect.signature(_BUILD[method]).parameters.keys()
    accepted = accepted - {"learning_rate", "weight_decay"} - _OURS.keys()
    named = accepted | {"learning_rate", "weight_decay", "decayed", "clip_norm", "clip_value"}
    for name, value in options.items():
        if name not in accepted:
            raise ArgumentError(
                name,
                got=repr(value),
                expected=f"an option of {method!r}",
                fix=f"Use `{_OURS[name]}`." if name in _OURS else _suggest_names(name, named),
            )
        if name in _DECAYS and isinstance(value, int | float) and not 0 <= value < 1:
            raise ArgumentError(name, got=value, expected="a decay in [0, 1)", fix="Try 0.9.")


def _suggest_names(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(map(repr, near))}?"
    return f"There are {', '.join(map(repr, sorted(known)))}."
