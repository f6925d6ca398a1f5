"""DICOM files as a Ray Data source: one row a file, with what its header says and, if asked for, its stored square.

``ray.data.read_datasource(DicomDatasource("/archive"))`` reads headers up to the pixels only. A file that is refused or cannot
be read is a row as well, with the reason, which names neither the file nor anything that a patient could be told by. The
other columns do: they hold identifiers as they stand in the files.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pydicom
from pyarrow import fs
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from cxr_ray.decoder_process import DecoderProcess
from cxr_ray.decoding import Format
from cxr_ray.dicom_header import radiograph_header, read_dicom, read_dicom_header
from cxr_ray.pixels import DamagedImage, ImageError, UnusableImage, reason
from ingest.dicom_files import find_dicom_files
from ingest.files import SourceFile, open_file, read_files

ACCEPTED, REFUSED, UNREADABLE = "accepted", "refused", "unreadable"
MAX_FILES_PER_TASK = 1024
_BLOCK_BYTES = 32 * 1024**2
_HEADER_BYTES = 512

_HEADER_FIELDS = (
    pa.field("location", pa.string()),
    pa.field("name", pa.string()),
    pa.field("stamp", pa.string()),
    pa.field("outcome", pa.string()),
    pa.field("reason", pa.string()),
    pa.field("instance", pa.string()),
    pa.field("study", pa.string()),
    pa.field("patient", pa.string()),
    pa.field("accession", pa.string()),
    pa.field("age_years", pa.float32()),
    pa.field("sex", pa.string()),
    pa.field("view", pa.string()),
    pa.field("acquired", pa.timestamp("s")),
)


def header_schema(size: int | None = None) -> pa.Schema:
    """The columns of `DicomDatasource`.

    ``location``, ``name`` and ``stamp`` are those of `ingest.files.SourceFile`; ``outcome`` is accepted, refused (readable, but
    no frontal chest radiograph) or unreadable, with its ``reason``; the rest is null unless accepted. ``pixels`` (size x size
    bytes of uint8, see `cxr_ray.records`) is there where `size` is given.
    """
    pixels = [] if size is None else [pa.field("pixels", pa.binary(size * size))]
    return pa.schema([*_HEADER_FIELDS, *pixels])


class DicomDatasource(Datasource):
    """The DICOM files of a folder, a zip, a DICOMDIR or a single file, at any pyarrow filesystem URI.

    A file that is named in a DICOMDIR, but absent, and a zip that is damaged are rows, too, and unreadable.

    Parameters
    ----------
    uri
        What is read; folders within folders and zips within folders included.
    size
        Edge of the stored square in pixels, which is decoded then; None for headers alone.

    Raises
    ------
    CxrRayError
        If the source is not there or cannot be listed.
    """

    def __init__(self, uri: str, size: int | None = None) -> None:
        super().__init__()
        self.found = find_dicom_files(uri)
        self._size = size

    def count(self) -> int:
        """How many rows there will be."""
        return len(self.found.files) + len(self.found.unreadable)

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all rows, as if every file were accepted."""
        return self.count() * self._row_bytes()

    def _row_bytes(self) -> int:
        return _HEADER_BYTES + (0 if self._size is None else self._size**2)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task for each batch of files, of at most `MAX_FILES_PER_TASK`."""
        files, filesystem, size = self.found.files, self.found.filesystem, self._size
        step = int(np.clip(-(-len(files) // max(parallelism, 1)), 1, MAX_FILES_PER_TASK))
        tasks = [
            self._task(
                _reader(filesystem, files[start : start + step], size), len(files[start : start + step]), per_task_row_limit
            )
            for start in range(0, len(files), step)
        ]
        if self.found.unreadable:
            rows = [_known_unreadable(self.found.root, name, why) for name, why in self.found.unreadable]
            tasks.append(self._task(lambda: [_table(rows, size)], len(rows), per_task_row_limit))
        return tasks

    def _task(self, read: Callable[[], object], rows: int, limit: int | None) -> ReadTask:
        # Input files would be named in Ray's logs.
        metadata = BlockMetadata(num_rows=rows, size_bytes=rows * self._row_bytes(), input_files=None, exec_stats=None)
        return ReadTask(read, metadata, schema=header_schema(self._size), per_task_row_limit=limit)


def _known_unreadable(root: str, name: str, why: str) -> dict[str, object]:
    return {"location": f"{root}/{name}", "name": name, "stamp": "", "outcome": UNREADABLE, "reason": why}


def _reader(filesystem: fs.FileSystem, files: Sequence[SourceFile], size: int | None) -> Callable[[], Iterator[pa.Table]]:
    if size is None:
        return lambda: iter([_table([_file_row(filesystem, file) for file in files], None)])
    step = int(np.clip(_BLOCK_BYTES // size**2, 1, MAX_FILES_PER_TASK))

    def read() -> Iterator[pa.Table]:
        with DecoderProcess(Format.DICOM, size) as decoder:
            for start in range(0, len(files), step):
                yield _table(_decoded_rows(filesystem, files[start : start + step], decoder), size)

    return read


def _table(rows: list[dict[str, object]], size: int | None) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=header_schema(size))


def _file_row(filesystem: fs.FileSystem, file: SourceFile) -> dict[str, object]:
    def dataset() -> pydicom.Dataset:
        with open_file(filesystem, file.location) as stream:
            return read_dicom_header(stream, "")

    return _row(file, dataset)


def _row(file: SourceFile, dataset: Callable[[], pydicom.Dataset]) -> dict[str, object]:
    row: dict[str, object] = {"location": file.location, "name": file.name, "stamp": file.stamp}
    try:
        header = radiograph_header(dataset(), "")
    except ImageError as error:
        return row | _left_out(error)
    except Exception as error:  # noqa: BLE001 - a bad file costs itself only
        return row | _left_out(DamagedImage(f"cannot be read ({type(error).__name__}); check the file"))
    return row | {
        "outcome": ACCEPTED,
        "instance": header.sop_instance_uid,
        "study": header.study_instance_uid,
        "patient": header.patient_id,
        "accession": header.accession_number,
        "age_years": header.age_years,
        "sex": header.sex,
        "view": header.view,
        "acquired": header.acquired,
    }


def _left_out(error: ImageError) -> dict[str, object]:
    return {"outcome": REFUSED if isinstance(error, UnusableImage) else UNREADABLE, "reason": reason(error, "")}


def _decoded_rows(filesystem: fs.FileSystem, files: Sequence[SourceFile], decoder: DecoderProcess) -> list[dict[str, object]]:
    """The rows of files that are read whole, with the stored square of those that are accepted."""
    rows: dict[int, dict[str, object]] = {}

    def accepted() -> Iterator[tuple[int, bytes | ImageError]]:
        for index, content in read_files(filesystem, [file.location for file in files]):
            rows[index] = _row(files[index], partial(_parsed, content))
            if rows[index]["outcome"] == ACCEPTED:
                yield index, content

    for index, square in decoder.squares(accepted()):
        if isinstance(square, ImageError):
            kept = {name: rows[index][name] for name in ("location", "name", "stamp")}
            rows[index] = kept | _left_out(square)
        else:
            rows[index]["pixels"] = square.tobytes()
    return [rows[index] for index in range(len(files))]


def _parsed(content: bytes | ImageError) -> pydicom.Dataset:
    if isinstance(content, ImageError):
        raise content
    return read_dicom(content, "")
