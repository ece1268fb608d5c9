"""Statistics of gradients: Taylor importance, the empirical Fisher, Kronecker factors.

Gradients are those of the sum of fn's outputs (of the loss, where fn returns one): for a mean
over examples they are as much smaller. A *sample* is a row: a token of a sequence, a position of
a feature map. Where the literature takes sums within an example first, the docstrings say so.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxcompress.graph.sites import Side, check_side
from jaxcompress.stats._statistic import Statistic, as_float32, products, sum_rows


class GradientActivation(NamedTuple):
    """First-order effects of removing channels.

    Attributes:
        signed: `Σ a g` over all rows, per channel, float32: what the summed outputs would lose
            if the channel were removed, to first order.
        absolute: `Σ |a g|`: the same without cancellation between rows.
        tokens: How many rows were seen, float32.
    """

    signed: Array
    absolute: Array
    tokens: Array


class Fisher(NamedTuple):
    """Diagonal of the empirical Fisher information.

    Attributes:
        total: Sum over rows of squared gradients, float32; `(features, outputs)` for the weight,
            `(channels,)` for channels.
        tokens: How many rows were seen, float32.
    """

    total: Array
    tokens: Array


class Kronecker(NamedTuple):
    """Kronecker factors of a layer's Fisher information, `A ⊗ G / tokens²` per token.

    Attributes:
        inputs: A = XᵀX, `(features, features)`, float32.
        gradients: G = DᵀD for the gradients D of the outputs, `(outputs, outputs)`, float32.
        tokens: How many rows were seen, float32.
    """

    inputs: Array
    gradients: Array
    tokens: Array


def _name_channels(at: Side) -> tuple[str, str]:
    check_side(at)
    return ("channels", "input_grad") if at == "input" else ("output", "output_grad")


def gradient_activation(*, at: Side = "output") -> Statistic:
    """Accumulate activation times gradient per channel: the first-order Taylor criterion.

    Args:
        at: The channels of the site's output, or those of its input.

    Returns:
        A statistic with result `GradientActivation`, `(channels,)` each. The paper's criterion
        averages over the positions of a feature map before it takes the absolute value and over
        examples afterwards; it lies between `|signed|` and `absolute`, both over the tokens.

    Raises:
        ArgumentError: If `at` is neither.

    Example:
        >>> import jax.numpy as jnp
        >>> s, a = gradient_activation(), jnp.array([[1.0, 2.0], [3.0, 0.0]])
        >>> s.finalize(s.update(s.init(2, 2), a, jnp.array([[1.0, -1.0], [-1.0, 5.0]]))).signed
        Array([-2., -2.], dtype=float32)

    Reference:
        Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference,
        arXiv:1611.06440, section 2.2.
    """

    def terms(a: Array, g: Array) -> tuple[Array, Array]:
        effect = as_float32(a) * as_float32(g)
        return effect.sum(0), jnp.abs(effect).sum(0)

    shapes = lambda features, _: [(features,)] * 2
    return sum_rows(shapes, terms, GradientActivation, _name_channels(at))


def fisher() -> Statistic:
    """Accumulate the diagonal empirical Fisher of the weight, each row a sample.

    `F_ij = Σ_t x_ti² g_tj²` with the inputs x and the gradients g of the outputs: the squared
    gradient of each entry of the weight, token by token, at the cost of one matrix product. The
    gradient of a whole example is a sum over its tokens, whose square this is not.

    Returns:
        A statistic with result `Fisher`, `(features, outputs)`.

    Example:
        >>> import jax.numpy as jnp
        >>> s = fisher()
        >>> s.finalize(s.update(s.init(2, 1), jnp.array([[1.0, 2.0]]), jnp.array([[3.0]]))).total
        Array([[ 9.],
               [36.]], dtype=float32)

    Reference:
        Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks,
        arXiv:1612.00796 (the diagonal); the labels are the given ones.
    """

    def terms(x: Array, g: Array) -> list[Array]:
        return [products(jnp.square(as_float32(x)), jnp.square(as_float32(g)))]

    shapes = lambda features, outputs: [(features, outputs)]
    return sum_rows(shapes, terms, Fisher, ("input", "output_grad"))


def channel_fisher(*, at: Side = "output") -> Statistic:
    """Accumulate the empirical Fisher of a gate on each channel, each row a sample.

    `F_c = Σ_t (a_tc g_tc)²`: the squared gradient of a factor that multiplies the channel. Fisher
    pruning sums `a g` over the positions of an example before squaring; on feature maps of one
    position it is the same.

    Args:
        at: The channels of the site's output, or those of its input.

    Returns:
        A statistic with result `Fisher`, `(channels,)`.

    Raises:
        ArgumentError: If `at` is neither.

    Example:
        >>> import jax.numpy as jnp
        >>> s = channel_fisher()
        >>> s.finalize(s.update(s.init(1, 1), jnp.array([[2.0]]), jnp.array([[3.0]]))).total
        Array([36.], dtype=float32)

    Reference:
        Theis et al., Faster gaze prediction with dense networks and Fisher pruning,
        arXiv:1801.05787.
    """

    def terms(a: Array, g: Array) -> list[Array]:
        return [jnp.square(as_float32(a) * as_float32(g)).sum(0)]

    return sum_rows(lambda features, _: [(features,)], terms, Fisher, _name_channels(at))


def kronecker() -> Statistic:
    """Accumulate the Kronecker factors `A = XᵀX` and `G = DᵀD` of a layer's Fisher.

    Returns:
        A statistic with result `Kronecker`.

    Example:
        >>> import jax.numpy as jnp
        >>> s = kronecker()
        >>> x, g = jnp.array([[1.0, 2.0]]), jnp.array([[3.0]])
        >>> s.finalize(s.update(s.init(2, 1), x, g)).gradients
        Array([[9.]], dtype=float32)

    Reference:
        Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature, arXiv:1503.05671, section 3. There the bias is a further input, always 1.
    """
    shapes = lambda features, outputs: [(features, features), (outputs, outputs)]
    terms = lambda x, g: (products(x, x), products(g, g))
    return sum_rows(shapes, terms, Kronecker, ("input", "output_grad"))
