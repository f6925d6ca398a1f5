"""The receiving side with peers that are not ours: DCMTK, Orthanc and pynetdicom, over plain text and TLS, in every syntax.

What docs/conformance.md states of classes, syntaxes, roles and statuses is tried here with the programs that PACS are built of.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pydicom
import pytest
from conftest import peer_environment, require_program, run_peer
from dicom_peers import CR, data_set_of, instance, listener_process, make_certificates, part10, until
from prometheus_client import CollectorRegistry
from pydicom.dataset import Dataset
from pydicom.uid import UID, generate_uid
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import StorageCommitmentPushModel

from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.transfer_syntaxes import DEFLATED, EXPLICIT_BIG_ENDIAN, TRANSFER_SYNTAXES
from serve.instance_names import content_digest
from serve.node.listener import Listener, ListenerSettings
from serve.node.node import NodeSettings, dicom_node
from serve.node.sop_classes import STORAGE_CLASSES
from serve.node.spool import Spool, Stored
from serve.node.storage import (
    CANNOT_UNDERSTAND,
    NO_INSTANCE_UID,
    NOT_THE_SOP_CLASS,
    OUT_OF_RESOURCES,
    TOO_LARGE,
    StoreRefused,
    store_part10,
)

pytestmark = pytest.mark.system
CT = "1.2.840.10008.5.1.4.1.1.2"
MPEG2 = "1.2.840.10008.1.2.4.100"


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def listen(spool: Spool):
    listeners: list[Listener] = []

    def start(*, callbacks: dict | None = None, **settings: object) -> Listener:
        defaults = {"port": 0, "min_free_bytes": 0, "drain_seconds": 1}
        registry = CollectorRegistry()
        listeners.append(Listener(ListenerSettings(**{**defaults, **settings}), spool, registry=registry, **(callbacks or {})))
        listeners[-1].registry = registry
        listeners[-1].start()
        return listeners[-1]

    yield start
    for listener in listeners:
        listener.stop()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def file(tmp_path: Path):
    def write(**elements: object) -> Path:
        content = instance(**elements)
        path = tmp_path / f"{content.SOPInstanceUID}.dcm"
        path.write_bytes(part10(content))
        return path

    return write


def send(listener: Listener, *arguments: object, program: str = "storescu"):
    options = ("-v", "-aet", "TESTPACS", "-aec", "CXRRAY")
    *flags, last = arguments or ("",)
    paths = [last] if last else []
    return run_peer(program, *options, *flags, "127.0.0.1", listener.port, *paths)


def encoded(syntax: str) -> Dataset:
    """An instance in a transfer syntax. That its pixels are none matters to nobody who only receives."""
    content = instance()
    content.file_meta.TransferSyntaxUID = syntax
    if UID(syntax).is_encapsulated:
        content.PixelData = pydicom.encaps.encapsulate([os.urandom(5001)])
        content["PixelData"].VR = "OB"
        content["PixelData"].is_undefined_length = True
    elif syntax == EXPLICIT_BIG_ENDIAN:
        content["PixelData"].VR = "OB"
    return content


@pytest.mark.parametrize("sop_class", STORAGE_CLASSES)
def test_every_class_by_pynetdicom_in_every_syntax(listen, spool: Spool, sop_class: str) -> None:
    listener = listen()
    sent = {}
    for syntax in TRANSFER_SYNTAXES:
        entity = AE("TESTPACS")
        entity.add_requested_context(sop_class, syntax)
        association = entity.associate("127.0.0.1", listener.port, ae_title="CXRRAY", max_pdu=16382)
        content = encoded(syntax)
        content.SOPClassUID = content.file_meta.MediaStorageSOPClassUID = sop_class
        content.file_meta.MediaStorageSOPInstanceUID = content.SOPInstanceUID
        assert association.send_c_store(content).Status == 0x0000, UID(syntax).name
        association.release()
        sent[str(content.SOPInstanceUID)] = (syntax, content)
    assert len(spool.pending()) == len(TRANSFER_SYNTAXES)
    for name in spool.pending():
        stored = pydicom.dcmread(spool.path(name))
        syntax, content = sent[stored.SOPInstanceUID]
        assert (stored.file_meta.TransferSyntaxUID, stored.file_meta.MediaStorageSOPClassUID) == (syntax, sop_class)
        # pynetdicom deflates and pads as it likes; what was meant has to be there.
        assert (stored.PatientID, len(stored.PixelData)) == (content.PatientID, len(content.PixelData)), UID(syntax).name
        if syntax != DEFLATED:
            assert stored.PixelData == content.PixelData


def test_one_association_carries_all_that_was_accepted(listen, spool: Spool) -> None:
    listener = listen()
    entity = AE("TESTPACS")
    for sop_class in (*STORAGE_CLASSES, "1.2.840.10008.1.1"):
        for syntax in TRANSFER_SYNTAXES:
            entity.add_requested_context(sop_class, syntax)
    for refused in (CT, "1.2.840.10008.5.1.4.1.2.2.1", str(StorageCommitmentPushModel)):
        entity.add_requested_context(refused)
    association = entity.associate("127.0.0.1", listener.port, ae_title="CXRRAY")
    accepted = {context.abstract_syntax for context in association.accepted_contexts}
    assert accepted == {*STORAGE_CLASSES, "1.2.840.10008.1.1"}
    assert association.send_c_echo().Status == 0x0000
    assert association.send_c_store(instance()).Status == 0x0000
    association.release()
    until(lambda: association.is_released, "the release")


def test_dcmtk_echo_and_store_over_tls(listen, spool: Spool, certificates, file) -> None:
    listener = listen(tls_certificate=certificates.server, tls_key=certificates.server_key)
    trusted = ("+cf", certificates.ca)
    assert send(listener, "+tla", *trusted, "", program="echoscu").returncode == 0
    stored = send(listener, "+tla", *trusted, file())
    assert stored.returncode == 0, stored.stdout
    own = ("+tls", certificates.client_key, certificates.client, *trusted)
    large = file(Rows=1500, Columns=1500, PixelData=os.urandom(1500 * 1500))
    assert send(listener, *own, large).returncode == 0
    assert len(spool.pending()) == 2
    name = spool.pending()[-1]
    assert pydicom.dcmread(spool.path(name)).PixelData == pydicom.dcmread(large).PixelData
    assert send(listener, file()).returncode != 0


def test_dcmtk_over_mutual_tls(listen, spool: Spool, certificates, file) -> None:
    listener = listen(tls_certificate=certificates.server, tls_key=certificates.server_key, tls_client_ca=certificates.ca)
    trusted = ("+cf", certificates.ca)
    stranger = ("+tls", certificates.stranger_key, certificates.stranger, *trusted)
    assert send(listener, *stranger, file()).returncode != 0
    assert send(listener, "+tla", *trusted, file()).returncode != 0
    assert spool.pending() == []
    own = ("+tls", certificates.client_key, certificates.client, *trusted)
    assert send(listener, *own, file()).returncode == 0
    assert len(spool.pending()) == 1


def test_files_for_tls_are_named_where_they_are_wrong(spool: Spool, certificates, tmp_path: Path) -> None:
    (tmp_path / "nonsense.pem").write_text("nothing")
    for wrong, says in (
        (dict(tls_certificate=tmp_path / "absent.pem"), r"absent\.pem: No such file"),
        (dict(tls_certificate=tmp_path / "nonsense.pem"), r"nonsense\.pem: no PEM certificate"),
        (dict(tls_certificate=certificates.server, tls_key=certificates.client_key), "belong together"),
        (
            dict(
                tls_certificate=certificates.server,
                tls_key=certificates.server_key,
                tls_client_ca=tmp_path / "nonsense.pem",
            ),
            r"nonsense\.pem: no PEM certificates of authorities",
        ),
    ):
        with pytest.raises(UsageError, match=says):
            Listener(ListenerSettings(port=0, **wrong), spool).start()
    with pytest.raises(ValueError, match="tls_client_ca need tls_certificate"):
        ListenerSettings(tls_client_ca=certificates.ca)


@pytest.fixture
def orthanc(free_port, tmp_path: Path) -> Iterator[dict]:
    """Settings of an Orthanc that is to be started, and its client."""
    import subprocess

    folder = tmp_path / "orthanc"
    folder.mkdir()
    settings = {
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "Plugins": [],
        "HttpPort": free_port(),
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAet": "ORTHANC",
        "DicomPort": free_port(),
        "DicomAlwaysAllowStore": True,
    }
    started: list[subprocess.Popen] = []

    def start(**more: object) -> httpx.Client:
        (folder / "orthanc.json").write_text(json.dumps(settings | more))
        with (folder / "orthanc.log").open("wb") as log:
            command = [require_program("Orthanc"), folder / "orthanc.json"]
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=peer_environment()))
        client = httpx.Client(base_url=f"http://127.0.0.1:{settings['HttpPort']}", timeout=60, trust_env=False)

        def answers() -> bool:
            assert started[-1].poll() is None, (folder / "orthanc.log").read_text()
            try:
                return client.get("/system").status_code == 200
            except httpx.TransportError:
                return False

        until(answers, "Orthanc's start")
        return client

    yield {"start": start, "port": settings["DicomPort"]}
    for process in started:
        process.terminate()
        process.wait(30)


def test_orthanc_sends_over_tls_and_plain_text(listen, spool: Spool, orthanc: dict, certificates) -> None:
    plain = listen()
    secured = listen(tls_certificate=certificates.server, tls_key=certificates.server_key, tls_client_ca=certificates.ca)
    modalities = {
        "plain": ["CXRRAY", "127.0.0.1", plain.port],
        "secured": {"AET": "CXRRAY", "Host": "127.0.0.1", "Port": secured.port, "UseDicomTls": True},
    }
    with closing(
        orthanc["start"](
            DicomModalities=modalities,
            DicomTlsCertificate=str(certificates.client),
            DicomTlsPrivateKey=str(certificates.client_key),
            DicomTlsTrustedCertificates=str(certificates.ca),
        )
    ) as client:
        for peer in modalities:
            assert client.post(f"/modalities/{peer}/echo", json={}).status_code == 200, peer
            uploaded = client.post("/instances", content=part10(instance())).json()
            stored = client.post(f"/modalities/{peer}/store", json={"Resources": [uploaded["ID"]]})
            assert stored.status_code == 200, stored.text
    assert [spool.read(name).calling_ae for name in spool.pending()] == ["ORTHANC", "ORTHANC"]


@dataclass
class Asked:
    """What waits for reports, and those that were taken; `settles` says what becomes of one."""

    open: Callable[[str], bool] = lambda _transaction: True
    settles: Callable[[str], bool] = lambda _transaction: True
    reports: list[tuple] = field(default_factory=list)

    def is_open(self, transaction_uid: str) -> bool:
        return self.open(transaction_uid)

    def report(self, transaction_uid: str, committed: list, failed: list) -> bool:
        self.reports.append((transaction_uid, committed, failed))
        return self.settles(transaction_uid)


def test_orthanc_reports_commitment_on_its_own_association(listen, orthanc: dict) -> None:
    asked_for = Asked()
    listener = listen(callbacks={"commitments": asked_for})
    with closing(orthanc["start"](DicomModalities={"node": ["CXRRAY", "127.0.0.1", listener.port]})) as client:
        kept, lost = instance(), generate_uid()
        assert client.post("/instances", content=part10(kept)).status_code == 200
        entity = AE("CXRRAY")
        entity.add_requested_context(StorageCommitmentPushModel)
        association = entity.associate("127.0.0.1", orthanc["port"], ae_title="ORTHANC")
        asked, transaction = Dataset(), generate_uid()
        asked.TransactionUID = transaction
        asked.ReferencedSOPSequence = [Dataset(), Dataset()]
        for item, uid in zip(asked.ReferencedSOPSequence, (kept.SOPInstanceUID, lost), strict=True):
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CR, uid
        status, _ = association.send_n_action(asked, 1, StorageCommitmentPushModel, "1.2.840.10008.1.20.1.1")
        assert status.Status == 0x0000
        association.release()
        until(lambda: asked_for.reports, "Orthanc's report")
    # The archive does not have the other one: 0112, no such object instance.
    assert asked_for.reports == [(transaction, [(CR, str(kept.SOPInstanceUID))], [(CR, str(lost), 0x0112)])]


@pytest.mark.parametrize("has_role", [True, False])
def test_reports_of_commitment_have_their_statuses(listen, has_role: bool) -> None:
    def settles(transaction: str) -> bool:
        if transaction == "1.9":
            raise OSError("gone")
        return transaction == "1.2"

    asked = Asked(lambda transaction: transaction != "1.3", settles)
    listener = listen(callbacks={"commitments": asked})
    entity = AE("ARCHIVE")
    entity.add_requested_context(StorageCommitmentPushModel)
    role = [build_role(StorageCommitmentPushModel, scp_role=True)] if has_role else []
    association = entity.associate("127.0.0.1", listener.port, ae_title="CXRRAY", ext_neg=role)
    (context,) = association.accepted_contexts
    assert context.as_scp is has_role
    if not has_role:
        association.release()
        return

    def report(transaction: str, event: int = 1, uid: str = "1.2.840.10008.1.20.1.1", instances: int = 1) -> int:
        said = Dataset()
        if transaction:
            said.TransactionUID = transaction
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CR, "1.5"
        said.ReferencedSOPSequence = [item] * instances
        answer, _ = association.send_n_event_report(said, event, StorageCommitmentPushModel, uid)
        return answer.Status

    assert report("1.2") == 0x0000
    assert asked.reports == [("1.2", [(CR, "1.5")], [])]
    assert report("1.3") == report("1.9") == report("1.8") == 0x0110
    # Of the one that is not open nothing was read but its name.
    assert [transaction for transaction, *_ in asked.reports] == ["1.2", "1.9", "1.8"]
    assert report("1.2", instances=2000) == 0x0000
    assert report("1.2", instances=10_000) == 0x0213
    assert report("") == 0x0115
    assert report("1.2", event=3) == 0x0113
    assert report("1.2", uid="1.2.3") == 0x0112
    association.release()


@pytest.mark.parametrize("commitment", [None, False, True])
def test_commitment_is_negotiated_where_some_destination_asks_for_it(tmp_path: Path, commitment: bool | None) -> None:
    destination = {"name": "pacs", "kind": "dicom", "host": "127.0.0.1", "port": 1, "called_ae": "PACS"}
    settings = NodeSettings(
        spool=tmp_path / "spool",
        listener={"port": 0, "min_free_bytes": 0, "drain_seconds": 0},
        delivery={"destinations": [] if commitment is None else [destination | {"commitment": commitment}]},
    )
    entity = AE("ARCHIVE")
    entity.add_requested_context(StorageCommitmentPushModel)
    entity.add_requested_context(CR)
    with dicom_node(settings, service_url="http://127.0.0.1:1", token=None) as listener:
        association = entity.associate("127.0.0.1", listener.port, ae_title="CXRRAY")
        accepted = {context.abstract_syntax for context in association.accepted_contexts}
        association.abort()
    assert accepted == ({CR, StorageCommitmentPushModel} if commitment else {CR})


def test_everything_else_is_filed_unread_where_that_is_wanted(listen, spool: Spool, file) -> None:
    stored: list[int] = []
    listener = listen(accept_all=True, callbacks={"on_stored": lambda: stored.append(1)})
    entity = AE("TESTPACS")
    private = "1.2.826.0.1.3680043.2.999.1"
    entity.add_requested_context(CT, MPEG2)
    entity.add_requested_context(CR, MPEG2)
    entity.add_requested_context(private)
    entity.add_requested_context("1.2.840.10008.5.1.4.1.2.2.1")
    association = entity.associate("127.0.0.1", listener.port, ae_title="CXRRAY")
    assert {context.abstract_syntax for context in association.accepted_contexts} == {CT, CR, private}
    sent = []
    for sop_class, syntax in ((CT, MPEG2), (CR, MPEG2), (private, "1.2.840.10008.1.2")):
        content = encoded(syntax)
        content.SOPClassUID = content.file_meta.MediaStorageSOPClassUID = sop_class
        content.file_meta.MediaStorageSOPInstanceUID = content.SOPInstanceUID
        assert association.send_c_store(content).Status == association.send_c_store(content).Status == 0x0000
        sent.append(str(content.SOPInstanceUID))
    association.release()
    assert (spool.pending(), stored, spool.count("filed")) == ([], [], 3)
    kept = [pydicom.dcmread(path) for path in (spool.root / "filed").iterdir()]
    assert sorted(content.SOPInstanceUID for content in kept) == sorted(sent)
    assert {content.file_meta.TransferSyntaxUID for content in kept} == {MPEG2, "1.2.840.10008.1.2"}
    # What can be read is answered as always.
    assert send(listener, file()).returncode == 0
    assert (len(spool.pending()), stored) == (1, [1])


def test_end_of_an_association_is_told_with_what_it_brought(listen, spool: Spool, file) -> None:
    ends: list[tuple[str, str, list[str]]] = []
    listener = listen(callbacks={"on_association_end": lambda *end: ends.append(end)})
    first, second = file(), file()
    assert (
        run_peer("storescu", "-aet", "CT1", "-aec", "CXRRAY", "127.0.0.1", listener.port, first, second, first).returncode == 0
    )
    until(lambda: ends, "the end")
    assert send(listener, "", program="echoscu").returncode == 0
    until(lambda: len(ends) == 2, "the second end")
    assert ends == [("CT1", "127.0.0.1", sorted(ends[0][2], key=spool.pending().index)), ("TESTPACS", "127.0.0.1", [])]
    assert set(ends[0][2]) == set(spool.pending())
    received = spool.read(spool.pending()[0])
    assert (received.calling_ae, received.peer_address) == ("CT1", "127.0.0.1")
    meta = pydicom.dcmread(received.path).file_meta
    assert meta.SourcePresentationAddress.rpartition(":")[0] == "dicom://127.0.0.1"
    assert meta.ReceivingApplicationEntityTitle == "CXRRAY"


def test_two_processes_share_a_port_and_a_spool(spool: Spool, file, free_port) -> None:
    port = free_port()
    settings = json.dumps({"port": port, "share_port": True, "min_free_bytes": 0, "max_associations": 64})
    files = [file() for _ in range(24)]
    with listener_process(spool.root, settings) as (first, _), listener_process(spool.root, settings) as (second, _):
        taken = {}
        for process in (first, second):
            taken[process.pid] = Path(f"/proc/{process.pid}/io").read_text()

        class There:
            pass

        There.port = port
        # An association each: the kernel deals them out.
        for path in files:
            assert send(There, path).returncode == 0
        assert send(There, files[0]).returncode == 0
        assert send(There, file(SOPInstanceUID=files[1].stem)).returncode == 0
        changed = [Path(f"/proc/{pid}/io").read_text() != before for pid, before in taken.items()]
    assert changed == [True, True]
    assert {spool.read(name).sop_instance_uid for name in spool.pending()} == {path.stem for path in files}
    assert (len(spool.pending()), len(spool.conflicts())) == (24, 1)


def test_metrics_count_what_happened(listen, spool: Spool, file) -> None:
    listener = listen(metrics_port=0, max_object_bytes=100_000)
    path = file()
    assert send(listener, path).returncode == 0
    assert send(listener, path).returncode == 0
    assert send(listener, file(SOPInstanceUID=path.stem)).returncode == 0
    assert send(listener, file(Rows=400, Columns=400, PixelData=bytes(160_000))).returncode != 0
    rejected = run_peer("echoscu", "-aec", "SOMEONE", "127.0.0.1", listener.port)
    assert rejected.returncode != 0

    def read() -> str:
        return httpx.get(f"http://127.0.0.1:{listener.metrics_port}/metrics", timeout=10, trust_env=False).text

    until(lambda: 'associations_total{outcome="rejected"} 1.0' in read(), "the last association's end")
    said = read()
    for line in (
        'cxr_node_instances_total{status="0000"} 3.0',
        'cxr_node_instances_total{status="C101"} 1.0',
        'cxr_node_stored_instances_total{kind="new"} 1.0',
        'cxr_node_stored_instances_total{kind="duplicate"} 1.0',
        'cxr_node_stored_instances_total{kind="conflict"} 1.0',
        "cxr_node_fsync_seconds_count 2.0",
        "cxr_node_store_seconds_count 4.0",
        "cxr_node_ready_instances 1.0",
        "cxr_node_conflicts 1.0",
        "cxr_node_open_associations 0.0",
    ):
        assert line in said
    assert path.stem not in said


def test_files_over_http_are_stored_by_the_same_code(listen, spool: Spool) -> None:
    listener = listen(max_object_bytes=100_000)
    content = instance()
    sent = part10(content)
    stored, name = store_part10(listener.storage, sent, sender="worklist", address="https://192.0.2.7")
    assert (stored, spool.pending()) == (Stored.NEW, [name])
    assert data_set_of(spool.path(name).read_bytes()) == data_set_of(sent)
    assert name.endswith(f"-{content_digest(sent)}.dcm")
    received = spool.read(name)
    assert (received.calling_ae, received.peer_address) == ("worklist", "192.0.2.7")
    entity = AE("TESTPACS")
    entity.add_requested_context(CR, content.file_meta.TransferSyntaxUID)
    association = entity.associate("127.0.0.1", listener.port, ae_title="CXRRAY")
    assert association.send_c_store(content).Status == 0x0000
    association.release()
    assert spool.pending() == [name]
    assert store_part10(listener.storage, sent)[0] is Stored.DUPLICATE


def refusals() -> dict[str, tuple[bytes, int]]:
    whole = instance()
    ct = instance(SOPClassUID=CT)
    video = encoded(MPEG2)
    uid = str(whole.SOPInstanceUID)
    sent = part10(whole)
    data = data_set_of(sent)
    head = sent[: -len(data)]
    return {
        "no file": (b"nothing", CANNOT_UNDERSTAND),
        "preamble alone": (bytes(128) + b"DICM", CANNOT_UNDERSTAND),
        "cut within the meta information": (sent[:200], CANNOT_UNDERSTAND),
        "another class": (part10(ct), 0x0122),
        "another syntax": (part10(video), CANNOT_UNDERSTAND),
        "too large": (part10(instance(Rows=400, Columns=400, PixelData=bytes(160_000))), TOO_LARGE),
        "another UID inside": (head + data.replace(uid.encode(), b"9" * len(uid)), NOT_THE_SOP_CLASS),
        "meta information alone": (head, NO_INSTANCE_UID),
    }


@pytest.mark.parametrize(("sent", "status"), refusals().values(), ids=refusals().keys())
def test_files_over_http_are_refused_as_c_stores_are(listen, spool: Spool, sent: bytes, status: int) -> None:
    with pytest.raises(StoreRefused) as refused:
        store_part10(listen(max_object_bytes=100_000).storage, sent)
    assert refused.value.status == status
    assert isinstance(refused.value, CxrRayError)
    assert spool.pending() == []
    assert not list((spool.root / "incoming").iterdir())


def test_files_over_http_wait_for_room(listen) -> None:
    with pytest.raises(StoreRefused) as refused:
        store_part10(listen(min_free_bytes=1 << 60).storage, part10(instance()))
    assert refused.value.status == OUT_OF_RESOURCES


def test_a_full_disk_is_a700_and_the_association_lives(tmp_path: Path) -> None:
    """On a file system of its own, filled to the last byte, and emptied again."""
    import subprocess

    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system of 4 MiB")
    try:
        spool = Spool(mount / "spool")
        with Listener(ListenerSettings(port=0, min_free_bytes=0, drain_seconds=1), spool) as listener:
            entity = AE("TESTPACS")
            entity.add_requested_context(CR, "1.2.840.10008.1.2.1")
            association = entity.associate("127.0.0.1", listener.port, ae_title="CXRRAY")
            large = instance(Rows=3000, Columns=2000, PixelData=os.urandom(6_000_000))
            for _ in range(2):
                assert association.send_c_store(large).Status == OUT_OF_RESOURCES
                assert list((spool.root / "incoming").iterdir()) == spool.pending() == []
            assert association.send_c_store(instance()).Status == 0x0000
            association.release()
            assert len(spool.pending()) == 1
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_events_of_pynetdicom_see_our_limits(listen) -> None:
    """What is negotiated beyond contexts: the length of PDUs, and who we are."""
    listener = listen(max_pdu=65536)
    seen: list[object] = []
    entity = AE("TESTPACS")
    entity.add_requested_context(CR)
    handlers = [(evt.EVT_ACCEPTED, lambda event: seen.append(event.assoc.acceptor))]
    association = entity.associate("127.0.0.1", listener.port, ae_title="CXRRAY", evt_handlers=handlers)
    association.release()
    (acceptor,) = seen
    assert acceptor.maximum_length == 65536
    assert acceptor.implementation_version_name == "CXRRAY_1"
