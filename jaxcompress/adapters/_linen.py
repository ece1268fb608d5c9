"""Linen modules as `(fn, params)`."""

from typing import Any

from jaxcompress.adapters._flax import nn
from jaxcompress.adapters._fn import Fn
from jaxcompress.tree import Params


def from_linen(module: nn.Module, variables: Params, **apply_kwargs: Any) -> tuple[Fn, Params]:
    """Turn a Linen module and its variables into `(fn, params)`.

    Args:
        module: The module.
        variables: What `module.init` gave: params and any other collections. It is the params
            of `fn`, unchanged, so paths read `params/dense/kernel`, `batch_stats/bn/mean`.
        **apply_kwargs: Keywords of every `module.apply`, such as `train=False` or
            `mutable=["batch_stats"]` (fn then returns `(outputs, updates)`, as `apply` does).
            Keywords given to `fn` itself, such as `rngs=...`, come on top.

    Returns:
        `(fn, params)` with `fn(params, *inputs)` equal to `module.apply(params, *inputs)`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> module = nn.Dense(2)
        >>> variables = module.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> fn, params = from_linen(module, variables)
        >>> fn(params, jnp.ones((5, 3))).shape
        (5, 2)
    """

    def fn(params: Params, *inputs: Any, **kwargs: Any) -> Any:
        return module.apply(params, *inputs, **{**apply_kwargs, **kwargs})

    return fn, variables
