"""History: the past of a visit never holds the visit itself, nor anything after it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.history import History, earlier_history

FEATURES = ("visit", "known", "count", "ever", "last", "fraction")
ROW = st.tuples(
    st.integers(0, 2),
    st.integers(0, 4),
    st.one_of(st.just(None), st.integers(0, 2**14 - 1), st.sampled_from([0, 1, 2, 3])),
)
TABLES = st.lists(ROW, max_size=14)


def arrays(rows):
    patients = np.array([row[0] for row in rows], dtype=np.int64)
    order = np.array([row[1] for row in rows], dtype=np.int64)
    return patients, order, np.array([bits(row[2]) for row in rows], dtype=np.float32).reshape(-1, 14)


def bits(number):
    return [np.nan] * 14 if number is None else [number >> place & 1 for place in range(14)]


def naive(patients, order, labels):
    """The definition, image by image."""
    rows = []
    for patient, moment in zip(patients, order, strict=True):
        own = patients == patient
        earlier = sorted({other for other in order[own] if other < moment})
        shown, known = [], True
        for visit in earlier:
            images = labels[own & (order == visit)]
            labelled = images[~np.isnan(images).any(axis=1)]
            known = known and len(labelled) == len(images)
            shown.append(labelled.max(axis=0) if len(labelled) else np.zeros(14))
        shown = np.array(shown).reshape(-1, 14)
        count = len(earlier)
        rows.append(
            (
                count,
                known,
                count,
                shown.max(axis=0) if count else np.zeros(14),
                shown[-1] if count else np.zeros(14),
                shown.mean(axis=0) if count else np.zeros(14),
            )
        )
    return {name: np.array([row[place] for row in rows]) for place, name in enumerate(FEATURES)}


@given(TABLES)
@settings(deadline=None)
def test_equals_the_definition(rows):
    patients, order, labels = arrays(rows)
    history = earlier_history(patients, order, labels)
    expected = naive(patients, order, labels)
    for name in ("visit", "known", "count"):
        np.testing.assert_array_equal(getattr(history, name), expected[name].reshape(-1))
    # Where an earlier visit has no labels, the rest means nothing.
    known = history.known
    for name in ("ever", "last", "fraction"):
        np.testing.assert_allclose(getattr(history, name)[known], expected[name].reshape(-1, 14)[known], rtol=1e-6)


@given(TABLES.filter(bool), st.data())
@settings(max_examples=200, deadline=None)
def test_labels_of_a_visit_and_later_change_no_feature_of_it(rows, data):
    patients, order, labels = arrays(rows)
    before = earlier_history(patients, order, labels)
    patient, moment, _ = data.draw(st.sampled_from(rows))
    later = (patients == patient) & (order >= moment)
    changed = labels.copy()
    for row in np.flatnonzero(later):
        changed[row] = bits(data.draw(ROW)[2])
    after = earlier_history(patients, order, changed)
    unaffected = ~((patients == patient) & (order > moment))
    for name in FEATURES:
        np.testing.assert_array_equal(getattr(before, name)[unaffected], getattr(after, name)[unaffected])


@given(TABLES, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_row_order_does_not_matter(rows, random):
    places = list(range(len(rows)))
    random.shuffle(places)
    patients, order, labels = arrays(rows)
    straight = earlier_history(patients, order, labels)
    shuffled = earlier_history(patients[places], order[places], labels[places])
    for name in FEATURES:
        np.testing.assert_array_equal(getattr(straight, name)[places], getattr(shuffled, name))


def one_patient(order, *findings) -> History:
    labels = np.zeros((len(order), 14), dtype=np.float32)
    for row, places in enumerate(findings):
        labels[row, places] = 1
    return earlier_history(np.zeros(len(order), dtype=np.int64), np.array(order), labels)


def test_images_of_one_visit_do_not_see_each_other_but_the_next_visit_sees_both():
    history = one_patient([5, 5, 9], [4], [13], [])
    assert history.visit.tolist() == [0, 0, 1]
    assert history.ever[:2].sum() == 0
    assert np.flatnonzero(history.ever[2]).tolist() == np.flatnonzero(history.last[2]).tolist() == [4, 13]
    assert history.count[2] == 1
    assert history.fraction[2, [4, 13]].tolist() == [1, 1]


def test_ever_last_and_fraction_of_a_course():
    history = one_patient([30, 10, 40, 20], [0], [0, 2], [], [2])
    assert history.visit.tolist() == [2, 0, 3, 1]
    assert np.flatnonzero(history.ever[2]).tolist() == [0, 2]
    assert np.flatnonzero(history.last[2]).tolist() == [0]
    np.testing.assert_allclose(history.fraction[2, [0, 1, 2]], [2 / 3, 0, 2 / 3])


def test_an_unlabelled_visit_makes_what_follows_unknown_until_nothing_else():
    labels = np.zeros((4, 14), dtype=np.float32)
    labels[1] = np.nan
    history = earlier_history(np.array(["a", "a", "a", "b"]), np.array([0, 1, 2, 3]), labels)
    assert history.known.tolist() == [True, True, False, True]


@pytest.mark.parametrize("rows", [0, 1])
def test_tables_of_no_and_one_image(rows):
    history = earlier_history(np.zeros(rows, dtype=np.int64), np.zeros(rows), np.ones((rows, 14), dtype=np.float32))
    assert [getattr(history, name).shape for name in FEATURES] == [(rows,)] * 3 + [(rows, 14)] * 3
    assert history.ever.sum() == 0


def test_types_are_those_of_the_record():
    history = one_patient([0, 1], [1], [])
    assert [getattr(history, name).dtype for name in FEATURES] == [
        np.dtype(kind) for kind in ("int32", "bool", "int32", "uint8", "uint8", "float32")
    ]
