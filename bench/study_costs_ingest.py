"""What an image costs a dataset and the drivers of ingest and training: manifest, order of an epoch, resident memory."""

import gc
import io
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_ingest import HEADER
from measuring import answer_of, script
from study_costs_table import Cost, best_seconds

from cxr_ray.dataset import Dataset, LeftOutImage, Manifest, Shard, Split
from cxr_ray.epoch_order import EpochOrder
from cxr_ray.findings import FINDINGS

_MIB = 2**20
_REASON = "ViewPosition is LL; only frontal views (PA, AP) are read"


def dataset(smoke: bool) -> list[Cost]:
    many = 500 if smoke else 50_000
    shards = [Shard(path=f"shards-0123456789ab/train-{number:05d}-000.parquet", rows=1024) for number in range(many)]
    left_out = [LeftOutImage(image=f"{number:032x}", reason=_REASON, refused=True) for number in range(many)]
    costs = []
    bare = len(_manifest([], []))
    for what, content in (("a shard", _manifest(shards, [])), ("an image left out", _manifest([], left_out))):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "manifest.json").write_bytes(content)
            micro = 1e6 * best_seconds(partial(Dataset, folder)) / many
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
    seconds = best_seconds(work, 1, time.process_time)
    tracemalloc.start()
    kept = work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return peak, seconds


def driver(smoke: bool) -> list[Cost]:
    sizes = (2_000, 6_000) if smoke else (100_000, 400_000)
    small, large = (answer_of([script("study_costs.py"), "driver-child", "--number", str(rows)]) for rows in sizes)
    taken = f"resident memory, {sizes[1]:,} images less {sizes[0]:,}"
    grown = {step: ((large["held"][step] - small["held"][step]) / (sizes[1] - sizes[0])) for step in large["held"]}
    begun = grown.pop("start")
    costs = [(f"ingest driver, {step}", f"{size - begun:,.0f} bytes an image", taken) for step, size in grown.items()]
    counted = {name: f"{size / sizes[1]:,.0f} bytes an image" for name, size in large["counted"].items()}
    return costs + [(name, value, f"{sizes[1]:,} images") for name, value in counted.items()]


def driver_child(rows: int) -> None:
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
