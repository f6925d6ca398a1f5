"""The results store on real SQLite files: repeated writes, refusals, study answers, several writers at once."""

import multiprocessing
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from cxr_ray.errors import CxrRayError, UsageError
from serve.store import Answer, Finding, OtherContentError, ReceivedInstance, Store

RECEIVED = datetime(2026, 3, 1, 23, 30, tzinfo=timezone(timedelta(hours=-5)))
FIRST = ReceivedInstance(
    "1.2.3.1",
    "1.2",
    "1.2.3",
    "aaaa",
    RECEIVED,
    calling_ae="PACS",
    patient_id="P1",
    accession_number="A1",
    study_date="20260301",
)
SECOND = replace(FIRST, sop_instance_uid="1.2.3.2", content_digest="bbbb")


def answer(probability: float, digest: str = "m1") -> Answer:
    return Answer(
        "multi-input",
        "1.0",
        digest,
        (Finding("Mass", probability, 0.5, probability >= 0.5), Finding("Hernia", 0.01, 0.3, False)),
        {"age": 61, "sex": "F", "view": "PA", "history": ["Mass"], "missing": []},
        ("no history",),
    )


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'results.db'}"


@pytest.fixture
def store(url: str):
    store = Store(url)
    yield store
    store.close()


def test_result_is_read_back_as_written(store: Store) -> None:
    assert store.record_result(FIRST, answer(0.7))
    study = store.study("1.2")
    assert study is not None
    assert (study.patient_id, study.accession_number, study.study_date) == ("P1", "A1", "20260301")
    (instance,) = study.instances
    assert instance.answer == answer(0.7)
    assert (instance.status, instance.reason, instance.calling_ae) == ("answered", None, "PACS")
    assert instance.series_instance_uid == "1.2.3"


def test_times_are_utc_and_aware(store: Store) -> None:
    store.record_result(FIRST, answer(0.7))
    (instance,) = store.study("1.2").instances
    assert instance.received_at == RECEIVED
    assert instance.received_at.utcoffset() == timedelta(0)
    assert abs(instance.answered_at - datetime.now(UTC)) < timedelta(minutes=1)


def test_repeated_result_changes_nothing(store: Store, tmp_path: Path) -> None:
    assert store.record_result(FIRST, answer(0.7))
    assert not store.record_result(FIRST, answer(0.9))
    with sqlite3.connect(tmp_path / "results.db") as raw:
        counts = [raw.execute(f"select count(*) from {table}").fetchone()[0] for table in ("study", "instance", "result")]
        assert raw.execute("pragma journal_mode").fetchone() == ("wal",)
    assert counts == [1, 1, 1]
    assert store.study("1.2").findings[0].probability == 0.7


def test_another_model_adds_a_result_and_is_the_answer(store: Store) -> None:
    store.record_result(FIRST, answer(0.7))
    assert store.record_result(FIRST, answer(0.2, digest="m2"))
    assert store.study("1.2").findings[0].probability == 0.2


def test_study_takes_the_highest_of_its_instances(store: Store) -> None:
    store.record_result(FIRST, answer(0.4))
    store.record_result(SECOND, answer(0.8))
    store.record_refusal(replace(FIRST, sop_instance_uid="1.2.3.3"), "lateral view")
    study = store.study("1.2")
    mass, hernia = study.findings
    assert (mass.name, mass.probability, mass.positive) == ("Mass", 0.8, True)
    assert mass.by_instance == {"1.2.3.1": 0.4, "1.2.3.2": 0.8}
    assert (hernia.probability, hernia.positive) == (0.01, False)
    assert [instance.status for instance in study.instances] == ["answered", "answered", "refused"]


def test_refusal_is_idempotent_and_overruled_by_an_answer(store: Store) -> None:
    assert store.record_refusal(FIRST, "lateral view")
    assert not store.record_refusal(FIRST, "lateral view")
    assert store.record_refusal(FIRST, "several frames")
    assert store.content_digest("1.2.3.1") is None
    assert store.study("1.2").findings == ()
    assert store.record_result(FIRST, answer(0.7))
    assert not store.record_refusal(FIRST, "lateral view")
    (instance,) = store.study("1.2").instances
    assert (instance.status, instance.reason) == ("answered", None)
    assert store.content_digest("1.2.3.1") == "aaaa"


def test_other_bytes_under_an_answered_uid_are_not_accepted(store: Store) -> None:
    store.record_result(FIRST, answer(0.7))
    with pytest.raises(OtherContentError, match=r"instance 1\.2\.3\.1 was received before with other bytes"):
        store.record_result(replace(FIRST, content_digest="cccc"), answer(0.1, digest="m2"))
    assert store.content_digest("1.2.3.1") == "aaaa"


def test_other_bytes_under_a_refused_uid_are(store: Store) -> None:
    store.record_refusal(FIRST, "lateral view")
    assert store.record_result(replace(FIRST, content_digest="cccc"), answer(0.1))
    assert store.content_digest("1.2.3.1") == "cccc"


def test_studies_come_newest_first_in_pages(store: Store) -> None:
    for day in range(5):
        store.record_result(
            replace(
                FIRST,
                sop_instance_uid=f"9.{day}",
                study_instance_uid=f"1.{day}",
                received_at=RECEIVED + timedelta(days=day),
            ),
            answer(0.5),
        )
    assert [study.study_instance_uid for study in store.studies(limit=2)] == ["1.4", "1.3"]
    assert [study.study_instance_uid for study in store.studies(limit=2, offset=3)] == ["1.1", "1.0"]
    assert store.study("7.7") is None
    assert store.content_digest("7.7") is None


def test_two_writers_of_one_instance_make_one_result(url: str, store: Store) -> None:
    other = Store(url)
    with ThreadPoolExecutor(8) as pool:
        new = list(pool.map(lambda turn: (store, other)[turn % 2].record_result(FIRST, answer(0.7)), range(40)))
    other.close()
    assert new.count(True) == 1


def _write_instances(url: str, start: int, count: int) -> None:
    store = Store(url)
    for number in range(start, start + count):
        store.record_result(replace(FIRST, sop_instance_uid=f"5.{number}"), answer(0.5))
    store.close()


def test_processes_write_while_one_reads(url: str, store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_instances, args=(url, start, 25)) for start in (0, 100)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        store.studies()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(store.study("1.2").instances) == 50


def test_answers_survive_reopening(url: str, store: Store) -> None:
    store.record_result(FIRST, answer(0.7))
    store.close()
    again = Store(url)
    assert again.content_digest("1.2.3.1") == "aaaa"
    again.close()


@pytest.mark.parametrize(
    ("url", "error", "says"),
    [
        ("results.db", UsageError, "does not parse"),
        ("nosuch://user:hush@host/db", UsageError, "no driver for 'nosuch'"),
        ("sqlite:////proc/nowhere/results.db", CxrRayError, "unable to open database file"),
    ],
)
def test_bad_url_is_one_line_without_password(url: str, error: type[CxrRayError], says: str) -> None:
    with pytest.raises(error, match=says) as raised:
        Store(url)
    assert "\n" not in str(raised.value)
    assert "hush" not in str(raised.value)


def test_database_errors_carry_no_patient(store: Store, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "results.db") as raw:
        raw.execute("drop table result")
        raw.execute("drop table instance")
    with pytest.raises(CxrRayError, match="no such table") as raised:
        store.record_result(replace(FIRST, patient_id="Doe"), answer(0.7))
    assert "Doe" not in str(raised.value) + str(raised.value.__cause__)


def test_time_without_zone_is_a_defect(store: Store) -> None:
    with pytest.raises(CxrRayError, match="no time zone"):
        store.record_result(replace(FIRST, received_at=datetime(2026, 3, 1)), answer(0.7))
