"""What an instance costs the node: looks at its folders, and its dispatcher while the service answers and while it is away."""

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from measuring import environment, script
from node_targets import free_port, process
from study_costs_films import large_film
from study_costs_table import Cost, best_seconds

from cxr_ray.findings import FINDINGS
from serve.node.assembly import Assembler, AssemblySettings
from serve.node.dispatch import Dispatcher, _Waiting
from serve.node.outbox import DestinationQueue
from serve.node.service_client import DispatchSettings
from serve.node.spool import Spool
from serve.node.study_ledger import StudyLedger

_MIB = 2**20


def listing(smoke: bool) -> list[Cost]:
    counts = (100, 1_000) if smoke else (1_000, 10_000, 100_000)
    table: dict[str, list[str]] = {}

    def note(what: str, work: Callable[[], object], times: int = 3) -> None:
        table.setdefault(what, []).append(f"{best_seconds(work, times, time.process_time):.4f}")

    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            root, names = Path(folder) / "spool", _names(count)
            spool, queue = Spool(root), DestinationQueue(Path(folder) / "archive")
            for name in names:
                (root / "ready" / name).touch()
            note("`Spool.pending`: dispatcher and assembler, at each look", spool.pending)
            dispatcher = Dispatcher(DispatchSettings(), spool)
            dispatcher._waiting = {name: _Waiting(5, float("inf")) for name in names}
            note("a look of the dispatcher, none due", lambda: list(dispatcher._due(spool.pending(), set())))  # noqa: B023
            assembler = Assembler(AssemblySettings(), spool, maker=None)  # type: ignore[arg-type]
            assembler._study_of = {name: name for name in names}
            note("a look of the assembler, all in `ready/`", assembler._due)
            (root / "done").rmdir()
            (root / "ready").rename(root / "done")
            (root / "ready").mkdir()
            for name in names:
                (root / "studies" / f"{name[:32]}.json").touch()
            note("a look of the assembler, nothing waits, issues in `studies/`", assembler._due)
            note("hourly sweep of `studies/`, nothing old", partial(StudyLedger(root).forget, 1e9))
            note("start with all in `done/`, claims made anew", partial(Spool, root), 1)
            note("start again", partial(Spool, root))
            note("hourly sweep of `done/`, nothing old", partial(spool.sweep, 1e9))
            for name in names:
                (queue.root / "waiting" / name[:32]).mkdir()
                (queue.root / "delivered" / f"{name}.json").touch()
            note("`DestinationQueue.waiting` of an outbox", queue.waiting)
            note("hourly sweep of its receipts", partial(queue.sweep, delivered_seconds=1e9, dead_seconds=None))
    taken = f"seconds of CPU with {', '.join(f'{count:,}' for count in counts)} files in the folder"
    return [(what, ", ".join(cells), taken) for what, cells in table.items()]


def _names(count: int) -> list[str]:
    return [f"{number:032x}-{number:032x}.dcm" for number in range(count)]


class _Swallowing(BaseHTTPRequestHandler):
    """Reads an upload to its end and answers as the service does, without looking at it."""

    protocol_version = "HTTP/1.1"
    answer = b""

    def do_POST(self) -> None:
        left = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read(min(left, _MIB)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def swallow_child(port: int) -> None:
    found = [{"name": name, "probability": 0.1234567890123, "threshold": 0.5, "positive": False} for name in FINDINGS]
    _Swallowing.answer = json.dumps({"model": {"name": "m", "version": "1", "digest": "d"}, "findings": found}).encode()
    ThreadingHTTPServer(("127.0.0.1", port), _Swallowing).serve_forever()


def dispatch(smoke: bool) -> list[Cost]:
    # Else every line of the dispatcher goes to the terminal.
    logging.getLogger("serve").addHandler(logging.NullHandler())
    instances, backlogs, seconds = (10, (20, 50), 2.0) if smoke else (200, (1_000, 10_000, 40_000), 15.0)
    costs = []
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        (folder / "film.dcm").write_bytes(large_film())
        swallow = [sys.executable, script("study_costs.py"), "swallow-child", "--number", str(port)]
        with process(swallow, environment(), port, folder / "swallow.log"):
            for concurrency in (2, 8):
                spool = _linked(folder / f"spool-{concurrency}", folder / "film.dcm", instances)
                settings = DispatchSettings(service_url=f"http://127.0.0.1:{port}", concurrency=concurrency)
                began, cpu = time.perf_counter(), time.process_time()
                with Dispatcher(settings, spool):
                    while spool.count("ready"):
                        time.sleep(0.05)
                elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
                value = f"{1e3 * cpu / instances:.1f} ms of CPU, {instances / elapsed:.0f} a second"
                costs.append(
                    (f"dispatching 10 MB, {concurrency} at once", value, "read, sent to a server that swallows, settled")
                )
        for backlog in backlogs:
            spool = _linked(folder / f"away-{backlog}", folder / "film.dcm", backlog)
            dispatcher = Dispatcher(DispatchSettings(service_url=f"http://127.0.0.1:{free_port()}"), spool)
            began, cpu = time.perf_counter(), time.process_time()
            with dispatcher:
                time.sleep(seconds)
                elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
                tried = sum(waiting.attempts for waiting in dispatcher._waiting.values())
            value = f"{cpu / elapsed:.2f} cores, {tried / elapsed:.0f} attempts a second, {1e3 * cpu / tried:.1f} ms each"
            costs.append((f"service away, {backlog:,} instances wait", value, f"first {seconds:g} s, connection refused"))
    return costs


def _linked(root: Path, film: Path, count: int) -> Spool:
    """A spool whose `ready/` has so many names of one file."""
    spool = Spool(root)
    for name in _names(count):
        os.link(film, root / "ready" / name)
    return spool
