"""Residual blocks of a function, as names to choose from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from jaxcompress import tree
from jaxcompress.graph import Traced
from jaxcompress.graph.sites import call_of, number_repeats
from jaxcompress.mappings import FieldMapping
from jaxcompress.structured.depth._flow import Flow, flow_of
from jaxcompress.structured.depth._residuals import (
    Residual,
    Stack,
    layers_of,
    names_of,
    prefix_of,
    residuals_of,
)
from jaxcompress.structured.depth._surgery import operate


@dataclass(frozen=True, kw_only=True)
class Block:
    """A residual branch: `x + f(x)`, f with at least one contraction of a leaf.

    Attributes:
        name: What is common to the paths of the leaves that f contracts, `layers_0/attention`;
            where that is not its own, the parts below as well: `layers_0/gate+up+down`.
        layer: The name of the layer that it belongs to.
        sites: Names of the sites inside f.
        leaves: Paths of the leaves that go if it is dropped (in all layers of a stack).
        shape: Of x, in one run.
        stack: Lengths of the scans around it, outermost first: it runs once for each iteration.
    """

    name: str
    layer: str
    sites: tuple[str, ...]
    leaves: tuple[str, ...]
    shape: tuple[int, ...]
    stack: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Blocks that follow each other and lie below one path.

    Attributes:
        name: That path, such as `layers_0`; a block on its own gives its name.
        blocks: Names of the blocks, in order.
        length: For layers that a scan runs over stacked leaves, how many there are: layer i is
            called `name[i]` and is a whole iteration. `None` for a layer written out.
    """

    name: str
    blocks: tuple[str, ...]
    length: int | None = None


@dataclass(frozen=True, kw_only=True)
class Blocks(FieldMapping[Block]):
    """The residual blocks of a function by name, in the order in which they run.

    Attributes:
        blocks: The blocks by name; the mapping itself gives them, too.
        layers: The layers by name, in order.
        rejected: Sums that look like blocks and cannot be dropped, `{name: reason}`.
    """

    blocks: Mapping[str, Block] = field(repr=False)
    layers: Mapping[str, Layer]
    rejected: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Analysis:
    """A captured call, and what its blocks are called.

    Attributes:
        traced: The call.
        flow: It as a graph of values.
        blocks: The blocks by name.
        layers: The layers by name.
        stacks: The scans of the layers that have a length.
        rejected: `{name: reason}`.
    """

    traced: Traced
    flow: Flow
    blocks: Mapping[str, Residual]
    layers: Mapping[str, Layer]
    stacks: Mapping[str, Stack]
    rejected: Mapping[str, str]

    def layer_of(self, block: str) -> str:
        return next(name for name, layer in self.layers.items() if block in layer.blocks)


def analyse(
    fn: Callable[..., Any] | Traced, params: tree.Params, inputs: Any, kwargs: Any
) -> Analysis:
    """Capture a call and name its blocks and layers."""
    traced = call_of(fn, params, inputs, kwargs)
    found, lookalikes, scans = residuals_of(traced)
    names = names_of([one.paths for one in (*found, *lookalikes)])
    blocks = dict(zip(names, found, strict=False))
    layers, stacks = _layers(blocks, scans)
    reasons = [one.reason for one in lookalikes]
    return Analysis(
        traced=traced,
        flow=flow_of(traced),
        blocks=blocks,
        layers=layers,
        stacks=stacks,
        rejected=dict(zip(names[len(found) :], reasons, strict=True)),
    )


def _layers(
    blocks: Mapping[str, Residual], stacks: Sequence[Stack]
) -> tuple[dict[str, Layer], dict[str, Stack]]:
    found: list[tuple[tuple[int, ...], Layer, Stack | None]] = []
    stacked = {stack.node.position for stack in stacks}
    for stack in stacks:
        mine = [n for n, one in blocks.items() if one.scans[:1] == (stack.node.position,)]
        prefix = "/".join(prefix_of(stack.paths)) or names_of([stack.paths])[0]
        layer = Layer(name=prefix, blocks=tuple(mine), length=stack.length)
        found.append((stack.node.position, layer, stack))
    flows: dict[tuple[int, ...], list[str]] = {}
    for name, one in blocks.items():
        if one.scans[:1] and one.scans[0] in stacked:
            continue
        flows.setdefault(one.flow.position, []).append(name)
    for names in flows.values():
        for name, numbers in layers_of([blocks[n].paths for n in names], names):
            mine = tuple(names[k] for k in numbers)
            found.append((blocks[mine[0]].node.position, Layer(name=name, blocks=mine), None))
    found.sort(key=lambda each: each[0])
    names = number_repeats([layer.name for _, layer, _ in found])
    named = list(zip(names, found, strict=True))
    layers = {name: replace(layer, name=name) for name, (_, layer, _) in named}
    return layers, {name: stack for name, (_, _, stack) in named if stack is not None}


def blocks(fn: Callable[..., Any], params: tree.Params, *inputs: Any, **kwargs: Any) -> Blocks:
    """Find the residual blocks of a function: sums `y = x + f(x)` in its graph.

    One operand of the sum is what the other is computed from, by way of at least one contraction
    of a leaf, up to casts and the borders of `jit` and `checkpoint`. In parallel residuals,
    `x + attention(x) + mlp(x)`, either branch is a block. What follows the sum stays when a block
    is dropped: `relu(x + f(x))` becomes `relu(x)`. Blocks are found in the bodies of scans, too,
    not in those of `cond`, `while`, `shard_map` and functions with their own differentiation rule.

    Nothing is computed: arrays may be `jax.ShapeDtypeStruct`s.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        params: Any pytree of arrays.
        *inputs: fn's other arguments.
        **kwargs: fn's keyword arguments.

    Returns:
        The blocks by name, with the layers that they form and what is no block and why.

    Raises:
        ArgumentTypeError: As `graph.trace`.

    Example:
        >>> import jax.numpy as jnp
        >>> def fn(params, x):
        ...     for layer in ("layer_0", "layer_1"):
        ...         x = x + jnp.tanh(x @ params[layer]["up"]) @ params[layer]["down"]
        ...     return x @ params["head"]
        >>> layer = {"up": jnp.ones((3, 5)), "down": jnp.ones((5, 3))}
        >>> params = {"layer_0": layer, "layer_1": layer, "head": jnp.ones((3, 2))}
        >>> found = blocks(fn, params, jnp.ones((7, 3)))
        >>> list(found), found["layer_0"].leaves
        (['layer_0', 'layer_1'], ('layer_0/down', 'layer_0/up'))

    Reference:
        Men et al., ShortGPT, arXiv:2403.03853 (layers of a transformer as units).
    """
    analysis = analyse(fn, params, inputs, kwargs)
    traced, sites = analysis.traced, analysis.traced.sites
    found = {}
    for name, one in analysis.blocks.items():
        surgery = operate(traced, [one], {})
        found[name] = Block(
            name=name,
            layer=analysis.layer_of(name),
            sites=tuple(sites[k].name for k in one.sites),
            leaves=surgery.removed,
            shape=one.flow.shapes[one.node.results[0]],
            stack=one.stack,
        )
    return Blocks(blocks=found, layers=analysis.layers, rejected=analysis.rejected)


def abstract(params: tree.Params) -> tree.Params:
    """Give the shapes of params alone."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
