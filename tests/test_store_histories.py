"""Histories of patients: what is put, imported, reviewed and predicted, and that nothing of the day or later gets in."""

import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import pytest
from stored_answers import FIRST, answer, of_study

from cxr_ray.errors import CxrRayError
from serve.store import ConfirmedVisit, EarlierVisit, Store

FAR = date(2200, 1, 1)
SOURCES = ("confirmed", "predicted", "both")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url)
    yield store
    store.close()


def day(number: int) -> date:
    return date(2025, 1, number)


def predicted(store: Store, number: int, *findings: str, view: str | None = "PA") -> str:
    """A study of the day with one image for each finding; without any, one that shows none."""
    instance = of_study(number, study_date=f"{day(number):%Y%m%d}")
    for image, finding in enumerate(findings or ("Mass",)):
        said = answer(0.9 if findings else 0.1, finding=finding, view=view)
        store.record_result(replace(instance, sop_instance_uid=f"9.{number}.{image}"), said)
    return instance.study_instance_uid


def test_history_is_put_whole_and_in_order(store: Store) -> None:
    assert store.history("P1") is None
    visits = [ConfirmedVisit(day(3), ("nodule", "Mass"), "AP"), ConfirmedVisit(day(1)), ConfirmedVisit(day(2), ("Hernia",))]
    for _ in range(2):
        store.put_history(" P1 ", visits)
        assert store.history("P1") == (visits[1], visits[2], ConfirmedVisit(day(3), ("Mass", "Nodule"), "AP"))
    store.put_history("P1", [ConfirmedVisit(day(2), ("Edema",))])
    assert store.history("P1") == (ConfirmedVisit(day(2), ("Edema",)),)
    store.put_history("P1", [])
    assert store.history("P1") == ()
    assert store.history("P2") is None


def test_records_of_one_day_are_one_visit(store: Store) -> None:
    store.put_history("P1", [ConfirmedVisit(day(1), ("Mass",), "PA"), ConfirmedVisit(day(1), ("Edema",), "AP")])
    assert store.history("P1") == (ConfirmedVisit(day(1), ("Mass", "Edema")),)


def test_import_adds_and_overwrites_by_patient_and_date(store: Store) -> None:
    store.put_history("P1", [ConfirmedVisit(day(1), ("Mass",)), ConfirmedVisit(day(2), ("Mass",), "PA")])
    new = {"P1": [ConfirmedVisit(day(2), ("Edema",)), ConfirmedVisit(day(3))], " P2": [ConfirmedVisit(day(4))], "P2": []}
    for _ in range(2):
        assert store.import_history(new) == 3
    assert store.history("P1") == (
        ConfirmedVisit(day(1), ("Mass",)),
        ConfirmedVisit(day(2), ("Edema",)),
        ConfirmedVisit(day(3)),
    )
    assert store.history("P2") == (ConfirmedVisit(day(4)),)
    with pytest.raises(CxrRayError, match="patient identifier is empty"):
        store.import_history({"P3": [ConfirmedVisit(day(4))], "  ": [ConfirmedVisit(day(4))]})
    assert store.history("P3") is None


@pytest.mark.parametrize(
    ("visit", "says"),
    [
        (lambda: ConfirmedVisit(datetime.now(UTC).date() + timedelta(days=2)), "is in the future"),
        (lambda: ConfirmedVisit(day(1), ("Fracture",)), "finding 'Fracture' is not known"),
        (lambda: ConfirmedVisit(day(1), ("Mass",), "LL"), "view 'LL' is not known"),
    ],
)
def test_a_visit_that_cannot_be_is_named(visit, says: str) -> None:
    with pytest.raises(CxrRayError, match=says):
        visit()


def test_sources_and_who_wins(store: Store) -> None:
    """Day 1 is put, 2 predicted, 3 predicted and put, 4 predicted and reviewed, 5 refused, 6 predicted twice."""
    store.put_history("P1", [ConfirmedVisit(day(1), ("Hernia",), "AP"), ConfirmedVisit(day(3), ("Edema",))])
    predicted(store, 2, "Mass", "Nodule")
    predicted(store, 3, "Mass")
    reviewed = predicted(store, 4, "Mass", "Fibrosis")
    assert store.review(reviewed, "mass", "rejected", "ada")
    assert store.review(reviewed, "Edema", "confirmed", "ada")
    store.record_refusal(of_study(5, study_date="20250105"), "lateral view")
    predicted(store, 6, "Mass", view="AP")
    predicted(store, 7, view=None)
    put = EarlierVisit(day(1), ("Hernia",), "AP"), EarlierVisit(day(3), ("Edema",), None)
    of_reader = EarlierVisit(day(4), ("Edema",), "PA")
    said = EarlierVisit(day(2), ("Mass", "Nodule"), "PA", "predicted")
    later = EarlierVisit(day(6), ("Mass",), "AP", "predicted"), EarlierVisit(day(7), (), None, "predicted")
    assert store.earlier_visits("P1", FAR, "confirmed") == (*put, of_reader)
    assert store.earlier_visits("P1", FAR, "predicted") == (
        said,
        EarlierVisit(day(3), ("Mass",), "PA", "predicted"),
        EarlierVisit(day(4), ("Fibrosis",), "PA", "predicted"),
        *later,
    )
    # A review says something of the findings reviewed, and nothing of the others.
    both = EarlierVisit(day(4), ("Edema", "Fibrosis"), "PA")
    assert store.earlier_visits("P1", FAR, "both") == (put[0], said, put[1], both, *later)
    assert store.earlier_visits("P1", FAR, "none") is None


def test_only_strictly_earlier_days_count(store: Store) -> None:
    draw = random.Random(7)
    store.put_history("P1", [ConfirmedVisit(day(draw.randrange(1, 13)), ("Hernia",)) for _ in range(4)])
    for number in draw.sample(range(1, 13), 7):
        study = predicted(store, number, "Mass", draw.choice(["Edema", "Nodule"]))
        if draw.random() < 0.5:
            store.review(study, "Mass", draw.choice(["confirmed", "rejected"]), "ada")
    for source in SOURCES:
        everything = store.earlier_visits("P1", FAR, source)
        assert len(everything) > 3
        for number in range(1, 14):
            earlier = tuple(visit for visit in everything if visit.visit_date < day(number))
            # Predictions alone cannot tell that a visit is the first.
            nothing = None if source == "predicted" else ()
            assert store.earlier_visits("P1", day(number), source) == (earlier or nothing)


def test_nothing_known_is_not_nothing_before(store: Store) -> None:
    predicted(store, 5, "Mass")
    assert [store.earlier_visits("P1", day(5), source) for source in SOURCES] == [None, None, None]
    store.put_history("P1", [])
    assert [store.earlier_visits("P1", day(5), source) for source in SOURCES] == [(), None, ()]
    assert store.earlier_visits("P2", day(9), "both") is None


@pytest.mark.parametrize("patient", [None, "", "  "])
def test_who_has_no_identifier_has_no_history(store: Store, patient: str | None) -> None:
    store.record_result(of_study(1, patient_id=patient, study_date="20250101"), answer(0.9))
    assert store.earlier_visits(patient, FAR, "both") is None
    with pytest.raises(CxrRayError, match="patient identifier is empty"):
        store.put_history(patient or "", [])


@pytest.mark.parametrize("study_date", [None, "", "2025", "20251301", "2025 1 1", "2025.01.01", "today"])
def test_dates_that_are_none_do_not_count(store: Store, study_date: str | None) -> None:
    store.record_result(of_study(1, study_date=study_date), answer(0.9))
    assert store.earlier_visits("P1", FAR, "both") is None


def test_the_newest_answer_is_the_prediction(store: Store) -> None:
    store.record_result(FIRST, answer(0.9))
    store.record_result(FIRST, answer(0.1, digest="m2"))
    store.record_shadow("1.2.3.1", answer(0.9, digest="m3"))
    assert store.earlier_visits("P1", FAR, "both") == (EarlierVisit(date(2026, 3, 1), (), "PA", "predicted"),)


def test_images_that_differ_leave_the_view_unknown(store: Store) -> None:
    store.record_result(FIRST, answer(0.9, view="AP"))
    store.record_result(replace(FIRST, sop_instance_uid="1.2.3.9"), answer(0.9, view=None))
    assert store.earlier_visits("P1", FAR, "predicted")[0].view is None


def test_a_review_is_replaced_and_taken_back(store: Store) -> None:
    study = predicted(store, 1, "Mass")
    assert store.review(study, "Mass", "rejected", "ada")
    assert store.review(study, "Mass", "confirmed", "bob")
    assert store.review(study, "Edema", "rejected", "ada")
    shown = store.study(study).reviews
    assert [(review.finding, review.verdict, review.actor) for review in shown] == [
        ("Edema", "rejected", "ada"),
        ("Mass", "confirmed", "bob"),
    ]
    assert all(datetime.now(UTC) - review.reviewed_at < timedelta(minutes=5) for review in shown)
    for finding in ("Mass", "Edema", "Hernia"):
        assert store.review(study, finding, None, "ada")
    assert store.study(study).reviews == ()
    assert store.earlier_visits("P1", FAR, "confirmed") is None
    assert not store.review("7.7", "Mass", "confirmed", "ada")
    with pytest.raises(CxrRayError, match="finding 'Fracture' is not known"):
        store.review(study, "Fracture", "confirmed", "ada")
