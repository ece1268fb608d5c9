import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxcompress import train, tree
from jaxcompress.errors import ArgumentTypeError, SelectionError


def learns(params):
    return list(tree.select(params, train.default_trainable(params)))


def test_linen_collections_other_than_params_do_not_learn():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))

    variables = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((4, 2)))
    assert learns(variables) == [
        "params/BatchNorm_0/bias",
        "params/BatchNorm_0/scale",
        "params/Dense_0/bias",
        "params/Dense_0/kernel",
    ]
    assert learns({**variables, "cache": {"k": np.ones(3, np.float32)}}) == learns(variables)


def test_nnx_variables_other_than_param_do_not_learn():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.mean = nnx.Param(jnp.ones(2))

    # A Param called `mean` learns, the running mean does not: the variable's type decides.
    state = nnx.state(Net(nnx.Rngs(0)))
    assert learns(state) == ["mean", "norm/bias", "norm/scale"]
    started = train.init(state, optax.adam(0.1), key=jax.random.key(0))
    assert tree.paths(started.opt_state[0].mu) == ["mean", "norm/bias", "norm/scale"]


def test_integers_keys_and_batch_stats_do_not_learn():
    params = {
        "w": np.ones(2, np.float32),
        "count": np.zeros((), np.int32),
        "key": jax.random.key(0),
        "block": {"batch_stats": {"mean": np.ones(2, np.float32)}},
    }
    assert learns(params) == ["w"]


def test_the_optimizer_sees_trainable_leaves_only():
    params = {"w": jnp.ones(2), "frozen": jnp.ones(3)}
    state = train.init(params, optax.adam(0.1), key=jax.random.key(0), trainable="w")
    assert tree.paths(state.opt_state[0].mu) == ["w"]


def test_a_leaf_without_gradient_is_refused():
    params = {"w": jnp.ones(2), "count": jnp.zeros((), jnp.int32)}
    with pytest.raises(ArgumentTypeError, match="count"):
        train.init(params, optax.sgd(0.1), key=jax.random.key(0), trainable="**")


@pytest.mark.parametrize("params", [{}, {"count": np.zeros((), np.int32)}])
def test_nothing_to_train_is_refused(params):
    with pytest.raises(SelectionError):
        train.init(params, optax.sgd(0.1), key=jax.random.key(0))
