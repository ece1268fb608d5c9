"""From a model of any library to `(fn, params)`, and back.

Everything in jaxcompress works on a pure `fn(params, *inputs)`. These adapters make one from a
Linen, NNX or Equinox model, and fill Flax params from a PyTorch checkpoint.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, StructureError
from jaxcompress.tree import Params, Where

Fn: TypeAlias = Callable[..., Any]
"""A pure `fn(params, *inputs) -> outputs`: the unit of work everywhere."""


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
        >>> module = nn.Dense(2)
        >>> variables = module.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> fn, params = from_linen(module, variables)
        >>> fn(params, jnp.ones((5, 3))).shape
        (5, 2)
    """

    def fn(params: Params, *inputs: Any, **kwargs: Any) -> Any:
        return module.apply(params, *inputs, **{**apply_kwargs, **kwargs})

    return fn, variables


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
        >>> fn, params = from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> tree.paths(params), fn(params, jnp.ones((5, 3))).shape
        (['bias', 'kernel'], (5, 2))
    """
    graphdef, state = nnx.split(module)

    def fn(params: Params, *inputs: Any, **kwargs: Any) -> Any:
        model = nnx.merge(graphdef, _copied(params))
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
        >>> module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> fn, params = from_nnx(module)
        >>> halved = to_nnx(module, jax.tree.map(lambda x: x / 2, params))
        >>> bool(jnp.allclose(halved(jnp.ones((1, 3))), module(jnp.ones((1, 3))) / 2))
        True
    """
    graphdef, state = nnx.split(module)
    tree.flatten_like(state, params, name="params")
    return nnx.merge(graphdef, _copied(params))


def _copied(params: Any) -> Any:
    """Make new variables of the same arrays: a merged module shares them, and writes into them."""
    return jax.tree.map(lambda x: x, params)


def from_equinox(module: Any) -> tuple[Fn, Params]:
    """Turn an Equinox module (any callable pytree) into `(fn, params)`.

    Args:
        module: The module. Like the module itself, `fn` takes one example at a time: batch it
            with `jax.vmap(fn, in_axes=(None, 0))`.

    Returns:
        `(fn, params)`: params is the module with `None` for everything that is not an array.

    Example:
        >>> import equinox as eqx
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


def learnable(params: Params) -> Where:
    """Choose the leaves that learn: floating arrays that are not mutable state.

    Mutable state is told by its kind where the tree says it: in a Linen `variables` dict every
    collection but `params`; in an `nnx.State` every variable that is not an `nnx.Param`; anywhere
    else what lies under a `batch_stats` key. Compressed leaves (`QArray`) do not learn.

    Args:
        params: Any pytree of arrays.

    Returns:
        A `where` for these params.

    Example:
        >>> params = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.ones(2)}}
        >>> list(tree.select(params, learnable(params)))
        ['params/w']
    """
    fixed = _nnx_state(params)
    is_linen = isinstance(params, Mapping) and "params" in params and not fixed

    def where(path: str, leaf: Any) -> bool:
        segments = path.split("/")
        if isinstance(leaf, tree.LeafNode) or not tree.is_floating(leaf) or path in fixed:
            return False
        return segments[0] == "params" if is_linen else "batch_stats" not in segments

    return where


def _nnx_state(params: Params) -> frozenset[str]:
    """List the paths of NNX variables other than `nnx.Param`: statistics, caches, counters."""
    flat = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )[0]
    return frozenset(
        tree.path_str(keypath)
        for keypath, leaf in flat
        if isinstance(leaf, nnx.Variable) and not isinstance(leaf, nnx.Param)
    )


# --- PyTorch checkpoints ----------------------------------------------------------------------

_TORCH_LEAF = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_COLLECTIONS = ("params", "batch_stats")
_BOOKKEEPING = re.compile(r"(^|\.)num_batches_tracked$")


def from_torch_state(
    state: Mapping[str, Any] | str | os.PathLike[str],
    variables: Params,
    *,
    rename: Callable[[str], str] | Mapping[str, str] | None = None,
    ignore: Where = (),
) -> Params:
    """Fill Flax variables with the weights of a PyTorch `state_dict`.

    A leaf `params/layer1_0/conv1/kernel` takes the tensor `layer1_0.conv1.weight`: kernels and
    scales are `weight`, batch statistics `running_mean` and `running_var`. Kernels are
    transposed from `(out, in, *spatial)` to `(*spatial, in, out)`; a `DenseGeneral` kernel and
    bias then split their axes into heads. Counters and random keys are left as they are.
    Transposed convolutions store `(in, out, ...)` and are not covered.

    Args:
        state: Tensor by name (NumPy, JAX or PyTorch CPU tensors), or a safetensors file.
        variables: Linen variables or an `nnx.State` that say what is wanted; shapes are enough
            (`jax.eval_shape` of `init`).
        rename: From a Flax module path (`layer1_0/conv1`, without collection and leaf) to the
            PyTorch module path: a function, or `{regex: replacement}` applied in order. `/`
            becomes `.` afterwards.
        ignore: Tensor names that may go unused. `num_batches_tracked` always may.

    Returns:
        Variables of the same structure and dtypes, with the checkpoint's values.

    Raises:
        StructureError: If a tensor is missing or left over; it lists them.
        ArgumentError: If a tensor's shape does not fit its leaf.

    Example:
        >>> variables = {"params": {"head": {"kernel": jax.ShapeDtypeStruct((3, 2), "float32")}}}
        >>> out = from_torch_state({"fc.weight": np.ones((2, 3))}, variables,
        ...                        rename={"^head$": "fc"})
        >>> out["params"]["head"]["kernel"].shape
        (3, 2)
    """
    tensors = load_file(state) if isinstance(state, str | os.PathLike) else state
    names = {
        path: _torch_name(path, rename)
        for path, leaf in tree.items(variables)
        if tree.is_floating(leaf)
    }
    missing = {path: name for path, name in names.items() if name not in tensors}
    unused = [
        name
        for name in tensors
        if name not in names.values()
        and not _BOOKKEEPING.search(name)
        and not tree.matches(ignore, name)
    ]
    if missing or unused:
        wants = ", ".join(f"{name!r} (for {path!r})" for path, name in list(missing.items())[:8])
        raise StructureError(
            "state",
            got=f"missing tensors: {wants or 'none'}; unused tensors: {unused[:8] or 'none'}",
            expected="one tensor for every leaf, and none left over",
            fix="Give `rename` (Flax module path to PyTorch's), or list what to `ignore`.",
        )
    return tree.map_with_path(
        lambda path, leaf: (
            _convert(path, leaf, names[path], np.asarray(tensors[names[path]]))
            if path in names
            else leaf
        ),
        variables,
    )


def _torch_name(path: str, rename: Callable[[str], str] | Mapping[str, str] | None) -> str:
    *modules, leaf = path.split("/")
    if modules and modules[0] in _COLLECTIONS:
        modules = modules[1:]
    module = "/".join(modules)
    if callable(rename):
        module = rename(module)
    else:
        for pattern, replacement in (rename or {}).items():
            module = re.sub(pattern, replacement, module)
    return ".".join(filter(None, [module.replace("/", "."), _TORCH_LEAF.get(leaf, leaf)]))


def _convert(path: str, leaf: Any, name: str, tensor: np.ndarray) -> jax.Array:
    original = tensor.shape
    if path.split("/")[-1] == "kernel" and tensor.ndim >= 2:
        tensor = np.transpose(tensor, (*range(2, tensor.ndim), 1, 0))  # OI... -> ...IO
        splits = [(math.prod(leaf.shape[:k]), math.prod(leaf.shape[k:])) for k in range(leaf.ndim)]
        if leaf.ndim > 2 and tensor.shape in splits:
            tensor = tensor.reshape(leaf.shape)  # (in, out) -> (in, heads, head_dim)
    elif path.split("/")[-1] == "bias" and tensor.shape == (math.prod(leaf.shape),):
        tensor = tensor.reshape(leaf.shape)  # (out,) -> (heads, head_dim)
    if tensor.shape != tuple(leaf.shape):
        raise ArgumentError(
            "state",
            got=f"{name!r} of shape {original}, which becomes {tensor.shape}",
            expected=f"a tensor for {path!r} of shape {tuple(leaf.shape)}",
            fix="Check the model's widths, or `rename`.",
        )
    return jnp.asarray(tensor, leaf.dtype)
