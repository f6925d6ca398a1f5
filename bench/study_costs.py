"""What a study costs in bytes, files and seconds: the unit costs that docs/scaling-studies.md multiplies.

    python bench/study_costs.py database | dataset | driver | listing | dispatch | chain | all     [--smoke]

- database: bytes of rows, indexes and pictures in PostgreSQL (a server of its own) and SQLite, at two sizes, so that growth is
  seen to be a line; a page and its count; recording an answer, its write-ahead log, and pg_dump.
- dataset: bytes of manifest.json for a shard and for an image left out, and opening it; the order of an epoch.
- driver: memory of the ingest's driver by what holds it, two sizes apart; the columns that a training's driver reads.
- listing: what the node does with its folders at every look and at the start, by the number of files in them.
- dispatch: the dispatcher's CPU for an instance of 10 MB, sent to a server that swallows it, and while the service is away.
- chain: `cxr-ray serve`, `cxr-ray listen` and DCMTK's storescp with a backlog of 10 MB films: answers, results and deliveries a
  second, CPU, and what stays of a study in the spool. Ports are free ones, so the front is Serve's own proxy.

Everything is the product's own code. CPU is counted where it can be, as it drifts less than time beside other work. Figures are
printed as Markdown for RESULTS.md; --smoke takes sizes that show that a part works, and measures nothing.
"""

import argparse
import gc
import io
import json
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import sqlalchemy as sa
from bench_ingest import HEADER, _instance, pngs
from bench_store import add
from chaos_stores import _FOLDERS, PostgresStore
from measuring import answer_of, environment, origin, say, script
from node_targets import _storescp, free_port, process
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from serve_targets import _MARK, Server, bundle, product

from cxr_ray.dataset import Dataset, LeftOutImage, Manifest, Shard, Split
from cxr_ray.epoch_order import EpochOrder
from cxr_ray.findings import FINDINGS
from serve.intake import _png
from serve.node.assembly import Assembler, AssemblySettings
from serve.node.delivery import Delivery
from serve.node.destinations import DeliverySettings
from serve.node.dispatch import Dispatcher, _Waiting
from serve.node.file_meta import split_part10
from serve.node.outbox import DestinationQueue, Outbox
from serve.node.parcels import Item, Parcel
from serve.node.service_client import DispatchSettings
from serve.node.spool import Origin, Spool
from serve.node.study_ledger import StudyLedger
from serve.store import Answer, Finding, Picture, ReceivedInstance, Store
from serve.store.tables import AccessRow, InstanceRow, PositiveFindingRow, ResultRow, StudyRow

_MIB = 2**20
_PATIENCE_SECONDS = 400.0
_UID = "1.2.3.900000"
_REASON = "ViewPosition is LL; only frontal views (PA, AP) are read"
_Cost = tuple[str, str, str]


def _print(part: str, costs: list[_Cost], begun: str) -> None:
    say(f"\n**{part.capitalize()}.** {begun}\n\n| cost | value | taken as |\n|---|---|---|")
    for cost in costs:
        say(f"| {' | '.join(cost)} |")


def _seconds(work: Callable[[], object], times: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """The best of some times: what others do on the machine only adds."""
    taken = []
    for _ in range(times):
        began = clock()
        work()
        taken.append(clock() - began)
    return min(taken)


def _decoded() -> list[np.ndarray]:
    return [cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE) for png in pngs()]


def database(smoke: bool) -> list[_Cost]:
    small, large, pictures = (500, 1_000, 10) if smoke else (10_000, 40_000, 200)
    bytes_a_row: dict[str, list[str]] = {}
    costs: list[_Cost] = []
    begun = origin("study_costs.py database")
    with tempfile.TemporaryDirectory() as folder, _postgres() as server:
        for kind, url in (("PostgreSQL", server), ("SQLite", f"sqlite:///{folder}/results.sqlite")):
            with closing(Store(url)) as store:
                for first, last in ((1, small), (small + 1, large)):
                    _fill(store, first, last)
                    for table, (rows, held, indexes) in _sizes(store).items():
                        if rows:
                            bytes_a_row.setdefault(table, []).append(f"{held / rows:.0f} + {indexes / rows:.0f}")
                    page, count = (1e3 * _seconds(work, 9) for work in (partial(store.studies, 50, 0), store.count))
                    costs.append((f"{kind}: newest page, count", f"{page:.1f} ms, {count:.2f} ms", f"{last:,} studies"))
                costs += _of_pictures(store, kind, pictures, large, Path(folder))
    say(f"\n**Rows.** {begun}\n\nBytes a row, table + indexes, at {small:,} and {large:,} studies:\n")
    say("| | PostgreSQL | | SQLite | |\n|---|---|---|---|---|")
    for table, cells in bytes_a_row.items():
        say(f"| {table} | {' | '.join(cells)} |")
    return costs


@contextmanager
def _postgres() -> Iterator[str]:
    # Not below a folder that only its owner may enter: the server is another user.
    folder = Path(tempfile.gettempdir()) / f"cxr-study-costs-{os.getpid()}"
    try:
        with closing(PostgresStore(folder)) as server:
            yield server.url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fill(store: Any, first: int, last: int) -> None:
    """Studies as bench_store makes them, with UIDs, digests and probabilities as long as real ones, and a look at each."""
    draw = random.Random(first)
    for begin in range(first, last + 1, 2000):
        rows: dict[type, list[dict]] = {StudyRow: [], InstanceRow: [], ResultRow: [], PositiveFindingRow: [], AccessRow: []}
        for number in range(begin, min(begin + 2000, last + 1)):
            add(rows, number, draw)
        for row in (*rows[StudyRow], *rows[InstanceRow]):
            row |= {name: generate_uid(entropy_srcs=[uid]) for name, uid in row.items() if name.endswith("_uid")}
        for row in rows[InstanceRow]:
            row |= {"content_digest": f"{draw.getrandbits(128):032x}", "calling_ae": "XRAY_ROOM_1"}
        for row in rows[ResultRow]:
            findings = tuple(Finding(each.name, draw.random(), 0.31415926, each.positive) for each in row["findings"])
            row |= {"findings": findings, "model_digest": f"{draw.getrandbits(256):064x}"}
        for row in rows[StudyRow]:
            look = {name: row[name] for name in ("study_instance_uid", "patient_id")} | {"at": row["received_at"]}
            rows[AccessRow].append(
                look | {"actor": "worklist", "action": "study", "request_id": f"{draw.getrandbits(64):016x}"}
            )
        with store._engine.begin() as connection:
            for table, entries in rows.items():
                connection.execute(sa.insert(table), entries)


def _sizes(store: Any) -> dict[str, tuple[int, int, int]]:
    """Rows, bytes of the table and bytes of its indexes, by table."""
    with store._engine.connect() as connection:
        names = [name for name in sa.inspect(connection).get_table_names() if name != "alembic_version"]
        counts = {name: connection.execute(sa.text(f'select count(*) from "{name}"')).scalar_one() for name in names}
        if store._engine.dialect.name == "postgresql":
            asked = sa.text("select pg_table_size(cast(:name as regclass)), pg_indexes_size(cast(:name as regclass))")
            sizes = {name: tuple(connection.execute(asked, {"name": f'"{name}"'}).one()) for name in names}
        else:
            asked = sa.text(
                "select m.tbl_name, m.type = 'index', sum(d.pgsize) "
                "from dbstat d join sqlite_schema m on m.name = d.name group by 1, 2"
            )
            found = {(table, bool(index)): size for table, index, size in connection.execute(asked)}
            sizes = {name: (found.get((name, False), 0), found.get((name, True), 0)) for name in names}
    return {name: (counts[name], *sizes[name]) for name in names}


def _of_pictures(store: Any, kind: str, pictures: int, studies: int, folder: Path) -> list[_Cost]:
    """Record answers with the pictures of real films, as the service does."""
    films = _decoded()
    shown = [Picture(_png(cv2.resize(film, (256, 256), interpolation=cv2.INTER_AREA)), _png(film)) for film in films]
    found = tuple(Finding(name, 0.123456789012345, 0.3, False) for name in FINDINGS)
    answer = Answer("multi-input", "1", "d" * 64, found, {"age": 61, "sex": "F", "view": "PA", "missing": ["history"]})
    received = [
        ReceivedInstance(*(generate_uid() for _ in range(3)), f"{number:032x}", datetime.now(UTC)) for number in range(pictures)
    ]
    before = _state(store, folder)
    began = time.perf_counter()
    for number, instance in enumerate(received):
        store.record_result(instance, answer, shown[number % len(shown)])
    each_ms = 1e3 * (time.perf_counter() - began) / pictures
    after = _state(store, folder)
    rows, held, indexes = _sizes(store)["picture"]
    png = sum(len(shown[number % len(shown)].square) + len(shown[number % len(shown)].view) for number in range(rows))
    taken = f"{rows} films of 1024x1024, {png / rows / 1e3:.0f} kB of PNG"
    costs = [
        (f"{kind}: a picture", f"{(held + indexes) / rows / 1e3:.0f} kB", taken),
        (f"{kind}: recording an answer and its picture", f"{each_ms:.1f} ms", f"each committed; {studies:,} studies are there"),
    ]
    if kind == "PostgreSQL":
        log, seconds, size = (then - earlier for then, earlier in zip(after, before, strict=True))
        costs += [
            ("PostgreSQL: write-ahead log of it", f"{log / pictures / 1e3:.0f} kB", "pg_current_wal_lsn"),
            (
                "pg_dump, a study's rows",
                f"{1e6 * before[1] / studies:.0f} µs, {before[2] / studies:.0f} bytes",
                "--format=custom",
            ),
            ("pg_dump, a picture", f"{1e3 * seconds / rows:.1f} ms, {size / rows / 1e3:.0f} kB", "what pictures add"),
        ]
    return costs


def _state(store: Any, folder: Path) -> tuple[int, float, int]:
    """Of PostgreSQL: bytes of log written so far, seconds and bytes of a dump."""
    if store._engine.dialect.name != "postgresql":
        return 0, 0.0, 0
    with store._engine.connect() as connection:
        log = int(connection.execute(sa.text("select pg_current_wal_lsn() - '0/0'::pg_lsn")).scalar_one())
    url, target, program = store._engine.url, folder / "dump", str(shutil.which("pg_dump", path=_FOLDERS))
    options = ["--format=custom", "--host", url.query["host"], "--username", url.username, "--file", str(target), url.database]
    seconds = _seconds(partial(subprocess.run, [program, *options], check=True), 1)
    return log, seconds, target.stat().st_size


def dataset(smoke: bool) -> list[_Cost]:
    many = 500 if smoke else 50_000
    shards = [Shard(path=f"shards-0123456789ab/train-{number:05d}-000.parquet", rows=1024) for number in range(many)]
    left_out = [LeftOutImage(image=f"{number:032x}", reason=_REASON, refused=True) for number in range(many)]
    costs = []
    bare = len(_manifest([], []))
    for what, content in (("a shard", _manifest(shards, [])), ("an image left out", _manifest([], left_out))):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "manifest.json").write_bytes(content)
            micro = 1e6 * _seconds(partial(Dataset, folder)) / many
            memory = _peak(partial(Dataset, folder))[0] / many
        value = f"{(len(content) - bare) / many:.0f} bytes; opening {micro:.1f} µs, {memory:.0f} bytes of memory"
        costs.append((f"manifest.json, {what}", value, f"a manifest of {many:,}"))
    for images in (10_000, 100_000) if smoke else (1_000_000, 10_000_000):
        order = EpochOrder((128,) * (images // 128), seed=0, epoch=0, window=1024)
        for workers in (1, 64):
            memory, seconds = _peak(partial(order.rows, workers, 32, 0))
            value = f"{seconds:.2f} s of CPU, {memory / _MIB:.0f} MiB"
            costs.append((f"order of an epoch, {images:,} images", value, f"one of {workers} workers, groups of 128"))
    return costs


def _manifest(shards: list[Shard], left_out: list[LeftOutImage]) -> bytes:
    split = Split(images=1, patients=1, labelled=1, prevalence=dict.fromkeys(FINDINGS, 0.123456), shards=shards)
    named: dict[str, Any] = {"run": "0" * 64, "created": datetime.now(UTC), "code_version": "1", "source": "dicom"}
    named |= {"metadata_sha256": None, "settings": {}, "findings": list(FINDINGS), "size": 256, "pixel_recipe": {}}
    named |= {"splits": {"train": split}, "counts": {}, "images_per_second": 1.0, "warnings": [], "left_out": left_out}
    return Manifest(**named).model_dump_json(indent=2).encode()


def _peak(work: Callable[[], object]) -> tuple[int, float]:
    """Most bytes that Python and numpy held meanwhile, and seconds of CPU, taken apart."""
    seconds = _seconds(work, 1, time.process_time)
    tracemalloc.start()
    kept = work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return peak, seconds


def driver(smoke: bool) -> list[_Cost]:
    sizes = (2_000, 6_000) if smoke else (100_000, 400_000)
    small, large = (answer_of([script("study_costs.py"), "driver-child", "--number", str(rows)]) for rows in sizes)
    taken = f"resident memory, {sizes[1]:,} images less {sizes[0]:,}"
    grown = {step: ((large["held"][step] - small["held"][step]) / (sizes[1] - sizes[0])) for step in large["held"]}
    begun = grown.pop("start")
    costs = [(f"ingest driver, {step}", f"{size - begun:,.0f} bytes an image", taken) for step, size in grown.items()]
    counted = {name: f"{size / sizes[1]:,.0f} bytes an image" for name, size in large["counted"].items()}
    return costs + [(name, value, f"{sizes[1]:,} images") for name, value in counted.items()]


def _driver_child(rows: int) -> None:
    """In a process of its own: what the ingest's driver holds of so many images, step by step."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cxr_ray.records import clinical_columns, record_schema
    from ingest.files import SourceFile
    from ingest.nih import _records
    from ingest.nih_table import read_table
    from ingest.shard_tasks import parquet_bytes
    from ingest.shards import _tasks

    names = [f"{number // 3:08d}_{number % 3:03d}.png" for number in range(rows)]
    lines = [f"{name},{FINDINGS[row % 14]},{row % 3},{row // 3},50,M,PA,\n" for row, name in enumerate(names)]
    content = (HEADER + "".join(lines)).encode()
    del lines
    held = {"start": _resident()}
    found = [SourceFile(f"/data/nih/images/{name}", f"images/{name}", f"{row}-1700000000000") for row, name in enumerate(names)]
    images = dict(zip(names, found, strict=True))
    held["files listed"] = _resident()
    table = read_table(content, "Data_Entry.csv")
    held["and the table read"] = _resident()
    records = _records(table, np.full(rows, "train", dtype=object), images)
    held["and records made"] = _resident()
    del table, images, found, names
    held["records alone"] = _resident()
    tasks = _tasks(records, 1024)
    held[f"records and tasks ({len(tasks) / rows:.4f} a row)"] = _resident()
    held["peak"] = _resident("VmHWM")
    del tasks
    schema = record_schema(None)
    stored = parquet_bytes(pa.table({name: records[name] for name in schema.names}, schema=schema), None)
    counted = _of_headers(rows) | {"records, as Arrow counts them": records.nbytes, "metadata in a shard, Parquet": len(stored)}
    for encoding in ("paper", "rich"):
        columns = [*clinical_columns(encoding), "labels"]
        counted[f"training driver, columns, {encoding}"] = pq.read_table(io.BytesIO(stored), columns=columns).nbytes
    print(json.dumps({"held": {name.partition(" (")[0]: size for name, size in held.items()}, "counted": counted}))


def _of_headers(rows: int) -> dict[str, int]:
    """What the driver of a DICOM archive holds of accepted and of refused files, as `ingest.dicom_archive` keeps them."""
    import pyarrow as pa

    from ingest.dicom_source import header_schema
    from ingest.shards import LeftOut

    text = {name: [f"{name}/{row:040d}" for row in range(rows)] for name in ("location", "name", "stamp")}
    text |= {name: [f"1.2.826.0.1.{row:040d}" for row in range(rows)] for name in ("instance", "study", "patient", "accession")}
    text |= {"outcome": ["accepted"] * rows, "reason": [_REASON] * rows, "sex": ["M"] * rows, "view": ["PA"] * rows}
    columns = text | {"age_years": [50.0] * rows, "acquired": [datetime(2020, 1, 1)] * rows}
    table = pa.table({name: columns[name] for name in header_schema().names}, schema=header_schema())
    del text, columns
    headers = int(table.to_pandas().memory_usage(deep=True).sum())
    tracemalloc.start()
    refused = [LeftOut(row["name"], row["instance"][-32:], row["reason"], refused=True) for row in table.to_pylist()]
    entries = [LeftOutImage(image=each.image, reason=each.reason, refused=True) for each in refused]
    left_out = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del entries
    return {"DICOM: headers of accepted files, pandas": headers, "DICOM: files left out": left_out}


def _resident(field: str = "VmRSS") -> int:
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status[field].split()[0]) * 1024


def listing(smoke: bool) -> list[_Cost]:
    counts = (100, 1_000) if smoke else (1_000, 10_000, 100_000)
    table: dict[str, list[str]] = {}

    def note(what: str, work: Callable[[], object], times: int = 3) -> None:
        table.setdefault(what, []).append(f"{_seconds(work, times, time.process_time):.4f}")

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


def _swallow_child(port: int) -> None:
    found = [{"name": name, "probability": 0.1234567890123, "threshold": 0.5, "positive": False} for name in FINDINGS]
    _Swallowing.answer = json.dumps({"model": {"name": "m", "version": "1", "digest": "d"}, "findings": found}).encode()
    ThreadingHTTPServer(("127.0.0.1", port), _Swallowing).serve_forever()


def dispatch(smoke: bool) -> list[_Cost]:
    # Else every line of the dispatcher goes to the terminal.
    logging.getLogger("serve").addHandler(logging.NullHandler())
    instances, backlogs, seconds = (10, (20, 50), 2.0) if smoke else (200, (1_000, 10_000, 40_000), 15.0)
    costs = []
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        (folder / "film.dcm").write_bytes(_film())
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


def _film() -> bytes:
    """A radiograph of 2500x2048 pixels of 12 bits, 10 MB, whose UIDs and PatientID are all `_UID`."""
    noise = np.random.default_rng(0).normal(0, 20, (2500, 2048))
    deep = cv2.resize(_decoded()[0], (2048, 2500), interpolation=cv2.INTER_CUBIC).astype(np.float32) * 16 + noise
    return _instance(np.clip(deep, 0, 4095).astype(np.uint16), ExplicitVRLittleEndian)


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

    def cost(self, what: str, *stages: str) -> _Cost:
        """The rates of the first so many stages, and the CPU."""
        rates = ", ".join(f"{self.rate(number):.1f} {stage}" for number, stage in enumerate(stages, 1))
        service, node = (1e3 * seconds / self.count for seconds in (self.service_cpu, self.node_cpu))
        return (
            what,
            f"{rates} a second; CPU {service:.0f} ms service, {node:.0f} ms node",
            f"{self.count} studies of a 10 MB film",
        )


def chain(smoke: bool) -> list[_Cost]:
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
    film = bytes(split_part10(memoryview(_film()))[1])
    for number in numbers:
        uid = f"1.2.3.{900000 - 1 - number}"
        own = film.replace(_UID.encode(), uid.encode()).replace(b"PA", view, 1)
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


def _deliveries(work: Path, peer: dict[str, Any], count: int) -> _Cost:
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


def _left(root: Path, stored: Path, lateral: int) -> list[_Cost]:
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


def main() -> None:
    """Run what the first argument names."""
    parts = {part.__name__: part for part in (database, dataset, driver, listing, dispatch, chain)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*parts, "all", "driver-child", "swallow-child"])
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="sizes that show that a part works")
    given = parser.parse_args()
    if given.what == "driver-child":
        _driver_child(given.number)
    elif given.what == "swallow-child":
        _swallow_child(given.number)
    else:
        for name in parts if given.what == "all" else (given.what,):
            begun = origin(f"study_costs.py {name}{' --smoke' * given.smoke}")
            _print(name, parts[name](given.smoke), begun)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
