"""What a study costs the results store: rows and indexes, pictures, their log and their dump; PostgreSQL and SQLite."""

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import sqlalchemy as sa
from bench_store import add
from chaos_stores import _FOLDERS, PostgresStore
from measuring import origin, say
from pydicom.uid import generate_uid
from study_costs_films import decoded_films
from study_costs_table import Cost, best_seconds

from cxr_ray.findings import FINDINGS
from serve.intake import _png
from serve.store import Answer, Finding, Picture, ReceivedInstance, Store
from serve.store.tables import AccessRow, InstanceRow, PositiveFindingRow, ResultRow, StudyRow


def database(smoke: bool) -> list[Cost]:
    small, large, pictures = (500, 1_000, 10) if smoke else (10_000, 40_000, 200)
    bytes_a_row: dict[str, list[str]] = {}
    costs: list[Cost] = []
    begun = origin("study_costs.py database")
    with tempfile.TemporaryDirectory() as folder, _postgres() as server:
        for kind, url in (("PostgreSQL", server), ("SQLite", f"sqlite:///{folder}/results.sqlite")):
            with closing(Store(url)) as store:
                for first, last in ((1, small), (small + 1, large)):
                    _fill(store, first, last)
                    for table, (rows, held, indexes) in _sizes(store).items():
                        if rows:
                            bytes_a_row.setdefault(table, []).append(f"{held / rows:.0f} + {indexes / rows:.0f}")
                    page, count = (1e3 * best_seconds(work, 9) for work in (partial(store.studies, 50, 0), store.count))
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


def _of_pictures(store: Any, kind: str, pictures: int, studies: int, folder: Path) -> list[Cost]:
    """Record answers with the pictures of real films, as the service does."""
    films = decoded_films()
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
    seconds = best_seconds(partial(subprocess.run, [program, *options], check=True), 1)
    return log, seconds, target.stat().st_size
