"""The result of `cxr-ray predict`: a Parquet file with a row a file, written as the rows come, shown when it is whole.

It is written under another name beside its own and renamed at the end, in object stores too, where a stream that breaks off
would be closed like any other. What an interrupted run leaves there, the next one replaces.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cxr_ray import storage
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.findings import FINDINGS
from ingest.files import problem

ANSWERED, REFUSED = "answered", "refused"
# What the file's metadata is found under; JSON.
METADATA_KEY = "cxr_ray"
_ROWS_A_GROUP = 8192
_MODEL = ("model_name", "model_version", "model_digest")
_TEXTS = pa.list_(pa.string())


def positive_column(finding: str) -> str:
    """The name of the column that says whether a finding reaches its threshold."""
    return f"{finding}_positive"


ANSWER_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("study_instance_uid", pa.string()),
        pa.field("series_instance_uid", pa.string()),
        pa.field("sop_instance_uid", pa.string()),
        pa.field("age", pa.float64()),
        pa.field("sex", pa.string()),
        pa.field("view", pa.string()),
        pa.field("history", _TEXTS),
        pa.field("missing", _TEXTS),
        pa.field("warnings", _TEXTS),
        *(pa.field(name, pa.float32()) for name in FINDINGS),
        *(pa.field(positive_column(name), pa.bool_()) for name in FINDINGS),
        *(pa.field(name, pa.string(), nullable=False) for name in _MODEL),
    ]
)
"""The columns: `reason` is null where a file is answered, and probabilities, clinical values, `missing` and `warnings` are null
where it is refused; UIDs are null for pictures; an empty `history` is that of a patient without earlier findings."""


def claim(uri: str, *, overwrite: bool) -> None:
    """Check that a result may be written there, and make its folder.

    Raises
    ------
    UsageError
        If it is a folder.
    CxrRayError
        If something is there and `overwrite` is not set, or nothing can be written there.
    """
    filesystem, path = storage.resolve(uri)
    shown = storage.shown(uri)
    held = filesystem.get_file_info(path).type
    if uri.endswith("/") or held == fs.FileType.Directory:
        raise UsageError(f"--out {shown}: is a folder; name a file in it, such as {shown.rstrip('/')}/results.parquet")
    if held != fs.FileType.NotFound and not overwrite:
        raise CxrRayError(f"--out {shown}: is there already; choose another name or give --overwrite")
    try:
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with filesystem.open_output_stream(_partial(path)):
            pass
        filesystem.delete_file(_partial(path))
    except OSError as error:
        raise CxrRayError(f"--out {shown}: cannot be written ({problem(error)}); choose another place") from None


def _partial(path: str) -> str:
    return f"{path}.partial"


class AnswersFile:
    """An open result; the rows that it is given have `ANSWER_SCHEMA` without the model's columns."""

    def __init__(self, writer: pq.ParquetWriter, model: tuple[str, str, str]) -> None:
        self._writer, self._model = writer, model
        self._waiting: list[pa.Table] = []

    def write(self, rows: pa.Table) -> None:
        """Add rows; they reach the file in groups of some thousands."""
        self._waiting.append(rows)
        if sum(table.num_rows for table in self._waiting) >= _ROWS_A_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        rows = pa.concat_tables(self._waiting)
        self._waiting = []
        for name, value in zip(_MODEL, self._model, strict=True):
            rows = rows.append_column(name, pa.array([value]).take(pa.array([0] * rows.num_rows, type=pa.int32())))
        self._writer.write_table(rows.select(ANSWER_SCHEMA.names).cast(ANSWER_SCHEMA))


@contextmanager
def answers_file(uri: str, model: tuple[str, str, str], metadata: Mapping[str, object]) -> Iterator[AnswersFile]:
    """Open a result; it gets its name when the block ends, and vanishes when the block raises.

    Parameters
    ----------
    model
        Name, version and digest of the bundle, which every row repeats.
    metadata
        What the file says of itself.
    """
    filesystem, path = storage.resolve(uri)
    schema = ANSWER_SCHEMA.with_metadata({METADATA_KEY: json.dumps(metadata)})
    try:
        with (
            filesystem.open_output_stream(_partial(path), compression=None) as stream,
            pq.ParquetWriter(stream, schema, compression="zstd") as writer,
        ):
            answers = AnswersFile(writer, model)
            yield answers
            answers.flush()
        filesystem.move(_partial(path), path)
    except BaseException:
        with suppress(OSError):
            filesystem.delete_file(_partial(path))
        raise
