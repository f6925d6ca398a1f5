"""The DICOM node as `cxr-ray listen` runs it, between real peers: DCMTK and Orthanc before it, the real service behind it."""

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pydicom
import pytest
from conftest import RunningService, peer_environment, require_program, run_peer
from pydicom.uid import CTImageStorage, SecondaryCaptureImageStorage, generate_uid

from cxr_ray.findings import FINDINGS
from ingest.phantom import PhantomVisit, simulate_patients
from ingest.phantom_drawing import draw
from ingest.phantom_release import phantom_dicom
from serve.uploads import decode_upload

pytestmark = [pytest.mark.system, pytest.mark.ray]

PATIENCE_SECONDS = 60.0
FOLDERS = ("ready", "done", "dead")
# What `storescu` has to propose for a file of this syntax.
PROPOSALS = {
    "1.2.840.10008.1.2.4.50": "-xy",
    "1.2.840.10008.1.2.4.90": "-xv",
    "1.2.840.10008.1.2.4.80": "-xt",
    "1.2.840.10008.1.2.1": "-xe",
}
VISITS = simulate_patients(12, 2)


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


@contextmanager
def running(command: list[str | Path], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, of which nothing is left afterwards."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Node:
    """`cxr-ray listen` on a spool, started and ended as often as a test wants."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.spool = folder / "spool"
        self.port = 0
        self._folder, self._stack = folder, stack
        self._starts = 0

    def start(self, service: str, *options: str) -> subprocess.Popen[bytes]:
        self._starts += 1
        self.log = self._folder / f"listen-{self._starts}.log"
        places = ["--service", service, "--spool", str(self.spool)]
        command = [sys.executable, "-m", "cxr_ray", "listen", "--port", "0", "--min-free-mb", "0", *places, *options]
        environment = {name: value for name, value in os.environ.items() if name != "CXR_RAY_TOKEN"}
        process = self._stack.enter_context(running(command, self.log, environment))
        announced = "DICOM node CXRRAY on 127.0.0.1:"
        until(lambda: announced in self.said() or process.poll() is not None, f"the node's start, see {self.log}")
        assert process.poll() is None, self.said()
        self.port = int(self.said().partition(announced)[2].split()[0])
        return process

    def said(self) -> str:
        return self.log.read_text()

    def find(self, file: Path) -> list[Path]:
        """Where in the spool a sent file lies: at one place, or it was never accepted."""
        uid = hashlib.sha256(sop_uid(file).encode()).hexdigest()[:32]
        return [path for folder in FOLDERS for path in (self.spool / folder).glob(f"{uid}-*.dcm")]

    def folder_of(self, file: Path) -> str | None:
        found = self.find(file)
        return found[0].parent.name if len(found) == 1 else None


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with ExitStack() as stack:
        yield Node(tmp_path, stack)


@pytest.fixture(scope="module")
def running_node(service: RunningService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One node for the tests that leave it as it is."""
    with ExitStack() as stack:
        node = Node(tmp_path_factory.mktemp("node"), stack)
        node.start(service.url)
        yield node


@pytest.fixture
def phantom(tmp_path: Path) -> Callable[..., Path]:
    """Write a phantom's film as DICOM, with UIDs that no other test uses."""

    def write(visit: PhantomVisit = VISITS[0], **elements: object) -> Path:
        dataset = phantom_dicom(visit, draw(visit, 256))
        dataset.SOPInstanceUID, dataset.SeriesInstanceUID, dataset.StudyInstanceUID = (generate_uid() for _ in range(3))
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        path = tmp_path / f"{dataset.SOPInstanceUID}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        return path

    return write


def send(node: Node, *files: Path) -> subprocess.CompletedProcess[str]:
    proposal = PROPOSALS[pydicom.dcmread(files[0], stop_before_pixels=True).file_meta.TransferSyntaxUID]
    options = ["-v", proposal, "-aet", "TESTPACS", "-aec", "CXRRAY"]
    return run_peer("storescu", *options, "127.0.0.1", node.port, *files, timeout=60)


def study_uid(file: Path) -> str:
    return str(pydicom.dcmread(file, stop_before_pixels=True).StudyInstanceUID)


def sop_uid(file: Path) -> str:
    return str(pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID)


def instance_of(service: RunningService, file: Path) -> dict:
    """The one instance of the file's study, once the service knows it."""
    url = f"{service.url}/v1/studies/{study_uid(file)}"
    until(lambda: httpx.get(url, timeout=30, trust_env=False).status_code == 200, f"an answer to {file.name}")
    (instance,) = httpx.get(url, timeout=30, trust_env=False).json()["instances"]
    return instance


def assert_answered(instance: dict) -> None:
    assert (instance["status"], instance["reason"]) == ("answered", None)
    assert [finding["name"] for finding in instance["findings"]] == list(FINDINGS)
    assert all(0 < finding["probability"] < 1 for finding in instance["findings"])


def result_rows(service: RunningService, file: Path) -> int:
    question = "select count(*) from result join instance on instance.id = instance_id join study on study.id = study_id "
    with sqlite3.connect(service.store.removeprefix("sqlite:///")) as store:
        return store.execute(question + "where study_instance_uid = ?", [study_uid(file)]).fetchone()[0]


def predicted(service: RunningService, file: Path) -> dict:
    """The answer over HTTP, asked for again where a busy service says when."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        answer = httpx.post(f"{service.url}/v1/predict", files={"image": file.read_bytes()}, timeout=60, trust_env=False)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
            assert answer.status_code == httpx.codes.OK, answer.text
            return answer.json()
        time.sleep(float(answer.headers["Retry-After"]))


def test_real_studies_are_answered_and_an_extremity_is_refused(
    running_node: Node, service: RunningService, real_data: Path
) -> None:
    chests = {"chest_cr_jpeg-baseline_mono2_8bit": (62, "M"), "chest_cr_jpeg2000-lossless_mono1_15bit": (64, "F")}
    files = {name: real_data / "dicom" / f"{name}.dcm" for name in (*chests, "extremity_cr_jpeg-ls-lossless_mono1_10bit")}
    for file in files.values():
        sent = send(running_node, file)
        assert sent.returncode == 0, sent.stdout
    for name, (age, sex) in chests.items():
        instance = instance_of(service, files[name])
        assert_answered(instance)
        used = {"age": age, "sex": sex, "view": "PA", "history": None, "missing": ["history"]}
        assert {field: instance["clinical"][field] for field in used} == used
        posted = [finding["probability"] for finding in predicted(service, files[name])["findings"]]
        assert [finding["probability"] for finding in instance["findings"]] == pytest.approx(posted, abs=1e-4)

    extremity = files["extremity_cr_jpeg-ls-lossless_mono1_10bit"]
    refused = instance_of(service, extremity)
    assert (refused["status"], refused["findings"]) == ("refused", [])
    assert "BodyPartExamined is EXTREMITY" in refused["reason"]
    until(lambda: running_node.folder_of(extremity) == "dead", "the dead letter")
    listing = [sys.executable, "-m", "cxr_ray", "deadletter", "list", "--json", "--spool", str(running_node.spool)]
    letters = json.loads(subprocess.run(listing, capture_output=True, timeout=60, check=True).stdout)
    (letter,) = (
        letter for letter in letters if letter["name"].startswith(hashlib.sha256(sop_uid(extremity).encode()).hexdigest()[:32])
    )
    assert (letter["status"], letter["reason"]) == (422, refused["reason"])

    inverted = files["chest_cr_jpeg2000-lossless_mono1_15bit"]
    until(lambda: all(running_node.folder_of(files[name]) == "done" for name in chests), "the answered files' move")
    (kept,) = running_node.find(inverted)
    assert pydicom.dcmread(kept).PhotometricInterpretation == "MONOCHROME1"
    square = decode_upload(kept.read_bytes(), kept.name, 64).pixels.astype(np.float32)
    air, lungs, mediastinum = square[:3, :3], square[14:30, 12:22], square[20:40, 29:35]
    assert air.mean() < lungs.mean() < mediastinum.mean() - 30


def test_ct_is_refused_at_the_association_and_by_its_modality(
    running_node: Node, service: RunningService, phantom: Callable[..., Path]
) -> None:
    proper = phantom(SOPClassUID=CTImageStorage, Modality="CT")
    refused = send(running_node, proper)
    assert refused.returncode != 0
    assert "No valid Presentation Context ID" in refused.stdout
    assert running_node.find(proper) == []
    # As archives send screenshots of a CT.
    captured = phantom(SOPClassUID=SecondaryCaptureImageStorage, Modality="CT")
    assert send(running_node, captured).returncode == 0
    instance = instance_of(service, captured)
    assert instance["status"] == "refused"
    assert "Modality is CT" in instance["reason"]


def test_killed_between_promise_and_answer_is_answered_once(
    node: Node, service: RunningService, phantom: Callable[..., Path], free_port: Callable[[], int]
) -> None:
    file = phantom(PatientName="Doe^Jane", PatientID="P77")
    killed = node.start(f"http://127.0.0.1:{free_port()}")
    assert send(node, file).returncode == 0
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert node.folder_of(file) == "ready"
    assert result_rows(service, file) == 0

    process = node.start(service.url)
    answered = instance_of(service, file)
    assert_answered(answered)
    until(lambda: node.folder_of(file) == "done", "the answered file's move")
    assert send(node, file, file).returncode == 0
    assert send(node, file).returncode == 0
    # Longer than the pause between two looks at the spool.
    time.sleep(1)
    assert (node.folder_of(file), result_rows(service, file)) == ("done", 1)
    assert instance_of(service, file) == answered

    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0, node.said()
    assert "stopping" in node.said()
    for unwanted in ("Traceback", "Doe", "Jane", "P77"):
        assert unwanted not in node.said()
    assert send(node, file).returncode != 0


def test_wrong_token_keeps_everything_in_the_spool(
    node: Node, guarded_service: RunningService, phantom: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "wrong").write_text("not the token\n")
    (tmp_path / "right").write_text(f"{guarded_service.token}\n")
    file = phantom()
    locked_out = node.start(guarded_service.url, "--token-file", str(tmp_path / "wrong"))
    assert send(node, file).returncode == 0
    until(lambda: "the service answers 401" in node.said(), "the refusal")
    assert (node.folder_of(file), result_rows(guarded_service, file)) == ("ready", 0)
    locked_out.send_signal(signal.SIGTERM)
    assert locked_out.wait(timeout=30) == 0
    assert "not the token" not in node.said()

    node.start(guarded_service.url, "--token-file", str(tmp_path / "right"))
    until(lambda: node.folder_of(file) == "done", "the answer")
    assert result_rows(guarded_service, file) == 1


@pytest.fixture
def orthanc(running_node: Node, free_port: Callable[[], int], tmp_path: Path) -> Iterator[httpx.Client]:
    """An Orthanc that knows the node as the modality `node`."""
    program = require_program("Orthanc")
    port = free_port()
    folder = tmp_path / "orthanc"
    folder.mkdir()
    settings = {
        "Name": "PACS",
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "Plugins": [],
        "HttpPort": port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAet": "ORTHANC",
        "DicomPort": free_port(),
        "DicomModalities": {"node": ["CXRRAY", "127.0.0.1", running_node.port]},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    log = folder / "orthanc.log"
    with (
        running([program, folder / "orthanc.json"], log, peer_environment()) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client,
    ):

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            with suppress(httpx.TransportError):
                return client.get("/system").status_code == 200
            return False

        until(answers, f"Orthanc's start, see {log}")
        yield client


def test_orthanc_routes_a_study_and_its_result_appears(
    orthanc: httpx.Client, running_node: Node, service: RunningService, phantom: Callable[..., Path]
) -> None:
    visit = next(visit for visit in VISITS if visit.visit == 1)
    file = phantom(visit, PatientName="Müller^Jörg", SpecificCharacterSet="ISO_IR 192", AccessionNumber="A-4711")
    assert orthanc.post("/modalities/node/echo", json={}).status_code == 200
    uploaded = orthanc.post("/instances", content=file.read_bytes())
    assert uploaded.status_code == 200, uploaded.text
    routed = orthanc.post("/modalities/node/store", json={"Resources": [uploaded.json()["ParentStudy"]]})
    assert routed.status_code == 200, routed.text
    assert (routed.json()["InstancesCount"], routed.json()["FailedInstancesCount"]) == (1, 0)
    instance = instance_of(service, file)
    assert_answered(instance)
    assert (instance["clinical"]["age"], instance["clinical"]["sex"]) == (visit.age_years, visit.sex)
    study = httpx.get(f"{service.url}/v1/studies/{study_uid(file)}", timeout=30, trust_env=False).json()
    assert (study["patient_id"], study["accession_number"]) == (f"PHANTOM{visit.patient_id:06d}", "A-4711")

    # PACS send again what they are not sure of.
    again = orthanc.post("/modalities/node/store", json={"Resources": [uploaded.json()["ParentStudy"]]})
    assert again.json()["FailedInstancesCount"] == 0
    time.sleep(1)
    assert (running_node.folder_of(file), result_rows(service, file)) == ("done", 1)
