"""History: the past of a visit never holds the visit itself, nor anything after it."""

from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_ray.records import record_schema
from ingest.history import History, earlier_history, history_columns

FEATURES = tuple(field.name for field in fields(History))
FROM_LABELS = ("ever", "last", "last_2", "last_3", "fraction", "decayed_80", "decayed_50", "no_finding")
WITHOUT_LABELS = ("count", "age_gap", "ap", "last_view", "last_2_view", "last_3_view")
ROW = st.tuples(
    st.integers(0, 2),
    st.integers(0, 5),
    st.one_of(st.just(None), st.integers(0, 2**14 - 1), st.sampled_from([0, 1, 2, 3])),
    st.one_of(st.just(np.nan), st.floats(0, 95, width=32), st.sampled_from([40.0, 41.0])),
    st.sampled_from(["PA", "AP", None]),
)
TABLES = st.lists(ROW, max_size=14)


def arrays(rows):
    """Patients, order, labels, ages and views."""
    patients, order = (np.array([row[place] for row in rows], dtype=np.int64) for place in (0, 1))
    labels = np.array([bits(row[2]) for row in rows], dtype=np.float32).reshape(-1, 14)
    return patients, order, labels, np.array([row[3] for row in rows], dtype=np.float32), objects([row[4] for row in rows])


def objects(values):
    column = np.full(len(values), None, dtype=object)
    column[:] = values
    return column


def bits(number):
    return [np.nan] * 14 if number is None else [number >> place & 1 for place in range(14)]


def naive(table, row):
    """The definition, one image at a time and with nothing but loops."""
    patients, order, labels, ages, views = table
    own = [other for other in range(len(patients)) if patients[other] == patients[row]]
    moments = sorted({order[other] for other in own if order[other] < order[row]}, reverse=True)
    visits = [[other for other in own if order[other] == moment] for moment in moments]
    shown = [[max(labels[other][place] for other in visit) for place in range(14)] for visit in visits]
    view = [common([views[other] for other in visit], None) for visit in visits]
    age = [common([float(ages[other]) for other in visit], np.nan) for visit in visits]
    known_views = [one for one in view if one is not None]

    def mean(decay):
        weights = [decay**back for back in range(len(visits))]
        return [
            sum(weight * visit[place] for weight, visit in zip(weights, shown, strict=True)) / (sum(weights) or 1)
            for place in range(14)
        ]

    def back(values, steps, absent):
        return values[steps - 1] if len(values) >= steps else absent

    nothing = [0.0] * 14
    return {
        "visit": len(visits),
        "known": all(not np.isnan(labels[other]).any() for visit in visits for other in visit),
        "count": len(visits),
        "age_gap": ages[row] - age[0] if visits else np.nan,
        "ever": [max(visit[place] for visit in shown) for place in range(14)] if visits else nothing,
        **{name: back(shown, steps, nothing) for steps, name in enumerate(("last", "last_2", "last_3"), 1)},
        "fraction": mean(1.0),
        "decayed_80": mean(0.8),
        "decayed_50": mean(0.5),
        "no_finding": sum(not any(visit) for visit in shown) / max(len(visits), 1),
        "ap": known_views.count("AP") / len(known_views) if known_views else np.nan,
        **{name: back(view, steps, None) for steps, name in enumerate(("last_view", "last_2_view", "last_3_view"), 1)},
    }


def common(values, unknown):
    return values[0] if all(value == values[0] for value in values) else unknown


def assert_equal(one, other, rows, name):
    np.testing.assert_array_equal(getattr(one, name)[rows], getattr(other, name)[rows], err_msg=name)


@given(TABLES)
@settings(max_examples=300, deadline=None)
def test_every_feature_equals_its_definition(rows):
    table = arrays(rows)
    history = earlier_history(*table)
    for row in range(len(rows)):
        for name, expected in naive(table, row).items():
            value = getattr(history, name)[row]
            if name in FROM_LABELS and not history.known[row]:
                continue  # where an earlier visit has no labels, it means nothing
            if name.endswith("view"):
                assert value == expected, name
            else:
                np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)


@given(TABLES.filter(bool), st.data())
@settings(max_examples=300, deadline=None)
def test_a_visit_and_what_follows_change_no_feature_of_it(rows, data):
    """Labels, ages and views of visit t and later; the age gap of t has its own age in it, and only that."""
    patients, order, labels, ages, views = arrays(rows)
    before = earlier_history(patients, order, labels, ages, views)
    patient, moment, *_ = data.draw(st.sampled_from(rows))
    own = patients == patient
    changed = labels.copy(), ages.copy(), views.copy()
    for row in np.flatnonzero(own & (order >= moment)):
        other = data.draw(ROW)
        for column, value in zip(changed, (bits(other[2]), other[3], other[4]), strict=True):
            column[row] = value
    after = earlier_history(patients, order, *changed)
    unaffected = ~(own & (order > moment))
    for name in FEATURES:
        assert_equal(before, after, unaffected & ~(own & (order == moment)) if name == "age_gap" else unaffected, name)
    kept_ages = earlier_history(patients, order, changed[0], ages, changed[2])
    assert_equal(before, kept_ages, unaffected, "age_gap")


@given(TABLES, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_row_order_does_not_matter(rows, random):
    """Not even that of images of one moment: a few moments for many rows make such images common."""
    places = list(range(len(rows)))
    random.shuffle(places)
    table = arrays(rows)
    straight, shuffled = earlier_history(*table), earlier_history(*(column[places] for column in table))
    for name in FEATURES:
        # Where an earlier visit has no labels, the rest means nothing, but must not depend on the order either.
        np.testing.assert_array_equal(getattr(straight, name)[places], getattr(shuffled, name), err_msg=name)


def one_patient(order, *findings, ages=None, views=None) -> History:
    labels = np.zeros((len(order), 14), dtype=np.float32)
    for row, places in enumerate(findings):
        labels[row, places] = 1
    ages = np.full(len(order), np.nan, dtype=np.float32) if ages is None else np.array(ages, dtype=np.float32)
    views = objects(views or [None] * len(order))
    return earlier_history(np.zeros(len(order), dtype=np.int64), np.array(order), labels, ages, views)


def test_images_of_one_visit_do_not_see_each_other_but_the_next_visit_sees_both():
    history = one_patient([5, 5, 9], [4], [13], [])
    assert history.visit.tolist() == [0, 0, 1]
    assert history.ever[:2].sum() == 0
    assert np.flatnonzero(history.ever[2]).tolist() == np.flatnonzero(history.last[2]).tolist() == [4, 13]
    assert history.count[2] == 1
    assert history.fraction[2, [4, 13]].tolist() == [1, 1]


def test_a_course():
    history = one_patient([30, 10, 40, 20], [0], [0, 2], [], [2], ages=[52.5, 50, 53, 52], views=["AP", "PA", "PA", "AP"])
    assert history.visit.tolist() == [2, 0, 3, 1]
    assert np.flatnonzero(history.ever[2]).tolist() == [0, 2]
    assert [np.flatnonzero(each[2]).tolist() for each in (history.last, history.last_2, history.last_3)] == [[0], [2], [0, 2]]
    np.testing.assert_allclose(history.fraction[2, [0, 1, 2]], [2 / 3, 0, 2 / 3])
    # Latest first: finding 0 was there, not there, there.
    np.testing.assert_allclose(history.decayed_50[2, 0], (1 + 0.25) / 1.75)
    np.testing.assert_allclose(history.decayed_80[2, 0], (1 + 0.64) / 2.44, rtol=1e-6)
    np.testing.assert_array_equal(history.age_gap, np.array([0.5, np.nan, 0.5, 2], dtype=np.float32))
    np.testing.assert_allclose(history.ap, [0.5, np.nan, 2 / 3, 0], rtol=1e-6)
    assert [each[2] for each in (history.last_view, history.last_2_view, history.last_3_view)] == ["AP", "AP", "PA"]


def test_no_finding_is_a_visit_without_any():
    history = one_patient([1, 2, 2, 3, 4], [], [], [7], [])
    # The second visit has an image without a finding and one with: it is no visit without findings.
    np.testing.assert_allclose(history.no_finding, [0, 1, 1, 0.5, 2 / 3], rtol=1e-6)


def test_images_of_a_visit_that_differ_leave_its_view_and_age_unknown():
    history = one_patient([1, 1, 2], ages=[40, 41, 42], views=["PA", "AP", "PA"])
    assert history.last_view[2] is None
    assert np.isnan(history.age_gap[2])
    assert np.isnan(history.ap[2])
    agreeing = one_patient([1, 1, 2], ages=[40, 40, 42], views=["AP", "AP", "PA"])
    assert (agreeing.last_view[2], agreeing.age_gap[2], agreeing.ap[2]) == ("AP", 2, 1)


def test_an_unlabelled_visit_makes_what_follows_unknown_until_nothing_else():
    labels = np.zeros((4, 14), dtype=np.float32)
    labels[1] = np.nan
    unknown = np.full(4, np.nan, dtype=np.float32), objects([None] * 4)
    history = earlier_history(np.array(["a", "a", "a", "b"]), np.array([0, 1, 2, 3]), labels, *unknown)
    assert history.known.tolist() == [True, True, False, True]


@pytest.mark.parametrize("rows", [0, 1])
def test_tables_of_no_and_one_image(rows):
    history = one_patient([0] * rows, *([3],) * rows)
    assert [getattr(history, name).shape for name in FEATURES if getattr(history, name).ndim == 1] == [(rows,)] * 9
    assert [getattr(history, name).shape for name in FEATURES if getattr(history, name).ndim == 2] == [(rows, 14)] * 7
    assert history.ever.sum() == 0
    assert {len(column) for column in history_columns(history).values()} == {rows}


# Columns of the record.


def test_columns_are_those_of_the_record_in_its_types():
    columns = history_columns(one_patient([0, 1], [1], []))
    schema = record_schema(None)
    assert list(columns) == [name for name in schema.names if name.startswith("history_")]
    assert {name: column.type for name, column in columns.items()} == {name: schema.field(name).type for name in columns}


def test_a_first_visit_is_known_to_have_no_past():
    columns = history_columns(one_patient([0, 1], [1], [], ages=[50, 51], views=["PA", "AP"]))
    first = {name.removeprefix("history_"): column[0].as_py() for name, column in columns.items()}
    zeros = {name: [0] * 14 for name in FROM_LABELS if name != "no_finding"}
    nulls = {name: None for name in WITHOUT_LABELS if name != "count"}
    assert first == {"count": 0, "no_finding": 0, **zeros, **nulls}
    second = {name.removeprefix("history_"): column[1].as_py() for name, column in columns.items()}
    assert (second["age_gap"], second["ap"], second["last_view"], second["last_2_view"]) == (1, 0, "PA", None)
    assert second["last_2"] == [0] * 14


def nulls_of(columns, row):
    return {name.removeprefix("history_") for name, column in columns.items() if not column[row].is_valid}


@pytest.fixture
def course() -> History:
    return one_patient([0, 1, 2, 3, 4], ages=[50, 51, 52, 53, 54], views=["PA"] * 5)


def test_without_earlier_labels_only_what_needs_none_is_left(course):
    columns = history_columns(course, known=np.array([True, True, True, True, False]))
    assert nulls_of(columns, 3) == set()
    assert nulls_of(columns, 4) == set(FROM_LABELS)


def test_without_an_order_of_visits_nothing_is_left(course):
    columns = history_columns(course, counted=np.array([True, True, True, True, False]))
    assert nulls_of(columns, 3) == set()
    assert nulls_of(columns, 4) == set(FROM_LABELS) | set(WITHOUT_LABELS)


def test_an_earlier_visit_without_labels_makes_null_what_comes_from_labels():
    labels = np.zeros((5, 14), dtype=np.float32)
    labels[0] = np.nan
    history = earlier_history(np.zeros(5), np.arange(5), labels, np.arange(5, dtype=np.float32), objects(["AP"] * 5))
    columns = history_columns(history)
    assert nulls_of(columns, 0) == {"age_gap", "ap", "last_view", "last_2_view", "last_3_view"}
    assert nulls_of(columns, 4) == set(FROM_LABELS)
    assert pa.array([0, 1, 2, 3, 4], type=pa.int32()).equals(columns["history_count"])
