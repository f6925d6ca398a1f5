"""Earlier visits as dates make the numbers that ingest makes of the whole table, and nothing of the day itself gets in."""

from dataclasses import fields, replace
from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_ray.clinical import ClinicalInputs, ClinicalLayout, ClinicalStatistics, PastVisits, encode, from_request
from cxr_ray.earlier_visits import EarlierVisit, united, with_history
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS, names
from ingest.history import earlier_history

START = date(2001, 3, 4)
RECORD = st.tuples(
    st.integers(0, 400), st.integers(0, 2**14 - 1) | st.sampled_from([0, 0, 1, 2, 3]), st.sampled_from(["PA", "AP", None])
)
RECORDS = st.lists(RECORD, max_size=9)
STATISTICS = ClinicalStatistics(48.0, 16.5, 0.56, 0.4, (0.1,) * 14, (0.3,) * ClinicalLayout("rich", meta=False).width)


def visit(days: int, labels: int, view: str | None) -> EarlierVisit:
    return EarlierVisit(START + timedelta(days=days), tuple(names([labels >> place & 1 for place in range(14)])), view)


def radiograph(view: str | None = "AP") -> ClinicalInputs:
    return from_request(61, "F", view, None)[0]


@given(RECORDS, st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_agrees_with_ingest(records, on):
    """Records of a day are images of a visit there; the radiograph itself is the last image of the table."""
    told = with_history(radiograph(), [visit(*record) for record in records], START + timedelta(days=on))
    rows = [*records, (on, 2**14 - 1, "PA")]
    views = np.full(len(rows), None, dtype=object)
    views[:] = [view for _, _, view in rows]
    history = earlier_history(
        np.zeros(len(rows), dtype=np.int64),
        np.array([days for days, _, _ in rows]),
        np.array([[labels >> place & 1 for place in range(14)] for _, labels, _ in rows], dtype=np.float32),
        np.array([days / 365.25 for days, _, _ in rows], dtype=np.float32),
        views,
    )
    np.testing.assert_array_equal(told.ever[0], history.ever[-1])
    for name in ("count", "age_gap", "fraction", "decayed_80", "decayed_50", "no_finding", "ap"):
        np.testing.assert_allclose(getattr(told.past, name)[0], getattr(history, name)[-1], atol=2e-6, err_msg=name)
    for back, of_ingest in enumerate((history.last, history.last_2, history.last_3)):
        np.testing.assert_array_equal(told.past.last[0, back], of_ingest[-1])
    for back, of_ingest in enumerate((history.last_view, history.last_2_view, history.last_3_view)):
        expected = {"AP": 1.0, "PA": 0.0, None: np.nan}[of_ingest[-1]]
        np.testing.assert_array_equal(told.past.last_ap[0, back], expected)
    assert {getattr(told.past, field.name).dtype for field in fields(told.past)} == {np.dtype(np.float32)}


def assert_same(one: ClinicalInputs, other: ClinicalInputs) -> None:
    for encoding in ("paper", "rich"):
        layout = ClinicalLayout(encoding)
        np.testing.assert_array_equal(encode(one, STATISTICS, layout), encode(other, STATISTICS, layout))


@given(RECORDS, RECORDS, st.integers(0, 400), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_day_itself_and_later_change_nothing(records, others, on, random):
    earlier = [visit(*record) for record in records if record[0] < on]
    mixed = earlier + [visit(*record) for record in others if record[0] >= on]
    random.shuffle(mixed)
    day = START + timedelta(days=on)
    assert_same(with_history(radiograph(), mixed, day), with_history(radiograph(), earlier, day))


def test_no_visit_before_is_a_first_visit():
    first = from_request(61, "F", "AP", [])[0]
    same_day = visit(0, 1, "PA")
    for visits in ((), (same_day,)):
        told = with_history(radiograph(), visits, START)
        assert_same(told, first)
        for field in fields(PastVisits):
            np.testing.assert_array_equal(getattr(told.past, field.name), getattr(PastVisits.none_before(1), field.name))


def test_nothing_known_stays_unknown():
    known = with_history(radiograph(), [visit(0, 1, "PA")], START + timedelta(days=9))
    forgotten = with_history(known, None, START)
    assert_same(forgotten, radiograph())
    assert forgotten.past is None


def test_the_rest_of_the_radiograph_stays_and_several_share_a_history():
    inputs = ClinicalInputs.concatenate([radiograph("AP"), radiograph("PA")])
    told = with_history(inputs, [visit(0, 5, "PA")], START + timedelta(days=365))
    assert (told.age_years.tolist(), told.male.tolist(), told.ap.tolist()) == ([61, 61], [0, 0], [1, 0])
    assert told.ever[:, [0, 1, 2]].tolist() == [[1, 0, 1]] * 2
    np.testing.assert_allclose(told.past.age_gap, [365 / 365.25] * 2, rtol=1e-6)


def test_records_of_a_day_are_united():
    records = [visit(5, 0b10, "PA"), visit(2, 1, "AP"), visit(5, 1, "AP"), visit(2, 0, "AP")]
    assert united(records) == (
        EarlierVisit(START + timedelta(days=2), (FINDINGS[0],), "AP"),
        EarlierVisit(START + timedelta(days=5), FINDINGS[:2], None),
    )


def test_an_unknown_finding_is_named():
    with pytest.raises(CxrRayError, match="finding 'Fracture' is not known"):
        with_history(radiograph(), [replace(visit(0, 0, None), findings=("Fracture",))], START + timedelta(days=1))
