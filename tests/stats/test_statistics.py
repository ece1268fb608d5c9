"""Every statistic against NumPy in float64, over unequal batches; the contract all share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import stats
from jaxcompress.errors import ArgumentError
from jaxcompress.stats._statistic import Counter, add_count, add_counters, read_count

pytestmark = pytest.mark.usefixtures("strict_promotion")

FEATURES, OUTPUTS = 6, 4
CUTS = [5, 6, 18]  # batches of 5, 1, 12 and 5 rows


def blocks_of(gram, size):
    return np.stack([gram[i : i + size, i : i + size] for i in range(0, len(gram), size)])


def covariance(x):
    return x.mean(0), np.cov(x.T, bias=True), len(x)


# Each: the statistic, its field or fields, and the same from all rows at once in NumPy.
ONE = {
    "absmax": (stats.absmax(), lambda x: np.abs(x).max(0)),
    "absmax_tensor": (stats.absmax(per_tensor=True), lambda x: np.abs(x).max()),
    "min_max": (stats.min_max(), lambda x: (x.min(0), x.max(0))),
    "min_max_tensor": (stats.min_max(per_tensor=True), lambda x: (x.min(), x.max())),
    "channel_norm": (
        stats.channel_norm(),
        lambda x: (np.abs(x).sum(0), np.sqrt((x**2).sum(0)), len(x)),
    ),
    "second_moment": (stats.second_moment(), lambda x: (x.T @ x, len(x))),
    "second_moment_blocks": (
        stats.second_moment(block=2),
        lambda x: (blocks_of(x.T @ x, 2), len(x)),
    ),
    "mean_covariance": (stats.mean_covariance(), covariance),
    "mean_variance": (
        stats.mean_covariance(diagonal=True),
        lambda x: (x.mean(0), x.var(0), len(x)),
    ),
    "histogram": (
        stats.histogram(bins=16),
        lambda x: (np.histogram(x, np.arange(-8, 9) * 0.5)[0], 0.5, 0, x.min(), x.max()),
    ),
}
TWO = {
    "fisher": (stats.fisher(), lambda x, g: ((x**2).T @ g**2, len(x))),
    "kronecker": (stats.kronecker(), lambda x, g: (x.T @ x, g.T @ g, len(x))),
    "gradient_activation": (
        stats.gradient_activation(),
        lambda a, g: ((a[:, :4] * g).sum(0), np.abs(a[:, :4] * g).sum(0), len(a)),
    ),
    "channel_fisher": (
        stats.channel_fisher(),
        lambda a, g: (((a[:, :4] * g) ** 2).sum(0), len(a)),
    ),
}
ALL = {**ONE, **TWO}


def rows(seed=0, n=23):
    rng = np.random.default_rng(seed)
    x = np.clip(rng.normal(size=(n, FEATURES)) * 1.5, -4, 3.99).astype(np.float32)
    x[0, 0] = 3.9  # so that the histogram's range is ±4
    return x, rng.normal(size=(n, OUTPUTS)).astype(np.float32)


def arrays_for(name, x, g):
    if name in ONE:
        return (x,)
    return (x[:, :4], g) if name in ("gradient_activation", "channel_fisher") else (x, g)


def run(statistic, *batches, jit=True):
    """Stream batches, each a tuple of arrays."""
    update = jax.jit(statistic.update) if jit else statistic.update
    state = statistic.init(*(array.shape[-1] for array in batches[0]))
    for batch in batches:
        new = update(state, *batch)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
        assert [a.dtype for a in jax.tree.leaves(new)] == [a.dtype for a in jax.tree.leaves(state)]
        state = new
    return statistic.finalize(state)


def pieces(arrays, cuts=CUTS):
    return list(zip(*(np.split(array, cuts) for array in arrays), strict=True))


def expect(name, x, g):
    arrays = (a.astype(np.float64) for a in (x, g)[: 1 if name in ONE else 2])
    return ALL[name][1](*arrays)


def assert_close(result, expected, rtol=1e-5):
    expected = expected if isinstance(expected, tuple) else (expected,)
    leaves = jax.tree.leaves(result)
    assert len(leaves) == len(expected)
    for got, want in zip(leaves, expected, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", ALL)
def test_streams_to_what_numpy_says(name):
    x, g = rows()
    assert_close(run(ALL[name][0], *pieces(arrays_for(name, x, g))), expect(name, x, g))


@pytest.mark.parametrize("name", ALL)
def test_one_batch_is_many(name):
    arrays = arrays_for(name, *rows(1))
    streamed, whole = run(ALL[name][0], *pieces(arrays)), run(ALL[name][0], arrays)
    for a, b in zip(jax.tree.leaves(streamed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_rows_accumulate_in_float32(name):
    x, g = (np.asarray(jnp.asarray(a, jnp.bfloat16)) for a in rows(2))
    result = run(ALL[name][0], *pieces(arrays_for(name, x, g)))
    assert_close(result, expect(name, x, g))


@pytest.mark.parametrize("name", ALL)
def test_vmap_keeps_experts_apart(name):
    statistic, _ = ALL[name]
    experts = [arrays_for(name, *rows(seed)) for seed in (3, 4)]
    stacked = [jnp.stack(pair) for pair in zip(*experts, strict=True)]
    state = statistic.init(*(a.shape[-1] for a in stacked))
    state = jax.tree.map(lambda s: jnp.broadcast_to(s, (2, *s.shape)), state)
    both = jax.vmap(statistic.finalize)(jax.jit(jax.vmap(statistic.update))(state, *stacked))
    for e, arrays in enumerate(experts):
        alone = run(statistic, arrays)
        for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[e], b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("value", [0.0, -2.5, 1e15, 1e-15])
@pytest.mark.parametrize("name", ONE)
def test_constant_rows(name, value):
    statistic, reference = ONE[name]
    x = np.full((3, FEATURES), value, np.float32)
    got = run(statistic, (x,), (x[:1],))
    if name == "histogram":
        assert counted_once(got, 24, value)
        return
    with np.errstate(all="ignore"):
        want = reference(np.full((4, FEATURES), np.float64(np.float32(value))))
    want = want if isinstance(want, tuple) else (want,)
    for a, b in zip(jax.tree.leaves(got), want, strict=True):
        # A covariance of constants is 0 up to the rounding of their squares.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-12 * abs(value) ** 2)


def counted_once(histogram, entries, value):
    counts, edges = np.asarray(histogram.counts), np.asarray(histogram.edges)
    (bin_number,) = np.nonzero(counts)[0]
    inside = edges[bin_number] <= value < edges[bin_number + 1]
    return counts[bin_number] == entries and inside and histogram.zeros == entries * (value == 0)


def test_moving_average_is_the_corrected_mean():
    x, _ = rows(5)
    batches = np.split(x, CUTS)
    weights = 0.9 ** np.arange(len(batches))[::-1]
    for per_tensor, axis in ((False, 0), (True, None)):
        result = run(
            stats.moving_average(decay=0.9, per_tensor=per_tensor), *((b,) for b in batches)
        )
        for got, extreme in zip(
            result, (np.min, np.max, lambda b, a: np.abs(b).max(a)), strict=True
        ):
            want = np.average([extreme(b, axis) for b in batches], axis=0, weights=weights)
            np.testing.assert_allclose(got, want, rtol=1e-5)


def test_moving_average_of_one_batch_is_its_extremes():
    x, _ = rows(6)
    result = run(stats.moving_average(decay=0.999), (x,))
    np.testing.assert_allclose(result.high, x.max(0), rtol=1e-6)


def test_covariance_survives_a_large_mean():
    rng = np.random.default_rng(7)
    x = (rng.normal(size=(64, 3)) + 10_000).astype(np.float32)
    result = run(stats.mean_covariance(), *pieces((x,), [1, 9, 40]))
    np.testing.assert_allclose(
        result.covariance, np.cov(x.T.astype(np.float64), bias=True), rtol=1e-4, atol=1e-4
    )


def test_second_moment_mean_divides_each_layer_by_its_tokens():
    moment = stats.SecondMoment(jnp.ones((2, 3, 3)), jnp.array([2.0, 4.0]))
    np.testing.assert_array_equal(moment.mean[:, 0, 0], [0.5, 0.25])


def test_nan_is_not_hidden():
    x = jnp.array([[1.0, jnp.nan], [0.0, 2.0]])
    assert np.isnan(run(stats.absmax(), (x,))).tolist() == [False, True]
    assert np.isnan(run(stats.min_max(), (x,)).low).tolist() == [False, True]


def test_lookups_count_rows():
    statistic = stats.lookups()
    indices = np.array([[3], [0], [3], [-1], [7]], np.int32)
    state = statistic.init(5)
    for part in np.split(indices, [2]):
        state = jax.jit(statistic.update)(state, part)
    result = statistic.finalize(state)
    np.testing.assert_array_equal(result.counts, [1, 0, 0, 2, 0])  # -1 and 7 are no rows
    assert result.tokens == 5


def test_counters_carry():
    total = Counter(jnp.uint32(2**32 - 1), jnp.uint32(0))
    total = add_count(total, 3)
    assert (int(total.low), int(total.high)) == (2, 1)
    doubled = add_counters(
        Counter(jnp.uint32(2**31), jnp.uint32(1)), Counter(jnp.uint32(2**31), jnp.uint32(2))
    )
    assert (int(doubled.low), int(doubled.high)) == (0, 4)
    assert float(read_count(doubled)) == 4 * 2.0**32


def test_a_billion_tokens_still_count():
    statistic = stats.channel_norm()
    state = statistic.init(1)
    state = state._replace(tokens=Counter(jnp.uint32(2**32 - 2), jnp.uint32(5)))
    state = jax.jit(statistic.update)(state, jnp.ones((4, 1)))
    assert (int(state.tokens.low), int(state.tokens.high)) == (2, 6)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: stats.absmax(reads="outputs"), id="reads"),
        pytest.param(lambda: stats.moving_average(decay=1.0), id="decay"),
        pytest.param(lambda: stats.second_moment(block=0), id="block"),
        pytest.param(lambda: stats.second_moment(block=4).init(6), id="block_divides"),
        pytest.param(lambda: stats.histogram(bins=100), id="bins"),
        pytest.param(lambda: stats.gradient_activation(at="x"), id="at"),
        pytest.param(lambda: stats.channel_fisher(at="x"), id="at_fisher"),
    ],
)
def test_bad_options_are_refused(make):
    with pytest.raises(ArgumentError):
        make()


def test_gradients_are_known_to_be_needed():
    assert stats.fisher().needs_gradients and not stats.absmax().needs_gradients
    assert stats.gradient_activation(at="input").reads == ("channels", "input_grad")


def test_integers_are_widened_before_they_are_measured():
    x = jnp.array([[-128, 3]], jnp.int8)
    for statistic, wanted in ((stats.absmax(), [128, 3]), (stats.moving_average(), [128, 3])):
        result = statistic.finalize(statistic.update(statistic.init(2), x))
        assert np.asarray(getattr(result, "absmax", result)).tolist() == wanted


def test_complex_activations_are_refused():
    statistic = stats.channel_norm()
    with pytest.raises(TypeError, match="complex64"):
        statistic.update(statistic.init(2), jnp.ones((3, 2), jnp.complex64))


def test_a_massive_first_row_costs_the_covariance_nothing():
    x = np.random.default_rng(0).normal(10, 1, (4096, 1)).astype(np.float32)
    x[0] = 1e6
    statistic = stats.mean_covariance()
    result = statistic.finalize(statistic.update(statistic.init(1), jnp.asarray(x)))
    np.testing.assert_allclose(result.mean, x.astype(float).mean(0), rtol=1e-6)
