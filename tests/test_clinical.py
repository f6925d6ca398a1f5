"""Clinical inputs: the layout of the seventeen numbers, and what stands in for the unknown."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_ray.clinical import (
    ClinicalInputs,
    ClinicalLayout,
    ClinicalStatistics,
    encode,
    fit_statistics,
    from_request,
    withheld,
)
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS

NAN = float("nan")
PAPER = ClinicalLayout()
STATISTICS = ClinicalStatistics(
    age_mean=47.0, age_std=16.0, male_mean=0.56, ap_mean=0.4, ever_mean=tuple(index / 100 for index in range(14))
)

# A mean for each number of the rich history, told apart by its place.
MEANS = replace(STATISTICS, past_mean=tuple((1 + place) / 1000 for place in range(111)))


def inputs(age, male, ap, ever):
    return ClinicalInputs(*(np.array(values, dtype=np.float32) for values in (age, male, ap, ever)))


def encode_paper(values, statistics):
    return encode(values, statistics, PAPER)


def three():
    """A man with mass and hernia before, a woman on her first visit, and a radiograph of which nothing is known."""
    seen = np.zeros((3, 14))
    seen[0, [4, 13]] = 1
    seen[2] = NAN
    return inputs([63, 31, NAN], [1, 0, NAN], [1, 0, NAN], seen)


def test_the_seventeen_numbers_by_hand():
    encoded = encode_paper(three(), STATISTICS)
    assert encoded.dtype == np.float32
    assert encoded.shape == (3, PAPER.width) == (3, 17)
    np.testing.assert_allclose(encoded[0], [1.0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    np.testing.assert_allclose(encoded[1], [-1.0, 0, 0] + [0] * 14)


def test_unknown_takes_the_training_mean():
    np.testing.assert_allclose(
        encode_paper(three(), STATISTICS)[2], [0.0, 0.56, 0.4, *(index / 100 for index in range(14))], rtol=1e-6
    )


@given(st.sets(st.sampled_from(["age", "sex", "view", "history"])))
@settings(deadline=None)
def test_missing_names_what_is_unknown_and_only_that_is_imputed(unknown):
    known = {"age_years": 63.0, "sex": "M", "view": "AP", "history": ["Mass", "Hernia"]}
    argument_of = {"age": "age_years"}
    arguments = known | {argument_of.get(name, name): None for name in unknown}
    request, missing = from_request(**arguments)
    assert set(missing) == unknown
    columns = {"age": [0], "sex": [1], "view": [2], "history": range(3, 17)}
    full, imputed = encode_paper(three(), STATISTICS)[[0, 2]]
    encoded = encode_paper(request, STATISTICS)
    assert encoded.shape == (1, 17)
    for name, places in columns.items():
        expected = imputed if name in unknown else full
        np.testing.assert_array_equal(encoded[0, list(places)], expected[list(places)])


def test_an_empty_history_is_known():
    request, missing = from_request(63.0, "F", "PA", [])
    assert missing == []
    np.testing.assert_array_equal(encode_paper(request, STATISTICS)[0, 3:], np.zeros(14))


def test_statistics_leave_out_what_is_unknown():
    ever = np.full((4, 14), NAN)
    ever[:2, 0] = [1, 0]
    ever[:3, 5] = [1, 1, 0]
    fitted = fit_statistics(inputs([40, NAN, 60, 50], [1, 1, NAN, 0], [NAN, 1, NAN, NAN], ever))
    assert fitted.age_mean == pytest.approx(50)
    assert fitted.age_std == pytest.approx(np.std([40, 60, 50]))
    assert fitted.male_mean == pytest.approx(2 / 3)
    assert fitted.ap_mean == 1
    assert fitted.ever_mean[0] == pytest.approx(0.5)
    assert fitted.ever_mean[5] == pytest.approx(2 / 3)
    assert fitted.ever_mean[1] == 0


@pytest.mark.parametrize("rows", [0, 3])
def test_wholly_unknown_columns_give_usable_statistics(rows):
    nothing = withheld(inputs(np.zeros(rows), np.zeros(rows), np.zeros(rows), np.zeros((rows, 14))))
    fitted = fit_statistics(nothing)
    assert ClinicalStatistics.from_json(asdict(fitted)) == fitted
    assert encode_paper(three(), fitted).shape == (3, 17)
    assert np.isfinite(encode_paper(nothing, fitted)).all()


def test_one_age_does_not_divide_by_zero():
    same = inputs([50, 50], [1, 0], [1, 0], np.zeros((2, 14)))
    assert np.isfinite(encode_paper(same, fit_statistics(same))).all()


def test_standardised_ages_have_mean_zero_and_deviation_one():
    ages = np.random.default_rng(0).uniform(1, 90, 500)
    many = inputs(ages, np.ones(500), np.ones(500), np.zeros((500, 14)))
    encoded = encode_paper(many, fit_statistics(many))[:, 0]
    assert encoded.mean() == pytest.approx(0, abs=1e-4)
    assert encoded.std() == pytest.approx(1, abs=1e-4)


def test_statistics_survive_json():
    for statistics in (STATISTICS, MEANS):
        assert ClinicalStatistics.from_json(json.loads(json.dumps(asdict(statistics)))) == statistics


def test_statistics_of_bundles_from_before_the_rich_encoding_are_read():
    values = asdict(STATISTICS)
    del values["past_mean"]
    assert ClinicalStatistics.from_json(values) == STATISTICS


@pytest.mark.parametrize(
    "change",
    [
        {"age_mean": None},
        {"age_mean": "old"},
        {"age_std": 0.0},
        {"age_std": -1.0},
        {"male_mean": NAN},
        {"ap_mean": float("inf")},
        {"ever_mean": [0.1] * 13},
        {"ever_mean": [0.1] * 13 + [NAN]},
        {"ever_mean": 0.1},
        {"ever_mean": ["much"] * 14},
        {"past_mean": [0.1] * 110},
        {"past_mean": [0.1] * 110 + [NAN]},
        {"past_mean": []},
        {"past_mean": 0.1},
    ],
)
def test_unusable_statistics_are_refused(change):
    with pytest.raises(CxrRayError, match="write the bundle again") as refused:
        ClinicalStatistics.from_json(asdict(STATISTICS) | change)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("absent", ["age_mean", "age_std", "male_mean", "ap_mean", "ever_mean"])
def test_absent_statistics_are_named(absent):
    values = asdict(STATISTICS)
    del values[absent]
    with pytest.raises(CxrRayError, match=absent):
        ClinicalStatistics.from_json(values)


def test_withheld_inputs_say_nothing_of_the_patient():
    known = three()
    hidden = withheld(known)
    assert len(hidden) == len(known)
    encoded = encode_paper(hidden, STATISTICS)
    np.testing.assert_array_equal(encoded, encode_paper(known, STATISTICS)[[2, 2, 2]])
    # The original is left as it was.
    assert np.isfinite(known.age_years[:2]).all()


def test_statistics_move_only_the_age_column_of_known_inputs():
    known = inputs([63], [1], [0], [[1] * len(FINDINGS)])
    other = replace(STATISTICS, age_mean=63.0, male_mean=0.1, ap_mean=0.9)
    np.testing.assert_array_equal(encode_paper(known, other)[0], [0, 1, 0] + [1] * 14)
