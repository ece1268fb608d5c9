"""Constructs: the primitives that run other jaxprs, how they feed them, and how to rebuild them.

A construct that must be entered is rebuilt as the same construct, never inlined: its policy,
shardings, donation, unrolling and differentiation rules stay what they were. `Cells` are values
keyed by site that travel beside the operands: states of observers, offsets, collected
activations. A scan slices and stacks them, a `while` carries them, a branch that was not taken
leaves them as they came.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._compat import Program
from jaxcompress.graph.program._rules import Rules

Cells: TypeAlias = dict[Any, Any]
"""Values by the name of a site, or whatever else the visits of one plan call them by."""
Role: TypeAlias = Literal["same", "carry", "slice"]
"""How a body's variable relates to the construct's: the same, carried, or cut along axis 0."""
CLOSED = frozenset({"custom_jvp", "custom_vjp", "shard_map"})
"""Constructs (as `Site.scope` names them) that nothing but their arrays goes into."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """One jaxpr that a construct runs.

    Attributes:
        label: What `Site.scope` says of it.
        program: The jaxpr.
        inputs: For each argument, which operand of the construct feeds it, and how.
        results: For each result, which result of the construct it gives (`None` for none) and how.
        repeats: How often it runs each time the construct does.
        stack: Leading axes that it gives to what is collected inside.
        bounded: Whether `repeats` is known.
        branch: Whether it is one of several alternatives.
    """

    label: str
    program: Program
    inputs: Sequence[tuple[int, Role]]
    results: Sequence[tuple[int | None, Role]]
    repeats: int = 1
    stack: tuple[int, ...] = ()
    bounded: bool = True
    branch: bool = False

    @classmethod
    def of(cls, label: str, jaxpr: Any, *, first: int = 0, **kwargs: Any) -> "Body":
        """Describe a body whose arguments and results are the construct's own, in order.

        Args:
            label: What `Site.scope` says of it.
            jaxpr: The jaxpr among the equation's parameters, open or closed.
            first: The operand of the construct that is its first argument.
            **kwargs: Other attributes.

        Returns:
            The body.
        """
        program = _compat.normalize(jaxpr)
        return cls(
            label=label,
            program=program,
            inputs=tuple((first + k, "same") for k in range(len(program.invars))),
            results=tuple((k, "same") for k in range(len(program.outvars))),
            **kwargs,
        )


class Enter(Protocol):
    """Runs the bodies of a construct under the replay's handlers.

    Attributes:
        fills: Whether cells are filled inside.
    """

    fills: bool

    def __call__(self, body: int, operands: Sequence[Any], cells: Cells) -> tuple[list, Cells]:
        """Run body number `body`; returns its results and the cells that were filled inside."""
        ...

    def forward(self, program: Program, operands: Sequence[Any]) -> list:
        """Run the forward program of a `custom_vjp`, and return its results."""
        ...

    def once(self, make: Callable[[], Any]) -> Any:
        """Make what does not depend on operands; a plan that is kept does so only once."""
        ...

    def derivative(self) -> Callable[..., list] | None:
        """Give what runs the program of a `custom_jvp` rule; `None` to run it as it is."""
        ...


class Construct(Protocol):
    """What `graph` knows of a primitive that runs jaxprs.

    Two optional attributes say what becomes of operands that are pytrees, such as quantized
    leaves: `holds_nodes`, whether `rebuild` takes them (where `Body.inputs` does not carry them),
    and `returns_nodes`, whether it can return them too. Without, they are made arrays first. Of
    the built-in ones `is_call` says that their one body has their operands and results, and
    `has_own_rule` that it does, but for differentiation; `takes_cells` says that cells go in
    whatever is differentiated.
    """

    def bodies(self, eqn: Any) -> list[Body]:
        """List the jaxprs of an equation."""
        ...

    def rebuild(
        self, eqn: Any, operands: Sequence[Any], cells: Cells, enter: Enter
    ) -> tuple[list, Cells]:
        """Run the equation with its bodies run by `enter`; returns results and filled cells."""
        ...


_CONSTRUCTS: Rules[Construct] = Rules(lambda kind: kind())


def register_construct(*primitives: str) -> Callable[[type], type]:
    """Say how a primitive that runs jaxprs is entered and rebuilt.

    Args:
        *primitives: Names of primitives.

    Returns:
        A decorator for a class with the methods of `Construct`.
    """
    return _CONSTRUCTS.register(*primitives)


def construct(primitive: str) -> Construct | None:
    """Give what is known of a primitive that runs jaxprs, by its name; `None` for any other."""
    return _CONSTRUCTS.get(primitive)


def is_call(primitive: str) -> bool:
    """Tell whether a primitive is a plain call of one body: `jit` and `checkpoint`."""
    return getattr(construct(primitive), "is_call", False)


def has_own_rule(primitive: str) -> bool:
    """Tell whether a primitive calls one body that has its own rule of differentiation."""
    return getattr(construct(primitive), "has_own_rule", False)


@register_construct("jit")
class _Jit:
    is_call = takes_cells = holds_nodes = returns_nodes = True

    def bodies(self, eqn: Any) -> list[Body]:
        return [Body.of(f"jit({eqn.params['name']})", eqn.params["jaxpr"])]

    def rebuild(
        self, eqn: Any, operands: Sequence[Any], cells: Cells, enter: Enter
    ) -> tuple[list, Cells]:
        def body(cells: Cells, *operands: Any) -> tuple[list, Cells]:
            return enter(0, operands, cells)

        jitted = enter.once(lambda: _compat.jit_like(eqn, body))
        with _compat.context(eqn):
            return jitted(cells, *operands)


@register_construct("remat2")
class _Remat:
    is_call = takes_cells = holds_nodes = returns_nodes = True

    def bodies(self, eqn: Any) -> list[Body]:
        return [Body.of("remat", eqn.params["jaxpr"])]

    def rebuild(
        self, eqn: Any, operands: Sequence[Any], cells: Cells, enter: Enter
    ) -> tuple[list, Cells]:
        flat, tree = jax.tree.flatten((list(operands), cells))
        results, filled = _compat.bind_remat(
            eqn, flat, lambda *flat: enter(0, *jax.tree.unflatten(tree, flat))
        )
        return results, filled


@register_construct("custom_jvp_call")
class _CustomJvp:
    has_own_rule = True

    def bodies(self, eqn: Any) -> list[Body]:
        return [Body.of("custom_jvp", eqn.params["call_jaxpr"])]

    def rebuild(
        self, eqn: Any, operands: Sequence[Any], cells: Cells, enter: Enter
    ) -> tuple[list, Cells]:
        if enter.fills:
            return _beside(eqn, operands, cells, enter)
        primal = lambda *xs: enter(0, xs, {})[0]
        return _compat.bind_custom_jvp(eqn, operands, primal, enter.derivative()), {}


@register_construct("custom_vjp_call")
class _CustomVjp:
    has_own_rule = True

    def bodies(self, eqn: Any) -> list[Body]:
        return [Body.of("custom_vjp", eqn.params["call_jaxpr"])]

    def rebuild(
        self, eqn: Any, operands: Sequence[Any], cells: Cells, enter: Enter
    ) -> tuple[list, Cells]:
        if enter.fills:
            return _beside(eqn, operands, cells, enter)
        results = _compat.bind_custom_vjp(
            eqn,
            operands,
            primal=lambda *xs: enter(0, xs, {})[0],
            forward=lambda program, *xs: enter.forward(program, xs),
        )
        return results, {}


def _beside(eqn: Any, operands: Sequence[Any], cells: Cells, enter: Enter) -> tuple[list, Cells]:
    """Fill cells by a second run: a differentiation rule has no room for further results."""
    filled = enter(0, [lax.stop_gradient(x) for x in operands], cells)[1]
    return _compat.bind(eqn, operands), filled


@register_construct("scan")
class _Scan:
    takes_cells = holds_nodes = True

    def bodies(self, eqn: Any) -> list[Body]:
        consts, carry = _compat.scan_counts(eqn)
        length, program = eqn.params["length"], _compat.normalize(eqn.params["jaxpr"])
        roles = _list_roles(consts, carry, len(program.invars))
        results = _list_roles(0, carry, len(program.outvars))
        return [
            Body(
                label="scan",
                program=program,
                inputs=tuple(enumerate(roles)),
                results=tuple(enumerate(results)),
                repeats=length,
                stack=(length,),
            )
        ]

    def rebuild(
        self, eqn: Any, operands: Sequence[Any], cells: Cells, enter: Enter
    ) -> tuple[list, Cells]:
        n_consts, n_carry = _compat.scan_counts(eqn)
        consts, operands = operands[:n_consts], operands[n_consts:]

        def body(carry: list, slices: tuple[list, Cells]) -> tuple[list, tuple[list, Cells]]:
            xs, cells = slices
            results, filled = enter(0, [*consts, *carry, *xs], cells)
            return results[:n_carry], (results[n_carry:], filled)

        options = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
        with _compat.context(eqn):
            carry, (stacked, filled) = lax.scan(
                body, list(operands[:n_carry]), (list(operands[n_carry:]), cells), **options
            )
        return [*carry, *stacked], filled


def _list_roles(same: int, carry: int, total: int) -> list[Role]:
    first: list[Role] = ["same" for _ in range(same)]
    second: list[Role] = ["carry" for _ in range(carry)]
    third: list[Role] = ["slice" for _ in range(total - same - carry)]
    return [*first, *second, *third]


@register_construct("while")
class _While:
    takes_cells = holds_nodes = True

    def bodies(self, eqn: Any) -> list[Body]:
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        n_carry = len(eqn.outvars)
        carried: list[tuple[int, Role]] = [(n_cond + n_body + k, "carry") for k in range(n_carry)]
        return [
            Body(
                label="while",
                program=_compat.normalize(eqn.params["body_jaxpr"]),
                inputs=(*((n_cond + k, "same") for k in range(n_body)), *carried),
                results=tuple((k, "carry") for k in range(n_carry)),
                bounded=False,
            ),
            Body(
                label="while condition",
                program=_compat.normalize(eqn.params["cond_jaxpr"]),
                inputs=(*((k, "same") for k in range(n_cond)), *carried),
                results=((None, "same"),),
                bounded=False,
            ),
        ]

    def rebuild(
        self, eqn: Any, operands: Sequence[Any], cells: Cells, enter: Enter
    ) -> tuple[list, Cells]:
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond_consts, body_consts = operands[:n_cond], operands[n_cond : n_cond + n_body]
        start = list(operands[n_cond + n_body :])
        carried = _find_filled(lambda: enter(0, [*body_consts, *start], cells)[1], enter)
        carried = {name: _or_zeros(cells, name, like) for name, like in carried.items()}

        def body(carry: tuple[list, Cells]) -> tuple[list, Cells]:
            return enter(0, [*body_consts, *carry[0]], {**cells, **carry[1]})

        def condition(carry: tuple[list, Cells]) -> Any:
            return enter(1, [*cond_consts, *carry[0]], {})[0][0]

        with _compat.context(eqn):
            return lax.while_loop(condition, body, (start, carried))


@register_construct("cond")
class _Cond:
    takes_cells = holds_nodes = True

    def bodies(self, eqn: Any) -> list[Body]:
        branches = enumerate(eqn.params["branches"])
        return [Body.of(f"cond[{k}]", jaxpr, first=1, branch=True) for k, jaxpr in branches]

    def rebuild(
        self, eqn: Any, operands: Sequence[Any], cells: Cells, enter: Enter
    ) -> tuple[list, Cells]:
        index, *operands = operands
        count = len(eqn.params["branches"])
        shapes: Cells = {}
        for k in range(count):
            shapes |= _find_filled(lambda k=k: enter(k, operands, cells)[1], enter)
        kept = {name: _or_zeros(cells, name, like) for name, like in shapes.items()}

        def branch(k: int) -> Callable[..., tuple[list, Cells]]:
            def run(operands: list, kept: Cells) -> tuple[list, Cells]:
                results, filled = enter(k, operands, {**cells, **kept})
                return results, {**kept, **filled}

            return run

        branches = [branch(k) for k in range(count)]
        platforms = eqn.params.get("branches_platforms")
        with _compat.context(eqn):
            if platforms is None:
                return lax.switch(index, branches, operands, kept)
            named = {
                name: run
                for run, names in zip(branches, platforms, strict=True)
                for name in names or ("default",)
            }
            return lax.platform_dependent(operands, kept, **named)


@register_construct("shard_map")
class _ShardMap:
    def bodies(self, eqn: Any) -> list[Body]:
        sizes = eqn.params["mesh"].shape
        count = math.prod(sizes[name] for name in eqn.params["newly_manual_axes"])
        return [Body.of("shard_map", eqn.params["jaxpr"], repeats=count, stack=(count,))]

    def rebuild(
        self, eqn: Any, operands: Sequence[Any], cells: Cells, enter: Enter
    ) -> tuple[list, Cells]:
        params = eqn.params
        spec = PartitionSpec(
            tuple(n for n in params["mesh"].axis_names if n in params["newly_manual_axes"])
        )

        def body(operands: list, cells: Cells) -> tuple[list, Cells]:
            local = jax.tree.map(lambda x: jnp.squeeze(x, 0), cells)
            results, filled = enter(0, operands, local)
            return results, jax.tree.map(lambda x: jnp.expand_dims(x, 0), filled)

        with _compat.context(eqn):
            return jax.shard_map(
                body,
                mesh=params["mesh"],
                in_specs=(list(params["in_specs"]), spec),
                out_specs=(list(params["out_specs"]), spec),
                axis_names=set(params["newly_manual_axes"]),
                check_vma=params["check_vma"],
            )(list(operands), cells)


def _find_filled(run: Callable[[], Cells], enter: Enter) -> Cells:
    """Find the shapes of the cells that a body fills, without running it."""
    return jax.eval_shape(run) if enter.fills else {}


def _or_zeros(cells: Cells, name: str, like: Any) -> Any:
    if name in cells:
        return cells[name]
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)
