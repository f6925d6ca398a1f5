"""A DICOM archive as a dataset: its frontal chest radiographs with the order of visits, labels and earlier findings.

Headers are read first, on Ray Data, so that visits can be ordered and patients split before a pixel is decoded. What is
readable but no frontal chest radiograph is refused; what cannot be read is left out and counts towards the limit.

Visits follow the acquisition date and time; the images of a study are one visit, at the study's earliest moment. A study
without any date may lie before or after every other of its patient, and one without a time before or after another of the
same day. The history of all images of such a patient is unknown; undated studies are ranked first, as visit 0.

Shards hold neither patient identifiers nor UIDs nor dates. Patients and images go by an HMAC-SHA256 under a secret of the
hospital: patient numbers are few enough to be guessed from a hash without a key, and so is a short key. Files that were left
out go by a hash of their path in the manifest; ``left-out.csv`` beside it, which is the hospital's, names them.
"""

import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import Field, ValidationInfo, field_validator

from cxr_ray import storage
from cxr_ray.dataset import Manifest
from cxr_ray.decoding import Format
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.records import fixed_lists
from cxr_ray.settings import Settings
from ingest.dicom_archive import Archive, read_archive
from ingest.history import earlier_history, history_columns
from ingest.label_table import LabelTable, read_label_table
from ingest.shards import LeftOut, Source, claim, warm_up, write_dataset
from ingest.splits import check_disjoint, split_by_key

PATIENT_KEY_VARIABLE = "CXR_RAY_PATIENT_KEY"
MIN_KEY_BYTES = 16
_PSEUDONYM_DIGITS = 32
_SECONDS_PER_DAY = 86400


class DicomSettings(Settings):
    """Settings of `cxr-ray ingest dicom`."""

    source: str = Field(
        description="DICOM files: a folder or URI, searched with all folders and zips in it; a zip; a DICOMDIR."
    )
    out: str = Field(description="Folder or URI of the dataset.")
    size: int = Field(256, ge=16, le=4096, description="Edge of the stored square, in pixels.")
    labels: str | None = Field(
        None,
        description="CSV with a column SOPInstanceUID, StudyInstanceUID or AccessionNumber, and 'Finding Labels' or a column "
        "of 0 and 1 for each finding; without it, no image has labels.",
    )
    patient_key_file: Path | None = Field(
        None,
        description=f"File with the secret that identifiers are hashed with, 16 bytes or more; else {PATIENT_KEY_VARIABLE}.",
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


def ingest_dicom(settings: DicomSettings) -> Manifest:
    """Turn a DICOM archive into a dataset.

    Raises
    ------
    CxrRayError
        If the patient key or a label is absent or wrong, no frontal chest radiograph is found, or too many files are
        unreadable.
    """
    given = settings.model_dump(mode="json")
    claim(settings.out, given, overwrite=settings.overwrite)
    key = _patient_key(settings.patient_key_file)
    warm_up()
    table = None if settings.labels is None else read_label_table(settings.labels)
    archive = read_archive(settings.source, settings.max_quarantined)
    labels = _labels(archive.headers, table)
    visits = _visits(archive.headers)
    source = Source(
        kind="dicom",
        filesystem=archive.filesystem,
        format=Format.DICOM,
        metadata_sha256=None if table is None else table.sha256,
        settings=given,
        counts=archive.counts | _counts(archive.headers, visits, table),
        root=archive.root,
        left_out=_left_out(archive, key),
        files=archive.counts["files"],
        warnings=_warnings(labels, settings.labels),
    )
    return write_dataset(
        _records(archive.headers, labels, visits, key, settings, labelled=table is not None),
        settings.out,
        source,
        size=settings.size,
        max_quarantined=settings.max_quarantined,
        overwrite=settings.overwrite,
    )


def _patient_key(path: Path | None) -> bytes:
    where = f"--patient-key-file {path}" if path else PATIENT_KEY_VARIABLE
    try:
        key = path.read_bytes() if path else os.environ.get(PATIENT_KEY_VARIABLE, "").encode()
    except OSError as error:
        raise CxrRayError(f"{where}: cannot be read ({error.strerror}); give a file that holds the secret") from None
    key = key.strip()
    if len(key) < MIN_KEY_BYTES:
        held = f"holds a secret of {len(key)} bytes, which can be guessed" if key else "holds no secret"
        raise CxrRayError(
            f"{where}: {held}, so patient identifiers cannot be hashed; make one, for instance with "
            f"'openssl rand -hex 32', keep it, and give it with --patient-key-file or in {PATIENT_KEY_VARIABLE}"
        )
    return key


def _pseudonym(key: bytes, identifier: str) -> str:
    return hmac.digest(key, identifier.encode(), hashlib.sha256).hex()[:_PSEUDONYM_DIGITS]


def _left_out(archive: Archive, key: bytes) -> tuple[LeftOut, ...]:
    return tuple(
        LeftOut(file=name, image=_pseudonym(key, name), reason=why, refused=refused) for name, why, refused in archive.left_out
    )


def _labels(headers: pd.DataFrame, table: LabelTable | None) -> np.ndarray:
    """Labels as float32, shape (N, 14); a row of NaN where the table, or the row in it, is absent."""
    if table is None:
        return np.full((len(headers), len(FINDINGS)), np.nan, dtype=np.float32)
    return table.of_images(_identifiers(headers))


def _identifiers(headers: pd.DataFrame) -> dict[str, list[str]]:
    columns = {"SOPInstanceUID": "instance", "StudyInstanceUID": "study", "AccessionNumber": "accession"}
    return {key: headers[column].tolist() for key, column in columns.items()}


def _warnings(labels: np.ndarray, table: str | None) -> tuple[str, ...]:
    if table is None or np.isfinite(labels).all(axis=1).any():
        return ()
    return (f"no image has labels: no row of {storage.shown(table)} names one; check that its identifiers are the archive's",)


def _counts(headers: pd.DataFrame, visits: "_Visits", table: LabelTable | None) -> dict[str, int]:
    return {
        "without_patient_id": int((headers["patient"] == "").sum()),
        "without_date": int((~visits.dated).sum()),
        "order_unknown": int((~visits.ordered).sum()),
        "age_unknown": int(headers["age_years"].isna().sum()),
        "sex_unknown": int(headers["sex"].isna().sum()),
        "view_unknown": int(headers["view"].isna().sum()),
        "labels_without_image": table.without_image(_identifiers(headers)) if table else 0,
        "label_rows_unlabelled": table.unlabelled_rows if table else 0,
    }


@dataclass(frozen=True)
class _Visits:
    """When each image's study began.

    Attributes
    ----------
    moment
        Seconds; minus infinity where no image of the study has a date, midnight where none of that date has a time; float64,
        shape (N,).
    dated
        Whether the study has a date; bool, shape (N,).
    ordered
        Whether the order of all studies of the patient is known; bool, shape (N,).
    """

    moment: np.ndarray
    dated: np.ndarray
    ordered: np.ndarray


def _visits(headers: pd.DataFrame) -> _Visits:
    acquired = headers["acquired"]
    frame = pd.DataFrame({"patient": _patients(headers), "study": headers["study"]})
    study = [frame["patient"], frame["study"]]
    frame["day"] = (acquired // _SECONDS_PER_DAY).groupby(study).transform("min")
    # A header without a time reads as midnight; a film that was really taken at that second loses little by it.
    timed = (acquired // _SECONDS_PER_DAY == frame["day"]) & (acquired % _SECONDS_PER_DAY > 0)
    frame["time"] = (acquired % _SECONDS_PER_DAY).where(timed).groupby(study).transform("min")
    studies = frame.drop_duplicates(["patient", "study"])
    same_day = studies.groupby(["patient", "day"])["time"].agg(["size", "count"])
    unclear_days = same_day.index[(same_day["size"] > 1) & (same_day["count"] < same_day["size"])]
    dated = frame["day"].notna().to_numpy()
    unclear = set(unclear_days.get_level_values("patient")) | set(frame["patient"][~dated])
    moment = (frame["day"] * _SECONDS_PER_DAY + frame["time"].fillna(0)).fillna(-np.inf)
    return _Visits(moment.to_numpy(dtype=np.float64), dated, ~frame["patient"].isin(unclear).to_numpy())


def _patients(headers: pd.DataFrame) -> pd.Series:
    """The patient of each image; where a file does not say, its study is all that is known of the patient."""
    return headers["patient"].where(headers["patient"] != "", headers["study"])


def _records(
    headers: pd.DataFrame, labels: np.ndarray, visits: _Visits, key: bytes, settings: DicomSettings, *, labelled: bool
) -> pa.Table:
    patients = np.array([_pseudonym(key, identity) for identity in _patients(headers)])
    images = [_pseudonym(key, instance) for instance in headers["instance"]]
    split = split_by_key(patients, settings.val_fraction, settings.test_fraction)
    check_disjoint(patients, split)
    ages = headers["age_years"].to_numpy(dtype=np.float32)
    history = earlier_history(patients, visits.moment, labels, ages, headers["view"].to_numpy(dtype=object))
    known = np.full(len(headers), labelled)
    return pa.table(
        {
            "image_id": pa.array(images, type=pa.string()),
            "patient_key": pa.array(patients, type=pa.string()),
            "visit": history.visit,
            "age_years": pa.array(ages, from_pandas=True),
            "sex": pa.array(headers["sex"], type=pa.string(), from_pandas=True),
            "view": pa.array(headers["view"], type=pa.string(), from_pandas=True),
            **history_columns(history, known=known, counted=visits.ordered),
            "labels": fixed_lists(np.nan_to_num(labels).astype(np.uint8), np.isfinite(labels).all(axis=1)),
            "split": pa.array(split, type=pa.string()),
            "source": pa.array(["dicom"] * len(headers), type=pa.string()),
            "location": pa.array(headers["location"], type=pa.string()),
            "stamp": pa.array(headers["stamp"], type=pa.string()),
        }
    )
