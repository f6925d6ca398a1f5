"""The Radiograph record: one image with everything that training knows of it, as a row of a shard.

Age, sex, view, labels and history are nullable: missing is not zero and not negative. Row order carries no meaning.
"""

from math import isqrt, prod

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr_ray.clinical import ClinicalInputs, Encoding, PastVisits
from cxr_ray.findings import FINDINGS

SPLITS = ("train", "val", "test")
_FINDING_COUNT = len(FINDINGS)

_FLAGS = pa.list_(pa.uint8(), _FINDING_COUNT)
_SHARES = pa.list_(pa.float32(), _FINDING_COUNT)

_METADATA_FIELDS = (
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("patient_key", pa.string(), nullable=False),
    pa.field("visit", pa.int32(), nullable=False),
    pa.field("age_years", pa.float32()),
    pa.field("sex", pa.string()),
    pa.field("view", pa.string()),
    pa.field("history_count", pa.int32()),
    pa.field("history_age_gap", pa.float32()),
    pa.field("history_ever", _FLAGS),
    pa.field("history_last", _FLAGS),
    pa.field("history_last_2", _FLAGS),
    pa.field("history_last_3", _FLAGS),
    pa.field("history_fraction", _SHARES),
    pa.field("history_decayed_80", _SHARES),
    pa.field("history_decayed_50", _SHARES),
    pa.field("history_no_finding", pa.float32()),
    pa.field("history_ap", pa.float32()),
    pa.field("history_last_view", pa.string()),
    pa.field("history_last_2_view", pa.string()),
    pa.field("history_last_3_view", pa.string()),
    pa.field("labels", _FLAGS),
    pa.field("split", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
)
_PAPER_COLUMNS = ("age_years", "sex", "view", "history_ever")
_LATEST = ("history_last", "history_last_2", "history_last_3")
_LATEST_VIEWS = ("history_last_view", "history_last_2_view", "history_last_3_view")
_PAST_COLUMNS = (
    "history_count",
    "history_age_gap",
    "history_fraction",
    "history_decayed_80",
    "history_decayed_50",
    "history_no_finding",
    "history_ap",
    *_LATEST,
    *_LATEST_VIEWS,
)


def record_schema(size: int | None) -> pa.Schema:
    """The Arrow schema of a shard.

    ``visit`` is the chronological rank within the patient from 0. ``history_*`` come from strictly earlier visits only: their
    number; the years since the latest; for each finding whether it was ever seen, whether it was seen at the latest, the
    second and the third latest, on which fraction of them, and the means in which each visit weighs 0.8 and 0.5 of the one
    after it; the fraction without any finding and the fraction taken AP; and the views of the latest three.

    ``pixels`` holds the stored square row by row, size x size bytes of uint8, and is absent where `size` is None. Plain bytes
    are read some twenty times as fast from Parquet as a list of numbers, which is what an Arrow tensor is stored as.
    """
    if size is None:
        return pa.schema(_METADATA_FIELDS)
    shape = {"dtype": "uint8", "shape": f"[{size}, {size}]"}
    return pa.schema([*_METADATA_FIELDS, pa.field("pixels", pa.binary(size * size), nullable=False, metadata=shape)])


def packed(rows: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Pack an array of shape (N, ...) into N strings of bytes, which cost nothing to unpack."""
    width = rows.dtype.itemsize * prod(rows.shape[1:])
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))])


def unpacked(column: pa.ChunkedArray, dtype: type[np.generic]) -> np.ndarray:
    """What `packed` packed: shape (N, K), read-only where no copy was needed."""
    width = column.type.byte_width
    count = width // np.dtype(dtype).itemsize
    chunks = [
        np.frombuffer(chunk.buffers()[1], dtype=dtype, count=len(chunk) * count, offset=chunk.offset * width)
        for chunk in column.chunks
    ]
    return (chunks[0] if len(chunks) == 1 else np.concatenate(chunks)).reshape(-1, count)


def pixel_column(squares_NHW: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Pack stored squares (uint8, shape (N, size, size)) into the ``pixels`` column."""
    return packed(squares_NHW.astype(np.uint8, copy=False))


def fixed_lists(values: np.ndarray, known: np.ndarray | None = None) -> pa.FixedSizeListArray:
    """Pack an (N, 14) array into Arrow fixed-size lists; rows where `known` (bool, shape (N,)) is False become null."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    mask = None if known is None else pa.array(~known)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=mask)


def from_fixed_lists(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Unpack fixed-size lists of 14 to float32, shape (N, 14), NaN where a row is null."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    known = array.is_valid().to_numpy(zero_copy_only=False)
    unpacked = np.full((len(array), _FINDING_COUNT), np.nan, dtype=np.float32)
    unpacked[known] = array.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, _FINDING_COUNT)
    return unpacked


def _numbers(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of nullable numbers as float32, shape (N,), NaN where null."""
    return pc.cast(column, pa.float32()).to_numpy(zero_copy_only=False)


def _one_of(column: pa.ChunkedArray, one: str, zero: str) -> np.ndarray:
    # A column without a single text may have come without a type.
    return _numbers(pc.index_in(pc.cast(column, pa.string()), value_set=pa.array([zero, one])))


def clinical_columns(encoding: Encoding) -> tuple[str, ...]:
    """The columns of a shard that `clinical_inputs` reads for an encoding."""
    return _PAPER_COLUMNS if encoding == "paper" else (*_PAPER_COLUMNS, *_PAST_COLUMNS)


def clinical_inputs(table: pa.Table, encoding: Encoding = "paper") -> ClinicalInputs:
    """The clinical values of a table that has `clinical_columns(encoding)`; those of the paper's encoding have no `past`."""
    return ClinicalInputs(
        age_years=_numbers(table["age_years"]),
        male=_one_of(table["sex"], "M", "F"),
        ap=_one_of(table["view"], "AP", "PA"),
        ever=from_fixed_lists(table["history_ever"]),
        past=_past_visits(table) if encoding == "rich" else None,
    )


def _past_visits(table: pa.Table) -> PastVisits:
    return PastVisits(
        count=_numbers(table["history_count"]),
        age_gap=_numbers(table["history_age_gap"]),
        fraction=from_fixed_lists(table["history_fraction"]),
        decayed_80=from_fixed_lists(table["history_decayed_80"]),
        decayed_50=from_fixed_lists(table["history_decayed_50"]),
        no_finding=_numbers(table["history_no_finding"]),
        ap=_numbers(table["history_ap"]),
        last=np.stack([from_fixed_lists(table[name]) for name in _LATEST], axis=1),
        last_ap=np.stack([_one_of(table[name], "AP", "PA") for name in _LATEST_VIEWS], axis=1),
    )


def pixel_array(column: pa.ChunkedArray) -> np.ndarray:
    """The ``pixels`` of a table as one uint8 array, shape (N, size, size), read-only where no copy was needed."""
    size = isqrt(column.type.byte_width)
    return unpacked(column, np.uint8).reshape(-1, size, size)
