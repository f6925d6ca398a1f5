"""The listener with DCMTK as its peer: what is promised lies in the spool, and what is refused says why.

DCMTK's ``storescu`` and ``echoscu`` are programs of their own, so every test crosses a socket. Where a peer has to
misbehave in a way that DCMTK cannot, pynetdicom or a plain socket plays it.
"""

import logging
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydicom
import pytest
from conftest import run_peer
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import AE

from cxr_ray.errors import CxrRayError
from cxr_ray.transfer_syntaxes import TRANSFER_SYNTAXES
from serve.node.listener import Listener, ListenerSettings
from serve.node.sop_classes import STORAGE_CLASSES
from serve.node.spool import Spool
from serve.node.storage import (
    CANNOT_UNDERSTAND,
    NO_INSTANCE_UID,
    NOT_THE_SOP_CLASS,
    OUT_OF_RESOURCES,
    TOO_LARGE,
)

STORESCU, ECHOSCU = "storescu", "echoscu"
CR = STORAGE_CLASSES[0]
# What `storescu` has to propose for a file of this syntax.
PROPOSALS = {
    "1.2.840.10008.1.2.4.50": "-xy",
    "1.2.840.10008.1.2.4.70": "-xs",
    "1.2.840.10008.1.2.4.80": "-xt",
    "1.2.840.10008.1.2.4.90": "-xv",
    "1.2.840.10008.1.2.5": "-xr",
    "1.2.840.10008.1.2.1": "-xe",
}
dcmtk = pytest.mark.system


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def listen(spool: Spool):
    listeners: list[Listener] = []

    def start(**settings: object) -> Listener:
        defaults = {"port": 0, "min_free_bytes": 0, "drain_seconds": 2}
        listeners.append(Listener(ListenerSettings(**{**defaults, **settings}), spool))
        listeners[-1].start()
        return listeners[-1]

    yield start
    for listener in listeners:
        listener.stop()


@pytest.fixture(scope="session")
def dicom_files(real_data: Path) -> list[Path]:
    found = sorted((real_data / "dicom").glob("*.dcm"))
    assert found, f"no DICOM files in {real_data / 'dicom'}"
    return found


@pytest.fixture
def small(tmp_path: Path):
    """Write a small instance of its own UID, uncompressed, and return its path."""

    def write(**elements: object) -> Path:
        content = pydicom.Dataset()
        content.SOPClassUID, content.SOPInstanceUID = CR, generate_uid()
        content.StudyInstanceUID, content.SeriesInstanceUID = generate_uid(), generate_uid()
        content.Modality, content.PatientName, content.PatientID = "CR", "Doe^Jane", "P77"
        content.Rows = content.Columns = 64
        content.SamplesPerPixel, content.PhotometricInterpretation = 1, "MONOCHROME2"
        content.BitsAllocated = content.BitsStored = 8
        content.HighBit, content.PixelRepresentation = 7, 0
        content.PixelData = os.urandom(64 * 64)
        for keyword, value in elements.items():
            setattr(content, keyword, value)
        path = tmp_path / f"{content.SOPInstanceUID}.dcm"
        content.file_meta = pydicom.dataset.FileMetaDataset()
        content.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        content.save_as(path, enforce_file_format=True)
        return path

    return write


def run(program: str, listener: Listener, *arguments: object, called: str = "CXRRAY") -> subprocess.CompletedProcess:
    options = [str(argument) for argument in arguments if str(argument).startswith("-")]
    paths = [str(argument) for argument in arguments if not str(argument).startswith("-")]
    return run_peer(program, "-v", "-aet", "TESTPACS", "-aec", called, *options, "127.0.0.1", listener.port, *paths)


def data_set_of(path: Path) -> bytes:
    meta = pydicom.dcmread(path, stop_before_pixels=True).file_meta
    return path.read_bytes()[132 + 12 + meta.FileMetaInformationGroupLength :]


def folder(spool: Spool, name: str) -> list[str]:
    return [path.name for path in (spool.root / name).iterdir()]


class Peer:
    """A pynetdicom requestor whose messages a test can bend."""

    def __init__(self, listener: Listener, syntax: str = ExplicitVRLittleEndian, calling: str = "TESTPACS") -> None:
        entity = AE(calling)
        entity.add_requested_context(CR, syntax)
        self.association = entity.associate("127.0.0.1", listener.port, ae_title="CXRRAY")

    def send(self, data: bytes | None, uid: str | None, sop_class: str = CR) -> pydicom.Dataset | None:
        from io import BytesIO

        from pynetdicom.dimse_primitives import C_STORE

        request = C_STORE()
        request.MessageID, request.Priority = 1, 2
        request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = sop_class, uid
        request.DataSet = None if data is None else BytesIO(data)
        self.association._reactor_checkpoint.clear()
        while not self.association._is_paused:
            time.sleep(0.01)
        self.association.dimse.send_msg(request, self.association.accepted_contexts[0].context_id)
        _, answer = self.association.dimse.get_msg(block=True)
        self.association._reactor_checkpoint.set()
        return answer

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.association.is_established:
            self.association.release()


@dcmtk
def test_echo(listen) -> None:
    assert run(ECHOSCU, listen()).returncode == 0


@dcmtk
def test_real_files_of_every_syntax_arrive_whole(listen, spool: Spool, dicom_files: list[Path]) -> None:
    listener = listen()
    for path in dicom_files:
        syntax = pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID
        sent = run(STORESCU, listener, PROPOSALS[syntax], path)
        assert sent.returncode == 0, sent.stdout
        # The promise is kept at the moment it is given: no waiting here.
        name = next(name for name in reversed(spool.pending()))
        assert folder(spool, "incoming") == []
        stored, original = pydicom.dcmread(spool.path(name)), pydicom.dcmread(path)
        assert stored.file_meta.TransferSyntaxUID == syntax
        # DCMTK does not send the padding at a file's end.
        original.pop((0xFFFC, 0xFFFC), None)
        assert stored == original
        assert spool.read(name).calling_ae == "TESTPACS"
    assert len(spool.pending()) == len(dicom_files)


def test_bytes_are_written_as_they_came(listen, spool: Spool, dicom_files: list[Path]) -> None:
    listener = listen()
    # Not by DCMTK, which writes sequences with lengths of its own.
    for path in dicom_files:
        meta = pydicom.dcmread(path, stop_before_pixels=True).file_meta
        if meta.MediaStorageSOPClassUID == CR:
            with Peer(listener, meta.TransferSyntaxUID) as peer:
                assert peer.send(data_set_of(path), meta.MediaStorageSOPInstanceUID).Status == 0x0000
            assert data_set_of(spool.path(spool.pending()[-1])) == data_set_of(path)
    assert spool.pending()


def test_every_class_and_syntax_is_negotiated(listen) -> None:
    listener = listen()
    for syntax in TRANSFER_SYNTAXES:
        entity = AE("TESTPACS")
        for sop_class in STORAGE_CLASSES:
            entity.add_requested_context(sop_class, syntax)
        entity.add_requested_context("1.2.840.10008.5.1.4.1.1.2", syntax)  # CT
        association = entity.associate("127.0.0.1", listener.port, ae_title="CXRRAY")
        assert [context.abstract_syntax for context in association.accepted_contexts] == list(STORAGE_CLASSES)
        association.release()
    entity = AE("TESTPACS")
    entity.add_requested_context(CR, "1.2.840.10008.1.2.4.100")  # MPEG2
    association = entity.associate("127.0.0.1", listener.port, ae_title="CXRRAY")
    assert association.accepted_contexts == []
    association.abort()


@dcmtk
def test_resent_instance_is_a_success_and_not_queued_again(listen, spool: Spool, small) -> None:
    listener, path = listen(), small()
    assert run(STORESCU, listener, path).returncode == 0
    spool.done(spool.pending()[0])
    assert run(STORESCU, listener, path, path).returncode == 0
    assert spool.pending() == []


@dcmtk
def test_same_uid_with_other_bytes_is_kept_too(listen, spool: Spool, small) -> None:
    listener, path = listen(), small()
    assert run(STORESCU, listener, path).returncode == 0
    assert run(STORESCU, listener, small(SOPInstanceUID=pydicom.dcmread(path).SOPInstanceUID)).returncode == 0
    (conflict,) = spool.conflicts()
    assert (len(spool.pending()), conflict.first, conflict.calling_ae) == (1, spool.pending()[0], "TESTPACS")
    assert conflict.peer_address.startswith("dicom://127.0.0.1:")


@dcmtk
def test_called_and_calling_titles_are_checked(listen, spool: Spool, small) -> None:
    path = small()
    refused = run(STORESCU, listen(), path, called="SOMEONE")
    assert refused.returncode != 0
    assert "Called AE Title Not Recognized" in refused.stdout
    listener = listen(allowed_calling=("OTHERPACS",))
    refused = run(STORESCU, listener, path)
    assert refused.returncode != 0
    assert "Calling AE Title Not Recognized" in refused.stdout
    assert spool.pending() == []
    assert run(STORESCU, listen(allowed_calling=("OTHERPACS", "TESTPACS")), path).returncode == 0


@dcmtk
def test_address_outside_the_networks_gets_no_word(listen, spool: Spool, small, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        refused = run(STORESCU, listen(allowed_networks=("10.0.0.0/8", "::1/128")), small())
    assert refused.returncode != 0
    assert spool.pending() == []
    assert "127.0.0.1: connection dropped: is in no allowed network" in caplog.text


@dcmtk
def test_low_disk_rejects_associations_as_transient(listen, spool: Spool, small) -> None:
    refused = run(STORESCU, listen(min_free_bytes=1 << 60), small())
    assert refused.returncode != 0
    assert "Rejected Transient" in refused.stdout
    assert "Temporary Congestion" in refused.stdout
    assert spool.pending() == []


def test_disk_that_runs_low_within_an_association_is_a700(listen, spool: Spool, small, tmp_path: Path) -> None:
    status = os.statvfs(spool.root)
    margin = 1 << 28
    listener = listen(min_free_bytes=status.f_bavail * status.f_frsize - margin)
    path = small()
    uid = str(pydicom.dcmread(path).SOPInstanceUID)
    with Peer(listener) as peer:
        assert peer.send(data_set_of(path), uid).Status == 0x0000
        with (tmp_path / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, 2 * margin)
        assert peer.send(data_set_of(small()), generate_uid()).Status == OUT_OF_RESOURCES
        (tmp_path / "ballast").unlink()
        # The node goes on by itself.
        again = small()
        assert peer.send(data_set_of(again), again.stem).Status == 0x0000
    assert len(spool.pending()) == 2


@dcmtk
def test_failing_write_is_a700_and_leaves_nothing(listen, spool: Spool, small) -> None:
    large = small(Rows=2000, Columns=2000, PixelData=os.urandom(4_000_000))
    listener = listen()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        refused = run(STORESCU, listener, "-xe", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "0xa700" in refused.stdout.lower() or "Refused: OutOfResources" in refused.stdout, refused.stdout
    assert spool.pending() == folder(spool, "incoming") == []
    assert run(STORESCU, listener, "-xe", large).returncode == 0


def test_spool_that_vanished_is_a700(listen, spool: Spool, small) -> None:
    listener, path = listen(), small()
    (spool.root / "incoming").rmdir()
    with Peer(listener) as peer:
        answer = peer.send(data_set_of(path), str(pydicom.dcmread(path).SOPInstanceUID))
    assert answer.Status == OUT_OF_RESOURCES
    assert spool.pending() == []


def test_bad_instances_get_their_own_status(listen, spool: Spool, small) -> None:
    listener = listen(max_object_bytes=100_000)
    path = small()
    uid, data = str(pydicom.dcmread(path).SOPInstanceUID), data_set_of(path)
    other = data.replace(uid.encode(), uid[:-1].encode() + (b"1" if uid[-1] != "1" else b"2"))
    without = pydicom.dcmread(path)
    del without.SOPInstanceUID
    nameless = path.with_name("nameless.dcm")
    without.save_as(nameless)
    with Peer(listener) as peer:
        assert peer.send(data + b"\x00" * 200_000, uid).Status == TOO_LARGE
        assert peer.send(other, uid).Status == NOT_THE_SOP_CLASS
        assert peer.send(data, uid, sop_class=STORAGE_CLASSES[3]).Status == NOT_THE_SOP_CLASS
        assert peer.send(data_set_of(nameless), uid).Status == NO_INSTANCE_UID
        assert peer.send(data, "../../etc/passwd").Status == NO_INSTANCE_UID
        assert peer.send(b"\x08\x00\xff", uid).Status in (CANNOT_UNDERSTAND, NO_INSTANCE_UID)
        assert peer.send(b"\xff" * 5000, uid).Status in (CANNOT_UNDERSTAND, NO_INSTANCE_UID)
        assert peer.send(None, uid).Status == NO_INSTANCE_UID
        answer = peer.send(data, None)
        assert answer.Status == NO_INSTANCE_UID
        assert not answer.AffectedSOPInstanceUID
        assert spool.pending() == []
        assert peer.send(data, uid).Status == 0x0000
    with Peer(listener, ImplicitVRLittleEndian) as peer:
        assert peer.send(os.urandom(4000), uid).Status in (CANNOT_UNDERSTAND, NO_INSTANCE_UID, NOT_THE_SOP_CLASS)
    with Peer(listener, "1.2.840.10008.1.2.1.99") as peer:
        assert peer.send(b"not deflated", uid).Status == CANNOT_UNDERSTAND
    assert len(spool.pending()) == 1


def test_peer_that_stops_or_boasts_within_a_pdu_loses_its_place(listen) -> None:
    listener = listen(network_timeout_seconds=0.5, acse_timeout_seconds=1, max_associations=1)
    half = struct.pack(">BBL", 4, 0, 5000) + b"\x00" * 100
    with Peer(listener) as peer:
        peer.association.dul.socket.socket.sendall(half)
        time.sleep(1)
        assert not peer.association.is_established
    for announced in (struct.pack(">BBL", 1, 0, 5000) + b"\x00" * 100, struct.pack(">BBL", 1, 0, 0xFFFFFFF0)):
        with socket.create_connection(("127.0.0.1", listener.port)) as connection:
            connection.sendall(announced)
            connection.settimeout(10)
            while connection.recv(1000):
                pass
    for _ in range(100):
        with Peer(listener) as peer:
            if peer.association.is_established:
                return
        time.sleep(0.1)
    pytest.fail("the place was not freed")


def test_more_associations_than_allowed_are_rejected(listen) -> None:
    listener = listen(max_associations=2)
    with Peer(listener) as first, Peer(listener) as second, Peer(listener) as third:
        assert first.association.is_established
        assert second.association.is_established
        assert third.association.is_rejected


@dcmtk
def test_parallel_associations_count_exactly(listen, spool: Spool, small) -> None:
    listener = listen()
    batches = [[small() for _ in range(5)] for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        sent = list(pool.map(lambda batch: run(STORESCU, listener, *batch), batches))
    assert [process.returncode for process in sent] == [0] * 8
    assert len(spool.pending()) == 40
    assert folder(spool, "incoming") == []


@dcmtk
def test_nothing_of_the_patient_is_logged(listen, small, caplog) -> None:
    with caplog.at_level(logging.DEBUG):
        path = small()
        run(STORESCU, listen(), path)
        run(STORESCU, listen(max_object_bytes=1024), path)
    assert "bytes from 'TESTPACS'" in caplog.text
    assert "C-STORE refused with 0xC101" in caplog.text
    for secret in ("Doe", "Jane", "P77", pydicom.dcmread(path).SOPInstanceUID):
        assert secret not in caplog.text


def test_stored_instance_is_announced(spool: Spool, small) -> None:
    announced: list[int] = []
    path = small()
    settings = ListenerSettings(port=0, min_free_bytes=0)
    with Listener(settings, spool, lambda: announced.append(1)) as listener, Peer(listener) as peer:
        peer.send(data_set_of(path), str(pydicom.dcmread(path).SOPInstanceUID))
    assert announced == [1]


def test_taken_port_is_named(listen, spool: Spool) -> None:
    port = listen().port
    with pytest.raises(CxrRayError, match=rf"listener 127\.0\.0\.1:{port}: .*; name a free port"):
        Listener(ListenerSettings(port=port), spool).start()


@pytest.mark.parametrize(
    "wrong",
    [
        {"ae_title": ""},
        {"ae_title": "x" * 17},
        {"ae_title": "A\\B"},
        {"allowed_networks": ("10.0.0.300/8",)},
        {"prot": 1},
    ],
)
def test_settings_refuse_nonsense(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ListenerSettings(**wrong)


PROCESS = """
import sys, time
from pathlib import Path
from serve.node.listener import Listener, ListenerSettings
from serve.node.spool import Spool
with Listener(ListenerSettings(port=0, min_free_bytes=0), Spool(Path(sys.argv[1]))) as listener:
    print(listener.port, flush=True)
    time.sleep(60)
"""


@dcmtk
def test_killed_listener_keeps_what_it_promised(spool: Spool, small) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, spool.root],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
    )

    class There:
        port = int(process.stdout.readline())

    paths = [small() for _ in range(3)]
    assert run(STORESCU, There, *paths).returncode == 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = Spool(spool.root)
    assert {again.read(name).sop_instance_uid for name in again.pending()} == {path.stem for path in paths}
