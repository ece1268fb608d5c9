"""Latency: warm, blocked, median and quartiles."""

import gc
import time
import timeit

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import report
from jaxcompress.errors import ArgumentError


def test_statistics_of_a_scripted_clock(monkeypatch):
    seconds = [5.0, 1.0, 2.0, 3.0, 4.0]
    monkeypatch.setattr(timeit, "repeat", lambda call, *, number, repeat: seconds[:repeat])
    taken = report.latency(lambda: 0, repeats=5)
    assert (taken.median, taken.low, taken.high, taken.repeats) == (3.0, 2.0, 4.0, 5)
    assert taken.spread == 2.0 and str(taken) == "3e+03 ms (spread 2e+03 ms)"


def test_it_waits_for_the_result_and_warms_up():
    calls = []

    def slow(x):
        calls.append(gc.isenabled())
        return jax.pure_callback(
            lambda y: (time.sleep(0.02), np.asarray(y))[1], jax.ShapeDtypeStruct((), x.dtype), x
        )

    taken = report.latency(slow, jnp.float32(1), repeats=3, warmup=2)
    assert 0.02 <= taken.low <= taken.median <= taken.high
    assert calls == [True, True, False, False, False] and gc.isenabled()


def test_a_compile_is_not_timed():
    @jax.jit
    def compiled(x):
        time.sleep(0.2)  # runs while tracing
        return x + 1

    assert report.latency(compiled, jnp.ones(3), repeats=3, warmup=1).high < 0.1


def test_a_failure_restores_the_collector():
    outcomes = iter([0, ValueError("broken")])

    def fn():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with pytest.raises(ValueError, match="broken"):
        report.latency(fn, repeats=2, warmup=1)
    assert gc.isenabled()


@pytest.mark.parametrize("name", ["repeats", "warmup"])
def test_at_least_one_call(name):
    with pytest.raises(ArgumentError, match=f"`{name}`: expected 1 or more, got 0"):
        report.latency(lambda: 0, **{name: 0})
