"""The Radiograph record: one image with everything that training knows of it, as a row of a shard.

Age, sex, view, labels and history are nullable: missing is not zero and not negative. Row order carries no meaning.
"""

import numpy as np
import pyarrow as pa

from cxr_ray.clinical import ClinicalInputs
from cxr_ray.findings import FINDINGS

SPLITS = ("train", "val", "test")
_FINDING_COUNT = len(FINDINGS)

_METADATA_FIELDS = (
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("patient_key", pa.string(), nullable=False),
    pa.field("visit", pa.int32(), nullable=False),
    pa.field("age_years", pa.float32()),
    pa.field("sex", pa.string()),
    pa.field("view", pa.string()),
    pa.field("history_count", pa.int32()),
    pa.field("history_ever", pa.list_(pa.uint8(), _FINDING_COUNT)),
    pa.field("history_last", pa.list_(pa.uint8(), _FINDING_COUNT)),
    pa.field("history_fraction", pa.list_(pa.float32(), _FINDING_COUNT)),
    pa.field("labels", pa.list_(pa.uint8(), _FINDING_COUNT)),
    pa.field("split", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
)
CLINICAL_COLUMNS = ("age_years", "sex", "view", "history_ever")


def record_schema(size: int | None) -> pa.Schema:
    """The Arrow schema of a shard.

    ``visit`` is the chronological rank within the patient from 0; ``history_*`` come from strictly earlier visits only:
    their number, and for each finding whether it was ever seen, whether it was seen last time, and on which fraction
    of them. ``pixels`` is a canonical Arrow fixed-shape tensor (uint8, size x size) and absent where `size` is None.
    """
    pixels = [] if size is None else [pa.field("pixels", pa.fixed_shape_tensor(pa.uint8(), (size, size)), nullable=False)]
    return pa.schema([*_METADATA_FIELDS, *pixels])


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


def _one_of(column: pa.ChunkedArray, one: str, zero: str) -> np.ndarray:
    text = column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()
    values = np.full(len(text), np.nan, dtype=np.float32)
    values[text == one] = 1.0
    values[text == zero] = 0.0
    return values


def clinical_inputs(table: pa.Table) -> ClinicalInputs:
    """The clinical values of a table that has `CLINICAL_COLUMNS`."""
    age = table["age_years"].to_numpy()
    return ClinicalInputs(
        age_years=np.asarray(age, dtype=np.float32),
        male=_one_of(table["sex"], "M", "F"),
        ap=_one_of(table["view"], "AP", "PA"),
        ever=from_fixed_lists(table["history_ever"]),
    )


def pixel_array(column: pa.ChunkedArray) -> np.ndarray:
    """The pixels of a table as one uint8 array, shape (N, size, size)."""
    chunks = [chunk.to_numpy_ndarray() for chunk in column.chunks if len(chunk)]
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
