"""Quantization-aware training of any function: weights on their leaves, activations at sites."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer

from jaxcompress import graph, numerics, tree
from jaxcompress.errors import ArgumentError, NonFiniteError, SelectionError
from jaxcompress.graph import Equation, Interception, Site
from jaxcompress.numerics import Activation, Format
from jaxcompress.quantize import _observers
from jaxcompress.quantize._activations import fit_activation, round_through, shared_axes, to_codes
from jaxcompress.quantize._integer_forward import contract_codes, suits
from jaxcompress.quantize._matrix import follows_site
from jaxcompress.quantize._policy import Coverage, Policy, Rule, alone, cover_formats, first_matches
from jaxcompress.quantize._quantizer import STE, Quantizer, SeenRange
from jaxcompress.quantize._train_sites import Met, TrainCoverage, meet, target_at
from jaxcompress.quantize._variables import (
    QuantizerState,
    Shapes,
    check_activations,
    check_weights,
    is_variables,
    join_variables,
    nest,
    shapes_of,
    split_variables,
)
from jaxcompress.tree import Params


class _Plan(NamedTuple):
    covered: Coverage
    rules: dict[str, Rule]
    leaves: dict[str, Any]
    notes: dict[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class QAT:
    """fn with its weights and activations rounded; what `train` makes.

    Where nothing is learned, followed or delayed, it takes the params of fn, and is a drop-in for
    fn inside any loss. Otherwise it takes the variables that `init` makes of them.

    Attributes:
        fn: The function.
        policy: The rules.
        weights: How weights are rounded.
        activations: How activations are.
        start: Observed calls before anything is rounded.
        freeze: Observed calls after which ranges stand still.
        decay: Of the moving averages of ranges.
        integers: Whether codes are contracted in the forward pass.
        strict: Whether what cannot be rounded is an error.
    """

    fn: Callable[..., Any]
    policy: Policy
    weights: Quantizer
    activations: Quantizer
    start: int
    freeze: int | None
    decay: float
    integers: bool
    strict: bool

    @property
    def has_state(self) -> bool:
        """Whether it takes the variables of `init` rather than params."""
        rules = [rule for rule in self.policy.rules if rule.weights is not None]
        return self.start > 0 or any(
            self.weights.learns(of="weights")
            or (rule.activations is not None and self._has_range(rule))
            for rule in rules
        )

    def __call__(self, variables: Params, *inputs: Any, **kwargs: Any) -> Any:
        """Run fn with weights and activations rounded.

        Args:
            variables: Params of fn, or what `init` made of them if `has_state`.
            *inputs: fn's other arguments.
            **kwargs: fn's keyword arguments.

        Returns:
            fn's outputs.

        Raises:
            StructureError: If variables are given in the wrong form, or of another model.
            SelectionError: If the policy leaves nothing to round.
        """
        return self._run(variables, inputs, kwargs, watch=False)[0]

    def observe(self, variables: Params, *inputs: Any, **kwargs: Any) -> tuple[Any, Params]:
        """Run as calling does, follow the ranges of activations, and count the call.

        Args:
            variables: What `init` made.
            *inputs: fn's other arguments.
            **kwargs: fn's keyword arguments.

        Returns:
            `(outputs, state)`. The state has the paths of those variables that do not learn, so
            that a loss can return it as `train.Aux(state=state)`; by hand, see `update`.

        Raises:
            StructureError: As calling does.
            SelectionError: As calling does.
        """
        outputs, ranges, steps = self._run(variables, inputs, kwargs, watch=True)
        return outputs, {"quantizers": {"ranges": nest(ranges), "steps": steps + 1}}

    def init(self, params: Params, *inputs: Any, **kwargs: Any) -> Params:
        """Put beside params what is learned and followed, started from a first batch.

        The batch runs through fn as it is, unrounded.

        Args:
            params: Params of fn.
            *inputs: A first batch: fn's other arguments.
            **kwargs: fn's keyword arguments.

        Returns:
            `{"params": params, "quantizers": {"learned": ..., "ranges": ..., "steps": 0}}`, with
            float32 entries under the paths of leaves: `learned` holds `weights/step`,
            `activations/step` and the like, `ranges` holds `low`, `high` and `count`.

        Raises:
            SelectionError: If the policy leaves nothing to round.
            NonFiniteError: If concrete activations hold NaN or infinity.
        """
        traced = graph.capture(self.fn, params, *inputs, **kwargs)
        plan = self._plan(params, traced)
        quantizer = self.weights
        learned: dict[str, dict[str, Any]] = {}
        for path, format in plan.covered.formats.items():
            if quantizer.learns(of="weights"):
                learned[path] = {"weights": quantizer.init_weights(plan.leaves[path], format)}
        ranges: dict[str, Any] = {}
        met, seen = self._first_look(plan, traced, params, inputs, kwargs)
        for path, one in met.items():
            if self.activations.learns(of="activations"):
                entry = self.activations.init_activations(seen[path], one.format)
                learned.setdefault(path, {})["activations"] = entry
            elif one.rule.static:
                ranges[path] = _observers.follow(
                    _observers.start(one.shape), seen[path], self.decay
                )
        return join_variables(params, QuantizerState(learned, ranges, jnp.zeros((), jnp.int32)))

    def convert(self, variables: Params, *inputs: Any, **kwargs: Any) -> Params:
        """Bring trained params into their stored form, with the form of activations beside them.

        At each site what the codes stand for is what calling rounds to. The exception is
        `LSQPlus(whole=False)`, whose offsets are rounded to a multiple of the step.

        Args:
            variables: As calling takes them; concrete or traced.
            *inputs: fn's other arguments, as in training; shapes are enough. They tell where fn
                contracts a leaf, and so which axes its format names.
            **kwargs: fn's keyword arguments.

        Returns:
            Params with a `QArray` in place of every leaf that has a format.

        Raises:
            StructureError: As calling does.
            ArgumentError: If a range has never been seen.
            ArgumentTypeError: If inputs are not those of fn.
        """
        params, state = split_variables(variables, has_state=self.has_state)
        follows = any(rule.weights and follows_site(rule.weights) for rule in self.policy.rules)
        traced = graph.capture(self.fn, params, *inputs, **kwargs) if follows else None
        plan = self._plan(params, traced)
        check_weights(state, self._weight_shapes(plan))

        def packed(path: str, leaf: Any) -> Any:
            if path not in plan.covered.formats:
                return leaf
            learned = state.learned.get(path, {})
            q = self.weights.pack(leaf, learned.get("weights", {}), plan.covered.formats[path])
            return replace(q, activation=self._settle(path, leaf, plan.rules[path], state))

        return tree.map_with_path(packed, params)

    def coverage(self, params: Params, *inputs: Any, **kwargs: Any) -> TrainCoverage:
        """Say what becomes of every leaf, and of the activations at every site.

        Args:
            params: Params of fn, or variables; shapes are enough.
            *inputs: fn's other arguments; shapes are enough.
            **kwargs: fn's keyword arguments.

        Returns:
            The account.

        Raises:
            SelectionError: If the policy leaves nothing to round.
        """
        params = params["params"] if is_variables(params) else params
        traced = graph.capture(self.fn, params, *inputs, **kwargs)
        return self._meet(self._plan(params, traced), traced.sites)[1]

    # --- Parts ----------------------------------------------------------------------------------

    def _has_range(self, rule: Rule) -> bool:
        return self.activations.learns(of="activations") or (
            rule.static and isinstance(self.activations, STE)
        )

    def _plan(self, params: Params, traced: graph.Traced | None) -> _Plan:
        policy, notes = alone(self.policy), {}
        sites = () if traced is None else traced.sites

        def resolve(path: str, leaf: Any, format: Format) -> Format:
            target = target_at(path, leaf, format, sites)
            if target.note:
                notes[path] = target.note
            return target.leaf

        covered = cover_formats(params, policy, resolve, strict=self.strict)
        leaves = dict(tree.items(params))
        chosen, _ = first_matches(params, leaves, self.policy)
        return _Plan(covered, {path: chosen[path] for path in covered.formats}, leaves, notes)

    def _weight_shapes(self, plan: _Plan) -> dict[str, Shapes]:
        if not self.weights.learns(of="weights"):
            return {}
        return {
            path: shapes_of(lambda w, f=format: self.weights.init_weights(w, f), plan.leaves[path])
            for path, format in plan.covered.formats.items()
        }

    def _range_shapes(self, met: Mapping[str, Met]) -> dict[str, Shapes]:
        shapes = {}
        for path, one in met.items():
            if not self._has_range(one.rule):
                continue
            if self.activations.learns(of="activations"):
                entry: Any = jax.ShapeDtypeStruct(one.shape, jnp.float32)
                seen = SeenRange(low=entry, high=entry, mean=entry)
                start = functools.partial(self.activations.init_activations, format=one.format)
                shapes[path] = shapes_of(start, seen)
            else:
                shapes[path] = shapes_of(lambda shape=one.shape: _observers.start(shape))
        return shapes

    def _meet(self, plan: _Plan, sites: tuple[Site, ...]) -> tuple[dict[str, Met], TrainCoverage]:
        """Find the activations to round, and account for all; see `meet`."""
        met, unrounded = meet(sites, plan.rules, plan.leaves)
        if self.integers and not any(
            self._in_integers(site, one, plan) for one in met.values() for site in one.sites
        ):
            raise ArgumentError(
                "integers",
                got="True where no site can contract codes",
                expected="a dot of a whole leaf, both in symmetric signed integers whose range is "
                "found anew and leaves nothing out, a scale per output or per tensor",
                fix="Leave `integers` out, or see `train` for what it takes.",
            )
        reached = {site.path for site in sites}
        elsewhere = tuple(path for path in plan.covered.formats if path not in reached)
        if self.strict and (unrounded or elsewhere):
            reasons = [f"{name!r} {reason}" for name, reason in unrounded.items()]
            reasons += [f"{path!r} has no site" for path in elsewhere]
            raise SelectionError(
                "policy",
                got=f"what cannot be followed: {'; '.join(reasons[:5])}",
                expected="under strict=True, leaves with sites and activations to round",
                fix="Put a rule without `activations`, or with weights=None, first for these, or "
                "pass strict=False.",
            )
        coverage = TrainCoverage(
            leaves=plan.covered,
            rounded={site.name: one.format for one in met.values() for site in one.sites},
            unrounded=unrounded,
            elsewhere=elsewhere,
            notes=plan.notes,
        )
        return met, coverage

    def _run(
        self, variables: Params, inputs: Any, kwargs: Any, *, watch: bool
    ) -> tuple[Any, dict[str, Any], Array]:
        params, state = split_variables(variables, has_state=self.has_state)
        traced = graph.capture(self.fn, params, *inputs, **kwargs)
        plan = self._plan(params, traced)
        check_weights(state, self._weight_shapes(plan))
        active = state.steps >= self.start if self.start else None
        met: dict[str, Met] = {}

        def decide(sites: tuple[Site, ...]) -> dict[str, Interception]:
            found, _ = self._meet(plan, sites)
            check_activations(state, self._range_shapes(found))
            met.update(found)
            return self._interceptions(found, plan, state, active, watch)

        rounded = tree.map_with_path(
            lambda path, w: self._weight(path, w, plan, state, active), params
        )
        outputs, seen = graph.intercept(traced, decide)(rounded, *inputs, **kwargs)
        ranges = dict(state.ranges)
        for path, one in met.items():
            if watch and path in ranges:
                now = _observers.merge_extents(one, [seen[site.name]["seen"] for site in one.sites])
                moving = True if self.freeze is None else state.steps < self.freeze
                ranges[path] = _observers.follow(ranges[path], now, self.decay, moving)
        return outputs, ranges, state.steps

    def _weight(
        self, path: str, w: Any, plan: _Plan, state: QuantizerState, active: Array | None
    ) -> Any:
        if path not in plan.covered.formats:
            return w
        learned = state.learned.get(path, {}).get("weights", {})
        rounded = self.weights.weights(w, learned, plan.covered.formats[path])
        return rounded if active is None else jnp.where(active, rounded, w)

    def _interceptions(
        self,
        met: Mapping[str, Met],
        plan: _Plan,
        state: QuantizerState,
        active: Array | None,
        watch: bool,
    ) -> dict[str, Interception]:
        chosen = {}
        for path, one in met.items():
            needs: dict[str, Any] = {}
            follows = path in state.ranges and not self.activations.learns(of="activations")
            form = Activation(format=one.format)
            if self._has_range(one.rule) and follows:
                form = lax.stop_gradient(
                    _observers.settle_activation(state.ranges[path], form.format)
                )
                needs["on"] = _observers.is_known(state.ranges[path])
            elif self._has_range(one.rule):
                needs["learned"] = state.learned[path]["activations"]
            if active is not None:
                needs["on"] = active & needs.get("on", jnp.ones(one.shape, bool))
            needs["scale"], needs["zero"] = form.scale, form.zero
            for site in one.sites:
                cell = jax.tree.map(lambda x, one=one, site=site: one.at(x, site), needs)
                if self._in_integers(site, one, plan):
                    leaf = plan.leaves[path]
                    q = numerics.quantize(lax.stop_gradient(leaf), plan.covered.formats[path])
                    cell |= {"w": leaf, "codes": q.values.astype(jnp.int8), "factor": q.scale}
                if watch and follows:
                    cell["seen"] = _observers.nothing(site.stack)
                handler = functools.partial(_at_site, self.activations, site, form.format)
                chosen[site.name] = Interception(handler, cell)
        return chosen

    def _in_integers(self, site: Site, met: Met, plan: _Plan) -> bool:
        found_anew = isinstance(self.activations, STE) and not met.rule.static
        simple = self.integers and self.start == 0 and isinstance(self.weights, STE) and found_anew
        weights = plan.covered.formats[met.path]
        return simple and suits(site, weights, met.format, plan.leaves[met.path].shape)

    def _first_look(
        self, plan: _Plan, traced: graph.Traced, params: Params, inputs: Any, kwargs: Any
    ) -> tuple[dict[str, Met], dict[str, Any]]:
        """Run fn unrounded, and see the activations whose range is learned or followed."""
        met: dict[str, Met] = {}
        learns = self.activations.learns(of="activations")

        def decide(sites: tuple[Site, ...]) -> dict[str, Interception]:
            found, _ = self._meet(plan, sites)
            met.update({path: one for path, one in found.items() if self._has_range(one.rule)})
            return {
                site.name: Interception(
                    functools.partial(_look, site, None if learns else one.format),
                    _observers.nothing(site.stack),
                )
                for one in met.values()
                for site in one.sites
            }

        _, seen = graph.intercept(traced, decide)(params, *inputs, **kwargs)
        merged = {
            path: _observers.merge_extents(one, [seen[site.name] for site in one.sites])
            for path, one in met.items()
        }
        for path, one in merged.items():
            ran = one.low <= one.high
            if not isinstance(one.mean, Tracer) and not jnp.isfinite(one.mean).all():
                raise NonFiniteError(
                    "inputs",
                    got=f"NaN or infinity among the activations that meet {path!r}",
                    expected="finite activations in the first batch",
                    fix="Find where they come from: no range can hold them.",
                )
            low, high = jnp.where(ran, one.low, 0), jnp.where(ran, one.high, 0)
            if learns:
                merged[path] = one._replace(low=low, high=high)
        return met, merged

    def _settle(self, path: str, leaf: Any, rule: Rule, state: QuantizerState) -> Activation | None:
        """Give the form of the activations that meet a leaf, its parts shaped like the leaf."""
        if rule.activations is None:
            return None
        learned = state.learned.get(path, {}).get("activations", {})
        if isinstance(self.activations, STE):
            if not rule.static:
                return Activation(format=rule.activations)
            if path not in state.ranges:  # only looked up
                return None
            _check_known(path, state.ranges[path])
            return _observers.settle_activation(state.ranges[path], rule.activations)
        if self.activations.learns(of="activations") and not learned:
            return None
        form = self.activations.settle(learned, rule.activations)
        ones = (1,) * len(leaf.shape)
        return jax.tree.map(lambda part: part if part.ndim else part.reshape(ones), form)


def _at_site(
    quantizer: Quantizer,
    site: Site,
    format: Any,
    equation: Equation,
    cell: dict[str, Any],
    *operands: Any,
) -> tuple[Any, dict[str, Any]]:
    """Round the activation of one run of a site, and see its range if that is followed."""
    k = site.layout.activation
    x = operands[k]
    if "seen" in cell:
        cell = {**cell, "seen": _observers.extend(cell["seen"], x, format)}
    if isinstance(quantizer, STE):
        still = lax.stop_gradient(x)
        form = Activation(format=format, scale=cell["scale"], zero=cell["zero"])
        shared = shared_axes(site.primitive, equation.params, k, form, x.ndim)
        scale, zero = fit_activation(still, form, shared)
        if "codes" in cell:
            codes = to_codes(still, scale, zero, form).astype(jnp.int8)
            w = (cell["w"], cell["codes"], cell["factor"].astype(jnp.float32))
            return contract_codes(equation, k, (x, codes, scale), w), cell
        rounded = round_through(x, scale, zero, form)
    else:
        rounded = quantizer.activations(x, cell.get("learned", {}), format)
    if "on" in cell:
        rounded = jnp.where(cell["on"], rounded, x)
    return equation.bind(*operands[:k], rounded, *operands[k + 1 :]), cell


def _look(
    site: Site, format: Any, equation: Equation, seen: Any, *operands: Any
) -> tuple[Any, Any]:
    x = operands[site.layout.activation]
    return equation.bind(*operands), _observers.extend(seen, x, format)


def _check_known(path: str, range: Mapping[str, Any]) -> None:
    known = _observers.is_known(range)
    if not isinstance(known, Tracer) and not known.all():
        raise ArgumentError(
            "variables",
            got=f"a range for {path!r} that no call has seen",
            expected="ranges from at least one batch",
            fix="Observe batches that take the branch where it is contracted.",
        )
