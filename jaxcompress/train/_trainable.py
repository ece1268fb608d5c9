"""Which leaves of params learn, and which are state that fn itself updates."""

from jaxcompress import quantize, tree
from jaxcompress.errors import ArgumentTypeError
from jaxcompress.tree import Params, Where


def split(params: Params, trainable: Where) -> tuple[Params, Params]:
    """Split params into what learns and the rest; see `tree.partition`.

    Args:
        params: Any pytree of arrays.
        trainable: Which leaves learn.

    Returns:
        `(learned, rest)`, with `None` where a leaf went to the other.

    Raises:
        SelectionError: If `trainable` selects nothing.
        ArgumentTypeError: If it selects a leaf that has no gradient.
    """
    learned, rest = tree.partition(params, trainable)
    for path, leaf in tree.items(learned):
        if isinstance(leaf, tree.LeafNode) or not tree.is_floating(leaf):
            raise ArgumentTypeError(
                "trainable",
                got=f"{path!r} ({type(leaf).__name__} of {getattr(leaf, 'dtype', None)})",
                expected="floating-point arrays",
                fix="Narrow `trainable`; only floating-point leaves have gradients.",
            )
    return learned, rest


def default_trainable(params: Params) -> Where:
    """Choose the leaves that learn where no `trainable` is given: `quantize.learnable`.

    Args:
        params: Any pytree of arrays.

    Returns:
        A `where` for these params.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.ones(2)}}
        >>> list(tree.select(params, default_trainable(params)))
        ['params/w']
    """
    return quantize.learnable(params)
