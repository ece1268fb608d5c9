import math

import numpy as np
import pytest

from jaxcompress.errors import ArgumentError
from jaxcompress.train import schedules

# schedule, and its fraction of the peak at some steps
CASES = {
    "constant": (schedules.Constant(), {0: 1.0, 1000: 1.0}),
    "staircase": (
        schedules.Staircase(boundaries=(10, 20), factor=0.5),
        {0: 1.0, 9: 1.0, 10: 0.5, 19: 0.5, 20: 0.25, 99: 0.25},
    ),
    "exponential": (
        schedules.Exponential(every=10, rate=0.5),
        {0: 1.0, 5: 0.5**0.5, 10: 0.5, 30: 0.125},
    ),
    "exponential-staircase": (
        schedules.Exponential(every=10, rate=0.5, staircase=True),
        {0: 1.0, 9: 1.0, 10: 0.5, 29: 0.25},
    ),
    "linear": (schedules.Linear(steps=10, final=0.2), {0: 1.0, 5: 0.6, 10: 0.2, 50: 0.2}),
    "cosine": (
        schedules.Cosine(steps=8, final=0.1),
        {0: 1.0, 2: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 4: 0.55, 8: 0.1, 99: 0.1},
    ),
    "plateau": (schedules.Plateau(), {0: 1.0, 1000: 1.0}),
}


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("name", CASES)
def test_values_at_key_steps(name, warmup):
    schedule, expected = CASES[name]
    rate = schedules.learning_rate(0.3, schedule, warmup=warmup)
    for step, fraction in expected.items():
        assert np.isclose(rate(warmup + step), 0.3 * fraction, rtol=1e-5), step
    for step in range(warmup):
        assert np.isclose(rate(step), 0.3 * step / warmup)


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedules.Staircase(boundaries=(20, 10)),
        lambda: schedules.Staircase(boundaries=()),
        lambda: schedules.Staircase(boundaries=(5,), factor=0.0),
        lambda: schedules.Exponential(every=0),
        lambda: schedules.Exponential(every=1, rate=1.5),
        lambda: schedules.Linear(steps=0),
        lambda: schedules.Cosine(steps=5, final=2.0),
        lambda: schedules.Plateau(factor=1.0),
        lambda: schedules.Plateau(patience=0),
        lambda: schedules.Plateau(tolerance=0.0),
        lambda: schedules.learning_rate(0.1, schedules.Constant(), warmup=-1),
    ],
)
def test_bad_schedules_are_refused(make):
    with pytest.raises(ArgumentError, match="expected"):
        make()
