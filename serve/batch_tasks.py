"""What Ray's processes do for `cxr-ray predict`: files into stored squares, and these into probabilities.

A file is read and decoded in the same task: only stored squares travel between processes. What is wrong with a file is a row,
like its answer.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from cxr_ray.bundle import load_bundle
from cxr_ray.clinical import ClinicalInputs, from_request
from cxr_ray.cpus import available_cpus
from cxr_ray.decoder_process import decoder_of_process
from cxr_ray.decoding import Format
from cxr_ray.dicom_header import looks_like_dicom, radiograph_header, read_dicom
from cxr_ray.dicom_values import text
from cxr_ray.engines import open_engine
from cxr_ray.findings import FINDINGS
from cxr_ray.pixels import DamagedImage, ImageError, UnsupportedImage, reason
from cxr_ray.records import pixel_array
from ingest.files import read_files
from serve.answers_file import ANSWER_SCHEMA, ANSWERED, REFUSED, positive_column
from serve.batch_settings import PredictSettings
from serve.upload_words import age_conflict
from serve.uploads import Stated

_STATED = ("age", "sex", "view", "history")
_FILE_FIELDS = ("file", "sha256", "status", "reason", "study_instance_uid", "series_instance_uid", "sop_instance_uid")
_PATIENT_FIELDS = (*_STATED, "missing", "warnings")
Row = dict[str, Any]

FILES_SCHEMA = pa.schema(
    [pa.field("location", pa.string()), pa.field("file", pa.string()), *(ANSWER_SCHEMA.field(name) for name in _STATED)]
)
"""What `decode_files` reads: where a file is, its name in the result, and what the clinical table states of its patient."""


def _decoded_schema(size: int) -> pa.Schema:
    fields = [ANSWER_SCHEMA.field(name) for name in (*_FILE_FIELDS, *_PATIENT_FIELDS)]
    return pa.schema([*fields, pa.field("pixels", pa.binary(size * size))])


def decode_files(files: pa.Table, filesystem: fs.FileSystem, size: int) -> pa.Table:
    """Read and decode files.

    Parameters
    ----------
    files
        Rows of `FILES_SCHEMA`.
    size
        Edge of the stored square in pixels.

    Returns
    -------
    pyarrow.Table
        In the order given, the columns of the result up to `warnings`, and `pixels`, null where a file is refused.
    """
    given = files.to_pylist()
    rows: list[Row] = [{"file": one["file"]} for one in given]

    def usable() -> Iterator[tuple[int, bytes | ImageError]]:
        for index, content in read_files(filesystem, files["location"].to_pylist()):
            try:
                _describe(rows[index], content, Stated(*(given[index][name] for name in _STATED)))
            except ImageError as error:
                _refuse(rows[index], error)
            except Exception as error:  # noqa: BLE001 - a bad file costs itself only
                _refuse(rows[index], DamagedImage(f"cannot be read ({type(error).__name__}); check the file"))
            else:
                yield index, content

    for index, square in decoder_of_process(Format.ANY, size).squares(usable()):
        if isinstance(square, ImageError):
            _refuse(rows[index], square)
        else:
            rows[index] |= {"status": ANSWERED, "pixels": square.tobytes()}
    return pa.Table.from_pylist(rows, schema=_decoded_schema(size))


def _refuse(row: Row, error: ImageError) -> None:
    row |= dict.fromkeys(_PATIENT_FIELDS) | {"status": REFUSED, "reason": reason(error, "")}


def _describe(row: Row, content: bytes | ImageError, stated: Stated) -> None:
    """Fill in what is known of a file besides its pixels; a file that is refused keeps what was found before."""
    if isinstance(content, ImageError):
        raise content
    if not content:
        raise UnsupportedImage("is empty (0 bytes); send a PNG, JPEG or DICOM file")
    row["sha256"] = hashlib.sha256(content).hexdigest()
    warnings: tuple[str, ...] = ()
    if looks_like_dicom(content):
        dataset = read_dicom(content, "")
        for column, keyword in zip(_FILE_FIELDS[4:], ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"), strict=True):
            row[column] = text(dataset, keyword) or None
        header = radiograph_header(dataset, "")
        warnings = (*header.warnings, *age_conflict(stated.age, header.age_years))
        stated = stated.filled(header)
    _, missing = from_request(*stated[:4])
    row |= dict(zip(_STATED, stated[:4], strict=True)) | {"missing": missing, "warnings": list(warnings)}


class Network:
    """The network of a bundle, in a process of its own.

    Parameters
    ----------
    share
        Part of its machine's CPUs that it computes with.
    """

    def __init__(self, settings: PredictSettings, share: float) -> None:
        bundle = load_bundle(settings.bundle)
        self._thresholds = np.array([bundle.description.thresholds[name] for name in FINDINGS])
        threads = None if settings.gpu else max(1, int(available_cpus() * share))
        self._engine = open_engine(bundle, settings.engine, threads=threads, batch_size=settings.batch_size)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Answer what `decode_files` returned: its columns but the pixels, the probabilities, and what is positive."""
        known = decoded["pixels"].is_valid().to_numpy()
        probabilities = np.zeros((len(known), len(FINDINGS)), dtype=np.float32)
        if known.any():
            usable = decoded.filter(pa.array(known))
            inputs = [from_request(*(row[name] for name in _STATED))[0] for row in usable.select(_STATED).to_pylist()]
            probabilities[known] = self._engine.predict(pixel_array(usable["pixels"]), ClinicalInputs.concatenate(inputs))
        positive = probabilities.astype(np.float64) >= self._thresholds
        answered = decoded.drop_columns("pixels")
        for k, name in enumerate(FINDINGS):
            answered = answered.append_column(name, pa.array(probabilities[:, k], mask=~known))
        for k, name in enumerate(FINDINGS):
            answered = answered.append_column(positive_column(name), pa.array(positive[:, k], mask=~known))
        return answered
