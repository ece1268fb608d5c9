"""The variables of quantization-aware training: params, and beside them what quantizers hold."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress import adapters, tree
from jaxcompress.errors import StructureError
from jaxcompress.tree import Params


class QuantizerState(NamedTuple):
    """What `quantizers` holds, by the paths of leaves.

    Attributes:
        learned: `{path: {"weights" or "activations": {name: array}}}`.
        ranges: `{path: {"low", "high" and "count"}}`.
        steps: Observed calls so far, int32.
    """

    learned: dict[str, dict[str, dict[str, Array]]]
    ranges: dict[str, Mapping[str, Array]]
    steps: Array


def is_variables(x: Any) -> bool:
    """Tell whether this is what `QAT.init` makes, rather than params."""
    if not isinstance(x, Mapping) or set(x) != {"params", "quantizers"}:
        return False
    beside = x["quantizers"]
    return isinstance(beside, Mapping) and set(beside) == set(QuantizerState._fields)


def nest(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Write `{path: entry}` as nested dictionaries, whose paths are the leaves'."""
    out: dict[str, Any] = {}
    for path, entry in entries.items():
        *above, last = path.split("/")
        inner = out
        for segment in above:
            inner = inner.setdefault(segment, {})
        inner[last] = entry
    return out


def join_variables(params: Params, state: QuantizerState) -> Params:
    """Put the state beside params."""
    return {
        "params": params,
        "quantizers": {
            "learned": nest(state.learned),
            "ranges": nest(state.ranges),
            "steps": state.steps,
        },
    }


Shapes = dict[str, tuple[int, ...]]
"""Shapes by name of what is learned or followed of one leaf: `{"step": (1, 8)}`."""


def shapes_of(start: Callable[..., Mapping[str, Any]], *like: Any) -> Shapes:
    """Give the shapes of what is learned or followed, from what starts it; nothing is computed."""
    return {name: tuple(x.shape) for name, x in jax.eval_shape(start, *like).items()}


def split_variables(variables: Params, *, has_state: bool) -> tuple[Params, QuantizerState]:
    """Take variables, or params that need nothing beside them, apart.

    Raises:
        StructureError: If they lack what is needed, or hold what is not, or are of no one model.
    """
    if not is_variables(variables):
        if has_state:
            raise StructureError(
                "variables",
                got="params alone",
                expected="what is learned, followed and counted beside them",
                fix="Call `variables = qat.init(params, *inputs)` first.",
            )
        return variables, QuantizerState({}, {}, jnp.zeros((), jnp.int32))
    params, beside = variables["params"], variables["quantizers"]
    learned: dict[str, dict[str, dict[str, Array]]] = {}
    ranges: dict[str, Any] = {}
    for path, x in tree.items(beside["learned"]):
        leaf, of, name = path.rsplit("/", 2)
        learned.setdefault(leaf, {}).setdefault(of, {})[name] = x
    for path, x in tree.items(beside["ranges"]):
        leaf, name = path.rsplit("/", 1)
        ranges.setdefault(leaf, {})[name] = x
    held, known = {*learned, *ranges}, set(tree.paths(params))
    if held and not has_state:
        raise StructureError(
            "variables",
            got=f"learned or followed ranges, of {tree.shorten(sorted(held))}",
            expected="params: this function learns and follows nothing",
            fix='Pass variables["params"], or give `train` the options that they were made with.',
        )
    if held - known:
        raise StructureError(
            "variables",
            got=f"ranges of {tree.shorten(sorted(held - known))}, which params do not have",
            expected="variables of one model",
            fix="Call `qat.init(params, *inputs)` with these params.",
        )
    return params, QuantizerState(learned, ranges, beside["steps"])


def check_weights(state: QuantizerState, wanted: Mapping[str, Shapes]) -> None:
    """Refuse variables that do not hold what is learned of the weights, and that alone."""
    held = {path: entry["weights"] for path, entry in state.learned.items() if "weights" in entry}
    _check_entries("what is learned of weights", held, wanted)


def check_activations(state: QuantizerState, wanted: Mapping[str, Shapes]) -> None:
    """Refuse variables that do not hold a range for each leaf that needs one, and those alone."""
    held: dict[str, Any] = dict(state.ranges)
    for path, entry in state.learned.items():
        if "activations" in entry:
            held[path] = entry["activations"]
    _check_entries("ranges of activations", held, wanted)


def _check_entries(what: str, held: Mapping[str, Any], wanted: Mapping[str, Shapes]) -> None:
    missing, extra = sorted(set(wanted) - set(held)), sorted(set(held) - set(wanted))
    if missing or extra:
        got = [f"none for {tree.shorten(missing)}"] if missing else []
        got += [f"some for {tree.shorten(extra)}"] if extra else []
        raise StructureError(
            "variables",
            got=f"{what}: {', and '.join(got)}",
            expected="variables made by this function's own `init`",
            fix="Call `qat.init(params, *inputs)`, with the options that training goes on with.",
        )
    for path, shapes in wanted.items():
        found = {name: tuple(x.shape) for name, x in held[path].items()}
        if found != shapes:
            raise StructureError(
                "variables",
                got=f"for {path!r} {what} of the shapes {found}",
                expected=f"the shapes {shapes}",
                fix="Call `qat.init(params, *inputs)` with these params and quantizers.",
            )


def labels(variables: Params) -> Params:
    """Label every leaf by how it trains, for `optax.multi_transform`.

    Args:
        variables: What `QAT.init` made, params alone, or a part of either with `None` for the
            rest.

    Returns:
        A tree of the same structure: "weights" for leaves that learn, "learned" for what
        quantizers learn, "state" for what no optimizer may touch (ranges, counters, BatchNorm's
        statistics).

    Example:
        >>> import optax
        >>> labels({"kernel": jnp.ones((2, 2)), "step": jnp.zeros((), jnp.int32)})
        {'kernel': 'weights', 'step': 'state'}
        >>> tx = optax.multi_transform(
        ...     {"weights": optax.adam(1e-3), "learned": optax.adam(1e-4),
        ...      "state": optax.set_to_zero()}, labels)
    """
    learns = learnable(variables)

    def label(path: str, leaf: Any) -> str:
        if not tree.matches(learns, path, leaf):
            return "state"
        return "learned" if is_variables(variables) and _is_beside(path) else "weights"

    return tree.map_with_path(label, variables)


def learnable(variables: Params) -> tree.Where:
    """Choose the leaves that learn, of variables or of params; see `adapters.learnable`.

    Args:
        variables: What `QAT.init` made, or params alone.

    Returns:
        A `where` for them.
    """
    if not is_variables(variables):
        return adapters.learnable(variables)
    inner = adapters.learnable(variables["params"])

    def where(path: str, leaf: Any) -> bool:
        if _is_beside(path):
            return path.startswith("quantizers/learned/")
        return tree.matches(inner, path.removeprefix("params").removeprefix("/"), leaf)

    return where


def _is_beside(path: str) -> bool:
    return path.startswith("quantizers/")
