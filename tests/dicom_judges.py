"""Who judges result objects: dciodvfy, PixelMed's DicomSRValidator, DCMTK, and an Orthanc that has to keep them."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from conftest import peer_environment, require_program, run_peer

PIXELMED = Path("/usr/share/java/pixelmed.jar")
_PATIENCE_SECONDS = 60.0
# Half the time of a virtual machine that compiles for a long life.
_BRIEF = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
# Java's own limits stop the validator's style sheets.
_NO_LIMITS = [f"-Djdk.xml.{limit}=0" for limit in ("xpathTotalOpLimit", "xpathExprGrpLimit", "xpathExprOpLimit")]


def require_pixelmed() -> None:
    if PIXELMED.is_file():
        return
    reason = f"{PIXELMED} is not there; install it with 'make peers'"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def dciodvfy(file: Path) -> list[str]:
    """Its complaints, and first the name of the object's definition."""
    return run_peer("dciodvfy", file).stdout.splitlines()


def validate_report(file: Path) -> list[str]:
    """What PixelMed's DicomSRValidator says, as at an IHE Connectathon; it takes one file."""
    require_pixelmed()
    options = ["-checktemplateid", "-checkcontentitemorder", file]
    validator = ["-cp", PIXELMED, "com.pixelmed.validate.DicomSRValidator"]
    return run_peer("java", *_BRIEF, *_NO_LIMITS, *validator, *options, timeout=180).stdout.splitlines()


def report_lines(file: Path) -> list[str]:
    """The tree as DCMTK reads it, a content item a line."""
    dumped = run_peer("dsrdump", "+Pl", file)
    assert dumped.returncode == 0, dumped.stdout
    return dumped.stdout.splitlines()


@contextmanager
def orthanc(folder: Path, free_port: Callable[[], int]) -> Iterator[httpx.Client]:
    """An empty Orthanc and its REST interface; nothing is left of it."""
    program = require_program("Orthanc")
    port = free_port()
    settings = {
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "Plugins": [],
        "HttpPort": port,
        "DicomPort": free_port(),
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen(
            [program, folder / "orthanc.json"],
            env=peer_environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            _await(process, client, folder / "orthanc.log")
            yield client
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await(process: subprocess.Popen[bytes], client: httpx.Client, log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with suppress(httpx.TransportError):
            if client.get("/system").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"Orthanc did not start: {log.read_text()}")
