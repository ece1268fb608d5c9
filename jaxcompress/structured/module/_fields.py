"""The numbers in a module's configuration, and the search for those that give wanted shapes."""

import dataclasses
import functools
import heapq
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

from jaxcompress.structured.module._flax import nn, nnx

Place: TypeAlias = tuple[str | int, ...]
"""Where a number is: names of fields and keywords, positions in tuples."""
Settings: TypeAlias = Mapping[Place, int | float]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

MOST_TRIALS = 64
"""How many settings are tried until one gives the shapes."""
MORE_TRIALS = 24
"""How many more are tried where one gives the shapes but not the outputs."""


def place_str(place: Place) -> str:
    """Write a place as code does: `config.hidden`, `widths[1]`."""
    text = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in place)
    return text.removeprefix(".")


class Call:
    """A constructor with its arguments, whose numbers can be set like those of a dataclass.

    Args:
        build: A class, a function, or a `functools.partial` of one; defaults count as arguments.
    """

    def __init__(self, build: Callable[..., Any]):
        partial = build if isinstance(build, functools.partial) else functools.partial(build)
        self._bound = _inspect_signature(partial.func).bind_partial(
            *partial.args, **partial.keywords
        )
        self._bound.apply_defaults()
        self._build = partial.func
        self.arguments = dict(self._bound.arguments)

    def __call__(self) -> Any:
        bound = inspect.BoundArguments(self._bound.signature, self.arguments)
        return self._build(
            *map(_fresh, bound.args), **{k: _fresh(x) for k, x in bound.kwargs.items()}
        )

    def replace(self, arguments: Mapping[str, Any]) -> "Call":
        """Give a copy with other arguments."""
        new = object.__new__(Call)
        new._bound, new._build, new.arguments = self._bound, self._build, dict(arguments)
        return new


def _inspect_signature(build: Callable[..., Any]) -> inspect.Signature:
    # Asked of an NNX class itself, the answer is `(*args, **kwargs)`.
    if not isinstance(build, type):
        return inspect.signature(build)
    whole = inspect.signature(build.__init__)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def _fresh(x: Any) -> Any:
    # A stream of keys is used up by each call, and cannot be from inside another trace.
    return nnx.Rngs(0) if isinstance(x, nnx.Rngs) else x


def numbers(node: Any, kind: type, at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """List the numbers of one kind in a module, a call, or what they are configured by."""
    if isinstance(node, kind if kind is float else int | np.integer) and type(node) is not bool:
        yield at, node
        return
    for key, child in _children(node):
        yield from numbers(child, kind, (*at, key))


def _children(node: Any) -> list[tuple[str | int, Any]]:
    kind: Any = type(node)
    if isinstance(node, Call):
        return list(node.arguments.items())
    if isinstance(node, nn.Module) or (
        dataclasses.is_dataclass(node) and not isinstance(node, type | nnx.Module)
    ):
        names = [f.name for f in dataclasses.fields(node) if f.init]
        hidden = ("parent", "name") if isinstance(node, nn.Module) else ()
        return [(name, getattr(node, name)) for name in names if name not in hidden]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(kind._fields, node, strict=True))
    if isinstance(node, tuple | list):
        return list(enumerate(node))
    if isinstance(node, Mapping):
        return [(key, child) for key, child in node.items() if isinstance(key, str)]
    return []


def replace_numbers(node: Any, settings: Settings) -> Any:
    """Give a copy with other numbers in some places."""
    kind: Any = type(node)
    if () in settings:
        return kind(settings[()])
    new = {}
    for key, child in _children(node):
        inner = {place[1:]: value for place, value in settings.items() if place[0] == key}
        if inner:
            new[key] = replace_numbers(child, inner)
    if not new:
        return node
    if isinstance(node, Call):
        return node.replace({**node.arguments, **new})
    if isinstance(node, nn.Module):
        return node.clone(**new)
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return kind._replace(node, **new)
    if isinstance(node, tuple | list):
        return kind(new.get(k, child) for k, child in enumerate(node))
    if isinstance(node, Mapping):
        return kind({**node, **new})
    return dataclasses.replace(node, **new)


def search(
    places: Mapping[Place, int],
    pairs: Sequence[tuple[int, int]],
    wanted: Shapes,
    shapes_of: Callable[[Settings], Shapes | None],
) -> Iterator[tuple[Settings, list[str]]]:
    """Look for settings that give the wanted shapes, nearest first.

    A place may hold one of the widths that change, or a fixed fraction or multiple of it. The first
    guess sets every place that equals a width; then the guess that misfits least is varied in one
    place after another.

    Args:
        places: The numbers now.
        pairs: Widths before and after.
        wanted: The shapes that are wanted.
        shapes_of: Gives the shapes with some settings; `None` if there is no such model.

    Yields:
        Settings with the paths of leaves that misfit: all that fit, and the best that does not.
    """
    options = {
        place: choices for place, n in places.items() if (choices := _list_options(n, pairs))
    }
    names = sorted(options, key=str)
    guess = tuple(options[name][0] for name in names)
    tie = itertools.count()
    queue: list[tuple[int, int, tuple[int, ...]]] = []
    seen: set[tuple[int, ...]] = set()
    best: tuple[int, Settings, list[str]] | None = None
    left, fitted = MOST_TRIALS, False

    def evaluate(values: tuple[int, ...]) -> tuple[Settings, list[str]]:
        seen.add(values)
        settings = {k: v for k, v in zip(names, values, strict=True) if v != places[k]}
        found = shapes_of(settings)
        misfits = [path for path, shape in wanted.items() if not found or found.get(path) != shape]
        heapq.heappush(queue, (len(misfits), next(tie), values))
        return settings, misfits

    todo = [guess]
    while left > 0:
        for values in todo:
            if values in seen or left <= 0:
                continue
            left -= 1
            settings, misfits = evaluate(values)
            if not misfits:
                yield settings, misfits
                left, fitted = (left, True) if fitted else (min(left, MORE_TRIALS), True)
            elif best is None or len(misfits) < best[0]:
                best = len(misfits), settings, misfits
        if not queue:
            break
        _, _, values = heapq.heappop(queue)
        todo = [
            (*values[:k], value, *values[k + 1 :])
            for k, name in enumerate(names)
            for value in (*options[name], places[name])
        ]
    if not fitted and best is not None:
        yield best[1], best[2]


def _list_options(n: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """List what a number may become, the likeliest first: a width itself, then parts of one."""
    choices = dict.fromkeys(new for old, new in pairs if old == n)
    if not choices:
        choices[n] = None
    for ratio in dict.fromkeys(Fraction(new, old) for old, new in pairs):
        if n > 1 and (n * ratio).denominator == 1:
            choices[int(n * ratio)] = None
    return [] if list(choices) == [n] else list(choices)
