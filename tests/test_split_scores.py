"""The figures of a split against scikit-learn, weighted and not, and subgroups against a split cut by hand."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from cxr_ray.operating import judge
from cxr_ray.records import fixed_lists
from cxr_ray.resampling import PatientResamples
from cxr_ray.scoring import Ranking
from cxr_ray.split_scores import difference, mean_auroc, score
from cxr_ray.subgroups import score_subgroup, subgroups

NAN = float("nan")
WEIGHTED = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1.0, NAN]), st.integers(0, 3)), min_size=3, max_size=40)


def made(patients=60, images=3, seed=0):
    generator = np.random.default_rng(seed)
    labels = (generator.random((patients * images, 14)) < 0.3).astype(float)
    labels[generator.random(labels.shape) < 0.05] = NAN
    scores = 1 / (1 + np.exp(-generator.normal(size=labels.shape) - np.nan_to_num(labels)))
    return scores, labels, np.repeat([f"p{number}" for number in range(patients)], images)


@given(WEIGHTED)
@settings(deadline=None)
def test_weighted_figures_are_scikit_learns(drawn):
    scores, labels, weights = np.array(drawn, dtype=np.float64).T
    known = np.isfinite(labels)
    kept = known & (weights > 0)
    if not 0 < labels[kept].sum() < kept.sum():
        return
    ranking = Ranking.of(scores, labels)
    # Two resamples at once: every image once, and as drawn.
    counts = ranking.counts(np.stack([np.ones_like(weights), weights]))
    truth, values, weight = labels[kept], scores[kept], weights[kept]
    assert counts.auroc()[1] == pytest.approx(metrics.roc_auc_score(truth, values, sample_weight=weight))
    assert counts.average_precision()[1] == pytest.approx(metrics.average_precision_score(truth, values, sample_weight=weight))
    false, true, _ = metrics.roc_curve(truth, values, sample_weight=weight, drop_intermediate=False)
    for specificity in (0.5, 0.9, 0.95):
        expected = true[1 - false >= specificity - 1e-9].max()
        assert counts.sensitivity_at(specificity)[1] == pytest.approx(expected)


def test_sensitivity_at_a_specificity_by_hand():
    """Ten negatives, of which one lies above two of the four positives."""
    scores = np.r_[np.linspace(0.0, 0.4, 9), 0.7, 0.5, 0.6, 0.8, 0.9]
    labels = np.r_[np.zeros(10), np.ones(4)]
    counts = Ranking.of(scores, labels).counted_once()
    assert counts.sensitivity_at(0.90)[0] == 1.0
    assert counts.sensitivity_at(0.95)[0] == 0.5
    # The highest score of all is a negative: no threshold but one above everything is strict enough.
    scores[9] = 1.0
    assert Ranking.of(scores, labels).counted_once().sensitivity_at(0.95)[0] == 0.0


def test_point_figures_intervals_and_counts():
    scores, labels, keys = made()
    found = score(scores, labels, keys, resamples=200)
    assert (found.images, found.patients, found.resamples) == (180, 60, 200)
    for k, finding in enumerate(found.findings):
        known = np.isfinite(labels[:, k])
        truth, values = labels[known, k], scores[known, k]
        assert (finding.images, finding.positives) == (known.sum(), truth.sum())
        assert finding.auroc.value == pytest.approx(metrics.roc_auc_score(truth, values))
        assert finding.average_precision.value == pytest.approx(metrics.average_precision_score(truth, values))
        assert finding.brier == pytest.approx(metrics.brier_score_loss(truth, values))
        for interval in (finding.auroc, finding.average_precision, *finding.sensitivity):
            assert interval.low <= interval.value <= interval.high
    assert found.auroc.value == pytest.approx(np.mean([finding.auroc.value for finding in found.findings]))
    assert mean_auroc(scores, labels, keys, resamples=200) == found.auroc


def test_nothing_known_is_scored_as_nothing():
    scores, labels, keys = made(patients=5)
    found = score(scores, np.full_like(labels, NAN), keys, resamples=100)
    assert all(np.isnan(finding.auroc.value) for finding in found.findings)
    assert np.isnan([found.auroc.value, found.auroc.low, found.average_precision.value]).all()
    assert np.isnan(mean_auroc(scores, np.full_like(labels, NAN), keys, resamples=100).value)


def test_resamples_draw_whole_patients_and_are_the_same_each_time():
    keys = np.array(["b", "a", "b", "c", "a"])
    drawing = PatientResamples(keys, resamples=120, seed=3)
    weights = np.concatenate(list(drawing.weights()))
    np.testing.assert_array_equal(weights, np.concatenate(list(drawing.weights())))
    assert weights.shape == (120, 5)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    assert (weights[:, 0] + weights[:, 1] + weights[:, 3] == 3).all()
    assert drawing.patients == 3


def test_a_paired_difference_is_surer_than_the_two_alone():
    scores, labels, keys = made(patients=120)
    noisy = scores + np.random.default_rng(5).normal(scale=0.02, size=scores.shape)
    by_finding, mean = difference(scores, noisy, labels, keys, resamples=200)
    one, other = (score(values, labels, keys, resamples=200).auroc for values in (scores, noisy))
    assert mean.value == pytest.approx(one.value - other.value)
    assert mean.high - mean.low < 0.5 * (one.high - one.low)
    assert len(by_finding) == 14
    _, same = difference(scores, scores, labels, keys, resamples=100)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    # The other way round it is the same with another sign.
    _, turned = difference(noisy, scores, labels, keys, resamples=200)
    assert (turned.low, turned.high) == pytest.approx((-mean.high, -mean.low))


def test_a_threshold_is_judged_by_hand():
    point = judge(np.array([0.1, 0.5, 0.5, 0.9, 0.9]), np.array([0.0, 0, 1, 1, NAN]), 0.5)
    assert (point.sensitivity, point.specificity) == (1.0, 0.5)
    assert (point.precision, point.negative_predictive_value) == (pytest.approx(2 / 3), 1.0)
    nobody = judge(np.array([0.1, 0.2]), np.array([0.0, 1]), 0.5)
    assert np.isnan(nobody.precision)
    assert (nobody.sensitivity, nobody.specificity, nobody.negative_predictive_value) == (0.0, 1.0, 0.5)


def table(**changed):
    columns = {
        "image_id": ["1", "2", "3", "4", "5", "6"],
        "patient_key": ["a", "a", "b", "c", "c", "c"],
        "sex": ["F", "F", None, "M", "M", "M"],
        "age_years": pa.array([17.5, 18.0, None, 59.0, 60.0, 90.0], pa.float32()),
        "view": ["PA", "AP", "AP", "AP", "AP", None],
        "history_count": pa.array([0, 1, None, 0, 1, 2], pa.int32()),
        "history_ever": fixed_lists(
            np.repeat([[0], [1], [0], [0], [1], [1]], 14, axis=1).astype(np.uint8),
            np.array([True, True, False, True, True, True]),
        ),
    } | changed
    return pa.table(columns)


def test_each_image_is_in_the_subgroups_that_it_belongs_to():
    members = {(group.by, group.name): np.flatnonzero(group.member[:, 0]).tolist() for group in subgroups(table())}
    assert members == {
        ("sex", "F"): [0, 1],
        ("sex", "M"): [3, 4, 5],
        ("sex", "unknown"): [2],
        ("age", "0-17"): [0],
        ("age", "18-39"): [1],
        ("age", "40-59"): [3],
        ("age", "60-79"): [4],
        ("age", "80+"): [5],
        ("age", "unknown"): [2],
        ("view", "AP"): [1, 2, 3, 4],
        ("view", "PA"): [0],
        ("view", "unknown"): [5],
        ("visit", "first"): [0, 3],
        ("visit", "follow-up"): [1, 4, 5],
        ("visit", "unknown"): [2],
        ("per patient", "1 image"): [2],
        ("per patient", "2-5 images"): [0, 1, 3, 4, 5],
        ("finding", "known"): [1, 4, 5],
        ("finding", "new"): [0, 3],
    }


def test_a_subgroup_is_scored_as_if_it_were_a_split():
    scores, labels, keys = made(patients=80)
    chosen = np.arange(len(scores)) % 3 == 0
    (group,) = [each for each in subgroups(halves(chosen, keys)) if (each.by, each.name) == ("view", "AP")]
    found = score_subgroup(group, scores, labels, keys, resamples=150)
    alone = score(scores[chosen], labels[chosen], keys[chosen], resamples=150)
    assert (found.images, found.patients, found.findings) == (chosen.sum(), 80, 14)
    assert found.auroc == alone.auroc


def halves(chosen, keys):
    count = len(keys)
    return pa.table(
        {
            "image_id": [str(number) for number in range(count)],
            "patient_key": keys,
            "sex": ["F"] * count,
            "age_years": pa.array([50.0] * count, pa.float32()),
            "view": ["AP" if each else "PA" for each in chosen],
            "history_count": pa.array([1] * count, pa.int32()),
            "history_ever": fixed_lists(np.zeros((count, 14), dtype=np.uint8)),
        }
    )


def test_a_finding_known_before_and_a_new_one_are_told_apart():
    """A score that only repeats the past ranks everything, and nothing once the past is taken away."""
    generator = np.random.default_rng(0)
    ever = (generator.random((3000, 14)) < 0.5).astype(np.uint8)
    labels = (generator.random((3000, 14)) < np.where(ever, 0.6, 0.1)).astype(float)
    scores = ever + generator.random((3000, 14)) / 10
    keys = np.arange(3000).astype(str)
    described = halves(np.ones(3000, dtype=bool), keys)
    position = described.schema.get_field_index("history_ever")
    described = described.set_column(position, "history_ever", fixed_lists(ever))
    by_name = {
        (group.by, group.name): score_subgroup(group, scores, labels, keys, resamples=100).auroc.value
        for group in subgroups(described)
    }
    assert by_name["sex", "F"] > 0.7
    assert by_name["finding", "known"] == pytest.approx(0.5, abs=0.03)
    assert by_name["finding", "new"] == pytest.approx(0.5, abs=0.03)


def test_nothing_to_score_has_no_mean():
    """A subgroup in which no finding has both classes."""
    interval = mean_auroc(np.empty((4, 0)), np.empty((4, 0)), np.arange(4), resamples=100)
    assert np.isnan([interval.value, interval.low, interval.high]).all()
