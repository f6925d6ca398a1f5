"""What archives tell, in the store: results that count as history, and films that were fetched and nobody sent."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import date, timedelta

import pytest
from stored_answers import FIRST, RECEIVED, SECOND, answer, of_study

from cxr_ray.errors import CxrRayError
from serve.store import ArchivedResult, ConfirmedVisit, EarlierVisit, OtherContentError, Picture, Store, StudyFilter

NEW_STUDY = date(2026, 3, 2)
DAY = date(2024, 5, 6)
FETCHED = replace(FIRST, fetched=True)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = Store(store_url)
    yield opened
    opened.close()


def archived(study: str = "1.7", day: date = DAY, *findings: str) -> ArchivedResult:
    return ArchivedResult(study, day, findings)


def test_archived_results_are_predicted_history(store: Store) -> None:
    store.put_archived_results(" P1 ", [archived("1.7", DAY, "effusion", "Mass"), archived("1.8", date(2025, 1, 2))])
    visits = (EarlierVisit(DAY, ("Effusion", "Mass"), None, "predicted"), EarlierVisit(date(2025, 1, 2), (), None, "predicted"))
    for source in ("predicted", "both"):
        assert store.earlier_visits("P1", NEW_STUDY, source) == visits
        assert store.earlier_visits("P1", DAY, source) is None
        assert store.earlier_visits("P2", NEW_STUDY, source) is None
    for source in ("confirmed", "none"):
        assert store.earlier_visits("P1", NEW_STUDY, source) is None
    assert store.predicted_studies("P1", NEW_STUDY) == {"1.7", "1.8"}
    assert store.predicted_studies("P1", date(2025, 1, 2)) == {"1.7"}


def test_archived_results_are_told_again_and_changed(store: Store) -> None:
    store.put_archived_results("P1", [archived("1.7", DAY, "Mass")])
    store.put_archived_results("P1", [archived("1.7", DAY, "Edema"), archived("1.8", DAY, "Hernia")])
    (visit,) = store.earlier_visits("P1", NEW_STUDY, "both")
    assert visit.findings == ("Edema", "Hernia")


def test_own_answer_and_confirmed_day_go_before_an_archived_result(store: Store) -> None:
    store.record_result(replace(of_study(7, study_date="20240506"), patient_id="P1"), answer(0.9, finding="Nodule"))
    store.put_archived_results("P1", [archived("1.7", DAY, "Mass"), archived("1.8", date(2024, 6, 1), "Edema")])
    visits = store.earlier_visits("P1", NEW_STUDY, "both")
    assert [visit.findings for visit in visits] == [("Nodule",), ("Edema",)]
    assert store.predicted_studies("P1", NEW_STUDY) == {"1.7", "1.8"}
    store.put_history("P1", [ConfirmedVisit(date(2024, 6, 1))])
    visits = store.earlier_visits("P1", NEW_STUDY, "both")
    assert [(visit.findings, visit.source) for visit in visits] == [(("Nodule",), "predicted"), ((), "confirmed")]


def test_archived_results_that_cannot_be(store: Store) -> None:
    with pytest.raises(CxrRayError, match="in the future"):
        archived("1.7", date.max)
    with pytest.raises(CxrRayError, match="'Broken' is not known"):
        archived("1.7", DAY, "Broken")
    with pytest.raises(CxrRayError, match="patient identifier is empty"):
        store.put_archived_results(" ", [archived()])


def test_a_fetched_film_is_history_and_in_no_list(store: Store) -> None:
    store.record_result(FETCHED, answer(0.9))
    assert store.is_fetched("1.2.3.1")
    assert store.studies() == []
    assert store.count() == store.count(StudyFilter(finding="Mass")) == store.count(StudyFilter(patient_id="P1")) == 0
    assert [study.study_instance_uid for study in store.studies(filter=StudyFilter(fetched=True))] == ["1.2"]
    assert store.count(StudyFilter(finding="Mass", fetched=True)) == 1
    (visit,) = store.earlier_visits("P1", NEW_STUDY, "predicted")
    assert visit.findings == ("Mass",)
    assert store.predicted_studies("P1", NEW_STUDY) == {"1.2"}


def test_another_film_of_a_fetched_study_brings_it_into_lists(store: Store) -> None:
    store.record_result(FETCHED, answer(0.9))
    later = RECEIVED + timedelta(days=3)
    store.record_result(replace(SECOND, received_at=later), answer(0.1))
    (study,) = store.studies(filter=StudyFilter(finding="Mass", received_from=later))
    assert (study.received_at, len(study.instances)) == (later, 2)
    assert store.is_fetched("1.2.3.1")
    assert not store.is_fetched("1.2.3.2")
    assert not store.is_fetched("7.7")


@pytest.mark.parametrize("content", ["aaaa", "other bytes"])
def test_a_fetched_film_that_is_sent_is_answered_anew(store: Store, content: str) -> None:
    store.record_result(FETCHED, answer(0.9), Picture(b"square", b"view"))
    store.record_shadow("1.2.3.1", answer(0.2, "m9"))
    sent = replace(FIRST, content_digest=content, received_at=RECEIVED + timedelta(days=1), calling_ae="PACS2")
    said = replace(answer(0.1), priors={"asked": True, "outcome": "none"})
    assert store.record_result(sent, said)
    (study,) = store.studies()
    (instance,) = study.instances
    assert (instance.answer, instance.content_digest, instance.calling_ae) == (said, content, "PACS2")
    assert instance.received_at == study.received_at == sent.received_at
    assert (store.picture("1.2.3.1"), store.shadow_answers("1.2.3.1")) == (None, ())
    assert store.count(StudyFilter(finding="Mass")) == 0
    assert not store.is_fetched("1.2.3.1")
    # From then on it is as any other.
    assert not store.record_result(sent, said)
    with pytest.raises(OtherContentError):
        store.record_result(replace(sent, content_digest="dddd"), answer(0.3))
    assert not store.record_result(replace(sent, fetched=True), said)
    assert not store.is_fetched("1.2.3.1")


def test_a_fetched_film_that_is_sent_and_refused(store: Store) -> None:
    store.record_result(FETCHED, answer(0.9))
    assert store.record_refusal(FIRST, "lateral view")
    (study,) = store.studies()
    assert (study.status, study.instances[0].status, study.instances[0].reason) == ("refused", "refused", "lateral view")
    assert store.count(StudyFilter(finding="Mass")) == 0


def test_what_came_of_asking_is_kept(store: Store) -> None:
    said = {"asked": True, "outcome": "timeout", "studies": 3, "used": 1}
    store.record_result(FIRST, replace(answer(0.9), priors=said))
    store.record_result(SECOND, answer(0.9))
    assert store.answer("1.2.3.1", "m1").priors == said
    assert store.answer("1.2.3.2", "m1").priors is None
