"""`train`: quantization-aware training of any function."""

from collections.abc import Callable
from typing import Any

from jaxcompress.errors import ArgumentError, require_at_least
from jaxcompress.numerics import Entropy
from jaxcompress.quantize._policy import Policy, check_policy
from jaxcompress.quantize._qat import QAT
from jaxcompress.quantize._quantizer import STE, Quantizer


def train(
    fn: Callable[..., Any],
    policy: Policy,
    *,
    weights: Quantizer | None = None,
    activations: Quantizer | None = None,
    start: int = 0,
    freeze: int | None = None,
    decay: float = 0.99,
    integers: bool = False,
    strict: bool = False,
) -> QAT:
    r"""Make a function that runs like `fn` with weights and activations rounded, to be trained.

    Every leaf is rounded once, however many sites it has; every activation where it meets such a
    leaf. Formats mean what they do in `ptq`: as written, `PerChannel()`, `PerGroup(n)` and
    `PerTensor()` follow the contracting site of most FLOPs (else the lookup), whatever the layout:
    a scale per output, groups along the innermost contracted axis, one per stacked layer or
    expert. Other axes are the leaf's own, as are all axes of a leaf without a site.
    `QAT.coverage` shows what each format came to. A method rounds as in `fake_quant`; one that
    needs data, such as GPTQ, is refused.

    With `STE()` and ranges found in each call, the result takes fn's params: put it in place of
    fn. With quantizers that learn, `Rule(static=True)` or `start`, it takes
    `variables = qat.init(params, *inputs)`, and `qat.observe` follows the ranges:

        def loss(variables, batch, key):
            logits, state = qat.observe(variables, batch["x"])
            return cross_entropy(logits, batch["y"]), train.Aux(state=state)

    A leaf with several sites, or contracted again and again by a loop, meets one range, so that
    `qat.convert` can say it; stacked layers that a scan takes apart have one each.
    `sparsity.sparsify` goes around the optimizer as ever; give it
    `where=tree.without(tree.weights, "quantizers/**")` if it sees variables.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        policy: The rules.
        weights: How weights are rounded, `STE()` by default; or `LSQ()`, `LSQPlus()`, `DoReFa()`.
        activations: How activations are, `STE()` by default; or `LSQ()`, `LSQPlus()`, `PACT()`,
            `DoReFa()`.
        start: Round nothing until that many calls of `observe` have been made.
        freeze: Let the ranges of `Rule(static=True)` stand still after that many; `None` never.
        decay: Of their moving averages, in [0, 1).
        integers: Contract codes in the forward pass, in int32, where a leaf as it is meets an
            activation, both `STE()` in symmetric signed integers with `AbsMax()` ranges found in
            each call, a scale per output or per tensor. The backward pass then is that of the
            unrounded operands: nothing rounded is kept for it. Elsewhere, and by default,
            rounded numbers are contracted, and gradients are those at the rounded values.
        strict: Raise where a leaf cannot take its format or has no site, or an activation cannot
            be rounded; see `QAT.coverage`.

    Returns:
        The function, with `init`, `observe`, `convert` and `coverage`.

    Raises:
        ArgumentError: If an option is out of range or without effect, or a quantizer does not go
            with a format. When called, as `QAT` says.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.numerics import Format, PerChannel, PerToken, int8
        >>> from jaxcompress.quantize import Rule
        >>> rule = Rule(weights=Format(int8, PerChannel()), activations=Format(int8, PerToken()))
        >>> qat = train(lambda p, x: x @ p["kernel"], Policy((rule,)))
        >>> params = {"kernel": jnp.asarray([[1.0], [127.0]])}
        >>> qat(params, jnp.asarray([[0.4, 127.0]])).tolist()
        [[16129.0]]
        >>> qat.convert(params, jnp.ones((1, 2)))["kernel"].activation.is_static
        False
    """
    check_policy(policy)
    quantizers = {"weights": weights or STE(), "activations": activations or STE()}
    for name, quantizer in quantizers.items():
        _check_quantizer(name, quantizer, policy)
    _check_schedule(policy, quantizers["activations"], start, freeze, decay)
    return QAT(
        fn=fn,
        policy=policy,
        weights=quantizers["weights"],
        activations=quantizers["activations"],
        start=start,
        freeze=freeze,
        decay=decay,
        integers=integers,
        strict=strict,
    )


def _check_quantizer(name: str, quantizer: Any, policy: Policy) -> None:
    if not isinstance(quantizer, Quantizer):
        raise ArgumentError(
            name, got=repr(quantizer), expected="a quantizer", fix="For example quantize.LSQ()."
        )
    formats = [getattr(rule, name) for rule in policy.rules if rule.weights is not None]
    formats = [format for format in formats if format is not None]
    for format in formats:
        quantizer.check(format, of=name)
        if isinstance(quantizer, STE) and isinstance(format.range, Entropy):
            raise ArgumentError(
                name,
                got="STE() with range=Entropy()",
                expected="a range method for single batches",
                fix="Entropy needs a histogram over all batches, which ptq makes; take MSE().",
            )
    if not formats and not isinstance(quantizer, STE):
        raise ArgumentError(
            name,
            got=f"{quantizer} with a policy that has no format for {name}",
            expected="a format that it rounds to",
            fix=f"Give a rule `{name}=Format(...)`.",
        )


def _check_schedule(
    policy: Policy, activations: Quantizer, start: int, freeze: int | None, decay: float
) -> None:
    require_at_least("start", start, 0, fix="0 is at once.")
    require_at_least("freeze", freeze, 0, fix="0 is at once.", optional=True)
    if not 0 <= decay < 1:
        raise ArgumentError("decay", got=decay, expected="in [0, 1)", fix="0.99 is the default.")
    followed = any(rule.static for rule in policy.rules) and isinstance(activations, STE)
    if freeze is not None and not followed:
        raise ArgumentError(
            "freeze",
            got=f"{freeze} where no range is followed",
            expected="a rule with static=True, and activations=STE()",
            fix="Leave `freeze` out: ranges are learned, or found in each call.",
        )
