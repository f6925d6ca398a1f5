"""A DICOM archive: every file below a folder looked at, its frontal chest radiographs turned into records.

Headers are read first, on Ray Data, so that visits can be ordered and patients split before a pixel is decoded. What is
readable but no frontal chest radiograph is refused; what cannot be read is quarantined and counts towards the limit.

Visits follow the acquisition date and time; the images of a study are one visit, at the study's earliest moment. A study
without any date may lie before or after every other of its patient: it comes first, as visit 0, and the history of all
the patient's images is unknown.

Shards hold neither patient identifiers nor UIDs nor dates. Patients and images go by an HMAC-SHA256 under a secret of the
hospital: patient numbers are few enough to be guessed from a hash without a key. Only the manifest's list of files that
were left out names them, by their paths.
"""

import csv
import hashlib
import hmac
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs
from pydantic import Field, ValidationInfo, field_validator

from cxr_ray import findings, storage
from cxr_ray.cpus import available_cpus
from cxr_ray.dataset import Manifest, Quarantined
from cxr_ray.dicom_image import decode_dicom, radiograph_header, read_dicom, read_dicom_header
from cxr_ray.errors import CxrRayError
from cxr_ray.pixels import Greyscale, ImageError, UnusableImage
from cxr_ray.progress import ProgressReport
from cxr_ray.records import fixed_lists
from cxr_ray.settings import Settings
from ingest.history import earlier_history
from ingest.shards import Source, check_quarantined, claim, write_dataset
from ingest.splits import check_disjoint, split_by_key

PATIENT_KEY_VARIABLE = "CXR_RAY_PATIENT_KEY"
UID_COLUMN = "SOPInstanceUID"
LABEL_COLUMN = "Finding Labels"
_EXTENSIONS = ("dcm", "dicom")
_PSEUDONYM_DIGITS = 32
_MAX_FILES_PER_TASK = 1024

_ACCEPTED, _REFUSED, _UNREADABLE = "accepted", "refused", "unreadable"
_HEADERS = pa.schema(
    [
        pa.field("location", pa.string()),
        pa.field("outcome", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("instance", pa.string()),
        pa.field("study", pa.string()),
        pa.field("patient", pa.string()),
        pa.field("age_years", pa.float32()),
        pa.field("sex", pa.string()),
        pa.field("view", pa.string()),
        pa.field("acquired", pa.timestamp("s")),
    ]
)


class DicomSettings(Settings):
    """Settings of `cxr-ray ingest dicom`."""

    source: str = Field(description="Folder or URI searched for DICOM files, folders within it included.")
    out: str = Field(description="Folder or URI of the dataset.")
    size: int = Field(256, ge=16, le=4096, description="Edge of the stored square, in pixels.")
    labels: str | None = Field(
        None, description=f"CSV with columns '{UID_COLUMN}' and '{LABEL_COLUMN}'; without it, no image has labels."
    )
    patient_key_file: Path | None = Field(
        None, description=f"File with the secret that identifiers are hashed with; else {PATIENT_KEY_VARIABLE} holds it."
    )
    val_fraction: float = Field(0.1, ge=0, le=1, description="Share of the patients for validation; 0 for none.")
    test_fraction: float = Field(
        0.2, ge=0, le=1, validate_default=True, description="Share of the patients for the test; 1 for a test set only."
    )
    max_quarantined: float = Field(0.01, ge=0, le=1, description="Share of unreadable files that stops the run; 1 never.")
    overwrite: bool = Field(default=False, description="Replace the dataset that OUT holds.")

    @field_validator("test_fraction")
    @classmethod
    def _leave_no_more_than_all(cls, test_fraction: float, info: ValidationInfo) -> float:
        val_fraction = info.data.get("val_fraction", 0.0)
        if val_fraction + test_fraction > 1:
            raise ValueError(f"with val_fraction {val_fraction} the shares exceed 1; lower one of them")
        return test_fraction


@dataclass(frozen=True)
class Archive:
    """What the headers of an archive say.

    Attributes
    ----------
    headers
        A row an accepted image, in the order of paths: location, instance, study, patient (empty where unknown),
        age_years, sex, view, acquired (seconds, NaN where no date is given).
    files
        How many files were looked at.
    """

    filesystem: fs.FileSystem
    root: str
    headers: pd.DataFrame
    files: int
    refused: tuple[Quarantined, ...]
    unreadable: tuple[Quarantined, ...]
    counts: dict[str, int]


@dataclass(frozen=True)
class LabelTable:
    """The labels (uint8, shape (14,), NIH order) of each SOP Instance UID, and the file's digest."""

    labels: dict[str, np.ndarray]
    sha256: str


def ingest_dicom(settings: DicomSettings) -> Manifest:
    """Turn a DICOM archive into a dataset.

    Raises
    ------
    CxrRayError
        If the patient key or a label is absent or wrong, no frontal chest radiograph is found, or too many files are
        unreadable.
    """
    claim(settings.out, overwrite=settings.overwrite)
    key = _patient_key(settings.patient_key_file)
    table = None if settings.labels is None else read_label_table(settings.labels)
    archive = read_archive(settings.source, settings.max_quarantined)
    records = _records(archive.headers, key, table, settings)
    instances = set(archive.headers["instance"])
    source = Source(
        kind="dicom",
        filesystem=archive.filesystem,
        decode=decode_file,
        metadata_sha256=None if table is None else table.sha256,
        settings=settings.model_dump(mode="json"),
        counts=archive.counts | {"labels_without_image": len(set(table.labels) - instances) if table else 0},
        root=archive.root,
        refused=archive.refused,
        unreadable=archive.unreadable,
        files=archive.files,
    )
    return write_dataset(records, settings.out, source, size=settings.size, max_quarantined=settings.max_quarantined)


def decode_file(data: bytes, name: str) -> Greyscale:
    """Decode the bytes of a DICOM file; errors as `read_dicom` and `decode_dicom`."""
    return decode_dicom(read_dicom(data, name), name)


def _patient_key(path: Path | None) -> bytes:
    where = f"--patient-key-file {path}" if path else PATIENT_KEY_VARIABLE
    try:
        key = path.read_bytes() if path else os.environ.get(PATIENT_KEY_VARIABLE, "").encode()
    except OSError as error:
        raise CxrRayError(f"{where}: cannot be read ({error.strerror}); give a file that holds the secret") from None
    if not key.strip():
        raise CxrRayError(
            f"{where}: holds no secret, so patient identifiers cannot be hashed; make one, for instance with "
            f"'openssl rand -hex 32', keep it, and give it with --patient-key-file or in {PATIENT_KEY_VARIABLE}"
        )
    return key.strip()


def _pseudonym(key: bytes, identifier: str) -> str:
    return hmac.digest(key, identifier.encode(), hashlib.sha256).hex()[:_PSEUDONYM_DIGITS]


def read_label_table(uri: str) -> LabelTable:
    """Read the CSV of labels.

    Raises
    ------
    CxrRayError
        Naming the file, the line, what is wrong in it and the remedy.
    """
    filesystem, path = storage.resolve(uri)
    content = storage.read_bytes(filesystem, path)
    labels: dict[str, np.ndarray] = {}
    for line, uid, text in _label_rows(content, path):
        if not uid or uid in labels:
            problem = f"{uid} stands there a second time" if uid else "is empty"
            raise CxrRayError(f"{path} line {line}: {UID_COLUMN} {problem}; correct or remove the row")
        try:
            labels[uid] = findings.parse(text)
        except CxrRayError as error:
            raise CxrRayError(f"{path} line {line}: {error}") from None
    return LabelTable(labels, hashlib.sha256(content).hexdigest())


def _label_rows(content: bytes, path: str) -> Iterator[tuple[int, str, str]]:
    """Line number, UID and label text of each row that is not blank."""
    try:
        rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        header = [name.strip() for name in next(rows, [])]
        absent = [name for name in (UID_COLUMN, LABEL_COLUMN) if name not in header]
        if absent:
            raise CxrRayError(f"{path}: has no column {', '.join(absent)} (found: {', '.join(header)}); name it so")
        uid, text = header.index(UID_COLUMN), header.index(LABEL_COLUMN)
        for row in rows:
            if len(row) not in (0, len(header)):
                raise CxrRayError(
                    f"{path} line {rows.line_num}: has {len(row)} values under {len(header)} columns; correct the row"
                )
            if row:
                yield rows.line_num, row[uid].strip(), row[text]
    except (UnicodeDecodeError, csv.Error) as error:
        raise CxrRayError(f"{path}: is no readable CSV ({error}); save it as CSV in UTF-8") from None


def read_archive(uri: str, max_quarantined: float) -> Archive:
    """Find the DICOM files below a folder and read their headers on Ray Data.

    Raises
    ------
    CxrRayError
        If the folder cannot be listed, too many files are unreadable, or none is a frontal chest radiograph.
    """
    filesystem, root = storage.resolve(uri)
    root = root.rstrip("/")
    candidates, others = _candidates(filesystem, root, uri)
    headers = _read_headers(candidates, filesystem, root, max_quarantined)
    left_out = headers.filter(pc.not_equal(headers["outcome"], _ACCEPTED))
    accepted = headers.filter(pc.equal(headers["outcome"], _ACCEPTED)).sort_by("location")
    if accepted.num_rows == 0:
        first = f" (first: {left_out['reason'][0]})" if left_out.num_rows else ""
        raise CxrRayError(
            f"--source {uri}: none of {len(candidates)} DICOM files is a frontal chest radiograph{first}; "
            "give the folder that holds them"
        )
    table = accepted.set_column(
        accepted.column_names.index("acquired"), "acquired", accepted["acquired"].cast(pa.int64()).cast(pa.float64())
    ).to_pandas()
    repeated = table.duplicated("instance")
    table = table[~repeated].reset_index(drop=True)
    counts = {
        "files": len(candidates),
        "other_files": others,
        "duplicate_instances": int(repeated.sum()),
        "without_patient_id": int((table["patient"] == "").sum()),
        "without_date": int((~np.isfinite(_moments(table))).sum()),
        "age_unknown": int(table["age_years"].isna().sum()),
        "sex_unknown": int(table["sex"].isna().sum()),
        "view_unknown": int(table["view"].isna().sum()),
    }
    return Archive(
        filesystem=filesystem,
        root=root,
        headers=table,
        files=len(candidates),
        refused=_entries(left_out, _REFUSED, root),
        unreadable=_entries(left_out, _UNREADABLE, root),
        counts=counts,
    )


def _candidates(filesystem: fs.FileSystem, root: str, uri: str) -> tuple[list[str], int]:
    """Paths that may be DICOM files, sorted, and how many other files there are."""
    try:
        infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise CxrRayError(f"--source {uri}: cannot be listed ({reason}); give the folder of the DICOM files") from None
    files = [info.path for info in infos if info.type == fs.FileType.File]
    candidates = sorted(path for path in files if _may_be_dicom(_relative(path, root)))
    return candidates, len(files) - len(candidates)


def _may_be_dicom(path: str) -> bool:
    parts = path.split("/")
    if any(part.startswith(".") for part in parts) or parts[-1].upper() == "DICOMDIR":
        return False
    _, dot, extension = parts[-1].rpartition(".")
    # A file named by its UID seems to have an extension of digits.
    return not dot or extension.lower() in _EXTENSIONS or extension.isdecimal()


def _relative(path: str, root: str) -> str:
    return path.removeprefix(f"{root}/")


def _read_headers(paths: list[str], filesystem: fs.FileSystem, root: str, max_quarantined: float) -> pa.Table:
    """A row a file as in `_HEADERS`; stops as soon as too many are unreadable."""
    import ray.data  # noqa: PLC0415 - takes a second that other commands need not pay

    if not paths:
        return _HEADERS.empty_table()
    step = int(np.clip(len(paths) / (4 * available_cpus()), 32, _MAX_FILES_PER_TASK))
    tables = [pa.table({"location": paths[start : start + step]}) for start in range(0, len(paths), step)]
    results = ray.data.from_arrow(tables).map_batches(
        _header_rows, fn_kwargs={"filesystem": filesystem, "root": root}, batch_format="pyarrow", batch_size=None
    )
    read: list[pa.Table] = []
    unreadable: list[Quarantined] = []
    with ProgressReport("headers", len(paths), "files") as progress:
        for rows in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            read.append(rows.cast(_HEADERS))
            unreadable += _entries(rows, _UNREADABLE, root)
            progress.advance(rows.num_rows)
            check_quarantined(unreadable, len(paths), max_quarantined)
    return pa.concat_tables(read)


def _header_rows(paths: pa.Table, filesystem: fs.FileSystem, root: str) -> pa.Table:
    rows = [_header_row(filesystem, location, _relative(location, root)) for location in paths["location"].to_pylist()]
    return pa.Table.from_pylist(rows, schema=_HEADERS)


class _BufferedFile(io.BufferedReader):
    """An Arrow file for pydicom, which reads a few bytes at a time and asks a buffered reader for its name."""

    name = ""


def _header_row(filesystem: fs.FileSystem, location: str, name: str) -> dict[str, object]:
    try:
        with filesystem.open_input_file(location) as file:
            header = radiograph_header(read_dicom_header(_BufferedFile(file), name), name)
    except UnusableImage as error:
        return {"location": location, "outcome": _REFUSED, "reason": str(error)}
    except ImageError as error:
        return {"location": location, "outcome": _UNREADABLE, "reason": str(error)}
    except OSError as error:
        reason = f"{name}: cannot be read ({str(error).splitlines()[0]}); check the file"
        return {"location": location, "outcome": _UNREADABLE, "reason": reason}
    return {
        "location": location,
        "outcome": _ACCEPTED,
        "instance": header.sop_instance_uid,
        "study": header.study_instance_uid,
        "patient": header.patient_id,
        "age_years": header.age_years,
        "sex": header.sex,
        "view": header.view,
        "acquired": header.acquired,
    }


def _entries(headers: pa.Table, outcome: str, root: str) -> tuple[Quarantined, ...]:
    rows = headers.filter(pc.equal(headers["outcome"], outcome)).sort_by("location")
    return tuple(
        Quarantined(image=_relative(location, root), reason=reason)
        for location, reason in zip(rows["location"].to_pylist(), rows["reason"].to_pylist(), strict=True)
    )


def _moments(headers: pd.DataFrame) -> np.ndarray:
    """Earliest acquisition of each image's study in seconds; minus infinity where none of its images has a date."""
    earliest = headers.groupby(["patient", "study"])["acquired"].transform("min")
    return earliest.fillna(-np.inf).to_numpy(dtype=np.float64)


def _records(headers: pd.DataFrame, key: bytes, table: LabelTable | None, settings: DicomSettings) -> pa.Table:
    identities = headers["patient"].where(headers["patient"] != "", headers["study"])
    patients = np.array([_pseudonym(key, identity) for identity in identities])
    images = [_pseudonym(key, instance) for instance in headers["instance"]]
    split = split_by_key(patients, settings.val_fraction, settings.test_fraction)
    check_disjoint(patients, split)

    labels = _label_array(headers["instance"], table)
    labelled = np.isfinite(labels).all(axis=1)
    moments = _moments(headers)
    dated = np.isfinite(moments)
    # Without labels, an undated study leaves the history of what follows it, which is everything, unknown.
    history = earlier_history(patients, moments, np.where(dated[:, None], labels, np.nan))
    known = history.known & dated & (table is not None)
    ordered = ~np.isin(patients, patients[~dated])
    return pa.table(
        {
            "image_id": pa.array(images, type=pa.string()),
            "patient_key": pa.array(patients, type=pa.string()),
            "visit": history.visit,
            "age_years": pa.array(headers["age_years"].to_numpy(dtype=np.float32), from_pandas=True),
            "sex": pa.array(headers["sex"], type=pa.string(), from_pandas=True),
            "view": pa.array(headers["view"], type=pa.string(), from_pandas=True),
            "history_count": pa.array(history.count, mask=~ordered),
            "history_ever": fixed_lists(history.ever, known),
            "history_last": fixed_lists(history.last, known),
            "history_fraction": fixed_lists(history.fraction, known),
            "labels": fixed_lists(np.nan_to_num(labels).astype(np.uint8), labelled),
            "split": pa.array(split, type=pa.string()),
            "source": pa.array(["dicom"] * len(headers), type=pa.string()),
            "location": pa.array(headers["location"], type=pa.string()),
        }
    )


def _label_array(instances: pd.Series, table: LabelTable | None) -> np.ndarray:
    """Labels as float32, shape (N, 14); a row of NaN where the table, or the row in it, is absent."""
    unknown = np.full(len(findings.FINDINGS), np.nan, dtype=np.float32)
    known = {} if table is None else table.labels
    return np.stack([known.get(instance, unknown) for instance in instances]).astype(np.float32)
