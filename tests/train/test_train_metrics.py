import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcompress.errors import ArgumentError, MissingExtraError
from jaxcompress.train import metrics

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("strict_promotion")


@pytest.fixture(scope="module")
def answers():
    """Logits that are right about half the time, and labels of five classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 200)
    logits = rng.normal(size=(200, 5)) + 1.5 * np.eye(5)[labels]
    return logits.astype(np.float32), labels.astype(np.int32)


def test_equal_scikit_learn(answers):
    logits, labels = answers
    predicted = logits.argmax(1)
    assert np.isclose(
        metrics.accuracy(logits, labels), sklearn.metrics.accuracy_score(labels, predicted)
    )
    assert np.isclose(
        metrics.top_k_accuracy(logits, labels, k=3),
        sklearn.metrics.top_k_accuracy_score(labels, logits, k=3),
    )
    for average in ("macro", "micro", "weighted"):
        expected = sklearn.metrics.f1_score(labels, predicted, average=average)
        assert np.isclose(metrics.f1(logits, labels, average=average), expected)
    assert np.isclose(
        np.mean(metrics.cross_entropy(logits, labels)),
        sklearn.metrics.log_loss(labels, scipy.special.softmax(logits.astype(float), axis=1)),
    )


def test_half_precision_logits_are_reduced_in_single(answers):
    logits, labels = jnp.asarray(answers[0], jnp.bfloat16), answers[1]
    exact = metrics.cross_entropy(logits.astype(jnp.float32), labels)
    np.testing.assert_array_equal(metrics.cross_entropy(logits, labels), exact)
    assert metrics.expected_calibration_error(logits, labels).dtype == jnp.float32


def test_confusion_counts_label_by_row_and_guess_by_column(answers):
    logits, labels = answers
    expected = np.zeros((5, 5), int)
    for label, row in zip(labels, logits, strict=True):
        expected[label, row.argmax()] += 1
    np.testing.assert_array_equal(metrics.confusion(logits, labels), expected)
    # Classes that never occur have their row and column all the same.
    assert metrics.confusion(np.eye(3, dtype=np.float32)[:1], np.array([0])).shape == (3, 3)


@given(
    hnp.arrays(
        np.float32,
        (6, 4),
        elements=st.sampled_from([-np.inf, -1.0, 0.0, 1.0, np.inf, np.nan]),
    ),
    hnp.arrays(np.int32, 6, elements=st.integers(0, 3)),
    st.sampled_from([1, 2, 4]),
)
def test_ties_go_to_the_lower_class_and_nan_is_wrong(logits, labels, k):
    ranks = np.argsort(-logits, axis=1, kind="stable")
    expected = [
        label in rank[:k] and not np.isnan(row).any()
        for row, rank, label in zip(logits, ranks, labels, strict=True)
    ]
    np.testing.assert_array_equal(metrics.correct(logits, labels, k=k), expected)


@pytest.mark.parametrize("bins", [1, 15])
def test_calibration_error_equals_the_loop(answers, bins):
    logits, labels = answers
    probabilities = scipy.special.softmax(logits.astype(float), axis=1)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for i in range(bins):
        chosen = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if chosen.any():
            expected += chosen.mean() * abs(right[chosen].mean() - confidence[chosen].mean())
    assert expected > 0.01
    error = metrics.expected_calibration_error(logits, labels, bins=bins)
    np.testing.assert_allclose(error, expected, rtol=1e-4)


def test_calibration_of_the_certain():
    logits = jnp.array([[100.0, 0.0], [100.0, 0.0]])
    assert metrics.expected_calibration_error(logits, jnp.array([0, 0])) == 0.0
    assert metrics.expected_calibration_error(logits, jnp.array([1, 1])) == 1.0


def test_compare_finds_a_difference_and_its_size(answers):
    logits, labels = answers
    rng = np.random.default_rng(1)
    noisy = (logits + 2 * rng.normal(size=logits.shape)).astype(np.float32)
    result = metrics.compare(logits, noisy, labels, key=KEY, resamples=1000)
    a, b = (np.asarray(metrics.correct(x, labels)) for x in (logits, noisy))
    losses = [np.asarray(metrics.cross_entropy(x, labels)) for x in (logits, noisy)]
    for interval, values in (
        (result.agreement, logits.argmax(1) == noisy.argmax(1)),
        (result.accuracy, b - a),
        (result.cross_entropy, losses[1] - losses[0]),
    ):
        # The bootstrap interval of a mean is close to that of the normal approximation.
        error = np.std(values) / np.sqrt(len(values))
        assert np.isclose(interval.value, np.mean(values), atol=1e-6)
        assert np.isclose(interval.low, interval.value - 1.96 * error, atol=0.35 * error)
        assert np.isclose(interval.high, interval.value + 1.96 * error, atol=0.35 * error)
    assert result.accuracy.high < 0 < result.cross_entropy.low
    assert result.accuracies == (pytest.approx(a.mean()), pytest.approx(b.mean()))
    assert "200 examples" in str(result) and f"{b.mean():.2%}" in str(result)


def test_comparing_a_model_with_itself_is_exact(answers):
    logits, labels = answers
    result = metrics.compare(logits, logits, labels, key=KEY, resamples=1000)
    assert result.agreement == (1.0, 1.0, 1.0)
    assert result.accuracy == result.cross_entropy == (0.0, 0.0, 0.0)


def test_wider_confidence_gives_wider_intervals(answers):
    logits, labels = answers
    narrow, wide = (
        metrics.compare(logits, -logits, labels, key=KEY, resamples=1000, confidence=level)
        for level in (0.5, 0.99)
    )
    assert wide.accuracy.low < narrow.accuracy.low < narrow.accuracy.high < wide.accuracy.high
    assert narrow == metrics.compare(
        logits, -logits, labels, key=KEY, resamples=1000, confidence=0.5
    )


def test_without_scikit_learn_the_extra_is_named(answers, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(MissingExtraError, match=r"jaxcompress\[demo\]"):
        metrics.f1(*answers)
    assert float(metrics.accuracy(*answers)) > 0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x, y: metrics.correct(x, y[:3]), "labels of shape"),
        (lambda x, y: metrics.cross_entropy(x[0], y), "labels of shape"),
        (lambda x, y: metrics.correct(x, y.astype(float)), "integer classes"),
        (lambda x, y: metrics.correct(x, y, k=0), "`k`"),
        (lambda x, y: metrics.expected_calibration_error(x, y, bins=0), "`bins`"),
        (lambda x, y: metrics.compare(x, x, y[:3], key=KEY), "labels of shape"),
        (lambda x, y: metrics.compare(x, x[:, :2], y, key=KEY), "`b_logits`"),
        (lambda x, y: metrics.compare(x, x, y, key=KEY, confidence=1.0), "`confidence`"),
        (lambda x, y: metrics.compare(x, x, y, key=KEY, resamples=0), "`resamples`"),
    ],
)
def test_bad_arguments_are_refused(answers, call, match):
    with pytest.raises(ArgumentError, match=match):
        call(*answers)


def test_labels_outside_the_classes_are_refused_or_wrong():
    logits = jnp.asarray([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1]])
    for labels in ([255, 0], [-1, 0]):
        with pytest.raises(ArgumentError, match="classes from 0 to 2"):
            metrics.accuracy(logits, jnp.asarray(labels))
        traced = jax.jit(lambda y: (metrics.correct(logits, y), metrics.cross_entropy(logits, y)))
        right, losses = traced(jnp.asarray(labels))
        assert right.tolist() == [0.0, 1.0] and bool(jnp.isnan(losses[0])) and losses[1] < 1
