"""`to_module`: the user's own class, built at the new widths."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax

from jaxcompress import graph, tree
from jaxcompress.errors import ArgumentError
from jaxcompress.structured._certificate import (
    Distance,
    distance,
    is_abstract,
    random_like,
    tolerance_of,
)
from jaxcompress.structured._keep import Keep
from jaxcompress.structured._shrink import rebuild, slice_params
from jaxcompress.structured.module._builders import Builder, builder_of, is_near
from jaxcompress.structured.module._fields import (
    Place,
    Settings,
    Shapes,
    numbers,
    place_str,
    replace_numbers,
    search,
)
from jaxcompress.structured.module._flax import nn, nnx
from jaxcompress.structured.module._literals import WidthLiteral, set_epsilons, width_literals


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """A module at the new widths, with its weights.

    Attributes:
        module: A Linen module, or an NNX module that holds params.
        params: Its variables, or `nnx.State`: the shrunk ones, with what its class computes
            otherwise than the shrunk function folded in.
        fields: What was set: `{field or keyword: (old, new)}`.
        folded: Leaves that were scaled, and by how much.
        distance: From the shrunk function, the larger one on given and on random inputs; `None` if
            params are shapes only.
        structural: The same, with the epsilons that could not be set put right as it runs: shows
            that nothing else differs.
        tolerance: The largest relative distance that is rounding for the dtypes.
        notes: What could not be folded, and why.
    """

    module: Any
    params: tree.Params = field(repr=False)
    fields: Mapping[str, tuple[float, float]]
    folded: Mapping[str, float]
    distance: Distance | None
    structural: Distance | None
    tolerance: float
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether outputs were compared, and nothing but epsilon and rounding tells them apart."""
        return self.structural is not None and self.structural.relative <= self.tolerance

    def __str__(self) -> str:
        fields = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.fields.items())
        far = "not compared"
        if self.distance is not None:
            far = f"{self.distance} from the shrunk function (rounding: {self.tolerance:.0e})"
        if self.distance != self.structural:
            far += f", {self.structural} but for epsilon"
        lines = [f"{fields or 'no field changes'}; {far}"]
        lines += [f"  {path} times {factor:.4g}" for path, factor in self.folded.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def to_module(
    module: nn.Module | Callable[..., nnx.Module],
    params: tree.Params,
    keep: Keep,
    *inputs: Any,
    exact: bool = True,
    **kwargs: Any,
) -> Rebuilt:
    """Build the user's own Linen or NNX class at the new widths, with the shrunk weights.

    Integers in the module's fields (or in the keywords of an NNX constructor), in configuration
    dataclasses, tuples and dictionaries in them, are set such that the class makes leaves of the
    shrunk shapes. That needs widths that are uniform where the class says so: one `hidden` for all
    layers, as many heads in each.

    `shrink`'s function keeps the width N of fn as a number where it divides by it; the class
    divides by the new width K. For the root mean square of RMSNorm that folds exactly:

        x / sqrt(s/N + eps) * scale = x / sqrt(s/K + eps N/K) * (scale sqrt(N/K)),  s = sum x^2,

    and for queries or scores over the root of the heads' size,

        q / sqrt(N) = (q sqrt(K/N)) / sqrt(K).

    Epsilon is set where a field or an NNX attribute has it, and stays as it is otherwise. A mean
    that is subtracted (LayerNorm, GroupNorm) over an axis that shrinks cannot be folded; neither
    can other numbers that depend on a width, such as rotary wavelengths. Nothing is taken on trust:
    outputs are compared with the shrunk function's.

    Args:
        module: The Linen module at full size; or what builds the NNX module at full size: its
            class or a function, with arguments by `functools.partial`.
        params: Its variables or `nnx.State`, at full size or as shrunk (and trained since). For
            shapes only, outputs are not compared.
        keep: What is kept.
        *inputs: Inputs of the module.
        exact: Refuse a module whose outputs are not the shrunk function's, up to rounding and to an
            epsilon that no field sets. With `False` the nearest that was found is returned, and
            says how far it is.
        **kwargs: Keywords of every call, as for `adapters.from_linen` and `from_nnx`.

    Returns:
        The module with its params, what was set and folded, and the measured distance.

    Raises:
        ArgumentError: If no fields give the shrunk shapes, or outputs differ.
        ArgumentTypeError: If module is neither a Linen module nor builds an NNX module.
        MissingExtraError: If flax is not installed.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> from jaxcompress import adapters, structured
        >>> class Mlp(nn.Module):
        ...     hidden: int = 8
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(2)(jnp.tanh(nn.Dense(self.hidden, name="up")(x)))
        >>> x = jnp.ones((1, 3))
        >>> fn, params = adapters.from_linen(Mlp(), Mlp().init(jax.random.key(0), x))
        >>> groups = structured.groups(fn, params, x)
        >>> keep = structured.keep(groups, {"params/up/kernel": [0, 2, 5]})
        >>> small = to_module(Mlp(), params, keep, x)
        >>> small.module.hidden, small.agrees, small.module.apply(small.params, x).shape
        (3, True, (1, 2))
    """
    builder = builder_of(module, inputs, kwargs)
    smaller = _slice_to_size(params, keep)
    full = tree.map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(keep.shapes[path], x.dtype), smaller
    )
    fn = builder.make_fn(builder.source, full)
    literals = width_literals(graph.dims(fn, full, *inputs), keep.leaves)
    reference = _Reference(rebuild(fn, keep), smaller, inputs)
    best = _search_nearest(builder, keep, literals, smaller, reference)
    unfolded = best.distance is None and any(_is_inexact(literal) for literal in literals)
    if exact and (unfolded or (best.distance is not None and not best.agrees)):
        raise ArgumentError(
            "exact",
            got=f"a module that computes something else: {best}",
            expected=f"outputs within {best.tolerance:.0e} of the shrunk function's",
            fix="Use `structured.rebuild`, whose outputs are those; or exact=False, and train on.",
        )
    return best


def _search_nearest(
    builder: Builder,
    keep: Keep,
    literals: Sequence[WidthLiteral],
    smaller: tree.Params,
    reference: "_Reference",
) -> Rebuilt:
    """Search for the module that gives the shapes, and outputs if several do."""
    wanted = {path: keep.shape(path) for path in keep.shapes}
    places = {place: int(n) for place, n in numbers(builder.source, int)}
    best: Rebuilt | None = None
    for settings, misfits in search(places, _list_changes(keep), wanted, builder.shapes_of):
        if misfits:
            _refuse_shapes(builder, settings, misfits, wanted)
        for candidate in _candidates(builder, settings, literals, smaller, reference):
            if best is None or _judge_rebuilt(candidate) < _judge_rebuilt(best):
                best = candidate
        # Where nothing can agree, the first is as good as any.
        if best is None or best.distance is None or best.agrees or any(map(_is_inexact, literals)):
            break
    assert best is not None, "the search gives something, and each of it a candidate"
    return best


def _list_changes(keep: Keep) -> list[tuple[int, int]]:
    """List all widths that change, of groups and of axes, each with what it becomes."""
    pairs = [(keep.sizes[name], keep[name].shape[-1]) for name in keep]
    for path, axes in keep.leaves.items():
        pairs += [(keep.shapes[path][axis], keep.shape(path)[axis]) for axis in axes]
    return sorted(set(pairs))


def _slice_to_size(params: tree.Params, keep: Keep) -> tree.Params:
    shapes = {path: tuple(leaf.shape) for path, leaf in tree.items(params)}
    if shapes == {path: keep.shape(path) for path in keep.shapes}:
        return params
    return slice_params(params, keep)


def _refuse_shapes(
    builder: Builder, settings: Settings, misfits: Sequence[str], wanted: Shapes
) -> NoReturn:
    found = builder.shapes_of(settings) or {}
    texts = [
        f"{path!r} would be {found.get(path, 'missing')}, not {wanted[path]}"
        for path in misfits[:5]
    ]
    more = f" and {len(misfits) - 5} more" if len(misfits) > 5 else ""
    raise ArgumentError(
        "module",
        got=f"no fields that give the shrunk shapes; at best {'; '.join(texts)}{more}",
        expected="a class whose widths are numbers in its fields or keywords, and kept alike "
        "wherever one number sets them",
        fix="Choose equal widths for what one field sets, or use `structured.rebuild`, which "
        "needs no class.",
    )


# --- Folding ------------------------------------------------------------------------------------


def _is_inexact(literal: WidthLiteral) -> bool:
    return literal.centred or not literal.leaves


def _judge_rebuilt(rebuilt: Rebuilt) -> tuple[bool, float]:
    return not rebuilt.agrees, 0.0 if rebuilt.distance is None else rebuilt.distance.relative


def _fold_literals(
    params: tree.Params, literals: Sequence[WidthLiteral]
) -> tuple[tree.Params, dict]:
    by_leaf = {path: literal for literal in literals for path in literal.leaves}

    def scale(path: str, x: Any) -> Any:
        if path not in by_leaf or isinstance(x, jax.ShapeDtypeStruct):
            return x
        offset = by_leaf[path].offset
        return ((x + offset) * by_leaf[path].factor - offset).astype(x.dtype)

    factors = {path: literal.factor for path, literal in by_leaf.items()}
    return tree.map_with_path(scale, params), factors


def _candidates(
    builder: Builder,
    settings: Settings,
    literals: Sequence[WidthLiteral],
    smaller: tree.Params,
    reference: "_Reference",
) -> Iterator[Rebuilt]:
    """Give the module with everything folded, then (where that is a guess) with less."""
    source = replace_numbers(builder.source, settings)
    epsilons = _epsilons(builder.source, literals)
    norms = [literal for literal in literals if literal.kind == "norm" and literal.epsilon]
    fewer = [literal for literal in literals if not literal.centred]
    for chosen in [literals, fewer] if len(fewer) < len(literals) else [literals]:
        for floats in [epsilons, {}] if epsilons else [{}]:
            folded, factors = _fold_literals(smaller, chosen)
            covered = [known for known, _ in _changes(builder.source, floats).values()]
            open_norms = [x for x in norms if not any(is_near(x.epsilon, c) for c in covered)]
            module, unset = builder.make_module(replace_numbers(source, floats), open_norms)
            fn = builder.make_fn(module, folded)
            far = structural = reference.distance(fn, folded)
            if far is not None and unset:
                structural = reference.distance(set_epsilons(fn, unset), folded)
            rebuilt = Rebuilt(
                module=builder.fill_module(module, folded),
                params=folded,
                fields=_changes(builder.source, {**settings, **floats}),
                folded=factors,
                distance=far,
                structural=structural,
                tolerance=reference.tolerance,
                notes=(*_explain_inexact(literals), *_explain_unset(unset)),
            )
            yield rebuilt
            if rebuilt.agrees or far is None:
                return


def _epsilons(source: Any, literals: Sequence[WidthLiteral]) -> dict[Place, float]:
    """Say which float fields are the epsilon of norms that all want the same other one."""
    settings = {}
    for place, value in numbers(source, float):
        wants = {
            literal.old / literal.new
            for literal in literals
            if literal.kind == "norm" and is_near(literal.epsilon, value)
        }
        if len(wants) == 1:
            settings[place] = value * wants.pop()
    return settings


def _explain_inexact(literals: Sequence[WidthLiteral]) -> list[str]:
    notes = []
    for literal in literals:
        name = literal.leaves[0] if literal.leaves else f"a {literal.kind} without a scale"
        if literal.centred:
            notes.append(
                f"{name}: its norm subtracts a mean over {literal.old}, of which {literal.new} are "
                "left; that cannot be folded"
            )
        elif not literal.leaves:
            notes.append(f"{name}: no leaf can be scaled for dividing by {literal.new}")
    return notes


def _explain_unset(literals: Sequence[WidthLiteral]) -> list[str]:
    return [
        f"{literal.leaves[0]}: epsilon stays {literal.epsilon:.1e}, where "
        f"{literal.wanted_epsilon:.1e} would agree"
        for literal in literals
        if literal.leaves
    ]


def _changes(source: Any, settings: Settings) -> dict[str, tuple[float, float]]:
    before = dict([*numbers(source, int), *numbers(source, float)])
    return {place_str(place): (before[place], new) for place, new in settings.items()}


class _Reference:
    """The shrunk function's outputs, on given and on random inputs."""

    def __init__(self, fn: Callable[..., Any], params: tree.Params, inputs: Sequence[Any]):
        self._fn, self._params = fn, params
        self._inputs = [] if is_abstract(params) else [random_like(inputs)]
        if self._inputs and not is_abstract(inputs):
            self._inputs.append(tuple(inputs))

    @functools.cached_property
    def _outputs(self) -> list[Any]:
        with jax.default_matmul_precision("highest"):
            run = jax.jit(self._fn)
            return [run(self._params, *args) for args in self._inputs]

    @property
    def tolerance(self) -> float:
        """The relative distance that is rounding."""
        return tolerance_of(self._params, self._inputs, self._outputs)

    def distance(self, fn: Callable[..., Any], params: tree.Params) -> Distance | None:
        """Measure how far another function is, at the worst."""
        with jax.default_matmul_precision("highest"):
            run = jax.jit(fn)
            found = [
                distance(run(params, *args), outputs)
                for args, outputs in zip(self._inputs, self._outputs, strict=True)
            ]
        return max(found, key=lambda d: d.relative, default=None)
