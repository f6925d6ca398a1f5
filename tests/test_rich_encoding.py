"""The rich encoding: its numbers by hand, what is unknown in it, and that it tells of strictly earlier visits only."""

import json
from dataclasses import asdict, fields, replace
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cxr_ray.clinical import (
    ClinicalInputs,
    ClinicalLayout,
    ClinicalStatistics,
    PastVisits,
    encode,
    fit_statistics,
    from_request,
    withheld,
)
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.records import clinical_inputs
from ingest.history import earlier_history, history_columns
from ingest.nih_table import NihTable, read_table

NAN = float("nan")
PAPER = ClinicalLayout()
RICH = ClinicalLayout("rich")
HISTORY = ClinicalLayout("rich", meta=False)
# A mean for each number of the history, told apart by its place.
MEANS = ClinicalStatistics(
    age_mean=47.0,
    age_std=16.0,
    male_mean=0.56,
    ap_mean=0.4,
    ever_mean=(0.1,) * 14,
    past_mean=tuple((1 + place) / 1000 for place in range(111)),
)


def places(*found, value=1.0):
    """Fourteen numbers, `value` at the places that were found."""
    return [value if place in found else 0.0 for place in range(14)]


def course(patients, order, shown, ages, views) -> ClinicalInputs:
    """What the shards hold of these images, read back; `shown` has the places of the findings, None without labels."""
    labels = np.array([[NAN] * 14 if found is None else places(*found) for found in shown], dtype=np.float32)
    kinds = np.array(views, dtype=object)
    ages = np.array(ages, dtype=np.float32)
    return read_back(earlier_history(np.array(patients), np.array(order), labels, ages, kinds), ages, views)


def read_back(history, ages, views, sex=None) -> ClinicalInputs:
    columns = {
        "age_years": pa.array(ages, type=pa.float32(), from_pandas=True),
        "sex": pa.array([None] * len(ages) if sex is None else sex, type=pa.string()),
        "view": pa.array(views, type=pa.string()),
        **history_columns(history),
    }
    return clinical_inputs(pa.table(columns), "rich")


# Visits at 50, 52, 52.5 and 53 years with {0, 2}, {2}, {0}, {}, and the first visit of someone else.
COURSE = course([1, 1, 1, 1, 2], [10, 20, 30, 40, 5], [(0, 2), (2,), (0,), (), (13,)], [50, 52, 52.5, 53, 70],
                ["PA", "AP", "AP", "PA", "AP"])  # fmt: skip


def test_layout_of_the_rich_encoding():
    assert (RICH.meta_width, RICH.summary_width, RICH.visits_width, RICH.width) == (6, 63, 48, 117)
    assert encode(COURSE, MEANS, RICH).shape == (5, 117)


def test_the_rich_numbers_of_a_course_by_hand():
    encoded = encode(COURSE, MEANS, RICH)[3]
    np.testing.assert_allclose(encoded[:6], [(53 - 47) / 16, 0.56, 0, 1, 0, 1], rtol=1e-6)
    summary, visits = encoded[6:69], encoded[69:].reshape(3, 16)
    leading = [1, 1, np.log(4) / np.log(200), np.log(1.5), 1, 0, 2 / 3]
    np.testing.assert_allclose(summary[:7], leading, rtol=1e-6)
    np.testing.assert_array_equal(summary[7:21], places(0, 2))
    np.testing.assert_allclose(summary[21:35], places(0, 2, value=2 / 3), rtol=1e-6)
    # The latest first: finding 0 was there, not there, there; finding 2 not there, there, there.
    decayed_80 = places(0, value=(1 + 0.64) / 2.44)
    decayed_80[2] = (0.8 + 0.64) / 2.44
    np.testing.assert_allclose(summary[35:49], decayed_80, rtol=1e-6)
    decayed_50 = places(0, value=(1 + 0.25) / 1.75)
    decayed_50[2] = (0.5 + 0.25) / 1.75
    np.testing.assert_allclose(summary[49:63], decayed_50, rtol=1e-6)
    np.testing.assert_array_equal(visits[0], [1, 1, *places(0)])
    np.testing.assert_array_equal(visits[1], [1, 1, *places(2)])
    np.testing.assert_array_equal(visits[2], [1, 0, *places(0, 2)])


def test_visits_that_do_not_exist_are_zeros():
    encoded = encode(COURSE, MEANS, RICH)[1]
    np.testing.assert_allclose(encoded[6:13], [1, 1, np.log(2) / np.log(200), np.log(3), 1, 0, 0], rtol=1e-6)
    visits = encoded[69:].reshape(3, 16)
    np.testing.assert_array_equal(visits[0], [1, 0, *places(0, 2)])
    assert not visits[1:].any()


def test_a_first_visit_is_zeros_but_known():
    for row in (0, 4):
        np.testing.assert_array_equal(encode(COURSE, MEANS, HISTORY)[row], [1] + [0] * 110)
    request, _ = from_request(63.0, "F", "PA", [])
    np.testing.assert_array_equal(encode(request, MEANS, HISTORY)[0], [1] + [0] * 110)


def unknown_history():
    return [0, *MEANS.past_mean[1:4], 0, *MEANS.past_mean[5:]]


@pytest.mark.parametrize("hide", [withheld, lambda known: replace(withheld(known), past=PastVisits.unknown(len(known)))])
def test_an_unknown_history_is_the_training_mean_and_said_to_be_unknown(hide):
    encoded = encode(hide(COURSE), MEANS, RICH)
    for row in encoded:
        np.testing.assert_allclose(row, [0, 0.56, 0.4, 0, 0, 0, *unknown_history()], rtol=1e-6)


def test_of_findings_without_visits_only_themselves_are_known():
    request, missing = from_request(63.0, "M", "AP", ["Mass", "Hernia"])
    assert missing == []
    expected = unknown_history()
    expected[7:21] = places(FINDINGS.index("Mass"), FINDINGS.index("Hernia"))
    np.testing.assert_allclose(encode(request, MEANS, RICH)[0], [1, 1, 1, 1, 1, 1, *expected], rtol=1e-6)


def test_earlier_visits_without_labels_leave_their_number_known():
    nothing = [None, None, None]
    encoded = encode(course([1] * 3, [1, 2, 3], nothing, [40, 41, NAN], ["AP", None, "PA"]), MEANS, HISTORY)
    means = MEANS.past_mean
    np.testing.assert_array_equal(encoded[0], [1] + [0] * 110)
    second, third = encoded[1], encoded[2]
    np.testing.assert_allclose(second[:7], [0, 1, np.log(2) / np.log(200), np.log(2), 1, means[5], 1], rtol=1e-6)
    np.testing.assert_allclose(third[:7], [0, 1, np.log(3) / np.log(200), means[3], 0, means[5], 1], rtol=1e-6)
    for row in (second, third):
        np.testing.assert_allclose(row[7:63], means[7:63], rtol=1e-6)
    np.testing.assert_allclose(second[63:], [1, 1, *means[65:79], *[0] * 32], rtol=1e-6)
    np.testing.assert_allclose(third[63:], [1, means[64], *means[65:79], 1, 1, *means[81:95], *[0] * 16], rtol=1e-6)


def test_years_that_run_backwards_are_none():
    known = course([1, 1], [1, 2], [(), ()], [50, 48], ["PA", "PA"])
    assert known.past.age_gap[1] == -2
    assert encode(known, MEANS, HISTORY)[1, 3] == 0


def test_means_of_the_past_leave_out_what_is_unknown():
    hidden = replace(COURSE, past=replace(COURSE.past, ap=np.array([NAN, NAN, NAN, 2 / 3, NAN], dtype=np.float32)))
    both = ClinicalInputs.concatenate([hidden, withheld(COURSE)])
    fitted = fit_statistics(both)
    assert len(fitted.past_mean) == 111
    of_known = encode(COURSE, MEANS, HISTORY).mean(axis=0)
    # The flags that say what is known are known of all; the share of AP of two first visits and of the fourth.
    of_known[0] = 0.5
    of_known[4] = 3 / 10
    of_known[6] = (2 / 3) / 3
    np.testing.assert_allclose(fitted.past_mean, of_known, rtol=1e-5)
    assert fitted.ever_mean == pytest.approx(of_known[7:21].tolist())


def test_statistics_without_a_past_are_not_enough_for_the_rich_history():
    fitted = fit_statistics(withheld(COURSE))
    assert fitted.past_mean is None
    with pytest.raises(CxrRayError, match="past_mean"):
        encode(COURSE, fitted, RICH)
    assert encode(COURSE, fitted, replace(RICH, history=False)).shape == (5, 6)


def number(shape, *values):
    return arrays.arrays(np.float32, shape, elements=st.sampled_from([NAN, *values]))


@st.composite
def any_inputs(draw):
    """Whatever combination of known and unknown, even such as no dataset has."""
    n = draw(st.integers(0, 4))
    past = PastVisits(
        count=draw(number(n, 0, 1, 2, 3, 183)),
        age_gap=draw(number(n, -1, 0, 0.5, 120)),
        fraction=draw(number((n, 14), 0, 0.5, 1)),
        decayed_80=draw(number((n, 14), 0, 0.25, 1)),
        decayed_50=draw(number((n, 14), 0, 0.75, 1)),
        no_finding=draw(number(n, 0, 0.5, 1)),
        ap=draw(number(n, 0, 0.5, 1)),
        last=draw(number((n, 3, 14), 0, 1)),
        last_ap=draw(number((n, 3), 0, 1)),
    )
    return ClinicalInputs(
        age_years=draw(number(n, 0, 47.5, 120)),
        male=draw(number(n, 0, 1)),
        ap=draw(number(n, 0, 1)),
        ever=draw(number((n, 14), 0, 1)),
        past=draw(st.sampled_from([past, None])),
    )


LAYOUTS = [ClinicalLayout(*switches) for switches in product(("paper", "rich"), (True, False), (True, False))]


@given(any_inputs())
@settings(deadline=None)
def test_no_number_is_ever_unknown_and_switches_take_columns_away(drawn):
    for layout in LAYOUTS:
        encoded = encode(drawn, MEANS, layout)
        assert encoded.dtype == np.float32
        assert encoded.shape == (len(drawn), layout.width)
        assert np.isfinite(encoded).all()
        whole = encode(drawn, MEANS, replace(layout, meta=True, history=True))
        meta, history = np.split(whole, [replace(layout, meta=True).meta_width], axis=1)
        kept = [part for part, chosen in ((meta, layout.meta), (history, layout.history)) if chosen]
        np.testing.assert_array_equal(encoded, np.concatenate([np.empty((len(drawn), 0)), *kept], axis=1))
    fitted = fit_statistics(drawn)
    assert ClinicalStatistics.from_json(json.loads(json.dumps(asdict(fitted)))) == fitted


@given(any_inputs(), st.data())
@settings(deadline=None)
def test_what_is_known_stays_whatever_else_is_unknown(drawn, data):
    """Hiding a value moves its own numbers to the mean, its flag to 0, and nothing else; the past has its own rules."""
    hidden = data.draw(st.sampled_from(["age_years", "male", "ap"]))
    before = encode(drawn, MEANS, RICH)
    after = encode(replace(drawn, **{hidden: np.full(len(drawn), np.nan, dtype=np.float32)}), MEANS, RICH)
    place = ["age_years", "male", "ap"].index(hidden)
    before[:, [place, 3 + place]] = [np.float32([0, 0.56, 0.4][place]), 0]
    np.testing.assert_array_equal(after, before)


@given(any_inputs())
@settings(deadline=None)
def test_each_row_is_encoded_by_itself(drawn):
    """Cut into single radiographs and put together again, in any order, the same numbers come out."""
    rows = [row_of(drawn, row) for row in reversed(range(len(drawn)))]
    if rows:
        again = ClinicalInputs.concatenate(rows)
        np.testing.assert_array_equal(encode(again, MEANS, RICH), encode(drawn, MEANS, RICH)[::-1])
        np.testing.assert_array_equal(encode(again, MEANS, PAPER), encode(drawn, MEANS, PAPER)[::-1])


def row_of(values, row):
    cut = {field.name: getattr(values, field.name) for field in fields(values)}
    past = cut.pop("past", None)
    cut = {name: column[row : row + 1] for name, column in cut.items()}
    return type(values)(**cut) if past is None else type(values)(**cut, past=row_of(past, row))


def test_concatenation_keeps_who_knows_his_past():
    request, _ = from_request(50.0, "M", "PA", ["Mass"])
    joined = ClinicalInputs.concatenate([request, COURSE, request])
    assert len(joined) == 7
    expected = [encode(part, MEANS, RICH) for part in (request, COURSE, request)]
    np.testing.assert_array_equal(encode(joined, MEANS, RICH), np.concatenate(expected))
    assert ClinicalInputs.concatenate([request, request]).past is None


def test_repeated_rows_are_the_same_row():
    for row in range(len(COURSE)):
        one = row_of(COURSE, row)
        repeated = one.repeated(5)
        assert len(repeated) == len(repeated.past) == 5
        np.testing.assert_array_equal(encode(repeated, MEANS, RICH), np.repeat(encode(one, MEANS, RICH), 5, axis=0))
    assert from_request(None, None, None, None)[0].repeated(3).past is None


# Strictly earlier visits, from a table of images to the numbers.

IMAGE = st.tuples(
    st.integers(0, 1),
    st.integers(0, 4),
    st.sets(st.sampled_from([0, 4, 13])),
    st.sampled_from([40.0, 41.5, NAN]),
    st.sampled_from(["PA", "AP", None]),
)


@given(st.lists(IMAGE, min_size=1, max_size=10), st.data())
@settings(deadline=None)
def test_labels_and_views_of_a_visit_and_what_follows_change_none_of_its_history(images, data):
    patient, moment, *_ = data.draw(st.sampled_from(images))
    later = [image[0] == patient and image[1] >= moment for image in images]
    drawn = [data.draw(IMAGE) if is_later else image for image, is_later in zip(images, later, strict=True)]
    changed = [(*image[:2], other[2], image[3], other[4]) for image, other in zip(images, drawn, strict=True)]
    before, after = (encode(course(*zip(*table, strict=True)), MEANS, HISTORY) for table in (images, changed))
    affected = np.array([image[0] == patient and image[1] > moment for image in images])
    np.testing.assert_array_equal(before[~affected], after[~affected])


@pytest.fixture(scope="module")
def release(real_data) -> NihTable:
    path = real_data / "nih" / "Data_Entry_2017_v2020.csv"
    return read_table(path.read_bytes(), path.name)


def of_release(table: NihTable, labels: np.ndarray) -> ClinicalInputs:
    history = earlier_history(table.patient, table.order, labels.astype(np.float32), table.age_years, table.view)
    return read_back(history, table.age_years, table.view, table.sex)


def test_labels_of_a_visit_and_later_change_none_of_its_numbers_in_the_release(release):
    rng = np.random.default_rng(11)
    known = of_release(release, release.labels)
    statistics = fit_statistics(known)
    before = encode(known, statistics, RICH)
    assert np.isfinite(before).all()
    # A visit of each patient, by chance, from which on the labels are others.
    first_changed = rng.integers(0, 5, release.patient.max() + 1)[release.patient]
    changed = known.past.count >= first_changed
    labels = np.where(changed[:, None], rng.integers(0, 2, release.labels.shape), release.labels)
    after = encode(of_release(release, labels), statistics, RICH)
    unaffected = known.past.count <= first_changed
    np.testing.assert_array_equal(before[unaffected], after[unaffected])
    assert (before[~unaffected] != after[~unaffected]).any(axis=1).all()
    assert 10_000 < (~unaffected).sum() < len(before) - 10_000


def test_the_release_fills_the_rich_numbers_as_described(release):
    known = of_release(release, release.labels)
    statistics = fit_statistics(known)
    encoded = encode(known, statistics, RICH)
    assert encoded.min() >= -3
    assert encoded.max() <= 3
    # 30,805 patients, each with one first visit; ages, sexes and views of all images are known.
    assert (encoded[:, 7] == 0).sum() == 30_805
    assert (encoded[:, 3:7] == 1).all()
    np.testing.assert_allclose(statistics.past_mean, encoded[:, 6:].mean(axis=0, dtype=np.float64), atol=1e-5)
    # The latest of the visits told one by one agrees with the paper's "ever": what was seen last was seen.
    last, ever = encoded[:, 71:85], encoded[:, 13:27]
    assert (last <= ever).all()
    np.testing.assert_array_equal(ever, encode(known, statistics, PAPER)[:, 3:])
