"""A real Orthanc of a test's own: its index and files in a folder of the test, nothing of it left afterwards."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from conftest import peer_environment, require_program
from waiting import until


@contextmanager
def running(command: list[str | Path], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, of which nothing is left afterwards."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=dict(environment), cwd=log.parent, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True)
class RunningOrthanc:
    """An archive that answers: its REST interface, and where it listens for DICOM."""

    rest: httpx.Client
    dicom_port: int
    process: subprocess.Popen[bytes]
    log: Path

    def instances(self, modality: str | None = None) -> list[dict]:
        """Simplified tags of what it holds, of one modality or all."""
        found = self.rest.get("/instances", params={"expand": ""}).json()
        tags = [self.rest.get(f"/instances/{each['ID']}/simplified-tags").json() | {"_id": each["ID"]} for each in found]
        return [each for each in tags if modality in {None, each.get("Modality")}]


@contextmanager
def running_orthanc(folder: Path, http_port: int, dicom_port: int, **settings: object) -> Iterator[RunningOrthanc]:
    """Start Orthanc with settings over a plain configuration; skipped where it is not installed."""
    program = require_program("Orthanc")
    folder.mkdir(parents=True, exist_ok=True)
    configuration = {
        "Name": "PACS",
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "Plugins": [],
        "HttpPort": http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAet": "ORTHANC",
        "DicomPort": dicom_port,
        **settings,
    }
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    log = folder / "orthanc.log"
    with (
        running([program, folder / "orthanc.json"], log, peer_environment()) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=30, trust_env=False) as client,
    ):

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            with suppress(httpx.TransportError):
                return client.get("/system").status_code == 200
            return False

        until(answers, f"Orthanc's start, see {log}")
        yield RunningOrthanc(client, dicom_port, process, log)
