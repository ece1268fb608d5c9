"""Policies: which leaves of params get which format."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxcompress import numerics, tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError, SelectionError
from jaxcompress.numerics import Entropy, Float, Format, Int, PerTensor, PerToken, QArray
from jaxcompress.quantize._method import Method, RoundToNearest
from jaxcompress.tree import LeafNode, Params, Where


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What to do with the leaves that `where` selects.

    Attributes:
        where: Which leaves; see `tree.matches`.
        weights: The format to bring them into; `None` leaves them alone, on purpose.
        activations: The format of the activations that are contracted with them, `PerTensor()` or
            `PerToken()`; `None` leaves these as they are. Functions of params alone
            (`fake_quant`, `pack`) do not look at it.
        static: Whether the range of activations is settled once, by `ptq` over its batches,
            rather than found anew in each call.
        method: How the codes of the weights are chosen.
        correct_bias: Whether `ptq` takes the mean error that rounding the weights leaves in the
            outputs out of the bias that is added to them (Nagel et al., arXiv:1906.04721,
            section 4.2).

    Raises:
        ArgumentTypeError: If a format is none, or the method is no `Method`.
        ArgumentError: If activations have a type (other than integers and floats), a granularity
            or a global scale that no contraction can take, or parts do not go together.
    """

    where: Where = tree.weights
    weights: Format | None
    activations: Format | None = None
    static: bool = False
    method: Method = field(default_factory=RoundToNearest)
    correct_bias: bool = False

    def __post_init__(self):
        for name, format in (("weights", self.weights), ("activations", self.activations)):
            if not isinstance(format, Format | None):
                raise ArgumentTypeError(
                    name,
                    got=type(format).__name__,
                    expected="a numerics.Format, or None to leave them alone",
                    fix="For example Format(int8, PerChannel()).",
                )
        if not isinstance(self.method, Method):
            raise ArgumentTypeError(
                "method",
                got=repr(self.method),
                expected="an instance of a quantize.Method",
                fix="For example quantize.GPTQ(), called.",
            )
        self._check_activations()

    def _check_activations(self) -> None:
        if self.activations is None:
            if self.static:
                raise ArgumentError(
                    "static",
                    got="True without a format for activations",
                    expected="activations=Format(...) where their range is to be settled",
                    fix="Leave `static` out, or give `activations`.",
                )
            return
        if self.weights is None:
            raise ArgumentError(
                "activations",
                got="a format in a rule with weights=None",
                expected="a format for the weights too: both are contracted together",
                fix="Give `weights`, or leave `activations` out.",
            )
        self._check_activation_numbers(self.activations)
        kinds = (PerTensor,) if self.static else (PerTensor, PerToken)
        if not isinstance(self.activations.granularity, kinds):
            raise ArgumentError(
                "activations",
                got=f"{self.activations.granularity} with static={self.static}",
                expected=f"a format with {' or '.join(f'{k.__name__}()' for k in kinds)}",
                fix="Tokens that have not come yet have no range; other slices would have to be "
                "scaled inside the sum.",
            )
        if isinstance(self.activations.range, Entropy) and not self.static:
            raise ArgumentError(
                "activations",
                got="Entropy() with static=False",
                expected="a range method for single arrays where each call finds the range",
                fix="Pass static=True, or take AbsMax(), Percentile() or MSE().",
            )

    @staticmethod
    def _check_activation_numbers(activations: Format) -> None:
        if not isinstance(activations.qtype, Int | Float):
            raise ArgumentError(
                "activations",
                got=f"{activations.qtype.name}, a {type(activations.qtype).__name__}",
                expected="integers or floats: codes that can be multiplied",
                fix="For example Format(int8, PerToken()), or Format(float8_e4m3fn, PerToken()).",
            )
        if activations.global_scale:
            raise ArgumentError(
                "activations",
                got=f"{activations.qtype.name} with global_scale=True",
                expected="one scale per token or tensor, in float32",
                fix="Leave `global_scale` out, for example Format(int8, PerToken()).",
            )


@dataclass(frozen=True)
class Policy:
    """An ordered list of rules; for each leaf the first that selects it counts.

    Attributes:
        rules: The rules, the most particular first.

    Raises:
        ArgumentError: If there is no rule.

    Example:
        >>> from jaxcompress.numerics import Format, PerChannel, int4, int8
        >>> policy = Policy((
        ...     Rule(where="head/**", weights=None),
        ...     Rule(where="embed/**", weights=Format(int8, PerChannel())),
        ...     Rule(weights=Format(int4, PerChannel())),
        ... ))
    """

    rules: tuple[Rule, ...]

    def __post_init__(self):
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.rules or not all(isinstance(rule, Rule) for rule in self.rules):
            raise ArgumentError(
                "rules",
                got=self.rules,
                expected="one or more quantize.Rule",
                fix="For example Policy((Rule(weights=Format(int8, PerChannel())),)).",
            )


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What a policy does to every leaf of params; the four together name each leaf once.

    Attributes:
        formats: The format of each leaf that is quantized, `{path: format}`.
        excluded: Paths of the leaves that a rule with `weights=None` leaves alone.
        unselected: Paths of the leaves that no rule selects.
        exempt: Leaves whose rule has a format that they cannot take, `{path: reason}`.
    """

    formats: Mapping[str, Format] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    unselected: tuple[str, ...] = ()
    exempt: Mapping[str, str] = field(default_factory=dict)


def coverage(params: Params, policy: Policy, *, strict: bool = False) -> Coverage:
    """Decide for every leaf which rule counts, and whether it can be followed.

    Args:
        params: Any pytree of arrays (shapes are enough).
        policy: The rules.
        strict: Raise when a leaf cannot take its format, rather than exempting it.

    Returns:
        The decision; at least one leaf has a format.

    Raises:
        SelectionError: If a rule selects nothing, or nothing that earlier rules left; if no leaf
            can take its format, or under `strict` if any cannot.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.quantize import presets
        >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
        >>> coverage(params, presets.int8_weights).unselected
        ('bias',)
    """
    return cover_formats(params, policy, lambda path, leaf, format: format, strict=strict)


def cover_formats(
    params: Params,
    policy: Policy,
    resolve: Callable[[str, Any, Format], Format],
    *,
    strict: bool,
) -> Coverage:
    """Decide as `coverage` does, where a rule's format means another for some leaves.

    Args:
        params: Likewise.
        policy: Likewise.
        resolve: `(path, leaf, the rule's format) -> the leaf's`, asked for arrays alone.
        strict: Likewise.

    Returns:
        The decision, with the formats of leaves.

    Raises:
        SelectionError: As `coverage` does.
    """

    def follow(path: str, leaf: Any, rule: Rule) -> Format | str:
        assert rule.weights is not None
        if (reason := find_obstacle(leaf, None)) is not None:
            return reason
        format = resolve(path, leaf, rule.weights)
        return find_obstacle(leaf, format) or format

    formats, rest, _ = follow_rules(params, policy, follow, strict=strict, allow_unused=False)
    return replace(rest, formats=formats)


def follow_rules(
    params: Params,
    policy: Policy,
    follow: Callable[[str, Any, Rule], Any],
    *,
    strict: bool,
    allow_unused: bool,
) -> tuple[dict[str, Any], Coverage, tuple[int, ...]]:
    """Let every leaf follow the first rule that selects it.

    Args:
        params: Any pytree of arrays.
        policy: The rules.
        follow: `(path, leaf, rule) -> what the rule comes to`, or in words why it cannot be
            followed; asked for rules with a format.
        strict: Whether a leaf that cannot follow its rule, and an unused rule, are errors.
        allow_unused: Whether an unused rule is one only under `strict`.

    Returns:
        What each rule comes to, `{path: ...}` in traversal order, at least one; what became of
        all other leaves; and the numbers of the rules that decide no leaf.

    Raises:
        SelectionError: As `coverage` and `ptq` do.
    """
    leaves = dict(tree.items(params))
    rule_of, unused = first_matches(params, leaves, policy)
    if not allow_unused:
        _require_all_used(params, policy, unused)
    done, exempt = {}, {}
    for path, rule in rule_of.items():
        if rule.weights is not None:
            found = follow(path, leaves[path], rule)
            (exempt if isinstance(found, str) else done)[path] = found
    if not done or (strict and (exempt or unused)):
        raise _refuse(done, exempt, unused, strict)
    rest = Coverage(
        excluded=tuple(path for path, rule in rule_of.items() if rule.weights is None),
        unselected=tuple(path for path in leaves if path not in rule_of),
        exempt=exempt,
    )
    return done, rest, unused


def first_matches(
    params: Params, leaves: Mapping[str, Any], policy: Policy
) -> tuple[dict[str, Rule], tuple[int, ...]]:
    """Give each selected leaf its rule, in traversal order, and the rules that got no leaf."""
    check_policy(policy)
    rule_of: dict[str, Rule] = {}
    unused = []
    for i, rule in enumerate(policy.rules):
        chosen = [p for p, leaf in leaves.items() if tree.matches(rule.where, p, leaf)]
        fresh = [path for path in chosen if path not in rule_of]
        unused += [] if fresh else [i]
        rule_of |= dict.fromkeys(fresh, rule)
    if not rule_of:  # this raises, and names the nearest paths
        tree.select(params, policy.rules[0].where)
    return {path: rule_of[path] for path in leaves if path in rule_of}, tuple(unused)


def _require_all_used(params: Params, policy: Policy, unused: tuple[int, ...]) -> None:
    """Refuse rules that decide nothing."""
    for i in unused:
        where = policy.rules[i].where
        chosen = tree.select(params, where)  # this raises, if it selects nothing
        raise SelectionError(
            "policy",
            got=f"rule {i} (where={where!r}), whose {len(chosen)} leaves all fall to earlier rules",
            expected="rules that each decide at least one leaf",
            fix="Put the more particular rule first, or drop this one.",
        )


def check_policy(policy: Any) -> None:
    """Refuse what is no policy, such as a lone rule."""
    if not isinstance(policy, Policy):
        raise ArgumentTypeError(
            "policy",
            got=type(policy).__name__,
            expected="a quantize.Policy",
            fix="For example quantize.presets.int8_weights.",
        )


def find_obstacle(leaf: Any, format: Format | None) -> str | None:
    """Say why a leaf cannot be quantized, into a format if one is given; `None` if it can."""
    if isinstance(leaf, LeafNode):
        return "is compressed already"
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return f"is not an array but {type(leaf).__name__}"
    return None if format is None else format.obstacle(tuple(leaf.shape), leaf.dtype)


def _refuse(
    done: Mapping[str, Any], exempt: Mapping[str, str], unused: Sequence[int], strict: bool
) -> SelectionError:
    got, fixes = [], []
    if exempt:
        listed = "; ".join(f"{path!r} {reason}" for path, reason in list(exempt.items())[:5])
        count = f"{len(exempt)} of {len(done) + len(exempt)} leaves"
        got.append(f"{count} that cannot follow their rule: {listed}")
        fixes.append("narrow `where`, or choose another granularity")
    elif not done:
        got.append("rules that give no leaf a format")
        fixes.append("add a rule with `weights=`, or widen `where`")
    if strict and unused:
        got.append(f"rules {list(unused)}, which decide no leaf")
        fixes.append("remove such rules, or put them first")
    if strict:
        fixes.append("pass strict=False to leave this alone")
    return SelectionError(
        "policy",
        got="; ".join(got),
        expected="rules that each decide leaves which can be quantized",
        fix=f"{'; or '.join(fixes).capitalize()}.",
    )


def alone(policy: Policy) -> Policy:
    """Let each rule's method say which format stands for it where no activations are seen."""
    if not isinstance(policy, Policy):
        return policy  # `coverage` refuses it
    return Policy(
        tuple(
            rule if rule.weights is None else replace(rule, weights=rule.method.alone(rule.weights))
            for rule in policy.rules
        )
    )


def fake_quant(params: Params, policy: Policy, *, strict: bool = False) -> Params:
    """Round every leaf to what its packed form stands for, and let gradients through.

    Call it on the params inside a loss: that is quantization-aware training of weights. What
    comes out equals `unpack(pack(params, policy))`, bit for bit.

    Args:
        params: Any pytree of arrays.
        policy: The rules.
        strict: Raise when a leaf cannot take its format, rather than leaving it alone.

    Returns:
        Params of the same structure, shapes and dtypes.

    Raises:
        SelectionError: As `coverage` does.
        ArgumentError: If a rule's method needs activations, as `GPTQ` does: see `ptq`.
        NonFiniteError: If a concrete leaf holds NaN or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.quantize import presets
        >>> params = {"kernel": jnp.asarray([[0.3], [127.0]]), "bias": jnp.asarray([0.3])}
        >>> fake_quant(params, presets.int8_weights)["kernel"].tolist()
        [[0.0], [127.0]]
    """
    return _apply_formats(params, policy, numerics.fake_quant, strict=strict)


def _apply_formats(
    params: Params, policy: Policy, convert: Callable[[Any, Format], Any], *, strict: bool
) -> Params:
    formats = coverage(params, alone(policy), strict=strict).formats
    return tree.map_with_path(
        lambda path, x: convert(x, formats[path]) if path in formats else x, params
    )


def pack(params: Params, policy: Policy, *, strict: bool = False) -> Params:
    """Bring every leaf into its stored form.

    Args:
        params: Any pytree of arrays.
        policy: The rules.
        strict: Raise when a leaf cannot take its format, rather than leaving it alone.

    Returns:
        Params with a `QArray` in place of every quantized leaf; the others are untouched.

    Raises:
        SelectionError: As `coverage` does.
        ArgumentError: If a rule's method needs activations, as `GPTQ` does: see `ptq`.
        NonFiniteError: If a concrete leaf holds NaN or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.quantize import presets
        >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
        >>> tree.nbytes(params), tree.nbytes(pack(params, presets.int8_weights))
        (60, 36)
    """
    return _apply_formats(params, policy, numerics.quantize, strict=strict)


def unpack(params: Params) -> Params:
    """Replace every `QArray` by the array that it stands for; other leaves pass through.

    Args:
        params: What `pack` gave, or any other params.

    Returns:
        Params of arrays, of the dtypes they had before `pack`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.quantize import presets
        >>> unpack(pack({"kernel": jnp.ones((2, 2))}, presets.int8_weights))["kernel"].dtype
        dtype('float32')
    """
    return tree.map_with_path(
        lambda _, x: numerics.dequantize(x) if isinstance(x, QArray) else x, params
    )
