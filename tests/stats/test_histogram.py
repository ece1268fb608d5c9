"""The streaming histogram, and the ranges found from it, against plain NumPy."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import stats
from jaxcompress.errors import ArgumentError
from jaxcompress.stats._histogram import _widen
from jaxcompress.stats._statistic import Counter

pytestmark = pytest.mark.usefixtures("strict_promotion")

STATISTIC = stats.histogram(bins=256)
UPDATE = jax.jit(STATISTIC.update)


def collect(*batches, statistic=STATISTIC):
    update = UPDATE if statistic is STATISTIC else jax.jit(statistic.update)
    state = statistic.init(1)
    for batch in batches:
        state = update(state, np.asarray(batch, np.float32))
    return statistic.finalize(state)


def sample(kind, n=20_000, seed=0):
    x = np.random.default_rng(seed).standard_t(5, size=n).astype(np.float32)
    return {"signed": x, "one_sided": np.maximum(x, 0), "negative": -np.abs(x)}[kind][:, None]


@hypothesis.given(
    hnp.arrays(np.float32, 8, elements=st.floats(width=32, allow_nan=True, allow_subnormal=False)),
    st.integers(1, 7),
)
@hypothesis.example(np.float32([-np.finfo(np.float32).tiny, 0, 0, 0, 0, 0, 0, 1]), 4)  # underflows
def test_cutting_into_batches_changes_no_bit(x, cut):
    x = x[:, None]
    # One shape throughout, so that nothing compiles anew: the cut moves within padding.
    pad = np.full((8, 1), np.inf, np.float32)
    first, second = pad.copy(), pad.copy()
    first[:cut], second[: 8 - cut] = x[:cut], x[cut:]
    whole, parts = jax.device_get((collect(x), collect(first, second)))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)
    finite = x[np.isfinite(x)]
    assert whole.counts.sum() == finite.size and whole.zeros == (finite == 0).sum()
    if finite.size and np.abs(finite).max() > 2.0**-100:
        width = float(whole.width)
        index = np.floor(finite.astype(np.float64) / width).astype(int) + 128
        np.testing.assert_array_equal(whole.counts, np.bincount(index, minlength=256))
        assert np.log2(width) % 1 == 0 and index.min() >= 0 and index.max() < 256
        assert index.max() >= 192 or index.min() < 64  # at most half of the bins are idle


def test_extreme_entries_fit():
    big = np.finfo(np.float32).max
    h = collect([[1.0], [-1.0]], [[big], [-big]])
    assert h.counts.sum() == 4 and h.counts[0] == h.counts[-1] == 1
    assert np.isfinite(h.width) and (h.low, h.high) == (-big, big)


def test_empty_and_zero_histograms_have_empty_ranges():
    for h in (collect([[np.nan]] * 2), collect([[0.0]] * 2)):
        for low, high in (
            h.percentile_range(99.0),
            h.mse_range(4),
            h.mse_range(4, symmetric=False, points=4),
            h.entropy_range(4),
        ):
            assert low == high == 0


def test_widening_carries_beyond_32_bits():
    full = Counter(jnp.full(8, 2**32 - 1, jnp.uint32), jnp.arange(8, dtype=jnp.uint32))
    before = [int(h) * 2**32 + int(v) for v, h in zip(full.low, full.high, strict=True)]
    wide = _widen(full, jnp.int32(1))
    after = [int(h) * 2**32 + int(v) for v, h in zip(wide.low, wide.high, strict=True)]
    merged = [before[0] + before[1], before[2] + before[3], before[4] + before[5]]
    assert after == [0, 0, *merged, before[6] + before[7], 0, 0]


@pytest.mark.parametrize("kind", ["signed", "one_sided", "negative"])
@pytest.mark.parametrize("q", [0, 0.1, 30, 50, 99, 99.9, 100])
def test_percentiles_are_numpys_to_a_bin(kind, q):
    x = sample(kind)
    h = collect(x)
    tolerance = float(h.width) if 0 < q < 100 else 0
    # The sample is sparse in its tails, where neighbours are further apart than a bin.
    around = np.percentile(x, [max(q - 0.01, 0), min(q + 0.01, 100)])
    got = float(h.percentile(q))
    assert around[0] - tolerance <= got <= around[1] + tolerance


def test_percentile_range_cuts_magnitudes_or_both_tails():
    x = sample("signed")
    h = collect(x)
    low, high = h.percentile_range(99)
    assert low == -high
    assert abs(float(high) - np.percentile(np.abs(x), 99)) <= 2 * float(h.width)
    low, high = h.percentile_range(98, symmetric=False)
    np.testing.assert_allclose([low, high], np.percentile(x, [1, 99]), atol=2 * float(h.width))
    assert collect(sample("one_sided")).percentile_range(98, symmetric=False)[0] == 0


def test_a_tail_keeps_its_digits_beside_a_heavy_centre():
    counts = np.zeros(256, np.float32)
    counts[128], counts[255] = 1e12, 1000
    h = stats.Histogram(*map(jnp.float32, (0, 1, 0, -1, 127.9)))._replace(
        counts=jnp.asarray(counts)
    )
    assert h.percentile(100 * (1 - 5e-10)) == pytest.approx(127.5, abs=0.1)


def quantization_error(x, low, high, bits, symmetric):
    if symmetric:
        limit = 2 ** (bits - 1) - 1
        step, least, most = high / limit, -limit, limit
    else:
        step = (high - low) / (2**bits - 1)
        least = round(low / step)
        most = least + 2**bits - 1
    return np.mean((x - np.clip(np.round(x / step), least, most) * step) ** 2)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("kind", ["signed", "one_sided", "negative"])
def test_mse_range_is_near_the_best_for_the_data(kind, symmetric):
    x = sample(kind).astype(np.float64)
    low, high = map(float, collect(x).mse_range(4, symmetric=symmetric))
    assert low <= 0 <= high and (low == -high or not symmetric)
    got = quantization_error(x, low, high, 4, symmetric)
    peak = np.abs(x).max()
    ends = np.linspace(0.02, 1, 50)
    if symmetric:
        tried = [(-peak * f, peak * f) for f in ends]
    else:
        tried = [(min(x.min(), 0) * f, max(x.max(), 0) * g) for f in ends for g in ends]
    best = min(quantization_error(x, a, b, 4, symmetric) for a, b in tried)
    whole = quantization_error(x, *tried[-1], 4, symmetric)
    assert got <= 1.03 * best < 0.8 * whole


def test_mse_range_of_huge_and_tiny_entries_scales():
    x = sample("signed", 2000)
    plain = np.array(collect(x).mse_range(4))
    for scale in (2.0**90, 2.0**-80):
        np.testing.assert_allclose(
            np.array(collect(x * np.float32(scale)).mse_range(4)) / scale, plain, rtol=1e-6
        )


def divergence(p, q):
    if ((p > 0) & (q == 0)).any():
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    return np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))


def entropy_edge(sizes, levels):
    """TensorRT's calibration, as its slides write it, in loops."""
    found = []
    for kept in range(levels, len(sizes) + 1):
        p = sizes[:kept].copy()
        p[-1] += sizes[kept:].sum()
        q = np.zeros(kept)
        level = np.arange(kept) * levels // kept
        for one in range(levels):
            mine = (level == one) & (sizes[:kept] > 0)
            if mine.any():
                q[mine] = sizes[:kept][mine].sum() / mine.sum()
        found.append(divergence(p, q))
    return levels + len(found) - 1 - int(np.argmin(found[::-1])), found


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("kind", ["signed", "one_sided", "negative"])
def test_entropy_range_is_tensorrts(kind, bits):
    h = collect(sample(kind))
    counts = np.asarray(h.counts, np.float64)
    counts[128] -= float(h.zeros)
    sizes = counts[128:] + counts[:128][::-1]
    peak = float(max(-h.low, h.high))
    edge, found = entropy_edge(sizes, 2 ** (bits - 1))
    low, high = map(float, h.entropy_range(bits))
    assert low == -high
    mine = round(high / float(h.width))
    # Equal up to float32's rounding of nearly equal divergences.
    assert high == min(edge * float(h.width), peak) or found[mine - 2 ** (bits - 1)] == (
        pytest.approx(min(found), rel=1e-4)
    )
    assert high < 0.9 * peak  # it does cut
    low, high = map(float, h.entropy_range(bits, symmetric=False))
    if kind != "signed":
        edge, _ = entropy_edge(sizes, 2**bits)
    ends = {"signed": (-1, 1), "one_sided": (0, 1), "negative": (-1, 0)}[kind]
    cut = min(edge * float(h.width), peak)
    assert (low, high) == (ends[0] * cut, ends[1] * cut)


def test_ranges_keep_leading_axes():
    hs = [collect(sample("signed", seed=s), sample("one_sided", seed=s)) for s in (1, 2)]
    both = jax.tree.map(lambda *a: jnp.stack(a), *hs)
    for find in (
        lambda h: h.percentile_range(99.0),
        lambda h: h.mse_range(4),
        lambda h: h.entropy_range(3),
        lambda h: (h.percentile(10.0), h.edges[..., -1]),
    ):
        for got, *alone in zip(find(both), *map(find, hs), strict=True):
            np.testing.assert_allclose(got, alone, rtol=1e-6)


@pytest.mark.parametrize(
    "find",
    [
        pytest.param(lambda h: h.percentile(101), id="percentile"),
        pytest.param(lambda h: h.percentile_range(0), id="percentile_range"),
        pytest.param(lambda h: h.mse_range(8), id="mse_bits"),
        pytest.param(lambda h: h.mse_range(4, points=0), id="points"),
        pytest.param(lambda h: h.entropy_range(1), id="entropy_bits"),
    ],
)
def test_bad_questions_are_refused(find):
    with pytest.raises(ArgumentError):
        find(collect([[1.0]]))
