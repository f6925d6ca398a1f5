"""Scores against scikit-learn, and intervals against what they claim."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics

from cxr_ray.operating import choose
from cxr_ray.report import interval_text, scores_table
from cxr_ray.scoring import auroc, mean_over_findings, precision_recall_curve, roc_curve
from cxr_ray.split_scores import score
from cxr_ray.terminal import console

NAN = float("nan")
# Few distinct scores, so that ties are common.
COLUMN = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1.0, NAN])), min_size=2, max_size=40)


def column(drawn):
    scores, labels = np.array(drawn, dtype=np.float64).T
    return scores / 5, labels


def both_classes(labels):
    known = labels[np.isfinite(labels)]
    return 0 < known.sum() < known.size


@given(COLUMN)
@settings(deadline=None)
def test_auroc_is_scikit_learns_with_ties_and_unknown_labels(drawn):
    scores, labels = column(drawn)
    known = np.isfinite(labels)
    value = auroc(scores[:, None], labels[:, None])[0]
    if both_classes(labels):
        assert value == pytest.approx(metrics.roc_auc_score(labels[known], scores[known]), abs=1e-12)
    else:
        assert np.isnan(value)


def test_auroc_by_hand():
    scores = np.array([[0.9], [0.5], [0.5], [0.1]])
    # Pairs (positive, negative): .9>.5, .9>.1, .5=.5, .5>.1
    assert auroc(scores, np.array([[1.0], [1], [0], [0]]))[0] == pytest.approx(3.5 / 4)


def test_columns_are_scored_apart():
    generator = np.random.default_rng(0)
    scores, labels = generator.random((200, 14)), (generator.random((200, 14)) < 0.3).astype(float)
    labels[generator.random((200, 14)) < 0.1] = NAN
    one_by_one = [auroc(scores[:, [k]], labels[:, [k]])[0] for k in range(14)]
    np.testing.assert_allclose(auroc(scores, labels), one_by_one)


def test_mean_is_of_what_could_be_scored():
    assert mean_over_findings(np.array([0.8, NAN, 0.6])) == pytest.approx(0.7)
    assert np.isnan(mean_over_findings(np.full(3, NAN)))


def clustered(patients, images, seed=0):
    """Images of a patient share label and nearly the score: `patients` x 14 facts, told `images` times."""
    generator = np.random.default_rng(seed)
    labels = (generator.random((patients, 14)) < 0.4).astype(np.float64)
    scores = generator.normal(size=(patients, 14)) + 0.8 * labels
    keys = np.repeat([f"p{number}" for number in range(patients)], images)
    noise = generator.normal(scale=0.01, size=(patients * images, 14))
    return np.repeat(scores, images, axis=0) + noise, np.repeat(labels, images, axis=0), keys


def width(interval):
    return interval.high - interval.low


def test_intervals_contain_the_value():
    scores, labels, keys = clustered(80, 3)
    scored = score(scores, labels, keys, resamples=300)
    assert (scored.images, scored.patients, scored.resamples) == (240, 80, 300)
    assert [finding.positives for finding in scored.findings] == labels.sum(axis=0).astype(int).tolist()
    for finding, value in zip(scored.findings, auroc(scores, labels), strict=True):
        interval = finding.auroc
        assert interval.value == pytest.approx(value)
        assert interval.low < interval.value < interval.high
    assert scored.auroc.value == pytest.approx(np.mean([finding.auroc.value for finding in scored.findings]))
    assert scored.auroc.low < scored.auroc.value < scored.auroc.high
    # Findings are independent here: the mean of fourteen is surer than any of them.
    assert width(scored.auroc) < min(width(finding.auroc) for finding in scored.findings)


def test_repeated_images_of_a_patient_make_nothing_surer():
    """The honest interval does not shrink when every image is told twelve times; one over images does."""
    once, many = clustered(80, 1), clustered(80, 12)
    single = score(*once, resamples=300)
    by_patient = score(*many, resamples=300)
    by_image = score(many[0], many[1], np.arange(len(many[0])), resamples=300)
    assert width(by_patient.auroc) == pytest.approx(width(single.auroc), rel=0.3)
    for patient, image in zip(by_patient.findings, by_image.findings, strict=True):
        assert width(patient.auroc) > 2 * width(image.auroc)


def test_the_seed_makes_it_reproducible():
    data = clustered(30, 2)
    one = score(*data, resamples=120, seed=4)
    assert one == score(*data, resamples=120, seed=4)
    other = score(*data, resamples=120, seed=5)
    assert other != one
    assert other.auroc.value == one.auroc.value


def test_keys_only_group():
    scores, labels, keys = clustered(30, 2)
    renamed = np.array([f"z{key}" for key in keys])
    assert score(scores, labels, renamed, resamples=100) == score(scores, labels, keys, resamples=100)


def test_a_resample_is_patients_drawn_with_replacement():
    """With four patients all resamples can be listed; each drawn AUC is scikit-learn's of one of them, rows repeated."""
    generator = np.random.default_rng(1)
    patients = np.repeat(np.arange(4), [2, 4, 3, 5])
    labels = np.concatenate([[1, 0], [1, 1, 0, 0], [0, 1, 1], [0, 0, 0, 1, 0]]).astype(np.float64)
    labels[8], scores = NAN, np.round(generator.random(14), 1)
    possible = set()
    for drawn in itertools.combinations_with_replacement(range(4), 4):
        rows = np.concatenate([np.flatnonzero(patients == patient) for patient in drawn])
        rows = rows[np.isfinite(labels[rows])]
        possible.add(round(metrics.roc_auc_score(labels[rows], scores[rows]), 9))
    seen = set()
    for seed in range(60):
        scored = score(scores[:, None], labels[:, None], patients, resamples=1, seed=seed)
        assert scored.findings[0].auroc.low == scored.findings[0].auroc.high
        seen.add(round(scored.findings[0].auroc.low, 9))
    assert seen <= possible
    assert len(seen) > len(possible) / 2


@pytest.mark.parametrize("value", [0.0, 1.0, NAN])
def test_a_finding_with_one_class_is_not_scored(value):
    scores, labels, keys = clustered(20, 2)
    labels[:, 13] = value
    scored = score(scores, labels, keys, resamples=100)
    hernia = scored.findings[13]
    for interval in (hernia.auroc, hernia.average_precision, *hernia.sensitivity):
        assert all(np.isnan([interval.value, interval.low, interval.high]))
    assert interval_text(hernia.auroc) == "-"
    assert np.isfinite([scored.auroc.value, scored.auroc.low, scored.auroc.high]).all()
    with console.capture() as printed:
        console.print(scores_table("a title", scored))
    (shown,) = [line for line in printed.get().splitlines() if line.split()[:1] == ["Hernia"]]
    share = ["(100.0%)"] if value == 1 else []
    assert shown.split() == ["Hernia", str(hernia.positives), *share, "-", "-"]


def test_a_resample_without_positives_does_not_spoil_the_interval():
    """One positive patient of ten is absent from a third of the resamples."""
    labels = np.zeros((10, 1))
    labels[3] = 1
    scored = score(np.linspace(0, 1, 10)[:, None], labels, np.arange(10), resamples=200)
    interval = scored.findings[0].auroc
    assert np.isfinite([interval.low, interval.high]).all()
    assert interval.value == pytest.approx(3 / 9)
    assert interval.low <= interval.value <= interval.high


@given(COLUMN)
@settings(deadline=None)
def test_youden_threshold_is_the_best_of_all(drawn):
    scores, labels = column(drawn)
    chosen = choose(scores[:, None], labels[:, None])["youden"][0]
    if not both_classes(labels):
        assert chosen == 0.5
        return
    known = np.isfinite(labels)
    scores, positive = scores[known], labels[known] == 1

    def youden(threshold):
        called = scores >= threshold
        return called[positive].mean() + (~called)[~positive].mean() - 1

    best = max(youden(threshold) for threshold in np.unique(scores))
    # If no threshold is better than calling nothing, the middle is as good as any.
    assert youden(chosen) == pytest.approx(best) if best > 0 else chosen in {0.5, *scores}


@given(COLUMN)
@settings(deadline=None)
def test_other_rules_keep_their_promise(drawn):
    scores, labels = column(drawn)
    chosen = {rule: found[0] for rule, found in choose(scores[:, None], labels[:, None]).items()}
    if not both_classes(labels):
        assert set(chosen.values()) == {0.5}
        return
    known = np.isfinite(labels)
    scores, positive = scores[known], labels[known] == 1
    assert (scores[positive] >= chosen["sensitivity_90"]).mean() >= 0.9
    assert (scores[positive] > chosen["sensitivity_90"]).mean() < 0.9
    assert (scores >= chosen["prevalence"]).sum() >= positive.sum() > (scores > chosen["prevalence"]).sum()


@given(COLUMN)
@settings(deadline=None)
def test_roc_curve_is_scikit_learns(drawn):
    scores, labels = column(drawn)
    assume(both_classes(labels))
    known = np.isfinite(labels)
    scores, labels = scores[known], labels[known]
    false, true, thresholds = roc_curve(scores, labels)
    expected = metrics.roc_curve(labels, scores, drop_intermediate=False)
    for ours, theirs in zip((false, true, thresholds), expected, strict=True):
        np.testing.assert_allclose(ours, theirs)
    assert (false[0], true[0], thresholds[0]) == (0, 0, np.inf)
    assert (false[-1], true[-1]) == (1, 1)
    assert np.trapezoid(true, false) == pytest.approx(auroc(scores[:, None], labels[:, None])[0])


@given(COLUMN)
@settings(deadline=None)
def test_precision_recall_curve_is_scikit_learns(drawn):
    scores, labels = column(drawn)
    assume(both_classes(labels))
    known = np.isfinite(labels)
    recall, precision = precision_recall_curve(scores[known], labels[known])
    theirs_precision, theirs_recall, _ = metrics.precision_recall_curve(labels[known], scores[known])
    np.testing.assert_allclose(recall, theirs_recall[-2::-1])
    np.testing.assert_allclose(precision, theirs_precision[-2::-1])
