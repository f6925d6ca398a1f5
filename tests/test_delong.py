"""DeLong's and Obuchowski's variances against their definitions by pairs, against R's pROC, and against what they claim."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from cxr_ray.delong import areas

NAN = float("nan")
CASE = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from([0.0, 1.0]), st.integers(0, 5)), min_size=6, max_size=30
)


def kernel(positive, negative):
    return 1.0 if positive > negative else 0.5 if positive == negative else 0.0


def by_pairs(scores, labels):
    """The structural components as DeLong et al. define them, pair by pair, and their covariance by numpy."""
    positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    v10 = np.array([[np.mean([kernel(row[i], row[j]) for j in negative]) for i in positive] for row in scores])
    v01 = np.array([[np.mean([kernel(row[i], row[j]) for i in positive]) for j in negative] for row in scores])
    return v10.mean(axis=1), np.cov(v10) / len(positive) + np.cov(v01) / len(negative)


@given(CASE)
@settings(deadline=None)
def test_areas_and_covariance_are_the_definition(drawn):
    first, second, labels, _ = np.array(drawn, dtype=np.float64).T
    if not 1 < labels.sum() < len(labels) - 1:
        return
    scores = np.stack([first, second])
    found = areas(scores, labels)
    expected, covariance = by_pairs(scores, labels)
    np.testing.assert_allclose(found.aurocs, expected, atol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-12)
    assert found.aurocs[0] == pytest.approx(metrics.roc_auc_score(labels, first))


@given(CASE)
@settings(deadline=None)
def test_clusters_follow_obuchowskis_sums(drawn):
    first, second, labels, keys = np.array(drawn, dtype=np.float64).T
    positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    clusters = np.unique(keys)
    with_positive, with_negative = len(np.unique(keys[positive])), len(np.unique(keys[negative]))
    if with_positive < 2 or with_negative < 2:
        return
    scores = np.stack([first, second])
    found = areas(scores, labels, keys)
    m, n, count = len(positive), len(negative), len(clusters)
    expected = np.zeros((2, 2))
    sums = {}
    for row in (0, 1):
        value = scores[row]
        for cluster in clusters:
            of_positive = [np.mean([kernel(value[i], value[j]) for j in negative]) for i in positive if keys[i] == cluster]
            of_negative = [np.mean([kernel(value[i], value[j]) for i in positive]) for j in negative if keys[j] == cluster]
            area = found.aurocs[row]
            sums[row, cluster] = sum(of_positive) - len(of_positive) * area, sum(of_negative) - len(of_negative) * area
    for a, b in itertools.product((0, 1), repeat=2):
        s10 = with_positive / (with_positive - 1) * sum(sums[a, c][0] * sums[b, c][0] for c in clusters) / m
        s01 = with_negative / (with_negative - 1) * sum(sums[a, c][1] * sums[b, c][1] for c in clusters) / n
        s11 = count / (count - 1) * sum(sums[a, c][0] * sums[b, c][1] for c in clusters)
        s11 += count / (count - 1) * sum(sums[b, c][0] * sums[a, c][1] for c in clusters)
        expected[a, b] = s10 / m + s01 / n + s11 / (m * n)
    np.testing.assert_allclose(found.covariance, expected, atol=1e-12)


def test_clusters_of_one_image_are_delongs():
    generator = np.random.default_rng(0)
    labels = (generator.random(60) < 0.4).astype(float)
    scores = np.round(generator.normal(size=(2, 60)) + labels, 1)
    alone = areas(scores, labels)
    clustered = areas(scores, labels, np.arange(60))
    # Obuchowski's mixed term is zero but for the sums of clusters with both classes, of which there are none.
    np.testing.assert_allclose(clustered.covariance, alone.covariance, atol=1e-15)


def test_images_of_a_patient_told_again_make_nothing_surer():
    generator = np.random.default_rng(1)
    labels = (generator.random(80) < 0.4).astype(float)
    scores = generator.normal(size=(1, 80)) + labels
    once = areas(scores, labels)
    again = areas(np.tile(scores, 12), np.tile(labels, 12), np.tile(np.arange(80), 12))
    assert again.covariance[0, 0] == pytest.approx(once.covariance[0, 0], rel=1e-9)
    assert areas(np.tile(scores, 12), np.tile(labels, 12)).covariance[0, 0] < once.covariance[0, 0] / 10


def test_one_class_cannot_be_compared():
    found = areas(np.zeros((2, 5)), np.ones(5))
    assert np.isnan(found.aurocs).all()
    assert np.isnan(found.covariance).all()


def test_unknown_labels_are_left_out():
    labels = np.array([1.0, 0, NAN, 1, 0, 1, 0])
    scores = np.array([[0.9, 0.1, 0.5, 0.4, 0.6, 0.7, 0.3]])
    kept = np.isfinite(labels)
    one, other = areas(scores, labels), areas(scores[:, kept], labels[kept])
    np.testing.assert_array_equal(one.aurocs, other.aurocs)
    np.testing.assert_array_equal(one.covariance, other.covariance)


def test_a_score_and_itself_do_not_differ():
    generator = np.random.default_rng(2)
    labels = np.r_[np.ones(20), np.zeros(30)]
    row = generator.normal(size=50) + labels
    same = areas(np.stack([row, row]), labels).difference(0, 1)
    assert (same.interval.value, same.z, same.p_value) == (0, 0, 1)


def test_figures_are_those_of_rs_proc():
    """Computed with R 4.2.2 and pROC 1.18.0: var, cov and roc.test(method = "delong") of roc(direction = "<")."""
    labels = np.r_[np.ones(8), np.zeros(12)]
    one = [0.9, 0.8, 0.7, 0.6, 0.55, 0.54, 0.35, 0.2, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.6, 0.05, 0.02, 0.01]
    other = [0.7, 0.9, 0.3, 0.8, 0.4, 0.6, 0.5, 0.1, 0.6, 0.2, 0.5, 0.1, 0.3, 0.4, 0.2, 0.1, 0.7, 0.3, 0.2, 0.0]
    found = areas(np.array([one, other]), labels)
    np.testing.assert_allclose(found.aurocs, [0.869791666667, 0.760416666667], atol=1e-10)
    np.testing.assert_allclose(
        found.covariance, [[0.00695078575938, 0.00771103896104], [0.00771103896104, 0.01380151966089]], atol=1e-12
    )
    difference = found.difference(0, 1)
    assert (difference.z, difference.p_value) == (pytest.approx(1.498115140951), pytest.approx(0.134103337928))
    low, value, high = 0.706386779145, 0.869791666667, 1.0
    interval = found.interval(0)
    assert (interval.low, interval.value, interval.high) == pytest.approx((low, value, high))
