"""The service across two hosts, bundle on an S3 server, store on PostgreSQL, a DICOM node on a third address before it.

A host is drained under load, cut off, killed, and the head is started again, while studies come in all the time. What was
accepted is counted afterwards: in the store, and in the archive to which the node sends.
"""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psycopg
import pytest
import yaml
from conftest import run_peer
from host_site import GATEWAY, SUBNET, Account, Site, environment, object_store, replicas, running_site, until
from local_cluster import clean_environment
from orthanc import RunningOrthanc, running, running_orthanc
from postgres import running_postgres
from pydicom.uid import generate_uid
from s3_server import BUCKET, upload

from ingest.phantom import simulate_patients
from ingest.phantom_drawing import draw
from ingest.phantom_release import phantom_dicom

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

POSTGRES_PORT, NODE_PORT = 5499, 11199
STORE = f"postgresql+psycopg://postgres@{GATEWAY}:{POSTGRES_PORT}/postgres"
TOKEN = "a-token-of-the-tests-own"
VISITS = simulate_patients(12, 2)
FILM = draw(VISITS[0], 256)
# An archive sends a study every now and then; this is a busy one.
STUDIES_A_SECOND = 3


@dataclass
class Service:
    """The service's address, and how to put it on the cluster."""

    site: Site
    config: Path

    @property
    def url(self) -> str:
        return f"http://{self.site.head.address}:8000"

    def deploy(self) -> None:
        """As `compose.yaml` does it, and until it answers."""
        self._serve("deploy", "--address", self.site.cluster.address, str(self.config))
        until(self.answers, "the service's first answer", 180)

    def spread(self) -> None:
        """Deploy it anew, so that it is on both hosts."""
        self._serve("shutdown", "--address", self.site.cluster.address, "--yes")
        self.deploy()
        expected = {(name, host.address) for name in ("Ingress", "Network") for host in (self.site.head, self.site.worker)}
        until(lambda: expected <= set(replicas(self.site)), f"replicas on both hosts, found {replicas(self.site)}", 60)

    def answers(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/readyz", timeout=2, trust_env=False).status_code == httpx.codes.OK
        return False

    def _serve(self, *arguments: str) -> None:
        variables = clean_environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.site.cluster.token_file)}
        program = Path(sys.executable).with_name("serve")
        done = subprocess.run([program, *arguments], env=variables, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@dataclass
class Senders:
    """A modality that sends a study after the other until it is told to stop; keeps what it was told."""

    folder: Path
    accepted: dict[str, float] = field(default_factory=dict)
    refused: int = 0

    def __enter__(self) -> "Senders":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def _send(self) -> None:
        self.folder.mkdir()
        film = phantom_dicom(VISITS[0], FILM)
        while not self._stop.wait(1 / STUDIES_A_SECOND):
            film.StudyInstanceUID, film.SeriesInstanceUID, film.SOPInstanceUID = (generate_uid() for _ in range(3))
            film.file_meta.MediaStorageSOPInstanceUID = film.SOPInstanceUID
            path = self.folder / "film.dcm"
            film.save_as(path, enforce_file_format=True)
            if run_peer("storescu", "-aec", "CXRRAY", GATEWAY, NODE_PORT, path).returncode == 0:
                self.accepted[str(film.SOPInstanceUID)] = time.time()
            else:
                self.refused += 1


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with object_store() as variables, environment(variables | {"CXR_RAY_TOKEN": TOKEN}), running_site() as made:
        yield made


@pytest.fixture(scope="module")
def service(site: Site, untrained_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    upload(untrained_bundle, f"s3://{BUCKET}/models/chest")
    settings = {
        "bundle": f"s3://{BUCKET}/models/chest",
        "store": STORE,
        "host": "0.0.0.0",
        "fronts": 2,
        "replicas": 2,
        "decoders": 1,
        "threads": 1,
        "engine": "torch",
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(settings))
    config = folder / "serve-deploy.yaml"
    command = [sys.executable, "-m", "cxr_ray", "serve", "--config", folder / "serve.yaml", "--write-config", config]
    with running_postgres(GATEWAY, POSTGRES_PORT, SUBNET):
        subprocess.run(command, check=True, timeout=60)
        made = Service(site, config)
        made.deploy()
        yield made


@pytest.fixture(scope="module")
def archive(site: Site, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningOrthanc]:
    with running_orthanc(tmp_path_factory.mktemp("archive"), free_port(), free_port()) as made:
        yield made


@pytest.fixture(scope="module")
def spool(service: Service, archive: RunningOrthanc, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of a node that runs all the time."""
    folder = tmp_path_factory.mktemp("node")
    settings = {
        "spool": str(folder / "spool"),
        "listener": {"host": GATEWAY, "port": NODE_PORT, "min_free_bytes": 0, "allowed_networks": [SUBNET]},
        "dispatch": {"service_url": service.url},
        "assembly": {"quiet_seconds": 0},
        "delivery": {
            "destinations": [
                {"name": "archive", "kind": "dicom", "host": "127.0.0.1", "port": archive.dicom_port, "called_ae": "ORTHANC"}
            ]
        },
    }
    (folder / "node.yaml").write_text(yaml.safe_dump(settings))
    log = folder / "node.log"
    command = [sys.executable, "-m", "cxr_ray", "listen", "--config", folder / "node.yaml"]
    with running(command, log, os.environ) as node:
        until(lambda: "DICOM node CXRRAY" in log.read_text() or node.poll() is not None, f"the node's start, see {log}")
        assert node.poll() is None, log.read_text()
        yield folder / "spool"
        assert "Traceback" not in log.read_text()


def answered() -> dict[str, float]:
    """When each instance was answered, by its UID, as the store has it; no instance twice."""
    url = STORE.replace("+psycopg", "")
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "SELECT sop_instance_uid, extract(epoch FROM answered_at) "
            "FROM instance JOIN result ON result.instance_id = instance.id"
        ).fetchall()
    twice = [uid for uid, times in Counter(uid for uid, _ in rows).items() if times > 1]
    assert not twice, twice
    return {uid: float(when) for uid, when in rows}


def returned(archive: RunningOrthanc) -> Counter[str]:
    """How many results of each kind the archive holds."""
    return Counter(tags["Modality"] for tags in archive.instances())


def see_through(senders: Senders, archive: RunningOrthanc, before: Counter[str]) -> dict[str, float]:
    """Wait until all that was accepted is answered and its results are in the archive, once each."""
    accepted = senders.accepted
    until(lambda: accepted.keys() <= answered().keys(), "everything accepted is answered", 180)
    grown = Counter({"SR": before["SR"] + len(accepted), "OT": before["OT"] + len(accepted)})
    until(lambda: returned(archive).total() >= grown.total(), f"two results a study, found {returned(archive)}", 180)
    assert returned(archive) == grown
    return {uid: when for uid, when in answered().items() if uid in accepted}


def told(senders: Senders, answers: dict[str, float], struck: float) -> tuple[str, str]:
    """What was counted, and how long it took until a study that came after the fault was answered."""
    delays = [answers[uid] - sent for uid, sent in senders.accepted.items()]
    after = [answers[uid] - struck for uid, sent in senders.accepted.items() if sent > struck]
    counted = f"{len(answers)} of {len(senders.accepted)} accepted studies answered, 2 results each; 0 lost, 0 twice"
    return counted, f"first answer to what came after: {min(after):.0f} s after the fault; longest delay {max(delays):.0f} s"


@pytest.mark.parametrize("fault", ["cut off", "killed"])
def test_the_service_loses_a_host_and_no_study(
    site: Site, service: Service, spool: Path, archive: RunningOrthanc, account: Account, tmp_path: Path, fault: str
) -> None:
    service.spread()
    before = returned(archive)
    with Senders(tmp_path / "sent") as senders:
        until(lambda: len(senders.accepted) >= 5 and answered().keys() & senders.accepted.keys(), "studies on their way")
        struck = time.time()
        missed = site.take_away(fault)
        moved = until(
            lambda: len(replicas(site)) == 4 and {at for _, at in replicas(site)} == {site.head.address}, "4 replicas"
        )
        time.sleep(5)
    answers = see_through(senders, archive, before)
    site.restore(1)
    counted, recovery = told(senders, answers, struck)
    recovery = f"missed after {missed:.0f} s, all replicas on the head {moved:.0f} s later; {recovery}"
    account.add("service and node", f"worker host {fault}", counted, recovery)
    assert senders.refused == 0


def test_the_node_keeps_accepting_while_the_head_is_away_and_results_follow(
    site: Site, service: Service, spool: Path, archive: RunningOrthanc, account: Account, tmp_path: Path
) -> None:
    service.spread()
    before = returned(archive)
    with Senders(tmp_path / "sent") as senders:
        until(lambda: len(senders.accepted) >= 5, "studies on their way")
        struck = time.time()
        site.lose(0)
        time.sleep(10)
        during = sum(sent > struck for sent in senders.accepted.values())
        site.restore(0)
        site.restore(1)
        service.deploy()
        back = time.time() - struck
        time.sleep(2)
    answers = see_through(senders, archive, before)
    assert during > 10
    assert senders.refused == 0
    counted, recovery = told(senders, answers, struck)
    account.add(
        "service and node",
        "head killed, started and deployed again",
        f"{counted}; {during} accepted in the first 10 s without a head",
        f"service back after {back:.0f} s; {recovery}",
    )


def test_a_host_is_drained_under_load_without_a_failed_request(
    site: Site, service: Service, account: Account, tmp_path: Path
) -> None:
    service.spread()
    film = tmp_path / "film.dcm"
    phantom_dicom(VISITS[0], FILM).save_as(film, enforce_file_format=True)
    told_status: Counter[str] = Counter()
    slowest = [0.0]
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(
            base_url=service.url, timeout=30, trust_env=False, headers={"Authorization": f"Bearer {TOKEN}"}
        ) as client:
            while not stop.is_set():
                started = time.monotonic()
                try:
                    status = str(client.post("/v1/predict", files={"image": ("film.dcm", film.read_bytes())}).status_code)
                except httpx.HTTPError as error:
                    status = type(error).__name__
                told_status[status] += 1
                slowest[0] = max(slowest[0], time.monotonic() - started)

    clients = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        until(lambda: told_status["200"] >= 20, f"answers before the draining, {told_status}")
        began = time.monotonic()
        site.drain(site.worker, 60)
        until(
            lambda: not any(at == site.worker.address for _, at in replicas(site)) and len(replicas(site)) == 4,
            "all replicas on the head",
            90,
        )
        drained = time.monotonic() - began
        site.lose(1)
        until(lambda: not site.is_known(site.worker), "the head misses the host")
        so_far = told_status["200"]
        until(lambda: told_status["200"] >= so_far + 20, f"answers afterwards, {told_status}")
    finally:
        stop.set()
        for client in clients:
            client.join(60)
        site.restore(1)
    assert set(told_status) == {"200"}, told_status
    account.add(
        "service under load",
        "worker host drained, then gone",
        f"{told_status.total()} requests, 0 failed",
        f"empty after {drained:.0f} s; slowest answer {slowest[0]:.1f} s",
    )
