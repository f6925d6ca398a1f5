"""Destinations as tests need them: real servers that answer as scripted, and results small enough to send by the thousand."""

import json
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import httpx
import pydicom
from conftest import peer_environment, require_program
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel

from serve.node.parcels import Item, Parcel, StudyOrigin
from serve.node.spool import Origin, Spool

SR_3D = "1.2.840.10008.5.1.4.1.1.88.34"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
SCP_TITLE = "PACS"
TIMEOUTS = {"connect_seconds": 5, "negotiation_seconds": 5, "send_seconds": 5, "response_seconds": 5}
PATIENCE = {"first_retry_seconds": 0.05, "max_retry_seconds": 0.2, "jitter": 0}


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def dicom_file(sop_instance: str, sop_class: str = SR_3D, study: str = "1.2.3", size: int = 200) -> bytes:
    content = Dataset()
    content.SOPClassUID, content.SOPInstanceUID = sop_class, sop_instance
    content.StudyInstanceUID, content.SeriesInstanceUID = study, f"{study}.1"
    content.PatientName, content.PatientID, content.Modality = "Doe^Jane", "P77", "SR"
    content.TextValue = "x" * size
    content.file_meta = FileMetaDataset()
    content.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = BytesIO()
    content.save_as(file, enforce_file_format=True)
    return file.getvalue()


def dead_instance(spool: Spool) -> str:
    """Put an instance into an empty spool and let it die there; returns its name."""
    sop_class, sop_instance = "1.2.840.10008.5.1.4.1.1.1", "1.2.3.4"
    file = dicom_file(sop_instance, sop_class)
    spool.store(file[file.index(b"\x08\x00\x16\x00UI") :], Origin(sop_class, sop_instance, ExplicitVRLittleEndian))
    (name,) = spool.pending()
    spool.dead(name, reason="lateral view: send a frontal one", status=422, attempts=1, instance=spool.read(name))
    return name


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]


def parcel(
    name: str = "1",
    destination: str = "pacs",
    study: str = "1.2.3",
    sequence: int = 1,
    *,
    items: tuple[Item, ...] | None = None,
    origin: StudyOrigin | None = None,
    created_at: datetime | None = None,
) -> Parcel:
    """A report and a secondary capture, whose UIDs are ``1.2.<name>.1`` and ``1.2.<name>.2``."""
    items = items or (
        Item("sr.dcm", dicom_file(f"1.2.{name}.1", SR_3D, study)),
        Item("sc.dcm", dicom_file(f"1.2.{name}.2", SECONDARY_CAPTURE, study, 40_000)),
    )
    made = created_at or datetime.now(UTC)
    return Parcel(digest(f"{destination} {name}"), destination, digest(study), sequence, items, origin, made)


def lying_in(folder: Path, made: Parcel) -> Parcel:
    """The same parcel as it is after it was added: its items are files."""
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for item in made.items:
        (folder / item.name).write_bytes(item.read())
        items.append(Item(item.name, folder / item.name))
    return Parcel(made.id, made.destination, made.study_key, made.sequence, tuple(items), made.origin, made.created_at)


def destination(port: int, name: str = "pacs", **given: object) -> dict[str, object]:
    """Settings of a DICOM destination on this machine."""
    defaults = dict(kind="dicom", name=name, host="127.0.0.1", port=port, called_ae=SCP_TITLE, timeouts=TIMEOUTS)
    return defaults | given


@dataclass
class StorageScp:
    """A storage SCP; `script` is given the SOP Instance UID and which time it comes, and returns a status."""

    script: Callable[[str, int], int] = lambda _uid, _turn: 0x0000
    titles: list[str] = field(default_factory=lambda: [SCP_TITLE])
    classes: tuple[str, ...] = (SR_3D, SECONDARY_CAPTURE)
    syntaxes: tuple[str, ...] = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
    tls: ssl.SSLContext | None = None
    port: int = 0
    answers_in: float = 0.0
    commits: Callable[[evt.Event], tuple[int, Dataset | None]] | None = None

    def __post_init__(self) -> None:
        self.times: Counter[str] = Counter()
        self.order: list[str] = []
        self.patients: set[str] = set()
        self.callers: set[str] = set()
        self.associations = 0
        self._server = None

    def start(self) -> "StorageScp":
        ae = AE(self.titles[0])
        ae.require_called_aet = True
        ae.maximum_pdu_size = 16382
        for sop_class in self.classes:
            ae.add_supported_context(sop_class, list(self.syntaxes))
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_ACCEPTED, self._accepted)]
        if self.commits is not None:
            ae.add_supported_context(StorageCommitmentPushModel, list(self.syntaxes))
            handlers.append((evt.EVT_N_ACTION, self.commits))
        self._server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers, ssl_context=self.tls)
        self.port = self._server.server_address[1]
        return self

    def stop(self) -> None:
        if self._server is not None:
            for association in self._server.active_associations:
                association.abort()
            self._server.shutdown()
            self._server = None

    def stop_soon(self) -> None:
        """It takes half a second to stop, and nobody has to wait."""
        threading.Thread(target=self.stop, daemon=True).start()

    def open_associations(self) -> int:
        return sum(association.is_established for association in self._server.active_associations)

    def _accepted(self, event: evt.Event) -> None:
        self.associations += 1
        self.callers.add(event.assoc.requestor.ae_title)

    def _store(self, event: evt.Event) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        self.times[uid] += 1
        if self.answers_in:
            time.sleep(self.answers_in)
        status = self.script(uid, self.times[uid])
        if status == 0x0000:
            assert event.dataset.SOPInstanceUID == uid
            self.patients.add(str(event.dataset.PatientName))
            self.order.append(uid)
        return status


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: bytes


Reply = tuple[int, dict[str, str], bytes]


class WebServer:
    """An HTTP server; `script` is given the request and its number, from 1."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.script: Callable[[Request, int], Reply] = lambda _request, _turn: (200, {}, b"")
        self.requests: list[Request] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    self.send_error(411)
                    return
                body = self.rfile.read(int(self.headers["Content-Length"]))
                request = Request(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                outer.requests.append(request)
                status, headers, answer = outer.script(request, len(outer.requests))
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(answer))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def silent_server() -> Iterator[int]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def take() -> None:
            with suppress(OSError):
                while True:
                    taken.append(server.accept()[0])

        threading.Thread(target=take, daemon=True).start()
        yield server.getsockname()[1]
        for connection in taken:
            connection.close()


def answering(*answers: bytes, keep: bool = True) -> socket.socket:
    """A server that gives one connection these bytes, each after something came, and then stays silent or closes."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            for answer in answers:
                connection.recv(65536)
                connection.sendall(answer)
            with suppress(ConnectionResetError):
                while keep and connection.recv(65536):
                    pass

    threading.Thread(target=serve, daemon=True).start()
    return server


@contextmanager
def orthanc(folder: Path, http_port: int, dicom_port: int, **settings: object) -> Iterator[httpx.Client]:
    """An Orthanc with the title ORTHANC and the DICOMweb plugin."""
    program = require_program("Orthanc")
    folder.mkdir(parents=True)
    plugin = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
    chosen = {
        "Name": "PACS",
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "Plugins": [str(plugin)] if plugin.exists() else [],
        "HttpPort": http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAet": "ORTHANC",
        "DicomPort": dicom_port,
        **settings,
    }
    (folder / "orthanc.json").write_text(json.dumps(chosen))
    log = folder / "orthanc.log"
    with log.open("w") as output:
        process = subprocess.Popen([program, folder / "orthanc.json"], stdout=output, stderr=output, env=peer_environment())
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=30, trust_env=False) as client:

            def answers() -> bool:
                assert process.poll() is None, log.read_text()
                with suppress(httpx.TransportError):
                    return client.get("/system").status_code == 200
                return False

            until(answers)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def stored_uids(client: httpx.Client) -> list[str]:
    """SOP Instance UIDs that an Orthanc holds."""
    return sorted(instance["MainDicomTags"]["SOPInstanceUID"] for instance in client.get("/instances?expand").json())


def certificate(folder: Path, name: str, ca: tuple[Path, Path] | None = None) -> tuple[Path, Path]:
    """Certificate and key for 127.0.0.1, signed by an authority, or an authority."""
    openssl = require_program("openssl")
    folder.mkdir(parents=True, exist_ok=True)
    made, key = folder / f"{name}.pem", folder / f"{name}.key"
    signed = ["-CA", ca[0], "-CAkey", ca[1], "-addext", "subjectAltName=IP:127.0.0.1"] if ca else []
    if ca:
        signed += ["-addext", "basicConstraints=critical,CA:FALSE"]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    subprocess.run([*command, "-keyout", key, "-out", made, *signed], check=True, capture_output=True)
    return made, key


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def stored(request: Request, _turn: int) -> Reply:
    """As a STOW-RS service answers that has stored everything (PS3.18 section 10.5.3)."""
    uids = [str(instance.SOPInstanceUID) for instance in read_part(request.body)]
    items = [{"00081155": {"vr": "UI", "Value": [uid]}} for uid in uids]
    answer = {"00081199": {"vr": "SQ", "Value": items}}
    return 200, {"Content-Type": "application/dicom+json"}, json.dumps(answer).encode()


def read_part(body: bytes) -> list[Dataset]:
    """The instances of a STOW-RS request."""
    boundary = body.split(b"\r\n", 2)[1]
    parts = body.split(b"\r\n" + boundary)[1:-1]
    return [pydicom.dcmread(BytesIO(part.split(b"\r\n\r\n", 1)[1])) for part in parts]
