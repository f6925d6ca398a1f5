"""What `bench_node` compares: this node's listener, Orthanc and DCMTK's storescp, each a process that receives on loopback."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from measuring import environment

_START_SECONDS = 60.0
# Not PATH: Python packages install programs of DCMTK's names.
PROGRAMS = "/usr/bin:/usr/sbin"
LISTENER = """
import sys, time
from pathlib import Path
from serve.node.listener import Listener, ListenerSettings
from serve.node.spool import Spool
with Listener(ListenerSettings(port=int(sys.argv[2]), max_associations=64), Spool(Path(sys.argv[1]))):
    time.sleep(100_000)
"""


@dataclass(frozen=True)
class Receiver:
    """A storage SCP that listens; `received` counts what it has stored, where that is cheap to tell."""

    name: str
    title: str
    port: int
    received: Callable[[], int]


def peers_environment() -> dict[str, str]:
    """For DCMTK and Orthanc, which without TCP_NODELAY wait 40 ms with each small PDU."""
    return {**os.environ, "TCP_NODELAY": "1"}


def program(name: str) -> str:
    """The path of a peer's program."""
    found = shutil.which(name, path=PROGRAMS)
    if found is None:
        raise SystemExit(f"{name} is in none of {PROGRAMS}; install it with 'make peers'")
    return found


def free_port() -> int:
    """A TCP port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def listener(folder: Path) -> Iterator[Receiver]:
    """This node's listener over a spool, with fsync as always."""
    spool, port = folder / "spool", free_port()
    command = [sys.executable, "-c", LISTENER, str(spool), str(port)]
    with process(command, environment(), port, folder / "listener.log"):
        yield Receiver("cxr-ray", "CXRRAY", port, lambda: sum(1 for _ in (spool / "ready").glob("*.dcm")))


@contextmanager
def orthanc(folder: Path) -> Iterator[Receiver]:
    """Orthanc with its default index, SQLite, and its default fsync."""
    port, http = free_port(), free_port()
    settings = {
        "StorageDirectory": str(folder / "orthanc"),
        "IndexDirectory": str(folder / "orthanc"),
        "Plugins": [],
        "HttpPort": http,
        "DicomPort": port,
        "DicomAet": "ORTHANC",
        "DicomAlwaysAllowStore": True,
        "AuthenticationEnabled": False,
        "RemoteAccessAllowed": False,
        "DicomThreadsCount": 8,
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    command = [program("Orthanc"), str(folder / "orthanc.json")]
    with process(command, peers_environment(), port, folder / "orthanc.log"):
        yield Receiver("Orthanc", "ORTHANC", port, lambda: _files(folder / "orthanc"))


@contextmanager
def storescp(folder: Path) -> Iterator[Receiver]:
    """DCMTK's storescp as it is started: one association after the other, nothing forced to disk."""
    with _storescp(folder, "storescp", []) as receiver:
        yield receiver


@contextmanager
def storescp_forking(folder: Path) -> Iterator[Receiver]:
    """DCMTK's storescp with a process an association and the largest PDUs, nothing forced to disk."""
    with _storescp(folder, "storescp --fork", ["--fork", "-pdu", "131072"]) as receiver:
        yield receiver


@contextmanager
def _storescp(folder: Path, name: str, options: list[str]) -> Iterator[Receiver]:
    port, stored = free_port(), folder / "storescp"
    stored.mkdir()
    command = [program("storescp"), *options, "+xa", "+uf", "-od", str(stored), str(port)]
    with process(command, peers_environment(), port, folder / "storescp.log"):
        yield Receiver(name, "ANY", port, lambda: _files(stored))


def _files(folder: Path) -> int:
    return sum(path.stat().st_size > 100_000 for path in folder.rglob("*") if path.is_file() and "index" not in path.name)


@contextmanager
def process(command: list[str], variables: dict[str, str], port: int, log: Path) -> Iterator[None]:
    """A program that listens on a port once it is ready; its whole group is ended afterwards."""
    with log.open("wb") as said:
        child = subprocess.Popen(
            command, env=variables, stdout=said, stderr=subprocess.STDOUT, start_new_session=True, cwd=log.parent
        )
        try:
            _wait_for(port, child, log)
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _wait_for(port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    patience = time.monotonic() + _START_SECONDS
    while time.monotonic() < patience and child.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit(f"{log.stem} did not start: {log.read_text(errors='replace')[-2000:]}")
