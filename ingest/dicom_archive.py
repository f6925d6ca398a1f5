"""The headers of a whole DICOM archive, read on Ray Data: which images it has, each once, and what was left out.

An archive holds the same instance more than once, as copies or, where somebody has edited a file without giving it a new UID,
with other content. Of the files with one SOP Instance UID the first by its path is taken.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from cxr_ray import storage
from cxr_ray.cluster_growth import await_cpu, cpus_at_most
from cxr_ray.errors import CxrRayError
from cxr_ray.pixels import ImageError
from cxr_ray.progress import ProgressReport
from cxr_ray.ray_session import without_reservations
from ingest.files import read_files
from ingest.shards import check_quarantined

if TYPE_CHECKING:
    from ingest.dicom_source import DicomDatasource

_REPEATED = "same SOP Instance UID as another file, other content"


@dataclass(frozen=True)
class Archive:
    """What the headers of an archive say.

    Attributes
    ----------
    headers
        A row an accepted image, in the order of paths, with the columns of `ingest.dicom_source.header_schema`; acquired in
        seconds, NaN where no date is given.
    left_out
        Name and reason of each file that is no image of the dataset, and whether it was refused (True) or is unreadable.
    counts
        What was found: files, other_files, archives, duplicate_instances.
    """

    filesystem: fs.FileSystem
    root: str
    headers: pd.DataFrame
    left_out: tuple[tuple[str, str, bool], ...]
    counts: dict[str, int]


def read_archive(uri: str, max_quarantined: float) -> Archive:
    """Find the DICOM files of a source and read their headers on Ray Data.

    Raises
    ------
    CxrRayError
        If the source cannot be listed, too many files are unreadable, or none is a frontal chest radiograph.
    """
    from ingest.dicom_source import ACCEPTED, REFUSED, DicomDatasource  # noqa: PLC0415 - loads Ray Data

    source = DicomDatasource(uri)
    found = source.found
    rows = _read_headers(source, max_quarantined).sort_by("name")
    accepted = rows.filter(pc.equal(rows["outcome"], ACCEPTED))
    others = rows.filter(pc.not_equal(rows["outcome"], ACCEPTED))
    left_out = [(row["name"], row["reason"], row["outcome"] == REFUSED) for row in others.to_pylist()]
    if accepted.num_rows == 0:
        first = f" (first: {left_out[0][1]})" if left_out else ""
        raise CxrRayError(
            f"--source {storage.shown(uri)}: none of {rows.num_rows} DICOM files is a frontal chest radiograph{first}; "
            "give the folder that holds them"
        )
    seconds = accepted["acquired"].cast(pa.int64()).cast(pa.float64())
    headers = accepted.set_column(accepted.column_names.index("acquired"), "acquired", seconds).to_pandas()
    taken, repeated = _distinct(headers, found.filesystem)
    counts = {
        "files": rows.num_rows,
        "other_files": found.other_files,
        "archives": found.archives,
        "duplicate_instances": len(headers) - len(taken) - len(repeated),
    }
    return Archive(found.filesystem, found.root, taken, tuple(sorted([*left_out, *repeated])), counts)


def _read_headers(source: "DicomDatasource", max_quarantined: float) -> pa.Table:
    """A row a file; stops as soon as too many are unreadable."""
    import ray.data  # noqa: PLC0415 - takes a second that other commands need not pay

    from ingest.dicom_source import MAX_FILES_PER_TASK, UNREADABLE, header_schema  # noqa: PLC0415

    files = source.count()
    if not files:
        return header_schema().empty_table()
    await_cpu()
    step = int(np.clip(files / (4 * cpus_at_most()), 32, MAX_FILES_PER_TASK))
    read: list[pa.Table] = []
    unreadable: list[str] = []
    results = without_reservations(ray.data.read_datasource(source, override_num_blocks=-(-files // step)))
    with ProgressReport("headers", files, "files") as progress:
        for rows in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            read.append(rows.cast(header_schema()))
            unreadable += rows.filter(pc.equal(rows["outcome"], UNREADABLE))["reason"].to_pylist()
            progress.advance(rows.num_rows)
            check_quarantined(len(unreadable), files, max_quarantined, unreadable[0] if unreadable else "")
    return pa.concat_tables(read)


def _distinct(headers: pd.DataFrame, filesystem: fs.FileSystem) -> tuple[pd.DataFrame, list[tuple[str, str, bool]]]:
    """The first file of each instance that can be read, and those of the same UID that are left out; copies are neither."""
    colliding = headers[headers.duplicated("instance", keep=False)]
    if colliding.empty:
        return headers, []
    digests = _digests(colliding["location"].tolist(), filesystem)
    first: dict[str, str | None] = {}
    dropped: list[int] = []
    left_out: list[tuple[str, str, bool]] = []
    columns = (colliding[name].tolist() for name in ("instance", "location", "name"))
    for row, instance, location, name in zip(colliding.index, *columns, strict=True):
        digest, unreadable = digests[location]
        if unreadable is None and instance not in first:
            first[instance] = digest
            continue
        dropped.append(row)
        if unreadable is not None:
            left_out.append((name, unreadable, False))
        elif digest != first[instance]:
            left_out.append((name, _REPEATED, True))
    return headers.drop(index=dropped).reset_index(drop=True), left_out


def _digests(locations: list[str], filesystem: fs.FileSystem) -> dict[str, tuple[str | None, str | None]]:
    """For each file the digest of its content, or why it cannot be read."""
    import ray.data  # noqa: PLC0415 - as above

    step = int(np.clip(len(locations) / (4 * cpus_at_most()), 8, 256))
    tasks = [pa.table({"location": locations[start : start + step]}) for start in range(0, len(locations), step)]
    results = without_reservations(ray.data.from_arrow(tasks)).map_batches(
        _digest_rows, fn_kwargs={"filesystem": filesystem}, batch_format="pyarrow", batch_size=None
    )
    digests: dict[str, tuple[str | None, str | None]] = {}
    with ProgressReport("same UIDs", len(locations), "files") as progress:
        for rows in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            digests |= {row["location"]: (row["digest"], row["unreadable"]) for row in rows.to_pylist()}
            progress.advance(rows.num_rows)
    return digests


def _digest_rows(files: pa.Table, filesystem: fs.FileSystem) -> pa.Table:
    locations = files["location"].to_pylist()
    digests: list[str | None] = [None] * len(locations)
    unreadable: list[str | None] = [None] * len(locations)
    for index, content in read_files(filesystem, locations):
        if isinstance(content, ImageError):
            unreadable[index] = str(content)
        else:
            digests[index] = hashlib.sha256(content).hexdigest()
    text = pa.string()
    return pa.table(
        {"location": locations, "digest": pa.array(digests, type=text), "unreadable": pa.array(unreadable, type=text)}
    )
