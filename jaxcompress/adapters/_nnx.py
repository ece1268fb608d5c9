"""NNX modules as `(fn, params)`, and back."""

from typing import Any

import jax

from jaxcompress import tree
from jaxcompress.adapters._flax import nnx
from jaxcompress.adapters._fn import Fn
from jaxcompress.tree import Params


def from_nnx(
    module: nnx.Module, *, mutable: Any = None, **call_kwargs: Any
) -> tuple[Fn, nnx.State]:
    """Turn an NNX module into `(fn, params)`.

    Args:
        module: The module; it is read, not changed. Its train or eval mode is fixed in `fn`.
        mutable: An NNX filter for the state that `fn` returns beside the outputs, such as
            `nnx.BatchStat`. With the default `None`, fn returns the outputs alone and whatever
            the module did to its state is dropped.
        **call_kwargs: Keywords of every call of the module. Keywords given to `fn` come on top.

    Returns:
        `(fn, params)`: params is the module's whole `nnx.State`, random state included;
        `fn(params, *inputs)` gives the outputs, or `(outputs, updates)` if `mutable` is given.

    Example:
        >>> import jax.numpy as jnp
        >>> fn, params = from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> tree.paths(params), fn(params, jnp.ones((5, 3))).shape
        (['bias', 'kernel'], (5, 2))
    """
    graphdef, state = nnx.split(module)

    def fn(params: Params, *inputs: Any, **kwargs: Any) -> Any:
        model = nnx.merge(graphdef, _copy(params))
        outputs = model(*inputs, **{**call_kwargs, **kwargs})
        return outputs if mutable is None else (outputs, nnx.state(model, mutable))

    return fn, state


def to_nnx(module: nnx.Module, params: nnx.State) -> nnx.Module:
    """Build a new NNX module from params, leaving `module` as it was.

    Args:
        module: The module that `from_nnx` took: it gives the structure.
        params: Params of its fn, as trained or pruned since.

    Returns:
        A new module that computes with params.

    Raises:
        StructureError: If params do not mirror the module's state.

    Example:
        >>> import jax.numpy as jnp
        >>> module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> fn, params = from_nnx(module)
        >>> halved = to_nnx(module, jax.tree.map(lambda x: x / 2, params))
        >>> bool(jnp.allclose(halved(jnp.ones((1, 3))), module(jnp.ones((1, 3))) / 2))
        True
    """
    graphdef, state = nnx.split(module)
    tree.flatten_like(state, params, name="params")
    return nnx.merge(graphdef, _copy(params))


def _copy(params: Any) -> Any:
    """Make new variables of the same arrays: a merged module shares them, and writes into them."""
    return jax.tree.map(lambda x: x, params)
