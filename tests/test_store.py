"""The results store on real databases: repeated writes, refusals, study answers, filters, several writers at once."""

import itertools
import multiprocessing
import random
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from stored_answers import FIRST, RECEIVED, SECOND, answer, of_study

from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.findings import FINDINGS
from serve.store import OtherContentError, Picture, Store, StudyFilter, StudyView


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url)
    yield store
    store.close()


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'results.db'}")
    yield store
    store.close()


def rows(url: str, table: str) -> int:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        found = connection.scalar(sa.select(sa.func.count()).select_from(sa.table(table)))
    engine.dispose()
    return found


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


def test_repeated_result_changes_nothing(store: Store, store_url: str) -> None:
    assert store.record_result(FIRST, answer(0.7))
    assert not store.record_result(FIRST, answer(0.9))
    assert [rows(store_url, table) for table in ("study", "instance", "result", "positive_finding")] == [1, 1, 1, 1]
    assert store.study("1.2").findings[0].probability == 0.7


def test_sqlite_has_a_write_ahead_log(sqlite_store: Store, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "results.db") as raw:
        assert raw.execute("pragma journal_mode").fetchone() == ("wal",)


def test_a_new_file_that_another_writes_is_waited_for(tmp_path: Path) -> None:
    """SQLite refuses at once to begin a write-ahead log then, and knows no timeout for it."""
    other = sqlite3.connect(tmp_path / "results.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(Store, f"sqlite:///{tmp_path / 'results.db'}")
        with pytest.raises(TimeoutError):
            opening.result(timeout=0.3)
        other.execute("ROLLBACK")
        opening.result(timeout=60).close()
    other.close()


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
        store.record_result(of_study(day, received_at=RECEIVED + timedelta(days=day)), answer(0.5))
    assert [study.study_instance_uid for study in store.studies(limit=2)] == ["1.4", "1.3"]
    assert [study.study_instance_uid for study in store.studies(limit=2, offset=3)] == ["1.1", "1.0"]
    assert store.studies(offset=5) == []
    assert store.study("7.7") is None
    assert store.content_digest("7.7") is None


def test_a_study_is_answered_as_soon_as_one_instance_is(store: Store) -> None:
    store.record_refusal(SECOND, "lateral view")
    assert store.study("1.2").status == "refused"
    store.record_result(FIRST, answer(0.7))
    assert store.study("1.2").status == "answered"
    assert store.count(StudyFilter(status="refused")) == 0


def lets_through(wanted: StudyFilter, study: StudyView) -> bool:
    """What a filter means, written down once more."""
    day = study.study_date
    return (
        wanted.patient_id in (None, study.patient_id)
        and wanted.accession_number in (None, study.accession_number)
        and (wanted.study_date_from is None or (day is not None and day >= f"{wanted.study_date_from:%Y%m%d}"))
        and (wanted.study_date_to is None or (day is not None and day <= f"{wanted.study_date_to:%Y%m%d}"))
        and (wanted.finding is None or any(found.positive and found.name == wanted.finding for found in study.findings))
        and wanted.status in (None, study.status)
        and (wanted.received_from is None or study.received_at >= wanted.received_from)
    )


def test_filters_let_through_what_they_say(store: Store) -> None:
    draw = random.Random(4)
    for number in range(30):
        instance = of_study(
            number,
            patient_id=draw.choice(["P1", "P2", None]),
            accession_number=draw.choice(["A1", "A2"]),
            study_date=draw.choice(["20260301", "20260302", "20260303", None, ""]),
            received_at=RECEIVED + timedelta(hours=draw.randrange(4)),
        )
        if draw.random() < 0.2:
            store.record_refusal(instance, "lateral view")
            continue
        for image, model in ((1, "m1"), (1, "m2"), (2, "m1")):
            said = answer(draw.random(), model, draw.choice(["Mass", "Nodule"]))
            store.record_result(replace(instance, sop_instance_uid=f"9.{number}.{image}"), said)
    everything = store.studies()
    assert len(everything) == store.count() == 30
    choices = {
        "patient_id": [None, "P1"],
        "accession_number": [None, "A2"],
        "study_date_from": [None, date(2026, 3, 2)],
        "study_date_to": [None, date(2026, 3, 2)],
        "finding": [None, "Mass", "Hernia"],
        "status": [None, "answered", "refused"],
        "received_from": [None, RECEIVED + timedelta(hours=2)],
    }
    sizes = set()
    for values in draw.sample(list(itertools.product(*choices.values())), 40):
        wanted = StudyFilter(**dict(zip(choices, values, strict=True)))
        expected = [study for study in everything if lets_through(wanted, study)]
        assert store.studies(filter=wanted) == expected, wanted
        assert store.studies(2, 1, wanted) == expected[1:3]
        assert store.count(wanted) == len(expected)
        sizes.add(len(expected))
    assert len(sizes) > 5


def test_a_page_costs_as_many_queries_as_a_study_and_no_pixels(store: Store) -> None:
    for number in range(12):
        store.record_result(of_study(number), answer(0.7), Picture(b"square", b"view"))
    asked: list[str] = []
    sa.event.listen(store._engine, "before_cursor_execute", lambda *arguments: asked.append(arguments[2]))
    assert store.studies(limit=1)[0].instances[0].has_picture
    of_one = len(asked)
    assert len(store.studies(limit=12)) == 12
    assert len(asked) == 2 * of_one
    assert "picture" in " ".join(asked)
    assert not [query for query in asked if "square" in query or "picture.view" in query]


def test_picture_is_the_newest_answers_and_fills_a_gap(store: Store) -> None:
    old, new = Picture(b"\x89PNG\0old", b"old view"), Picture(b"new", b"new view")
    store.record_result(FIRST, answer(0.7))
    assert store.picture("1.2.3.1") is None
    assert not store.study("1.2").instances[0].has_picture
    assert not store.record_result(FIRST, answer(0.7), old)
    assert store.picture("1.2.3.1") == old
    assert not store.record_result(FIRST, answer(0.7), new)
    assert store.picture("1.2.3.1") == old
    assert store.record_result(FIRST, answer(0.7, digest="m2"), new)
    assert store.picture("1.2.3.1") == new
    with pytest.raises(OtherContentError):
        store.record_result(replace(FIRST, content_digest="cccc"), answer(0.1, digest="m3"), old)
    assert store.picture("1.2.3.1") == new


def test_what_a_model_said_before_is_found_by_its_digest(store: Store) -> None:
    store.record_result(FIRST, answer(0.7))
    store.record_result(FIRST, answer(0.2, digest="m2"))
    assert store.answer("1.2.3.1", "m1") == answer(0.7)
    assert store.answer("1.2.3.1", "m2") == answer(0.2, digest="m2")
    assert store.answer("1.2.3.1", "m3") is None
    assert store.answer("1.2.3.2", "m1") is None


def test_shadow_answers_are_kept_and_show_nowhere(store: Store) -> None:
    store.record_result(FIRST, answer(0.2))
    before = store.study("1.2")
    assert store.record_shadow("1.2.3.1", answer(0.9, digest="m2"))
    assert not store.record_shadow("1.2.3.1", answer(0.8, digest="m2"))
    assert store.shadow_answers("1.2.3.1") == (answer(0.9, digest="m2"),)
    assert store.study("1.2") == before
    assert store.answer("1.2.3.1", "m2") is None
    assert store.count(StudyFilter(finding="Mass")) == 0
    # The trial is over, and the model becomes the one that answers.
    assert store.record_result(FIRST, answer(0.9, digest="m2"))
    assert store.study("1.2").findings[0].probability == 0.9
    with pytest.raises(CxrRayError, match=r"instance 7\.7 is not in the store"):
        store.record_shadow("7.7", answer(0.1))


def _write_instances(url: str, own: int) -> None:
    """Instances of one study, some of them the others' too, each positive for another finding; by threads at once."""
    store = Store(url)

    def write(number: int) -> None:
        store.record_result(replace(FIRST, sop_instance_uid=f"5.{number}"), answer(0.9, finding=FINDINGS[number % 14]))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, [*range(own, own + 10), *range(100, 114)]))
    store.close()


def test_processes_open_and_write_while_one_reads(store_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_instances, args=(store_url, own)) for own in (0, 20)]
    for writer in writers:
        writer.start()
    store = Store(store_url)
    while any(writer.is_alive() for writer in writers):
        store.studies()
        writers[0].join(0.02)
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(store.study("1.2").instances) == 10 + 10 + 14
    assert rows(store_url, "result") == 10 + 10 + 14
    assert [name for name in FINDINGS if store.count(StudyFilter(finding=name)) == 1] == list(FINDINGS)
    store.close()


def test_two_writers_of_one_instance_make_one_result(store_url: str, store: Store) -> None:
    other = Store(store_url)
    with ThreadPoolExecutor(8) as pool:
        new = list(pool.map(lambda turn: (store, other)[turn % 2].record_result(FIRST, answer(0.7)), range(40)))
    other.close()
    assert new.count(True) == 1


def test_answers_survive_reopening(store_url: str, store: Store) -> None:
    store.record_result(FIRST, answer(0.7))
    store.close()
    again = Store(store_url)
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


def test_database_errors_carry_no_patient(store: Store, store_url: str) -> None:
    engine = sa.create_engine(store_url)
    with engine.begin() as raw:
        for table in ("result", "shadow_result", "picture", "instance"):
            raw.execute(sa.text(f"drop table {table}"))
    engine.dispose()
    with pytest.raises(CxrRayError, match=r"no such table|does not exist") as raised:
        store.record_result(replace(FIRST, patient_id="Doe"), answer(0.7))
    assert "Doe" not in str(raised.value) + str(raised.value.__cause__)


def test_time_without_zone_is_a_defect(store: Store) -> None:
    with pytest.raises(CxrRayError, match="no time zone"):
        store.record_result(replace(FIRST, received_at=datetime(2026, 3, 1)), answer(0.7))
