"""Every public function with shapes in its signature is called once with those shapes checked."""

import importlib
import inspect
import pkgutil

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import jaxcompress
from jaxcompress import numerics

LOGITS = jnp.arange(24.0).reshape(2, 3, 4)
INT4 = numerics.Format(numerics.int4)
LABELS = jnp.zeros((2, 3), jnp.int32)

CALLS = {
    "distill.decoupled": lambda f: f(LOGITS, -LOGITS, LABELS),
    "distill.jensen_shannon": lambda f: f(LOGITS, -LOGITS),
    "distill.kl": lambda f: f(LOGITS, -LOGITS),
    "distill.logit_mse": lambda f: f(LOGITS, -LOGITS),
    "distill.mix": lambda f: f(LOGITS[0, 0], LOGITS[0, 1], weight=0.5),
    "distill.reverse_kl": lambda f: f(LOGITS, -LOGITS),
    "distill.soft_cross_entropy": lambda f: f(LOGITS, -LOGITS),
    "linalg.damped_cholesky": lambda f: f(jnp.eye(3)),
    "linalg.descend_columns": lambda f: f(
        LOGITS[0], LOGITS[0], jnp.eye(3), lambda i, row, state: row
    ),
    "linalg.solve_columns": lambda f: f(LOGITS[0], jnp.eye(3), lambda i, row, state: row),
    "linalg.top_k_in_groups": lambda f: f(LOGITS, 1, axis=2, size=2),
    "linalg.top_k_mask": lambda f: f(LOGITS, 5),
    "linalg.top_k_masks": lambda f: f([LOGITS, LOGITS[0]], 5),
    "lowrank.activation_svd": lambda f: f(LOGITS[0], jnp.eye(3), 1),
    "lowrank.spectra": lambda f: f(LOGITS),
    "lowrank.svd": lambda f: f(LOGITS[0], 1),
    "lowrank.tucker2": lambda f: f(LOGITS, 1, 2),
    "quantize.bias_shift": lambda f: f(LOGITS[0], LOGITS[0], jnp.ones(3)),
    "quantize.clip_search": lambda f: f(LOGITS[0], jnp.ones(3), INT4),
    "quantize.gptq": lambda f: f(LOGITS[0], jnp.eye(3), INT4),
    "structured.influence": lambda f: f(LOGITS, -LOGITS),
    "train.augment.pad_crop_flip": lambda f: f(jax.random.key(0), jnp.ones((2, 4, 4, 3))),
    "train.metrics.accuracy": lambda f: f(LOGITS[0], LABELS[0]),
    "train.metrics.confusion": lambda f: f(LOGITS[0], LABELS[0]),
    "train.metrics.correct": lambda f: f(LOGITS[0], LABELS[0]),
    "train.metrics.cross_entropy": lambda f: f(LOGITS[0], LABELS[0]),
    "train.metrics.expected_calibration_error": lambda f: f(LOGITS[0], LABELS[0]),
    "train.metrics.top_k_accuracy": lambda f: f(LOGITS[0], LABELS[0], k=2),
}


def exports(module):
    return {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}


def shaped_functions():
    """Collect the public functions whose signature says a shape."""
    found = {}
    for info in pkgutil.iter_modules(jaxcompress.__path__):
        top = importlib.import_module(f"jaxcompress.{info.name}")
        below = filter(inspect.ismodule, exports(top).values())
        for module in [top, *(m for m in below if m.__name__.startswith(f"{top.__name__}."))]:
            for name, value in exports(module).items():
                if not inspect.isfunction(value):
                    continue
                if value.__module__.startswith(module.__name__) and any(
                    "jaxtyping." in str(hint) and "Callable" not in str(hint)
                    for hint in value.__annotations__.values()
                ):
                    found[f"{module.__name__}.{name}".removeprefix("jaxcompress.")] = value
    return found


def test_every_shaped_function_is_called():
    assert set(CALLS) == set(shaped_functions())


@pytest.mark.parametrize("name", CALLS)
def test_shapes(name):
    function = shaped_functions()[name]
    CALLS[name](jaxtyping.jaxtyped(function, typechecker=beartype.beartype))


def test_a_wrong_shape_would_be_seen():
    kl = jaxtyping.jaxtyped(jaxcompress.distill.kl, typechecker=beartype.beartype)
    with pytest.raises(jaxtyping.TypeCheckError):
        kl(LOGITS, LOGITS[..., :2])
