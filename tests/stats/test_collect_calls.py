"""What `collect` refuses, reports and shows."""

import jax
import numpy as np
import pytest
from stats_mlp import BATCHES, MLP, mlp, normal

from jaxcompress import stats
from jaxcompress.errors import (
    ArgumentError,
    ArgumentTypeError,
    NonFiniteError,
    SelectionError,
    StructureError,
)


def test_non_finite_activations_are_named():
    bad = BATCHES[1].copy()
    bad[0, 0] = np.inf
    batches = [BATCHES[0], bad, bad]
    with pytest.raises(NonFiniteError, match=r"in batch 1 at 'up/kernel': 1\."):
        stats.collect(mlp, MLP, batches, stats.absmax())
    collected = stats.collect(mlp, MLP, batches, stats.absmax(), allow_non_finite=True)
    assert collected.non_finite == {"up/kernel": 2}
    assert np.isinf(collected["up/kernel"][0])
    nan = {**MLP, "up": {**MLP["up"], "bias": np.full(6, np.nan, np.float32)}}
    with pytest.raises(NonFiniteError, match="'down/kernel': 30"):
        stats.collect(mlp, nan, BATCHES, stats.absmax(), where="down/**")


def test_non_finite_layers_are_named():
    layers = normal(4, 4, 4)
    layers[1] = np.inf
    fn = lambda p, x: jax.lax.scan(lambda h, w: (h @ w, None), x, p["layers"])[0]
    with pytest.raises(NonFiniteError, match="'layers', iterations 2, 3: 40"):
        stats.collect(fn, {"layers": layers}, BATCHES, stats.absmax())


def test_bad_calls_say_what_to_do():
    absmax = stats.absmax()
    with pytest.raises(SelectionError, match="nearest paths are: 'down/kernel'"):
        stats.collect(mlp, MLP, BATCHES, absmax, where="**/kernle")
    with pytest.raises(SelectionError, match=r"'up/bias', which is used outside .*\(add"):
        stats.collect(mlp, MLP, BATCHES, absmax, where="up/bias")
    with pytest.raises(SelectionError, match="'spare', which is not read by fn"):
        stats.collect(mlp, MLP, BATCHES, absmax, where="spare")
    with pytest.raises(ArgumentError, match="no batches"):
        stats.collect(mlp, MLP, iter([]), absmax)
    with pytest.raises(ArgumentError, match="without rows at the site 'up/kernel'"):
        stats.collect(mlp, MLP, [BATCHES[0][:0]], absmax)
    for odd in (BATCHES[0].astype(np.float16), BATCHES[0][0], (BATCHES[0], BATCHES[0])):
        with pytest.raises(StructureError, match="batch 1 with"):
            stats.collect(mlp, MLP, [BATCHES[0], odd], absmax)
    for wrong in (stats.absmax, {}, {"a": 1}, None):
        with pytest.raises(ArgumentTypeError, match="statistics"):
            stats.collect(mlp, MLP, BATCHES, wrong)
    for wrong in ({"x": BATCHES[0]}, 3, "abc"):
        with pytest.raises(ArgumentTypeError, match="batches"):
            stats.collect(mlp, MLP, wrong, absmax)


def test_progress_is_for_terminals(monkeypatch, capsys):
    stats.collect(mlp, MLP, BATCHES[:2], stats.absmax(), progress=True)
    assert not capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")
    stats.collect(mlp, MLP, BATCHES[:2], stats.absmax(), progress=True)
    assert "Collecting statistics" in capsys.readouterr().err
    stats.collect(mlp, MLP, BATCHES[:2], stats.absmax())
    assert not capsys.readouterr().err
