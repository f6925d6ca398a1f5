"""What a study costs on its whole way, with the service, the node and an archive as processes: rates, CPU, and what stays."""

import json
import os
import sqlite3
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import environment
from node_targets import _storescp, free_port, process
from pydicom.uid import ExplicitVRLittleEndian
from serve_targets import _MARK, Server, bundle, product
from study_costs_films import FILM_UID, large_film
from study_costs_table import Cost

from serve.node.delivery import Delivery
from serve.node.destinations import DeliverySettings
from serve.node.file_meta import split_part10
from serve.node.outbox import Outbox
from serve.node.parcels import Item, Parcel
from serve.node.spool import Origin, Spool

_PATIENCE_SECONDS = 400.0


@dataclass
class _Drained:
    """A backlog's way through the node: CPU of service and node in seconds, and what waited at each look.

    Attributes
    ----------
    looks
        Seconds since the start, instances in ready/ and in answered/, parcels in the outbox.
    """

    count: int
    service_cpu: float
    node_cpu: float
    looks: list[tuple[float, int, int, int]]

    def rate(self, stage: int) -> float:
        """Studies a second that left the first `stage` places, from 10 to 90 % of them."""
        waiting = [(look[0], sum(look[1 : stage + 1])) for look in self.looks]
        begin, end = (next(each for each in waiting if each[1] <= share * self.count) for share in (0.9, 0.1))
        return (begin[1] - end[1]) / max(end[0] - begin[0], 1e-9)

    def cost(self, what: str, *stages: str) -> Cost:
        """The rates of the first so many stages, and the CPU."""
        rates = ", ".join(f"{self.rate(number):.1f} {stage}" for number, stage in enumerate(stages, 1))
        service, node = (1e3 * seconds / self.count for seconds in (self.service_cpu, self.node_cpu))
        return (
            what,
            f"{rates} a second; CPU {service:.0f} ms service, {node:.0f} ms node",
            f"{self.count} studies of a 10 MB film",
        )


def chain(smoke: bool) -> list[Cost]:
    count, lateral = (6, 3) if smoke else (100, 50)
    with tempfile.TemporaryDirectory(prefix="study-costs-") as name, ExitStack() as stack:
        work = Path(name)
        spool, store = Spool(work / "spool"), work / "results.sqlite"
        server = stack.enter_context(product(bundle(work, 256, 256), work, "proxy"))
        archive = stack.enter_context(_storescp(work, "storescp", ["--fork", "-pdu", "131072"]))
        peer = {"name": "archive", "kind": "dicom", "host": "127.0.0.1", "port": archive.port, "called_ae": archive.title}
        node = {"spool": str(spool.root), "dispatch": {"service_url": server.url}, "assembly": {"quiet_seconds": 0}}
        node |= {"listener": {"port": free_port(), "min_free_bytes": 0}}
        delivering = node | {"delivery": {"destinations": [peer]}}
        # What is loaded once.
        _put(spool, range(4), b"PA")
        _drain(spool, server, delivering, work)
        before = _bytes(store)
        _put(spool, range(100, 100 + count), b"PA")
        costs = [_drain(spool, server, node, work).cost("answers alone", "answers")]
        costs.append(
            ("store (SQLite), a study answered", f"{(_bytes(store) - before) / count / 1e3:.0f} kB", "growth of its file")
        )
        _put(spool, range(1000, 1000 + count), b"PA")
        stages = ("answers", "results", "deliveries")
        costs.append(_drain(spool, server, delivering, work).cost("answers, results, deliveries", *stages))
        _put(spool, range(2000, 2000 + lateral), b"LL")
        costs.append(_drain(spool, server, node, work).cost("lateral films", "refusals"))
        return [*costs, _deliveries(work, peer, count), *_left(spool.root, work / "storescp", lateral)]


def _put(spool: Spool, numbers: range, view: bytes) -> None:
    """Store films that are each of a study and a patient of its own."""
    film = bytes(split_part10(memoryview(large_film()))[1])
    for number in numbers:
        uid = f"1.2.3.{900000 - 1 - number}"
        own = film.replace(FILM_UID.encode(), uid.encode()).replace(b"PA", view, 1)
        spool.store(own, Origin("1.2.840.10008.5.1.4.1.1.1", uid, ExplicitVRLittleEndian, "XRAY_ROOM_1"))


def _drain(spool: Spool, server: Server, node: dict[str, Any], work: Path) -> _Drained:
    """Run a node until nothing waits any more."""
    (work / "node.yaml").write_text(json.dumps(node))
    listen = [sys.executable, "-m", "cxr_ray", "listen", "--config", str(work / "node.yaml")]
    us, outbox, count = Server("", "study-costs-node"), spool.root / "outbox/archive/waiting", spool.count("ready")
    looks: list[tuple[float, int, int, int]] = []
    service = server.cpu_seconds()
    with process(listen, environment() | {_MARK: us.mark}, node["listener"]["port"], work / "listen.log"):
        began, cpu = time.perf_counter(), us.cpu_seconds()
        while not looks or any(looks[-1][1:]):
            if time.perf_counter() - began > _PATIENCE_SECONDS:
                raise SystemExit(f"{looks[-1]} after {_PATIENCE_SECONDS:g} s; {(work / 'listen.log').read_text()[-2000:]}")
            waiting = (spool.count("ready"), spool.count("answered"), _entries(outbox) if outbox.exists() else 0)
            looks.append((time.perf_counter() - began, *waiting))
            time.sleep(0.05)
        return _Drained(count, server.cpu_seconds() - service, us.cpu_seconds() - cpu, looks)


def _deliveries(work: Path, peer: dict[str, Any], count: int) -> Cost:
    """The outbox alone: parcels of a report and a picture, and an archive that is there."""
    stored = sorted((work / "storescp").iterdir(), key=lambda path: path.stat().st_size)
    items = (Item("sr.dcm", stored[0].read_bytes()), Item("sc.dcm", stored[-1].read_bytes()))
    outbox = Outbox(work / "outbox")
    for number in range(count):
        outbox.add(Parcel(f"{number:032x}", peer["name"], f"{number:032x}", 1, items))
    began, cpu = time.perf_counter(), time.process_time()
    with Delivery(DeliverySettings(destinations=(peer,)), outbox):
        while outbox.queue(peer["name"]).waiting():
            time.sleep(0.05)
    elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
    return (
        "deliveries alone",
        f"{count / elapsed:.1f} a second; CPU {1e3 * cpu / count:.0f} ms node",
        f"{count} parcels, storescp",
    )


def _left(root: Path, stored: Path, lateral: int) -> list[Cost]:
    """What stays of a study in the spool, and how large its results are."""
    patterns = ("done/*.json", "studies/*.json", "outbox/archive/delivered/*.json")
    sizes = [[path.stat().st_size for path in root.glob(pattern)] for pattern in patterns]
    beside = ", ".join(f"{sum(each) / len(each):,.0f}" for each in sizes)
    objects = sorted(path.stat().st_size for path in stored.iterdir())
    settled = _entries(root / "done") + _entries(root / "dead")
    return [
        ("spool: answer, issue, receipt", f"{beside} bytes", "a file each; the film in done/ is another"),
        ("spool: claims", f"{_entries(root / 'known')} links, {settled} files in done/ and dead/", "known/"),
        (
            "spool: a lateral film",
            f"{_entries(root / 'dead') / lateral:.0f} files in dead/",
            "film and reason, kept `retention.dead_days`",
        ),
        (
            "results of a study",
            f"{objects[0] / 1e3:.0f} kB + {objects[-1] / 1e6:.2f} MB",
            "report and Secondary Capture at storescp",
        ),
    ]


def _entries(folder: Path) -> int:
    return sum(not entry.name.startswith(".") for entry in os.scandir(folder))


def _bytes(store: Path) -> int:
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("pragma wal_checkpoint(truncate)")
    return store.stat().st_size
