"""How long a page of the results store takes when it holds many studies.

    python bench/bench_store.py [--store URL] [--studies N]

Fills an empty store (SQLite in a temporary folder unless a URL is given) with made-up studies of two images each, and then
asks for pages of 50 with each filter, on the first page and deep inside. Prints the best of 21 times in milliseconds, for
a busy machine says little else; goal: a page below 20 ms at 100,000 studies.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta

import sqlalchemy as sa
from measuring import origin, say

from cxr_ray.findings import FINDINGS
from serve.store import Finding, Store, StudyFilter
from serve.store.tables import InstanceRow, PositiveFindingRow, ResultRow, StudyRow

START = datetime(2020, 1, 1, tzinfo=UTC)
# As many as in the NIH release, from the rarest to the most frequent finding.
POSITIVE = dict(
    zip(FINDINGS, (0.10, 0.025, 0.12, 0.18, 0.05, 0.06, 0.013, 0.05, 0.04, 0.02, 0.02, 0.015, 0.03, 0.002), strict=True)
)
PAGES = {
    "newest": (StudyFilter(), 0),
    "newest, page 1,000": (StudyFilter(), 50_000),
    "frequent finding": (StudyFilter(finding="Infiltration"), 0),
    "rare finding": (StudyFilter(finding="Hernia"), 0),
    "rare finding, refused": (StudyFilter(finding="Hernia", status="refused"), 0),
    "answered": (StudyFilter(status="answered"), 0),
    "refused": (StudyFilter(status="refused"), 0),
    "one patient": (StudyFilter(patient_id="P77"), 0),
    "accession number": (StudyFilter(accession_number="A777"), 0),
    "study date, one day": (StudyFilter(study_date_from=date(2020, 6, 1), study_date_to=date(2020, 6, 1)), 0),
    "study date, from": (StudyFilter(study_date_from=date(2020, 2, 1)), 0),
    "study date, up to": (StudyFilter(study_date_to=date(2020, 2, 1)), 0),
    "study date, eight months": (StudyFilter(study_date_from=date(2020, 2, 1), study_date_to=date(2020, 10, 1)), 0),
    "study date and finding": (StudyFilter(study_date_from=date(2020, 2, 1), finding="Mass"), 0),
    "received from": (StudyFilter(received_from=START + timedelta(days=300)), 0),
}


def main() -> None:
    """Fill, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="SQLAlchemy URL of an empty database")
    parser.add_argument("--studies", type=int, default=100_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(given.store or f"sqlite:///{folder}/results.sqlite")
        fill(store._engine, given.studies)
        say(f"\n**Store** of {given.studies:,} studies, {store._engine.dialect.name}. {origin('bench_store.py')}\n")
        say("| page of 50 | page, ms | count, ms | studies |\n|---|---|---|---|")
        for name, (wanted, offset) in PAGES.items():
            page = milliseconds(lambda: store.studies(50, offset, wanted))  # noqa: B023
            count = milliseconds(lambda: store.count(wanted))  # noqa: B023
            say(f"| {name} | {page:.1f} | {count:.1f} | {store.count(wanted):,} |")
        study, past = (lambda: store.study("1.77")), (lambda: store.earlier_visits("P77", date(2030, 1, 1), "both"))
        say(f"| (one study) | {milliseconds(study):.1f} | | |\n| (a patient's earlier visits) | {milliseconds(past):.1f} | | |")
        store.close()


def milliseconds(work: Callable[[], object]) -> float:
    """The best of 21 times."""
    times = []
    for _ in range(21):
        began = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - began))
    return min(times)


def fill(engine: sa.Engine, studies: int) -> None:
    """Write studies past the store's own way, which syncs each."""
    draw = random.Random(0)
    for first in range(1, studies + 1, 2000):
        rows: dict[type, list[dict]] = {StudyRow: [], InstanceRow: [], ResultRow: [], PositiveFindingRow: []}
        for number in range(first, min(first + 2000, studies + 1)):
            add(rows, number, draw)
        with engine.begin() as connection:
            for table, entries in rows.items():
                connection.execute(sa.insert(table), entries)
    if engine.dialect.name == "postgresql":
        # As autovacuum does by itself in a store that grows at a hospital's pace.
        with engine.begin() as connection:
            connection.exec_driver_sql("ANALYZE")


def add(rows: dict[type, list[dict]], number: int, draw: random.Random) -> None:
    """A study with a frontal and a lateral image, or, one in twenty, with two lateral ones."""
    received = START + timedelta(minutes=5 * number)
    answered = draw.random() < 0.95
    rows[StudyRow].append(
        {
            "study_instance_uid": f"1.{number}",
            "patient_id": f"P{draw.randrange(30_000)}",
            "accession_number": f"A{number}",
            "study_date": f"{received:%Y%m%d}",
            "received_at": received,
            "status": "answered" if answered else "refused",
        }
    )
    for image in (1, 2):
        status = "answered" if answered and image == 1 else "refused"
        rows[InstanceRow].append(
            {
                "sop_instance_uid": f"1.{number}.{image}",
                "study_id": number,
                "series_instance_uid": f"1.{number}.0",
                "content_digest": "a" * 64,
                "status": status,
                "reason": None if status == "answered" else "lateral view",
                "received_at": received,
                "answered_at": received,
            }
        )
    if not answered:
        return
    said = {name: draw.random() < share for name, share in POSITIVE.items()}
    rows[ResultRow].append(
        {
            "instance_id": 2 * number - 1,
            "model_name": "multi-input",
            "model_version": "1",
            "model_digest": "d" * 64,
            "findings": tuple(Finding(name, 0.123456789 + 0.5 * positive, 0.5, positive) for name, positive in said.items()),
            "clinical": {"age": 61, "sex": "F", "view": "PA", "history": None, "missing": ["history"]},
            "warnings": [],
            "created_at": received,
        }
    )
    for name, positive in said.items():
        if positive:
            rows[PositiveFindingRow].append({"study_id": number, "finding": name, "received_at": received})


if __name__ == "__main__":
    main()
