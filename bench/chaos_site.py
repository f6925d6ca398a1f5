"""The hospital of a campaign: a service, two listeners on one spool and port, two Orthancs, and a destination that fails.

::

    Orthanc (source), storescu, pynetdicom --C-STORE--> listener A, listener B --> spool --HTTP--> cxr-ray serve --> store
                                                            |
                                                            +--C-STORE--> Orthanc (archive: SR, SC), second (SR)
"""

import json
import random
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

import httpx
from chaos_destination import Mode
from chaos_disk import SpoolDisk
from chaos_journal import entries
from chaos_proc import descendants, lock_holder
from chaos_processes import CampaignError, Child, Family, product, until
from chaos_stores import PostgresStore, ResultsStore, SqliteStore
from measuring import script

TITLE = "CXRRAY"
ARCHIVE, SECOND = "archive", "second"
WANTED: dict[str, tuple[str, ...]] = {ARCHIVE: ("sr", "sc"), SECOND: ("sr",)}
_FAKETIME = "/usr/lib/*/faketime/libfaketime.so.1"
_REPLICA = "ServeReplica:"
_END_SECONDS = 20


class Site:
    """Everything that runs; ends all of it when left.

    Parameters
    ----------
    folder
        Of logs, journals, spool and archives; empty.
    store
        ``sqlite`` or ``postgresql``.
    studies
        How many will come; the spool's disk is made for so many.
    ray_folder
        For Ray's sessions: a short path, as sockets need it.

    Attributes
    ----------
    strays
        Processes that were still there when all had been told to end.
    """

    def __init__(self, folder: Path, store: str, studies: int, mark: str, bundle: Path, ray_folder: Path) -> None:
        self._stack = ExitStack()
        self.folder = folder
        self.strays: list[str] = []
        self.family = Family(mark, folder)
        self.disk = SpoolDisk(folder / "disk", megabytes=256 + studies // 2)
        self.spool = self.disk.root / "spool"
        self.clock = folder / "clock"
        self.faketime = next(iter(sorted(Path("/").glob(_FAKETIME[1:]))), None)
        self._store_kind, self._bundle, self._ray = store, bundle, ray_folder
        self.sent, self.taken = folder / "sent.jsonl", folder / "second.jsonl"
        self._met, self._mode = folder / "second.met.jsonl", folder / "second.mode"

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def _open(self) -> None:
        ports = free_ports(6)
        self.http_port, self.port = ports[0], ports[1]
        self._stack.enter_context(self.disk)
        self._stack.callback(self._end_what_is_left)
        self.store: ResultsStore = (
            SqliteStore(self.folder)
            if self._store_kind == "sqlite"
            else PostgresStore(self._ray.with_name(f"{self._ray.name}-pg"))
        )
        self._stack.callback(self.store.close)
        self.service = self._service()
        self.archive, self.archive_http = self._orthanc(ARCHIVE, "ORTHANC", ports[2], ports[3], {"StorageCompression": True})
        modality = {f"node-{self.port}": {"AET": TITLE, "Host": "127.0.0.1", "Port": self.port, "Timeout": 20}}
        source_ports = free_ports(2)
        self.source, self.source_http = self._orthanc("source", "SOURCE", *source_ports, {"DicomModalities": modality})
        self.set_mode(Mode.WELL)
        self.second = self._second(ports[4])
        config = self.folder / "node.yaml"
        # JSON is YAML.
        config.write_text(json.dumps(self._node_settings(ports[3], ports[4]), indent=1))
        self.set_clock(0)
        (self.folder / "tmp-node").mkdir()
        self.listeners = [self._listener(name, config) for name in ("listener-a", "listener-b")]
        for child in (self.service, self.archive, self.source, self.second, *self.listeners):
            self._stack.callback(child.stop)
        self._stack.callback(self.set_mode, Mode.WELL)

    def _end_what_is_left(self) -> None:
        # What has lost its parent or its peer may take a moment to notice.
        with suppress(CampaignError):
            until(lambda: not self.family.alive(), "processes to end", _END_SECONDS)
        self.strays = self.family.end()

    def start(self) -> None:
        """Start everything, the listeners last."""
        for child in (self.archive, self.source, self.second, self.service, *self.listeners):
            child.start()

    @property
    def children(self) -> Sequence[Child]:
        """All programs."""
        return (self.service, self.archive, self.source, self.second, *self.listeners)

    def set_mode(self, mode: Mode) -> None:
        """How the second destination fails from now on."""
        written = self._mode.with_suffix(".new")
        written.write_text(mode.name)
        written.rename(self._mode)

    def met(self) -> Counter[Mode]:
        """How many associations or instances each way to fail has met."""
        return Counter(Mode[line["mode"]] for line in entries(self._met))

    def set_clock(self, offset: int) -> None:
        """Set the listeners' clocks so many seconds off."""
        self.clock.write_text(f"{offset:+d}\n")

    def holder(self, lock: str) -> Child | None:
        """The listener that holds one of the spool's locks; None while nobody does."""
        pid = lock_holder(self.spool / lock)
        return next((child for child in self.listeners if child.up and child.pid == pid), None)

    def replicas(self) -> list[tuple[int, str]]:
        """Processes of the service's replicas, with their names."""
        found = [(process, process.title) for process in descendants(self.service.pid)] if self.service.up else []
        return [(process.pid, title) for process, title in found if _REPLICA in title]

    def backlog(self) -> int:
        """Instances and parcels that are under way."""
        folders = [self.spool / name for name in ("ready", "answered")]
        instances = sum(1 for folder in folders for _ in folder.glob("*.dcm"))
        return instances + sum(1 for _ in (self.spool / "outbox").glob("*/waiting/*"))

    def planned(self) -> int:
        """Revisions that are being made."""
        return sum(1 for _ in (self.spool / "plans").glob("*.json"))

    def _service(self) -> Child:
        options = ["--bundle", str(self._bundle), "--store", self.store.url, "--port", str(self.http_port)]
        lean = ["--engine", "torch", "--decoders", "1", "--threads", "1"]
        url = f"http://127.0.0.1:{self.http_port}/readyz"
        environment = {"RAY_TMPDIR": str(self._ray)}
        return Child(self.family, "service", product("serve", *options, *lean), lambda: _answers(url), environment, 240)

    def _listener(self, name: str, config: Path) -> Child:
        environment = {"TMPDIR": str(self.folder / "tmp-node")}
        if self.faketime:
            environment |= {
                "LD_PRELOAD": str(self.faketime),
                "FAKETIME_TIMESTAMP_FILE": str(self.clock),
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "FAKETIME_CACHE_DURATION": "1",
                # As on a real machine, where files keep the times that they got before the clock was set.
                "NO_FAKE_STAT": "1",
            }
        announced = f"DICOM node {TITLE} on"
        child = Child(self.family, name, product("listen", "--config", config), lambda: False, environment)
        child.ready = lambda: child.log.read_text(errors="replace").count(announced) >= child.starts - child.failed_starts
        return child

    def _node_settings(self, archive_port: int, second_port: int) -> dict[str, object]:
        hasty = {"connect_seconds": 5, "negotiation_seconds": 5, "send_seconds": 5, "response_seconds": 10}
        destination = {"kind": "dicom", "host": "127.0.0.1", "calling_ae": TITLE, "timeouts": hasty}
        return {
            "spool": str(self.spool),
            "listener": {"ae_title": TITLE, "port": self.port, "share_port": True, "min_free_bytes": 0, "max_associations": 20},
            "dispatch": {"service_url": f"http://127.0.0.1:{self.http_port}", "max_retry_seconds": 4, "timeout_seconds": 30},
            "assembly": {"quiet_seconds": 0.5, "max_retry_seconds": 4, "attempts": 50},
            "delivery": {
                "destinations": [
                    {**destination, "name": ARCHIVE, "port": archive_port, "called_ae": "ORTHANC", "results": WANTED[ARCHIVE]},
                    {**destination, "name": SECOND, "port": second_port, "called_ae": "SECOND", "results": WANTED[SECOND]},
                ],
                "patience": {"first_retry_seconds": 0.5, "max_retry_seconds": 4},
            },
        }

    def _orthanc(self, name: str, title: str, http: int, dicom: int, extra: dict[str, object]) -> tuple[Child, httpx.Client]:
        program = shutil.which("Orthanc", path="/usr/sbin:/usr/bin")
        if program is None:
            raise CampaignError("Orthanc is not installed; 'make peers' installs it")
        folder = self.folder / name
        folder.mkdir()
        settings = {
            "Name": name,
            "StorageDirectory": str(folder),
            "IndexDirectory": str(folder),
            "Plugins": [],
            "HttpPort": http,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomAet": title,
            "DicomPort": dicom,
            "DicomScuTimeout": 20,
            "StableAge": 1,
            **extra,
        }
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(settings, indent=1))
        client = self._stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{http}", timeout=60, trust_env=False))
        return Child(self.family, name, [program, file], lambda: _answers(f"http://127.0.0.1:{http}/system")), client

    def _second(self, port: int) -> Child:
        options = ["--port", port, "--title", "SECOND", "--journal", self.taken, "--met", self._met, "--mode", self._mode]
        command = [sys.executable, script("chaos_destination.py"), *map(str, options)]
        return Child(self.family, SECOND, command, lambda: _listens(port))


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback address that nobody uses, outside the range from which clients get theirs."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(15000, 30000)
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found


def _answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=10, trust_env=False).status_code == 200
    return False


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False
