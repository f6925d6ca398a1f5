"""The spool on a real disk: names, duplicates, moves, what a crash leaves, and a writer killed while it writes."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pydicom
import pytest
from blake3 import blake3
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian

from cxr_ray.errors import CxrRayError
from serve.node.spool import Origin, Spool, Stored

ROOT = Path(__file__).resolve().parents[1]
CR = "1.2.840.10008.5.1.4.1.1.1"


def data_set(uid: str, **elements: str) -> bytes:
    content = Dataset()
    content.SOPClassUID, content.SOPInstanceUID = CR, uid
    content.StudyInstanceUID, content.SeriesInstanceUID = "1.2", "1.2.3"
    content.PatientName, content.PatientID = "Doe^Jane", "P77"
    for keyword, value in elements.items():
        setattr(content, keyword, value)
    stream = DicomBytesIO()
    stream.is_implicit_VR, stream.is_little_endian = False, True
    write_dataset(stream, content)
    return stream.getvalue()


def origin(uid: str, calling_ae: str = "PACS") -> Origin:
    return Origin(CR, uid, str(ExplicitVRLittleEndian), calling_ae)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "deep" / "spool")


def test_stored_instance_is_a_part_10_file_with_the_same_bytes(spool: Spool) -> None:
    sent = data_set("1.2.3.4", StudyDate="20260301", AccessionNumber="A1")
    assert spool.store(sent, origin("1.2.3.4")) is Stored.NEW
    (name,) = spool.pending()
    assert name == f"{hashlib.sha256(b'1.2.3.4').hexdigest()[:32]}-{blake3(sent).hexdigest()[:32]}.dcm"
    stored = spool.path(name).read_bytes()
    assert stored.endswith(sent)
    meta = pydicom.dcmread(spool.path(name)).file_meta
    assert (meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID) == (CR, "1.2.3.4")
    assert (meta.TransferSyntaxUID, meta.SourceApplicationEntityTitle) == (ExplicitVRLittleEndian, "PACS")
    assert meta.ImplementationClassUID
    assert stored[132 + 12 + meta.FileMetaInformationGroupLength :] == sent
    assert files(spool.root / "incoming") == []
    instance = spool.read(name)
    assert (instance.sop_instance_uid, instance.study_instance_uid, instance.series_instance_uid) == (
        "1.2.3.4",
        "1.2",
        "1.2.3",
    )
    assert (instance.patient_id, instance.accession_number, instance.study_date) == ("P77", "A1", "20260301")
    assert instance.content_digest == blake3(sent).hexdigest()[:32]
    assert abs(instance.received_at - datetime.now(UTC)) < timedelta(minutes=1)


def test_bytes_are_on_disk_before_their_name_and_that_before_the_answer(spool: Spool, monkeypatch) -> None:
    steps: list[str] = []
    sync, rename = os.fsync, Path.rename

    def syncing(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(spool.root)
        steps.append(f"sync {target.parts[0]}{' file' if len(target.parts) > 1 else ''}")
        sync(descriptor)

    def renaming(source: Path, target: Path) -> Path:
        steps.append(f"rename {source.parent.name} {target.parent.name}")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    spool.store(data_set("1.2.3.4"), origin("1.2.3.4"))
    assert steps == ["sync incoming file", "rename incoming ready", "sync ready"]
    steps.clear()
    spool.store(data_set("1.2.3.4"), origin("1.2.3.4"))
    assert steps == ["sync ready"]
    steps.clear()
    (name,) = spool.pending()
    spool.dead(name, reason="lateral view", status=422, attempts=1, instance=None)
    assert steps == [
        "sync incoming file",
        "rename incoming dead",
        "sync dead",
        "rename ready dead",
        "sync dead",
        "sync ready",
    ]
    steps.clear()
    spool.replay(name)
    assert steps == ["rename dead ready", "sync ready", "sync dead", "sync dead"]
    steps.clear()
    spool.done(name)
    assert steps == ["rename ready done", "sync done", "sync ready"]


def test_files_and_folders_are_for_their_owner_only(spool: Spool) -> None:
    spool.store(data_set("1.2.3.4"), origin("1.2.3.4"))
    assert spool.path(spool.pending()[0]).stat().st_mode & 0o077 == 0
    assert (spool.root / "ready").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("where", ["ready", "done", "dead"])
def test_same_bytes_again_are_recognised(spool: Spool, where: str) -> None:
    sent = data_set("1.2.3.4")
    spool.store(sent, origin("1.2.3.4"))
    (name,) = spool.pending()
    if where == "done":
        spool.done(name)
    elif where == "dead":
        spool.dead(name, reason="lateral view", status=422, attempts=1, instance=spool.read(name))
    assert spool.store(memoryview(sent), origin("1.2.3.4", "OTHER")) is Stored.DUPLICATE
    assert files(spool.root / where)[0] == name
    assert len(spool.pending()) == (1 if where == "ready" else 0)


def test_same_uid_with_other_bytes_is_kept_beside(spool: Spool) -> None:
    spool.store(data_set("1.2.3.4"), origin("1.2.3.4"))
    other = data_set("1.2.3.4", PatientID="P78")
    assert (
        spool.store(other, Origin(CR, "1.2.3.4", str(ExplicitVRLittleEndian), "CT1", "dicom://192.0.2.7:4")) is Stored.CONFLICT
    )
    (first,) = spool.pending()
    (conflict,) = spool.conflicts()
    assert (conflict.first, conflict.name.partition("-")[0]) == (first, first.partition("-")[0])
    assert (conflict.sop_instance_uid, conflict.calling_ae, conflict.peer_address) == ("1.2.3.4", "CT1", "dicom://192.0.2.7:4")
    assert (spool.root / "conflicts" / conflict.name).read_bytes().endswith(other)
    assert spool.store(other, origin("1.2.3.4")) is Stored.DUPLICATE
    assert (len(spool.conflicts()), spool.count("conflicts"), len(spool.pending())) == (1, 1, 1)
    spool.done(first)
    assert Spool(spool.root).store(data_set("1.2.3.4", PatientID="P79"), origin("1.2.3.4")) is Stored.CONFLICT


def test_what_a_person_was_to_decide_about_stays_for_its_time(spool: Spool) -> None:
    for uid in ("1.2.3.4", "1.2.3.5"):
        spool.store(data_set(uid), origin(uid))
    first, second = spool.pending()
    spool.dead(first, reason="lateral view", status=422, attempts=1, instance=spool.read(first))
    spool.store(data_set("1.2.3.5", PatientID="P78"), origin("1.2.3.5"))
    (conflict,) = spool.conflicts()
    # Since its reason was written, and not since it came.
    os.utime(spool.root / "dead" / first, (1000, 1000))
    assert [spool.sweep_aside(folder, 60) for folder in ("dead", "conflicts", "filed")] == [0, 0, 0]
    for path in (spool.root / "dead" / f"{first}.json", spool.root / "conflicts" / f"{conflict.name}.json"):
        os.utime(path, (1000, 1000))
    assert [spool.sweep_aside(folder, 60) for folder in ("dead", "conflicts", "filed")] == [1, 1, 0]
    assert (spool.dead_letters(), spool.conflicts(), spool.pending()) == ([], [], [second])
    assert spool.store(data_set("1.2.3.4", PatientID="P79"), origin("1.2.3.4")) is Stored.NEW


def test_uid_is_free_again_when_its_file_is_gone(spool: Spool) -> None:
    spool.store(data_set("1.2.3.4"), origin("1.2.3.4"))
    spool.done(spool.pending()[0])
    assert spool.sweep(-1) == 1
    assert files(spool.root / "known") == []
    assert spool.store(data_set("1.2.3.4", PatientID="P78"), origin("1.2.3.4")) is Stored.NEW
    # By hand, without the claim: which binds nobody any more, once it cannot be that of a writer.
    (spool.root / "ready" / spool.pending()[0]).unlink()
    (claim,) = (spool.root / "known").iterdir()
    os.utime(claim, (1000, 1000), follow_symlinks=False)
    assert spool.store(data_set("1.2.3.4", PatientID="P79"), origin("1.2.3.4")) is Stored.NEW
    os.utime(claim, (1000, 1000), follow_symlinks=False)
    (spool.root / "ready" / spool.pending()[0]).unlink()
    Spool(spool.root)
    assert files(spool.root / "known") == []


def test_a_claim_whose_writer_was_killed_promises_nothing_to_another_content(spool: Spool) -> None:
    """Until it cannot be that of a writer any more: then the next one has it."""
    spool.store(data_set("1.2.3.4"), origin("1.2.3.4"))
    (spool.root / "ready" / spool.pending()[0]).unlink()
    with pytest.raises(BlockingIOError, match="being written"):
        spool.store(data_set("1.2.3.4", PatientID="P78"), origin("1.2.3.4"))
    assert (spool.pending(), spool.conflicts(), files(spool.root / "incoming")) == ([], [], [])
    assert spool.store(data_set("1.2.3.4"), origin("1.2.3.4")) is Stored.NEW


def test_a_claim_is_let_go_when_its_file_gets_no_name(spool: Spool, monkeypatch) -> None:
    def full(_arrival: object, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("serve.node.arrival.Arrival.rename", full)
        with pytest.raises(OSError, match="No space"):
            spool.store(data_set("1.2.3.4"), origin("1.2.3.4"))
    assert files(spool.root / "known") == []
    assert spool.store(data_set("1.2.3.4", PatientID="P78"), origin("1.2.3.4")) is Stored.NEW


def test_one_of_many_takes_over_a_claim_that_binds_nobody(spool: Spool) -> None:
    for turn in range(20):
        uid = f"1.2.3.{turn}"
        spool.store(data_set(uid), origin(uid))
        for name in spool.pending():
            (spool.root / "ready" / name).unlink()
        for claim in (spool.root / "known").iterdir():
            os.utime(claim, (1000, 1000), follow_symlinks=False)
        contents = [data_set(uid, PatientID=f"P{number}") for number in range(4)]
        with ThreadPoolExecutor(4) as pool:
            told = list(pool.map(lambda content, uid=uid: spool.store(content, origin(uid)), contents))
        assert Counter(told) == {Stored.NEW: 1, Stored.CONFLICT: 3}
        assert len(spool.pending()) == 1


def test_claims_are_made_anew_from_the_files(spool: Spool) -> None:
    spool.store(data_set("1.2.3.4"), origin("1.2.3.4"))
    (claim,) = (spool.root / "known").iterdir()
    claim.unlink()
    assert Spool(spool.root).store(data_set("1.2.3.4", PatientID="P78"), origin("1.2.3.4")) is Stored.CONFLICT


def test_one_of_several_contents_wins_and_none_is_lost(spool: Spool) -> None:
    contents = [data_set("1.2.3.4", PatientID=f"P{number}") for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda content: spool.store(content, origin("1.2.3.4")), contents))
    assert sorted(outcome.value for outcome in outcomes) == ["conflict"] * 15 + ["new"]
    assert (len(spool.pending()), len(spool.conflicts())) == (1, 15)


def test_unread_files_are_durable_and_nobody_answers_them(spool: Spool) -> None:
    sent = os.urandom(1000)
    for expected in (Stored.NEW, Stored.DUPLICATE):
        with spool.receive(Origin("1.2.840.10008.5.1.4.1.1.2", "1.2", "1.2.840.10008.1.2.4.100", "PACS")) as arrival:
            arrival.add(memoryview(sent)[:10])
            arrival.add(sent[10:])
            arrival.flush()
            assert spool.file_unread(arrival, origin("1.2")) is expected
    (name,) = files(spool.root / "filed")
    assert (spool.root / "filed" / name).read_bytes().endswith(sent)
    assert name.split("-")[1] == f"{blake3(sent).hexdigest()[:32]}.dcm"
    assert spool.pending() == files(spool.root / "incoming") == []


@pytest.mark.parametrize("uid", ["../../etc/passwd", "1.2/../../x", "1.02.3"])
def test_no_uid_leads_out_of_the_spool(spool: Spool, uid: str) -> None:
    spool.store(data_set("1.2.3.4"), origin(uid))
    (name,) = spool.pending()
    assert name.removesuffix(".dcm").replace("-", "").isalnum()


def test_odd_sender_title_is_stored_in_what_ae_allows(spool: Spool) -> None:
    spool.store(data_set("1.2.3.4"), origin("1.2.3.4", "PA\\CS\n\N{SNOWMAN}-with-a-long-title"))
    assert spool.read(spool.pending()[0]).calling_ae == "PACS-with-a-long"


def test_pending_is_oldest_first(spool: Spool) -> None:
    for number in range(4):
        spool.store(data_set(f"1.{number}"), origin(f"1.{number}"))
    names = spool.pending()
    for age, name in enumerate(names):
        os.utime(spool.path(name), (1000 - age, 1000 - age))
    assert spool.pending() == names[::-1]
    for name in names:
        os.utime(spool.path(name), (1000, 1000))
    assert spool.pending() == sorted(names)


def test_done_can_be_repeated_and_clears_the_trace_of_a_crash(spool: Spool) -> None:
    spool.store(data_set("1.2.3.4"), origin("1.2.3.4"))
    (name,) = spool.pending()
    (spool.root / "dead" / f"{name}.json").write_text("{}")
    spool.done(name)
    spool.done(name)
    assert files(spool.root / "done") == [name]
    assert files(spool.root / "dead") == []
    assert spool.pending() == []


def test_dead_letter_keeps_its_reason_and_can_be_replayed(spool: Spool) -> None:
    spool.store(data_set("1.2.3.4"), origin("1.2.3.4"))
    (name,) = spool.pending()
    spool.dead(name, reason="lateral view", status=422, attempts=3, instance=spool.read(name))
    assert spool.pending() == []
    sidecar = json.loads((spool.root / "dead" / f"{name}.json").read_text())
    assert set(sidecar) == {"reason", "status", "when", "attempts", "sop_instance_uid", "study_instance_uid"}
    assert datetime.fromisoformat(sidecar["when"]).utcoffset() == timedelta(0)
    (letter,) = spool.dead_letters()
    assert (letter.name, letter.reason, letter.status, letter.attempts) == (name, "lateral view", 422, 3)
    assert (letter.sop_instance_uid, letter.study_instance_uid) == ("1.2.3.4", "1.2")
    spool.replay(name)
    assert spool.pending() == [name]
    assert spool.dead_letters() == []
    assert files(spool.root / "dead") == []


def test_crash_between_reason_and_move_leaves_it_pending(spool: Spool) -> None:
    spool.store(data_set("1.2.3.4"), origin("1.2.3.4"))
    (name,) = spool.pending()
    (spool.root / "dead" / f"{name}.json").write_text("{}")
    again = Spool(spool.root)
    assert again.pending() == [name]
    assert again.dead_letters() == []


def test_lost_reason_does_not_hide_a_dead_letter(spool: Spool) -> None:
    spool.store(data_set("1.2.3.4"), origin("1.2.3.4"))
    (name,) = spool.pending()
    spool.dead(name, reason="lateral view", status=422, attempts=1, instance=None)
    (spool.root / "dead" / f"{name}.json").write_text("{")
    assert spool.dead_letters()[0].reason == "the reason was lost"


@pytest.mark.parametrize("name", ["nothing.dcm", "../ready/x.dcm", ""])
def test_replay_of_what_is_not_there_names_it(spool: Spool, name: str) -> None:
    with pytest.raises(CxrRayError, match="is not in"):
        spool.replay(name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no DICOM at all", "not readable as DICOM"),
        (b"", "not readable as DICOM"),
    ],
)
def test_unreadable_file_is_named(spool: Spool, content: bytes, says: str) -> None:
    spool.path("x.dcm").write_bytes(content)
    with pytest.raises(CxrRayError, match=rf"x\.dcm: {says}"):
        spool.read("x.dcm")


@pytest.mark.parametrize("value", ["", "1." + "2" * 70])
def test_unusable_study_uid_is_named(spool: Spool, value: str) -> None:
    spool.store(data_set("1.2.3.4", StudyInstanceUID=value), origin("1.2.3.4"))
    with pytest.raises(CxrRayError, match="study_instance_uid is empty or longer than 64"):
        spool.read(spool.pending()[0])


def test_sweep_removes_by_age_and_by_count(spool: Spool) -> None:
    for number in range(6):
        spool.store(data_set(f"1.{number}"), origin(f"1.{number}"))
    now = time.time()
    for age, name in enumerate(spool.pending()):
        spool.done(name)
        os.utime(spool.root / "done" / name, (now - 100 * age, now - 100 * age))
    assert spool.sweep(450) == 1
    assert spool.sweep(float("inf")) == 0
    assert spool.sweep(float("inf"), keep_done_count=2) == 3
    assert len(files(spool.root / "done")) == 2
    assert spool.sweep(0) == 2


def test_room_is_measured_on_the_disk(spool: Spool) -> None:
    assert spool.has_room(0)
    assert not spool.has_room(1 << 60)


def test_failed_write_leaves_nothing(spool: Spool) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            spool.store(data_set("1.2.3.4") + b"\x00" * 200_000, origin("1.2.3.4"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert spool.pending() == []
    assert files(spool.root / "incoming") == []


def test_root_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CxrRayError, match="name a folder on a local disk"):
        Spool(tmp_path / "file" / "spool")


def test_leftovers_go_but_not_from_under_a_living_writer(spool: Spool) -> None:
    (spool.root / "incoming" / "left").write_bytes(b"half")
    with spool.receive(origin("1.2.3.4")):
        (written,) = set(files(spool.root / "incoming")) - {"left"}
        Spool(spool.root)
        assert files(spool.root / "incoming") == [written]
    assert files(spool.root / "incoming") == []


WRITER = """
import sys
from pathlib import Path
from serve.node.spool import Origin, Spool
spool = Spool(Path(sys.argv[1]))
number = 0
while True:
    uid = f"1.2.{number}"
    spool.store(number.to_bytes(4, "big") * 200_000, Origin("1.2.840.10008.5.1.4.1.1.1", uid, "1.2.840.10008.1.2.1"))
    print(number, flush=True)
    number += 1
"""


@pytest.mark.system
def test_killed_writer_loses_nothing_it_promised(spool: Spool) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, spool.root], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for _ in range(20):
        writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    promised = 20 + len(writer.stdout.read().split())
    writer.wait()
    again = Spool(spool.root)
    assert files(spool.root / "incoming") == []
    assert len(again.pending()) in (promised, promised + 1)
    for name in again.pending():
        written = again.path(name).read_bytes()[-800_000:]
        assert blake3(written).hexdigest()[:32] == name[33:65]


def test_same_instance_from_many_threads_is_one(spool: Spool) -> None:
    sent = data_set("1.2.3.4")
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda _: spool.store(sent, origin("1.2.3.4")), range(32)))
    assert Stored.DUPLICATE in outcomes
    assert len(spool.pending()) == 1
