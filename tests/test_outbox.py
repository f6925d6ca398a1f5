"""The outbox on a real disk: what is promised when, what a crash leaves, and writers killed while they write."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from result_peers import digest, parcel

from cxr_ray.errors import CxrRayError
from serve.node.outbox import DestinationQueue, Outbox
from serve.node.parcels import Item, Letter, Parcel, ParcelState, Receipt, StudyOrigin

ROOT = Path(__file__).resolve().parents[1]
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "spool" / "outbox")


@pytest.fixture
def queue(outbox: Outbox) -> DestinationQueue:
    return outbox.queue("pacs")


def receipt(of: Parcel) -> Receipt:
    names = tuple(item.name for item in of.items)
    return Receipt(
        id=of.id,
        study_key=of.study_key,
        sequence=of.sequence,
        items=names,
        created_at=of.created_at,
        delivered_at=NOW,
        attempts=1,
        remote_status="0x0000",
        committed=False,
    )


def letter(reason: str = "refused") -> Letter:
    return Letter(reason=reason, detail="", when=NOW, attempts=1)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_parcel_comes_back_as_it_was_put_in(outbox: Outbox, queue: DestinationQueue, tmp_path: Path) -> None:
    (tmp_path / "sc.dcm").write_bytes(b"pixels")
    items = (Item("sr.dcm", b"report"), Item("sc.dcm", tmp_path / "sc.dcm"), Item("summary.json", b"{}"))
    put = parcel(items=items, sequence=2, origin=StudyOrigin(calling_ae="CT1", address="10.0.0.7"))
    assert outbox.add(put)
    (name,) = queue.waiting()
    got = queue.read(name)
    assert (got.id, got.destination, got.study_key, got.sequence) == (put.id, "pacs", put.study_key, 2)
    assert (got.origin, got.created_at) == (put.origin, put.created_at)
    assert [(item.name, item.read()) for item in got.items] == [
        ("sr.dcm", b"report"),
        ("sc.dcm", b"pixels"),
        ("summary.json", b"{}"),
    ]
    assert [item.media_type for item in got.items] == ["application/dicom", "application/dicom", "application/json"]
    assert queue.state(name) == ParcelState()


def test_everything_is_on_disk_before_it_is_promised(outbox: Outbox, queue: DestinationQueue, monkeypatch) -> None:
    steps: list[str] = []
    sync, rename = os.fsync, Path.rename
    folder = queue.root

    def syncing(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(folder)
        steps.append(f"sync {target.parts[0]}{' ' + target.name.strip('.').split('.json')[0] if len(target.parts) > 2 else ''}")
        sync(descriptor)

    def renaming(source: Path, target: Path) -> Path:
        steps.append(f"rename {source.relative_to(folder).parts[0]} {target.relative_to(folder).parts[0]}")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    put = parcel(items=(Item("sr.dcm", b"report"),))
    outbox.add(put)
    assert steps == ["sync incoming sr.dcm", "sync incoming parcel", "sync incoming", "rename incoming waiting", "sync waiting"]
    steps.clear()
    assert not outbox.add(put)
    assert steps == ["sync waiting"]
    steps.clear()
    queue.dead(put.id, letter())
    assert [step.partition(" letter")[0] for step in steps] == [
        "sync waiting",
        "rename waiting waiting",
        "sync waiting",
        "rename waiting dead",
        "sync dead",
        "sync waiting",
    ]
    queue.replay(put.id)
    steps.clear()
    queue.delivered(receipt(put))
    # The receipt first: a crash between the two leaves a parcel that is known to be delivered, never one that is lost.
    assert steps == ["sync delivered", "rename delivered delivered", "sync delivered", "rename waiting incoming"]


def test_parcel_is_taken_once_wherever_it_is(outbox: Outbox, queue: DestinationQueue) -> None:
    waiting, delivered, dead = parcel("1"), parcel("2"), parcel("3")
    for put in (waiting, delivered, dead):
        assert outbox.add(put)
    queue.delivered(receipt(delivered))
    queue.dead(dead.id, letter())
    for put in (waiting, delivered, dead):
        assert not outbox.add(put)
    assert queue.waiting() == [waiting.id]
    assert queue.receipts() == [delivered.id]
    assert queue.receipt(delivered.id) == receipt(delivered)
    assert [found.id for found in queue.dead_letters()] == [dead.id]
    # The same results for somebody else are another matter.
    assert outbox.add(parcel("1", "archive"))


def test_same_parcel_from_many_threads_is_one(outbox: Outbox, queue: DestinationQueue) -> None:
    put = parcel()
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: outbox.add(put), range(32))) == 1
    assert queue.waiting() == [put.id]
    assert files(queue.root / "incoming") == []


def test_files_are_for_their_owner_only(outbox: Outbox, queue: DestinationQueue) -> None:
    put = parcel()
    outbox.add(put)
    for path in (queue.root / "waiting", *(queue.root / "waiting" / put.id).iterdir()):
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("bad", ["", "../x", "a/b", ".hidden", "a" * 129, "a\nb"])
def test_names_that_are_no_file_names_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="parcel id"):
        Parcel(bad, "pacs", "study", 1, (Item("sr.dcm", b""),))
    with pytest.raises(ValueError, match="parcel items"):
        Parcel("id", "pacs", "study", 1, (Item(f"{bad}.dcm" if bad else "", b""),))
    with pytest.raises(ValueError, match="parcel items"):
        Parcel("id", "pacs", "study", 1, (Item("state.txt", b""),))
    with pytest.raises(ValueError, match="two of one name"):
        Parcel("id", "pacs", "study", 1, (Item("sr.dcm", b""), Item("sr.dcm", b"")))


def test_items_do_not_overwrite_what_describes_them() -> None:
    for name in ("parcel.json", "state.json", "letter.json"):
        with pytest.raises(ValueError, match="parcel items"):
            Parcel("id", "pacs", "study", 1, (Item(name, b"{}"),))


def test_progress_is_kept_and_what_is_lost_of_it_begins_again(outbox: Outbox, queue: DestinationQueue) -> None:
    put = parcel()
    outbox.add(put)
    state = ParcelState(attempts=3, confirmed=("sr.dcm",), last_error="away", last_attempt_at=NOW)
    queue.keep_state(put.id, state)
    assert DestinationQueue(queue.root).state(put.id) == state
    (queue.root / "waiting" / put.id / "state.json").write_bytes(b"")
    assert queue.state(put.id) == ParcelState()


def test_dead_letter_keeps_its_reason_and_is_replayed_from_where_it_was(outbox: Outbox, queue: DestinationQueue) -> None:
    put = parcel()
    outbox.add(put)
    queue.keep_state(put.id, ParcelState(attempts=3, confirmed=("sr.dcm",)))
    queue.dead(put.id, Letter(reason="refused", detail="Doe^Jane?", when=NOW, attempts=4))
    (dead,) = queue.dead_letters()
    assert (dead.destination, dead.id, dead.letter.reason, dead.letter.attempts) == ("pacs", put.id, "refused", 4)
    assert dead.record.study_key == put.study_key
    assert (queue.waiting(), queue.count_dead()) == ([], 1)
    queue.replay(put.id)
    state = queue.state(put.id)
    assert (state.attempts, state.confirmed) == (0, ("sr.dcm",))
    assert state.replayed_at is not None
    assert (queue.waiting(), queue.count_dead()) == ([put.id], 0)


def test_lost_reason_does_not_hide_a_dead_letter(outbox: Outbox, queue: DestinationQueue) -> None:
    put = parcel()
    outbox.add(put)
    queue.dead(put.id, letter())
    for name in ("letter.json", "parcel.json", "state.json"):
        (queue.root / "dead" / put.id / name).write_text("{")
    (dead,) = queue.dead_letters()
    assert (dead.letter.reason, dead.record) == ("the reason was lost", None)
    queue.replay(put.id)
    with pytest.raises(CxrRayError, match=r"parcel.json cannot be read"):
        queue.read(put.id)


@pytest.mark.parametrize("name", ["nothing", "../waiting", "", "."])
def test_replay_of_what_is_not_there_names_it(queue: DestinationQueue, name: str) -> None:
    with pytest.raises(CxrRayError, match="is not among the dead letters of pacs"):
        queue.replay(name)


def test_sweep_removes_receipts_and_dead_letters_by_age_and_nothing_that_waits(outbox: Outbox, queue: DestinationQueue) -> None:
    for name in "1234":
        outbox.add(parcel(name))
    queue.delivered(receipt(parcel("1")))
    queue.delivered(receipt(parcel("2")))
    queue.dead(parcel("3").id, letter())
    old = time.time() - 1000
    os.utime(queue.root / "delivered" / f"{parcel('1').id}.json", (old, old))
    os.utime(queue.root / "dead" / parcel("3").id / "letter.json", (old, old))
    os.utime(queue.root / "waiting" / parcel("4").id / "parcel.json", (old, old))
    assert queue.sweep(delivered_seconds=None, dead_seconds=None) == 0
    assert queue.sweep(delivered_seconds=500, dead_seconds=None) == 1
    assert queue.sweep(delivered_seconds=500, dead_seconds=500) == 1
    assert queue.receipts() == [parcel("2").id]
    assert (queue.waiting(), queue.count_dead()) == ([parcel("4").id], 0)
    assert queue.sweep_waiting(None) == 0
    assert queue.sweep_waiting(500) == 1
    assert (queue.waiting(), files(queue.root / "incoming")) == ([], [])


def test_orphans_are_those_whom_the_settings_no_longer_name(outbox: Outbox) -> None:
    for destination in ("pacs", "archive", "hook"):
        outbox.add(parcel(destination=destination))
    outbox.queue("hook").delivered(receipt(parcel(destination="hook")))
    assert outbox.orphaned() == []
    outbox.keep_current(["pacs"])
    assert outbox.orphaned() == ["archive"]
    assert Outbox(outbox.root).destinations() == ["archive", "hook", "pacs"]


def test_watchers_hear_of_what_is_added(outbox: Outbox) -> None:
    told: list[str] = []
    outbox.watch(told.append)
    outbox.add(parcel())
    outbox.unwatch(told.append)
    outbox.add(parcel("2"))
    assert told == ["pacs"]


def test_leftovers_go_but_not_from_under_a_living_writer(outbox: Outbox, queue: DestinationQueue) -> None:
    (queue.root / "incoming" / "left").mkdir()
    (queue.root / "incoming" / "left" / "sr.dcm").write_bytes(b"half")
    with queue._writing() as folder:
        DestinationQueue(queue.root)
        assert files(queue.root / "incoming") == [folder.name]
    assert files(queue.root / "incoming") == []


def test_failed_write_promises_nothing_and_leaves_nothing(outbox: Outbox, queue: DestinationQueue) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            outbox.add(parcel())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (queue.waiting(), files(queue.root / "incoming")) == ([], [])
    assert outbox.add(parcel())


def test_root_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CxrRayError, match="name a folder on a local disk"):
        Outbox(tmp_path / "file" / "outbox")


WRITER = """
import sys
from pathlib import Path
from serve.node.outbox import Outbox
from serve.node.parcels import Item, Parcel
outbox = Outbox(Path(sys.argv[1]))
number = 0
while True:
    content = number.to_bytes(4, "big") * 20_000
    outbox.add(Parcel(f"p{number}", "pacs", "study", number, (Item("sr.dcm", content), Item("sc.dcm", content))))
    print(number, flush=True)
    number += 1
"""


@pytest.mark.system
def test_killed_writer_loses_nothing_that_it_promised(outbox: Outbox) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, outbox.root], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for _ in range(20):
        writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    promised = 20 + len(writer.stdout.read().split())
    writer.wait()
    queue = Outbox(outbox.root).queue("pacs")
    assert files(queue.root / "incoming") == []
    assert len(queue.waiting()) in (promised, promised + 1)
    for name in queue.waiting():
        number = int(name[1:])
        assert [item.read() for item in queue.read(name).items] == [number.to_bytes(4, "big") * 20_000] * 2


def test_nothing_in_a_record_names_a_patient(outbox: Outbox, queue: DestinationQueue) -> None:
    put = parcel(study="1.2.840.99")
    outbox.add(put)
    record = (queue.root / "waiting" / put.id / "parcel.json").read_text()
    assert "1.2.840.99" not in record
    assert json.loads(record)["study_key"] == digest("1.2.840.99")
