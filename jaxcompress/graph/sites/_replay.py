"""`replay`: run a function's jaxpr with chosen equations handled by the caller."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError, SelectionError
from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._compat import Primitive, Program
from jaxcompress.graph.program._constructs import Cells, Construct, construct
from jaxcompress.graph.sites._sites import Site
from jaxcompress.graph.sites._trace import Traced, capture, no_sites
from jaxcompress.graph.sites._walk import Found, Place, Position, Record, Walker


@dataclass(frozen=True)
class Equation:
    """One equation of fn, as a handler sees it.

    Attributes:
        primitive: The JAX primitive; `primitive.name` is its name.
        params: Its parameters, such as `dimension_numbers`.
        sites: The sites at this equation, one per weight operand; empty elsewhere.
    """

    primitive: Primitive
    params: Mapping[str, Any]
    sites: tuple[Site, ...]
    _eqn: Any = field(repr=False)

    @property
    def result_dtype(self) -> Any:
        """The dtype of its (first) result."""
        return self._eqn.outvars[0].aval.dtype

    def bind(self, *operands: Any, **changes: Any) -> Any:
        """Do what the equation does, on the given operands.

        Args:
            *operands: As many as the equation has.
            **changes: Parameters to change, such as `precision`.

        Returns:
            The result; a list of results for a primitive that has several.
        """
        results = _compat.bind(self._eqn, operands, {**self._eqn.params, **changes})
        return results if self.primitive.multiple_results else results[0]


Handler: TypeAlias = Callable[..., Any]
"""`(equation, *operands) -> result`, or a list of results for a primitive that has several."""
Key: TypeAlias = Any
"""A `where` over leaf paths (glob or regex), a JAX primitive, or `(Equation) -> bool`."""
Visit: TypeAlias = Callable[[Equation, Sequence[Any], Cells], tuple[list, Cells]]
"""What the interpreter calls: `(equation, operands, cells) -> (results, filled cells)`."""


class Carrier(Protocol):
    """Takes leaves that are no arrays through a program, as far as they can go.

    A `LeafNode` such as a quantized leaf is traced as the array that it stands for, and flows
    through the interpreter itself: into visits, through equations that the carrier follows, and
    into constructs that can hold pytrees.
    """

    def follow(self, equation: Equation, operands: Sequence[Any]) -> list[Any] | None:
        """Run an equation on operands some of which are nodes; `None` if it takes only arrays."""
        ...

    def sliced(self, node: tree.LeafNode) -> tree.LeafNode | None:
        """Describe the slices of a node along its first axis, its arrays left whole.

        `None` if some array of it cannot be sliced there.
        """
        ...

    def array(self, node: tree.LeafNode, why: str) -> Any:
        """Give the array that a node stands for; `why` says what the node could not enter."""
        ...


@dataclass(frozen=True)
class Plan:
    """Which equations of a program are visited, by position.

    Attributes:
        visits: What to call.
        sites: The sites of the equations that have any.
        forward: `(position, program) -> plan` of the forward program of a `custom_vjp`, which
            is only known under differentiation.
        fills: Whether visits fill cells, named as the sites they visit.
        carrier: What takes nodes through the program, if any are among the arguments.
        entered: Positions of constructs to rebuild though nothing inside is visited.
        consts: Other constants of the programs at some positions.
        derivative: `(position, program, which tangents are zero) -> plan` of the program of a
            `custom_jvp` rule, which is only known under differentiation; `None` runs it as it is.
        keyed: Names of cells that visits at some positions read, beside those of their sites.
        made: What constructs made for all runs (see `Entry.once`), if the plan is kept for others.
    """

    visits: Mapping[Position, Visit]
    sites: Mapping[Position, tuple[Site, ...]]
    forward: Callable[[Position, Program], "Plan"]
    fills: bool = False
    carrier: Carrier | None = None
    entered: frozenset[Position] = frozenset()
    consts: Mapping[Position, Sequence[Any]] = field(default_factory=dict)
    derivative: Callable[[Position, Program, Sequence[bool]], "Plan"] | None = None
    keyed: Mapping[Position, tuple[str, ...]] = field(default_factory=dict)
    made: dict[Position, Any] | None = None

    @functools.cached_property
    def cells(self) -> Mapping[Position, frozenset[str]]:
        """The names of the cells of what is visited below each prefix of a visited position."""
        below: dict[Position, set[str]] = {}
        for position in self.visits:
            names = {site.name for site in self.sites.get(position, ())}
            names.update(self.keyed.get(position, ()))
            for k in range(len(position) + 1):
                below.setdefault(position[:k], set()).update(names)
        return {position: frozenset(names) for position, names in below.items()}


class Entry:
    """Runs the bodies of one construct under a plan; see `_constructs.Enter`."""

    def __init__(
        self,
        bodies: Callable[[], Sequence[Any]],
        plan: Plan,
        position: Position,
        *,
        returns_nodes: bool = False,
    ):
        self._programs = [body.program for body in bodies()]
        self._plan, self._position, self._returns_nodes = plan, position, returns_nodes
        self.fills = plan.fills and bool(plan.cells.get(position))

    def __call__(self, body: int, operands: Sequence[Any], cells: Cells) -> tuple[list, Cells]:
        position = (*self._position, body)
        program, plan, keep = self._programs[body], self._plan, self._returns_nodes
        return run(program, operands, plan, cells, position, keep_nodes=keep)

    def once(self, make: Callable[[], Any]) -> Any:
        """Make something for the construct, or give what an earlier run of the plan made."""
        made = self._plan.made
        if made is None:
            return make()
        if self._position not in made:
            made[self._position] = make()
        return made[self._position]

    def forward(self, program: Program, operands: Sequence[Any]) -> list:
        """Run the forward program of a `custom_vjp` under the same handlers."""
        plan = self._plan.forward(self._position, program)
        if not plan.visits and self._plan.derivative is None:
            raise ArgumentError(
                "handlers",
                got="a handler inside a custom_vjp whose forward rule has no such equation",
                expected="equations that run with and without differentiation",
                fix="Leave it out of the handlers, or handle the primitive that the rule uses.",
            )
        return run(program, operands, plan, {})[0]

    def derivative(self) -> Callable[..., list] | None:
        """Give what runs the program of a `custom_jvp` rule under the same plan."""
        make = self._plan.derivative
        if make is None:
            return None

        def derived(program: Program, zeros: Sequence[bool], *operands: Any) -> list:
            return run(program, operands, make(self._position, program, zeros), {})[0]

        return derived


def run(
    program: Program,
    args: Sequence[Any],
    plan: Plan,
    cells: Cells,
    position: Position = (),
    *,
    keep_nodes: bool = False,
) -> tuple[list, Cells]:
    """Interpret a program, visiting the planned equations and binding all others whole."""
    consts = plan.consts.get(position, program.consts)
    env: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
    env.update(zip(program.invars, args, strict=True))
    dying = _last_uses(program)
    filled: Cells = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _compat.Literal) else env[atom]

    for number, eqn in enumerate(program.eqns):
        here = (*position, number)
        operands = [read(atom) for atom in eqn.invars]
        nodes = any(isinstance(x, tree.LeafNode) for x in operands)
        rule = construct(eqn.primitive.name)
        if here in plan.visits:
            equation = Equation(eqn.primitive, eqn.params, plan.sites.get(here, ()), eqn)
            results, new = plan.visits[here](equation, operands, cells)
            filled |= new
        elif rule is not None and (
            here in plan.cells or here in plan.entered or (nodes and _passes(eqn, rule))
        ):
            below = sorted(plan.cells.get(here, ()))
            inside = {name: cells[name] for name in below if name in cells}
            bodies, passes = functools.partial(rule.bodies, eqn), _passes(eqn, rule)
            enter = Entry(bodies, plan, here, returns_nodes=passes)
            operands = _entering(eqn, rule, operands, plan.carrier) if nodes else operands
            results, new = rule.rebuild(eqn, operands, inside, enter)
            filled |= new
        else:
            results = None
            if nodes and plan.carrier is not None:
                results = plan.carrier.follow(
                    Equation(eqn.primitive, eqn.params, (), eqn), operands
                )
            if results is None:
                why = eqn.primitive.name
                results = _compat.bind(eqn, [_dense(x, plan.carrier, why) for x in operands])
        env.update(zip(eqn.outvars, results, strict=True))
        for var in dying[number]:
            env.pop(var, None)
    results = [read(atom) for atom in program.outvars]
    if not keep_nodes:
        results = [_dense(x, plan.carrier, "a result") for x in results]
    return results, filled


def _dense(x: Any, carrier: Carrier | None, why: str) -> Any:
    if not isinstance(x, tree.LeafNode):
        return x
    assert carrier is not None, "nodes among the arguments come with a carrier"
    return carrier.array(x, why)


def _passes(eqn: Any, rule: Construct) -> bool:
    """Tell whether nodes can enter a construct and come out of it: a plain call."""
    return getattr(rule, "returns_nodes", False) and not _compat.is_placed(eqn)


def _entering(
    eqn: Any, rule: Construct, operands: Sequence[Any], carrier: Carrier | None
) -> list[Any]:
    """Prepare nodes for a construct: whole, as slices, or as arrays where they cannot enter."""
    assert carrier is not None, "nodes among the arguments come with a carrier"
    roles: dict[int, set[str]] = {}
    for body in rule.bodies(eqn):
        for k, role in body.inputs:
            roles.setdefault(k, set()).add(role)
    holds = getattr(rule, "holds_nodes", False) and not _compat.is_placed(eqn)
    entering = []
    for k, x in enumerate(operands):
        if isinstance(x, tree.LeafNode):
            mine = roles.get(k, {"carry"}) if holds else {"carry"}
            node = x if mine == {"same"} else None
            node = carrier.sliced(x) if mine == {"slice"} else node
            entering.append(carrier.array(x, eqn.primitive.name) if node is None else node)
        else:
            entering.append(x)
    return entering


def _last_uses(program: Program) -> list[list[Any]]:
    """List, for each equation, the variables that nothing reads after it."""
    dying: list[list[Any]] = []
    needed = {atom for atom in program.outvars if not isinstance(atom, _compat.Literal)}
    for eqn in reversed(program.eqns):
        atoms = [a for a in eqn.invars if not isinstance(a, _compat.Literal)]
        mine = list(dict.fromkeys(a for a in (*atoms, *eqn.outvars) if a not in needed))
        needed.update(mine)
        dying.append(mine)
    return dying[::-1]


def execute(traced: Traced, plan: Plan, args: Any, cells: Cells) -> tuple[Any, Cells]:
    """Run a captured call under a plan; returns fn's outputs and the filled cells.

    With a carrier, a node among the arguments is the argument for the array it stands for.
    """
    is_leaf = None if plan.carrier is None else (lambda x: isinstance(x, tree.LeafNode))
    results, filled = run(traced.program, jax.tree.leaves(args, is_leaf=is_leaf), plan, cells)
    results = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in results]
    return jax.tree.unflatten(jax.tree.structure(traced.outputs), results), filled


SitesAt: TypeAlias = Mapping[Position, tuple[Site, ...]]
Match: TypeAlias = Callable[[Program, SitesAt], Mapping[Position, Visit]]
"""Chooses what to visit in a program, given the sites in it."""


def make_plan(
    program: Program,
    record: Record,
    walker: Walker,
    match: Match,
    *,
    fills: bool = False,
    carrier: Carrier | None = None,
) -> Plan:
    """Choose the equations to visit, here and in forward programs that come to light later."""
    sites: dict[Position, tuple[Site, ...]] = {}
    for position, site, _ in record.sites:
        sites[position] = (*sites.get(position, ()), site)

    def forward(position: Position, later: Program) -> Plan:
        operands = record.operands[position]
        values = operands[len(operands) - len(later.invars) :]
        found, _ = walker.walk(later, values, Place())
        known = [f.site for f in record.sites if f.position[: len(position)] == position]
        found.sites = _same_sites(found.sites, known)
        return make_plan(later, found, walker, match, fills=fills, carrier=carrier)

    return Plan(match(program, sites), sites, forward, fills, carrier)


def _same_sites(found: list[Found], known: list[Site]) -> list[Found]:
    """Give the sites of a forward program the names and places they have in the primal one."""
    left = list(known)
    named = []
    for number, one in enumerate(found):
        alike = [s for s in left if _form(s) == _form(one.site)]
        if alike:
            left.remove(alike[0])
            places = ("name", "stack", "layers", "scope", "repeats", "upstream", "beside")
            changes = {place: getattr(alike[0], place) for place in places}
        else:  # the rule's forward program contracts more, or otherwise
            changes = {"name": f"{one.site.path}#forward{number}"}
        named.append(one._replace(site=replace(one.site, **changes)))
    return named


def _form(site: Site) -> tuple[Any, ...]:
    return site.path, site.primitive, site.axes, site.weight.shape, site.activation.shape


class _Matcher:
    """Finds the first pair that takes each equation, and notes which pairs took any."""

    def __init__(
        self, pairs: Sequence[tuple[Key, Handler]], leaves: Mapping[str, Any], taken: set[int]
    ):
        self._pairs, self._leaves, self._taken = pairs, leaves, taken
        self._looks_everywhere = any(_is_general(key) for key, _ in pairs)

    def __call__(self, program: Program, sites: SitesAt) -> dict[Position, Visit]:
        visits: dict[Position, Visit] = {}
        self._walk(program, (), sites, visits)
        return visits

    def _walk(
        self, program: Program, position: Position, sites: SitesAt, visits: dict[Position, Visit]
    ) -> None:
        for number, eqn in enumerate(program.eqns):
            here = (*position, number)
            if here in sites or self._looks_everywhere:
                equation = Equation(eqn.primitive, eqn.params, sites.get(here, ()), eqn)
                for k, (key, handler) in enumerate(self._pairs):
                    if self._takes(key, equation):
                        visits[here] = functools.partial(_call, handler)
                        self._taken.add(k)
                        break
            rule = construct(eqn.primitive.name)
            if rule is not None and here not in visits:
                for k, body in enumerate(rule.bodies(eqn)):
                    self._walk(body.program, (*here, k), sites, visits)

    def _takes(self, key: Key, equation: Equation) -> bool:
        if isinstance(key, Primitive):
            return equation.primitive is key
        if _is_general(key):
            return bool(key(equation))
        return any(tree.matches(key, s.path, self._leaves[s.path]) for s in equation.sites)


def _is_general(key: Key) -> bool:
    """Tell whether a key can take equations that are no sites: a predicate of one argument."""
    if not callable(key):
        return isinstance(key, Primitive)
    return len(inspect.signature(key).parameters) == 1


def _call(
    handler: Handler, equation: Equation, operands: Sequence[Any], cells: Cells
) -> tuple[list, Cells]:
    several = equation.primitive.multiple_results
    result = handler(equation, *operands)
    results = list(result) if several and isinstance(result, Sequence) else [result]
    count = len(equation._eqn.outvars)
    if len(results) != count or any(isinstance(x, tuple | list | None) for x in results):
        at = ", ".join(site.name for site in equation.sites) or equation.primitive.name
        raise ArgumentError(
            "handlers",
            got=f"{type(result).__name__} from the handler at {at}",
            expected=f"a list of {count} results" if several else "the one result, an array",
            fix="Return what equation.bind(*operands) returns.",
        )
    return results, {}


def _nothing_taken(key: Key, traced: Traced) -> Exception:
    known = {site.path: traced.leaves[site.path] for _, site, _ in traced.record.sites}
    return SelectionError(
        "handlers",
        got=f"the key {key!r}, which takes no equation of fn (or only such as an earlier key has)",
        expected="keys that each take at least one equation",
        fix=f"The leaves with sites are: {tree.shorten(sorted(known))}."
        if known
        else no_sites(traced.record),
    )


def replay(
    fn: Callable[..., Any], handlers: Mapping[Key, Handler] | Sequence[tuple[Key, Handler]]
) -> Callable[..., Any]:
    """Make a function that runs like `fn`, with chosen equations handled by you.

    `fn` is traced when the new function is called, so it works wherever fn does: under `jit`,
    `grad`, `vmap`, `scan`, `remat` and shardings. Constructs that hold a handled equation are
    rebuilt around it with all their parameters; the others are bound whole. A jitted function
    that fn calls several times is rebuilt for each call, as handlers may treat its sites apart.
    With handlers that do what the equation does, values and gradients are fn's own, bit for bit
    under jit.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        handlers: `{key: handler}`, or pairs where a key cannot be hashed. A key is a `where`
            over the paths of leaves (glob, compiled regex, `(path, leaf) -> bool`, or several),
            which takes equations that contract such a leaf or look it up; a JAX primitive
            (`jax.lax.dot_general_p`), which takes all its equations; or a predicate of one
            argument, `(Equation) -> bool`. The first key that
            takes an equation counts. A handler gets the `Equation` and its operands and returns
            the result, or a list of results if the primitive has several;
            `equation.bind(*operands)` does what the equation does.

    Returns:
        A function of the same arguments. Calling it raises `SelectionError` if some key takes
        no equation.

    Example:
        >>> import jax.numpy as jnp
        >>> def double(equation, x, w):
        ...     return equation.bind(x, 2 * w)
        >>> fn = lambda params, x: jnp.tanh(x @ params["kernel"])
        >>> doubled = replay(fn, {"kernel": double})
        >>> params, x = {"kernel": jnp.ones((3, 2))}, jnp.ones((1, 3))
        >>> bool((doubled(params, x) == jnp.tanh(2 * x @ params["kernel"])).all())
        True
    """
    pairs = list(handlers.items()) if isinstance(handlers, Mapping) else list(handlers)
    for key, handler in pairs:
        _check_pair(key, handler)

    @functools.wraps(fn)
    def replayed(params: tree.Params, *inputs: Any, **kwargs: Any) -> Any:
        traced = capture(fn, params, inputs, kwargs)
        taken: set[int] = set()
        plan = make_plan(
            traced.program, traced.record, traced.walker, _Matcher(pairs, traced.leaves, taken)
        )
        for k, (key, _) in enumerate(pairs):
            if k not in taken:
                raise _nothing_taken(key, traced)
        results, _ = execute(traced, plan, (params, inputs, kwargs), {})
        return results

    return replayed


def _check_pair(key: Key, handler: Handler) -> None:
    kinds = str | Primitive | Sequence
    if not isinstance(key, kinds) and not hasattr(key, "search") and not callable(key):
        raise ArgumentTypeError(
            "handlers",
            got=f"the key {key!r}",
            expected="a path glob, a compiled regex, a JAX primitive or a predicate",
            fix='For example {"**/kernel": handler} or {jax.lax.dot_general_p: handler}.',
        )
    if not callable(handler):
        raise ArgumentTypeError(
            "handlers",
            got=f"{handler!r} for {key!r}",
            expected="a function (equation, *operands) -> result",
            fix="Pass a function.",
        )
