"""Splits: every patient in exactly one, the same in every run."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_ray.errors import CxrRayError
from ingest.splits import carve_validation, check_disjoint, split_by_key

PATIENTS = st.lists(st.integers(0, 8), min_size=2, max_size=40).map(np.array)


@given(PATIENTS, st.floats(0.01, 0.99), st.integers(0, 5))
@settings(deadline=None)
def test_validation_holds_whole_patients_and_about_the_fraction(patients, fraction, seed):
    chosen = carve_validation(patients, fraction, seed)
    assert chosen.shape == patients.shape
    assert not set(patients[chosen]) & set(patients[~chosen])
    if len(set(patients)) == 1:
        return
    assert 0 < chosen.sum() < len(patients)
    # At most the fraction, unless a single patient is more; and another patient would have been too many.
    largest = max(Counter(patients).values())
    assert chosen.sum() <= fraction * len(patients) or len(set(patients[chosen])) == 1
    assert chosen.sum() + largest > fraction * len(patients)


def test_fraction_of_a_large_table():
    patients = np.random.default_rng(0).integers(0, 3000, 20_000)
    chosen = carve_validation(patients, 0.1, seed=0)
    assert 0.097 < chosen.mean() <= 0.1


def test_no_fraction_no_validation():
    assert not carve_validation(np.array([1, 2, 3]), 0.0, seed=0).any()


def test_the_seed_decides():
    patients = np.repeat(np.arange(200), 3)
    first = carve_validation(patients, 0.2, seed=1)
    np.testing.assert_array_equal(first, carve_validation(patients, 0.2, seed=1))
    assert (first != carve_validation(patients, 0.2, seed=2)).any()


def test_validation_does_not_depend_on_row_order():
    patients = np.random.default_rng(4).integers(0, 50, 300)
    order = np.random.default_rng(5).permutation(300)
    np.testing.assert_array_equal(carve_validation(patients, 0.3, 7)[order], carve_validation(patients[order], 0.3, 7))


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
