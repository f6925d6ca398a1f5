"""Calibration against scikit-learn and against what is known by construction."""

import numpy as np
import pytest
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

from cxr_ray.calibration import Calibrator, brier, fit, reliability

NAN = float("nan")


def logits(values):
    return np.log(values / (1 - values))


def drawn(count, seed=0, slope=1.0, intercept=0.0):
    """Probabilities that are wrong by a slope and an intercept, and labels drawn from the right ones."""
    generator = np.random.default_rng(seed)
    right = generator.beta(1, 4, count)
    labels = (generator.random(count) < right).astype(float)
    return 1 / (1 + np.exp(-(logits(right) - intercept) / slope)), labels


def test_brier_is_scikit_learns_and_leaves_unknown_labels_out():
    probabilities, labels = drawn(500)
    assert brier(probabilities, labels) == pytest.approx(metrics.brier_score_loss(labels, probabilities))
    half = labels.copy()
    half[::2] = NAN
    assert brier(probabilities, half) == pytest.approx(metrics.brier_score_loss(labels[1::2], probabilities[1::2]))
    assert np.isnan(brier(probabilities, np.full(500, NAN)))


def test_bins_hold_equally_many_images_and_their_means():
    probabilities, labels = drawn(1000)
    bins = reliability(probabilities, labels)
    assert bins.images.tolist() == [100] * 10
    order = np.argsort(probabilities)
    np.testing.assert_allclose(bins.predicted, probabilities[order].reshape(10, 100).mean(axis=1))
    np.testing.assert_allclose(bins.observed, labels[order].reshape(10, 100).mean(axis=1))
    assert bins.expected_error == pytest.approx(np.mean(np.abs(bins.predicted - bins.observed)))


def test_equal_probabilities_share_a_bin():
    probabilities = np.repeat([0.1, 0.4], [70, 30])
    labels = np.r_[np.ones(14), np.zeros(56), np.ones(3), np.zeros(27)]
    bins = reliability(probabilities, labels)
    assert bins.images.tolist() == [70, 30]
    np.testing.assert_allclose(bins.observed, [0.2, 0.1])
    assert bins.expected_error == pytest.approx(0.7 * 0.1 + 0.3 * 0.3)


def test_nothing_known_has_no_error():
    assert np.isnan(reliability(np.full(5, 0.5), np.full(5, NAN)).expected_error)


def aims(labels: np.ndarray) -> np.ndarray:
    """Platt 1999, section 2.2."""
    positives, negatives = (labels == 1).sum(), (labels == 0).sum()
    return np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))


def test_platt_is_logistic_regression_without_a_penalty():
    """What lies between nought and one is, to scikit-learn, both with a weight."""
    probabilities, labels = drawn(4000, slope=0.5, intercept=-1.0)
    found = fit(probabilities, labels, "platt")
    both = np.tile(logits(probabilities)[:, None], (2, 1))
    weights = np.r_[aims(labels), 1 - aims(labels)]
    theirs = LogisticRegression(C=1e9, tol=1e-10).fit(both, np.repeat([1, 0], 4000), sample_weight=weights)
    assert found.slope == pytest.approx(theirs.coef_[0, 0], rel=1e-4)
    assert found.intercept == pytest.approx(theirs.intercept_[0], rel=1e-4)
    assert (found.slope, found.intercept) == (pytest.approx(0.5, abs=0.1), pytest.approx(-1, abs=0.2))


def test_temperature_has_no_intercept_and_the_highest_likelihood():
    probabilities, labels = drawn(4000, slope=0.5)
    found = fit(probabilities, labels, "temperature")
    assert found.intercept == 0
    best = min(np.linspace(0.3, 0.8, 501), key=lambda slope: metrics.log_loss(labels, Calibrator(slope)(probabilities)))
    assert found.slope == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_recalibration_mends_what_was_wrong_on_patients_not_seen(method):
    wrong = dict(slope=0.4, intercept=-1.0 if method == "platt" else 0.0)
    change = fit(*drawn(4000, **wrong), method)
    probabilities, labels = drawn(4000, seed=1, **wrong)
    before, after = (reliability(values, labels).expected_error for values in (probabilities, change(probabilities)))
    assert after < 0.03 < 0.1 < before
    # Their order stays.
    assert (np.diff(change(np.sort(probabilities))) >= 0).all()


@pytest.mark.parametrize("labels", [np.zeros(50), np.ones(50), np.full(50, NAN)])
def test_one_class_changes_nothing(labels):
    assert fit(np.linspace(0.1, 0.9, 50), labels, "platt") == Calibrator()


def test_classes_that_are_told_apart_without_error_give_a_finite_calibrator():
    probabilities = np.r_[np.full(20, 0.1), np.full(20, 0.9)]
    found = fit(probabilities, np.r_[np.zeros(20), np.ones(20)], "platt")
    assert np.isfinite([found.slope, found.intercept]).all()
    # As far apart as twenty images of each can show.
    assert found(np.array([0.1, 0.9])) == pytest.approx([1 / 22, 21 / 22], abs=1e-4)


def test_few_positives_that_are_all_told_apart_keep_the_order_of_the_others():
    rng = np.random.default_rng(0)
    probabilities = np.r_[rng.uniform(0.01, 0.4, 200), rng.uniform(0.6, 0.9, 3)]
    labels = np.r_[np.zeros(200), np.ones(3)]
    for method in ("platt", "temperature"):
        changed = fit(probabilities, labels, method)(np.linspace(0.001, 0.999, 999).astype(np.float32))
        assert (np.diff(changed) > 0).all()
        assert 0 < changed[0] < changed[-1] < 1


def test_probabilities_of_nought_and_one_stay_finite():
    assert np.isfinite(Calibrator(2.0, -1.0)(np.array([0.0, 1.0]))).all()
