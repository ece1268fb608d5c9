"""Equinox modules, or any callable pytrees, as `(fn, params)`, and back."""

from typing import Any

import jax
import numpy as np

from jaxcompress import tree
from jaxcompress.adapters._fn import Fn
from jaxcompress.tree import Params


def from_equinox(module: Any) -> tuple[Fn, Params]:
    """Turn an Equinox module (any callable pytree) into `(fn, params)`.

    Args:
        module: The module. Like the module itself, `fn` takes one example at a time: batch it
            with `jax.vmap(fn, in_axes=(None, 0))`.

    Returns:
        `(fn, params)`: params is the module with `None` for everything that is not an array.

    Example:
        >>> import equinox as eqx, jax.numpy as jnp
        >>> fn, params = from_equinox(eqx.nn.Linear(3, 2, key=jax.random.key(0)))
        >>> tree.paths(params), fn(params, jnp.ones(3)).shape
        (['weight', 'bias'], (2,))
    """
    params = jax.tree.map(lambda x: x if _is_array(x) else None, module)

    def fn(params: Params, *inputs: Any, **kwargs: Any) -> Any:
        return to_equinox(module, params)(*inputs, **kwargs)

    return fn, params


def to_equinox(module: Any, params: Params) -> Any:
    """Build a new Equinox module from params.

    Args:
        module: The module that `from_equinox` took: it gives the structure and whatever is not
            an array.
        params: Params of its fn, as trained or pruned since.

    Returns:
        A new module of the same class.

    Raises:
        StructureError: If params do not mirror the module.
    """
    return tree.merge(params, jax.tree.map(lambda x: None if _is_array(x) else x, module))


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)
