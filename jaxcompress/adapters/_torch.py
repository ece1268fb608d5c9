"""Flax params from a PyTorch checkpoint."""

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, StructureError
from jaxcompress.tree import Params, Where

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
    if isinstance(state, str | os.PathLike):
        from safetensors.numpy import load_file  # files alone need it

        state = load_file(state)
    tensors = state
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
