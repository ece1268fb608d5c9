"""How Linen and NNX modules are built with other numbers in their configuration."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from jaxcompress import adapters, tree
from jaxcompress.errors import ArgumentTypeError
from jaxcompress.structured.module._fields import Call, Settings, Shapes, replace_numbers
from jaxcompress.structured.module._flax import nn, nnx
from jaxcompress.structured.module._literals import WidthLiteral


def is_near(a: float, b: float) -> bool:
    """Tell whether two numbers are one, in float32 and as it was written."""
    return math.isclose(a, b, rel_tol=1e-5)


Builder: TypeAlias = "_Linen | _Nnx"
"""How modules of one library are built; `source` has the numbers."""


def builder_of(module: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Builder:
    if isinstance(module, nn.Module):
        return _Linen(module, inputs, kwargs)
    if callable(module) and not isinstance(module, nnx.Module):
        call = Call(module)
        if isinstance(nnx.eval_shape(lambda: call()), nnx.Module):
            return _Nnx(call, kwargs)
    raise ArgumentTypeError(
        "module",
        got=f"a {type(module).__name__}",
        expected="a Linen module, or what builds an NNX module",
        fix="For NNX give its class with arguments: functools.partial(Model, hidden=8, rngs=rngs).",
    )


class _Linen:
    def __init__(self, module: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]):
        self.source, self._inputs, self._kwargs = module, inputs, kwargs

    def shapes_of(self, settings: Settings) -> Shapes | None:
        kwargs = {k: v for k, v in self._kwargs.items() if k not in ("mutable", "rngs")}
        key = jax.random.key(0)
        rngs = {"dropout": key, **self._kwargs.get("rngs", {}), "params": key}
        try:
            module = replace_numbers(self.source, settings)
            made = jax.eval_shape(lambda *args: module.init(rngs, *args, **kwargs), *self._inputs)
        except Exception:  # whatever the user's code raises at widths that do not go together
            return None
        made = nn.meta.unbox(made)
        return {path: tuple(leaf.shape) for path, leaf in tree.items(made)}

    def make_module(
        self, source: Any, norms: Sequence[WidthLiteral]
    ) -> tuple[Any, list[WidthLiteral]]:
        return source, list(norms)

    def make_fn(self, module: Any, params: tree.Params) -> Callable[..., Any]:
        return adapters.from_linen(module, params, **self._kwargs)[0]

    def fill_module(self, module: Any, params: tree.Params) -> Any:
        return module


class _Nnx:
    def __init__(self, call: Call, kwargs: Mapping[str, Any]):
        self.source, self._kwargs = call, kwargs

    def shapes_of(self, settings: Settings) -> Shapes | None:
        try:
            state = nnx.state(self._abstract(replace_numbers(self.source, settings)))
        except Exception:  # as above
            return None
        return {path: tuple(leaf.shape) for path, leaf in tree.items(state)}

    def _abstract(self, call: Call) -> Any:
        return nnx.eval_shape(lambda: call())

    def make_module(
        self, source: Any, norms: Sequence[WidthLiteral]
    ) -> tuple[Any, list[WidthLiteral]]:
        module = self._abstract(source)
        unset = []
        for norm in norms:
            was_set = [_set_epsilon(module, path, norm) for path in norm.leaves]
            if not any(was_set):
                unset.append(norm)
        return module, unset

    def make_fn(self, module: Any, params: tree.Params) -> Callable[..., Any]:
        if isinstance(module, Call):
            module = self._abstract(module)
        fn = adapters.from_nnx(module, **self._kwargs)[0]
        return lambda params, *inputs: fn(_as(nnx.state(module), params), *inputs)

    def fill_module(self, module: Any, params: tree.Params) -> Any:
        graphdef, state = nnx.split(module)
        return nnx.merge(graphdef, _as(state, params))


def _as(state: nnx.State, params: tree.Params) -> nnx.State:
    """Write params in the containers of another state, whose static metadata may differ."""
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(params))


def _set_epsilon(module: Any, path: str, norm: WidthLiteral) -> bool:
    """Set the float attribute of a leaf's module that is its epsilon."""
    *parents, _ = path.split("/")
    for name in parents:
        module = module[int(name)] if name.isdecimal() else getattr(module, name, None)
    for name, value in vars(module).items() if isinstance(module, nnx.Module) else ():
        if isinstance(value, float) and is_near(value, norm.epsilon):
            setattr(module, name, norm.wanted_epsilon)
            return True
    return False
