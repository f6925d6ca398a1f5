"""Splits: every patient in exactly one, the same in every run."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS, parse
from ingest.splits import check_disjoint, split_by_key, stratified_splits

IMAGES = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2**14 - 1)), min_size=1, max_size=40)
SHARES = st.sampled_from([{"train": 0.9, "val": 0.1}, {"train": 0.5, "val": 0.5}, {"train": 0.6, "val": 0.1, "test": 0.3}])


def arrays(images):
    """Patients and labels."""
    labels = np.array([[bits >> place & 1 for place in range(14)] for _, bits in images], dtype=np.uint8)
    return np.array([patient for patient, _ in images]), labels


@given(IMAGES, SHARES, st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_whole_patients_and_no_split_empty(images, shares, seed):
    patients, labels = arrays(images)
    splits = stratified_splits(patients, labels, shares, seed)
    check_disjoint(patients, splits)
    assert set(splits) <= set(shares)
    assert len(set(splits)) == min(len(shares), len(set(patients)))


@given(IMAGES, SHARES, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_row_order_plays_no_role(images, shares, random):
    places = list(range(len(images)))
    random.shuffle(places)
    patients, labels = arrays(images)
    straight = stratified_splits(patients, labels, shares, 3)
    np.testing.assert_array_equal(straight[places], stratified_splits(patients[places], labels[places], shares, 3))


@pytest.fixture(scope="module")
def train_val(real_data):
    """Patients, labels and follow-ups of the release's 86,524 images outside the test list."""
    test = set((real_data / "nih" / "test_list.txt").read_text().split())
    with (real_data / "nih" / "Data_Entry_2017_v2020.csv").open() as lines:
        rows = [row for row in list(csv.reader(lines))[1:] if row[0] not in test]
    labels = {text: parse(text) for text in {row[1] for row in rows}}
    return (
        np.array([int(row[3]) for row in rows]),
        np.stack([labels[row[1]] for row in rows]),
        np.array([int(row[2]) for row in rows]),
    )


def plain_random(patients, share, seed):
    """Whole patients at random until they hold the share of the images."""
    unique, images = np.unique(patients, return_counts=True)
    drawn = np.random.default_rng(seed).permutation(len(unique))
    return np.isin(patients, unique[drawn[np.cumsum(images[drawn]) <= share * len(patients)]])


def deviations(labels, chosen):
    """How far each finding's prevalence is from that of all images, relative to it; shape (14,)."""
    return np.abs(labels[chosen].mean(axis=0) / labels.mean(axis=0) - 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prevalences_are_kept_where_chance_would_not(train_val, seed):
    patients, labels, follow_up = train_val
    chosen = stratified_splits(patients, labels, {"train": 0.9, "val": 0.1}, seed) == "val"
    by_chance = plain_random(patients, 0.1, seed)
    assert abs(chosen.mean() - 0.1) < 5e-4
    assert deviations(labels, chosen).max() < 0.02
    assert deviations(labels, chosen).max() < deviations(labels, by_chance).max() / 5
    assert deviations(labels, chosen).mean() < deviations(labels, by_chance).mean() / 5
    assert labels[chosen][:, FINDINGS.index("Hernia")].sum() in (13, 14, 15)
    # Neither only patients of one visit nor only those of many.
    assert (follow_up[chosen] == 0).mean() == pytest.approx((follow_up == 0).mean(), abs=0.015)


def test_three_splits_of_the_whole_release(train_val):
    patients, labels, _ = train_val
    splits = stratified_splits(patients, labels, {"train": 0.7, "val": 0.1, "test": 0.2}, 0)
    for name, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert (splits == name).mean() == pytest.approx(share, abs=1e-3)
        assert deviations(labels, splits == name).max() < 0.03


def test_one_rare_patient_does_not_make_a_small_split_large():
    """A single patient has all of a finding: it belongs to the largest split."""
    patients = np.r_[np.zeros(50, dtype=int), np.arange(1, 101)]
    labels = np.zeros((150, 14), dtype=np.uint8)
    labels[:50, 13] = 1
    splits = stratified_splits(patients, labels, {"train": 0.9, "val": 0.1}, 0)
    assert set(splits[:50]) == {"train"}
    assert 12 <= (splits == "val").sum() <= 18


def test_the_seed_decides():
    patients, labels = np.repeat(np.arange(200), 3), np.zeros((600, 14), dtype=np.uint8)
    first = stratified_splits(patients, labels, {"train": 0.8, "val": 0.2}, seed=1)
    np.testing.assert_array_equal(first, stratified_splits(patients, labels, {"train": 0.8, "val": 0.2}, seed=1))
    assert (first != stratified_splits(patients, labels, {"train": 0.8, "val": 0.2}, seed=2)).any()


def test_check_disjoint_names_the_patient():
    splits = np.array(["train", "train", "test", "val"])
    check_disjoint(np.array([1, 1, 2, 3]), splits)
    with pytest.raises(CxrRayError, match=r"1 patients .*first: 2\)"):
        check_disjoint(np.array([1, 2, 2, 3]), splits)
    with pytest.raises(CxrRayError, match="2 patients"):
        check_disjoint(np.array([1, 2, 2, 1]), splits)


def test_keys_land_where_they_always_did():
    """Fixed for good: another assignment would carry patients of a trained model's test split into its training."""
    keys = np.array([f"nih-{number}" for number in range(12)])
    letters = {"r": "train", "v": "val", "t": "test"}
    assert split_by_key(keys, 0.2, 0.3).tolist() == [letters[letter] for letter in "rtrtrrtrvvtv"]


@given(st.lists(st.text(max_size=6), min_size=1, max_size=20), st.lists(st.text(max_size=6), max_size=20))
@settings(deadline=None)
def test_a_patients_split_does_not_depend_on_the_others(keys, others):
    alone = split_by_key(np.array(keys, dtype=object), 0.2, 0.3)
    together = split_by_key(np.array(others + keys, dtype=object), 0.2, 0.3)
    np.testing.assert_array_equal(together[len(others) :], alone)


def test_shares_are_those_asked_for():
    splits = split_by_key(np.array([f"key-{number}" for number in range(20_000)]), 0.1, 0.25)
    shares = {name: float(np.mean(splits == name)) for name in ("train", "val", "test")}
    assert shares == pytest.approx({"train": 0.65, "val": 0.1, "test": 0.25}, abs=0.01)


def test_a_larger_test_share_keeps_the_smaller_one():
    keys = np.array([f"key-{number}" for number in range(500)])
    small, large = split_by_key(keys, 0.1, 0.2) == "test", split_by_key(keys, 0.1, 0.4) == "test"
    assert not (small & ~large).any()
