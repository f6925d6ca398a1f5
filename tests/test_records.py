"""Radiograph records: their Arrow form, nulls, and whether a reader without this package understands them."""

import hashlib
import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_ray.records import clinical_inputs, fixed_lists, from_fixed_lists, pixel_array, pixel_column, record_schema

PLAIN_READER = """
import hashlib, json, sys
import numpy as np
import pyarrow.parquet as pq

table = pq.read_table(sys.argv[1])
about = table.schema.field("pixels").metadata
array = np.array([np.frombuffer(row, about[b"dtype"].decode()) for row in table["pixels"].to_pylist()])
array = array.reshape(-1, *json.loads(about[b"shape"]))
rest = table.drop_columns(["pixels"]).to_pylist()
print(json.dumps({
    "shape": array.shape, "dtype": str(array.dtype),
    "sha256": hashlib.sha256(array.tobytes()).hexdigest(), "rows": rest,
    "foreign": sorted({"cxr_ray", "ingest", "ray", "torch"} & set(sys.modules)),
}))
"""

TABLES = st.integers(0, 12).flatmap(
    lambda rows: st.tuples(
        st.lists(st.lists(st.integers(0, 1), min_size=14, max_size=14), min_size=rows, max_size=rows),
        st.lists(st.booleans(), min_size=rows, max_size=rows),
        st.lists(st.integers(0, rows), max_size=3),
    )
)


_SHARES = ("history_fraction", "history_decayed_80", "history_decayed_50")
_VIEWS = ("history_last_view", "history_last_2_view", "history_last_3_view")


def record_table(pixels: np.ndarray) -> pa.Table:
    """Records of which every second one has no age, sex, view, history and labels."""
    rows = len(pixels)
    known = np.arange(rows) % 2 == 0
    flags = (np.arange(rows * 14).reshape(rows, 14) % 3 == 0).astype(np.uint8)

    def nullable(values, kind):
        return pa.array(values, type=kind, mask=~known)

    columns = {
        "image_id": pa.array([f"image-{row}" for row in range(rows)]),
        "patient_key": pa.array([f"patient-{row // 2}" for row in range(rows)]),
        "visit": pa.array(np.arange(rows) % 2, type=pa.int32()),
        "age_years": nullable(np.linspace(0, 95, rows), pa.float32()),
        "sex": nullable(np.resize(["M", "F", "F"], rows), pa.string()),
        "view": nullable(np.resize(["PA", "AP", "AP", "PA", "PA"], rows), pa.string()),
        "history_count": nullable(np.arange(rows) % 2, pa.int32()),
        "history_age_gap": nullable(np.linspace(0, 3, rows), pa.float32()),
        "history_no_finding": nullable(np.linspace(0, 1, rows), pa.float32()),
        "history_ap": nullable(np.linspace(1, 0, rows), pa.float32()),
        **{name: fixed_lists(flags, known) for name in ("history_ever", "history_last", "history_last_2", "history_last_3")},
        **{name: fixed_lists(flags.astype(np.float32) / 4, known) for name in _SHARES},
        **{name: nullable(np.resize(["PA", "AP", "AP"], rows), pa.string()) for name in _VIEWS},
        "labels": fixed_lists(flags, known),
        "split": pa.array(["train"] * rows),
        "source": pa.array(["test"] * rows),
        "pixels": pixel_column(pixels),
    }
    schema = record_schema(pixels.shape[1])
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (6, 24, 24), dtype=np.uint8)


def test_plain_pyarrow_reads_a_shard_in_a_fresh_interpreter(tmp_path, pixels):
    table = record_table(pixels)
    path = tmp_path / "shard.parquet"
    pq.write_table(table, path)
    ran = subprocess.run(
        [sys.executable, "-c", PLAIN_READER, str(path)], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    seen = json.loads(ran.stdout)
    assert (seen["shape"], seen["dtype"]) == ([6, 24, 24], "uint8")
    assert seen["sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()
    assert seen["rows"] == table.drop_columns(["pixels"]).to_pylist()
    assert seen["rows"][1]["age_years"] is seen["rows"][1]["labels"] is None
    assert seen["foreign"] == []


def test_schema_survives_parquet(tmp_path, pixels):
    path = tmp_path / "shard.parquet"
    pq.write_table(record_table(pixels), path, row_group_size=4)
    again = pq.read_table(path)
    assert again.schema.equals(record_schema(24))
    np.testing.assert_array_equal(pixel_array(again["pixels"]), pixels)
    np.testing.assert_array_equal(pixel_array(again.slice(1, 4)["pixels"]), pixels[1:5])


def test_metadata_only_differs_by_the_pixels():
    assert record_schema(None).names == [name for name in record_schema(24).names if name != "pixels"]


def test_what_identifies_a_row_is_not_nullable():
    schema = record_schema(24)
    required = {name for name in schema.names if not schema.field(name).nullable}
    assert required == {"image_id", "patient_key", "visit", "split", "source", "pixels"}


@given(TABLES)
@settings(deadline=None)
def test_fixed_lists_keep_nulls_through_slices_and_chunks(drawn):
    """However a column is cut and joined, each row is what was packed, and NaN where it was unknown."""
    rows, known, cuts = drawn
    values = np.array(rows, dtype=np.uint8).reshape(-1, 14)
    known = np.array(known, dtype=bool)
    expected = np.where(known[:, None], values, np.nan).astype(np.float32)
    packed = fixed_lists(values, known)
    np.testing.assert_array_equal(from_fixed_lists(packed), expected)

    edges = [0, *sorted(cuts), len(values)]
    chunks = [packed.slice(start, stop - start) for start, stop in pairwise(edges)]
    column = pa.chunked_array(chunks, type=packed.type)
    np.testing.assert_array_equal(from_fixed_lists(column), expected)
    for start, chunk in zip(edges, chunks, strict=False):
        np.testing.assert_array_equal(from_fixed_lists(chunk), expected[start : start + len(chunk)])
    np.testing.assert_array_equal(from_fixed_lists(column.slice(len(values) // 2)), expected[len(values) // 2 :])


def test_fixed_lists_of_a_view_with_other_strides():
    values = np.random.default_rng(0).random((14, 5)).astype(np.float32).T
    np.testing.assert_array_equal(from_fixed_lists(fixed_lists(values)), values)
    np.testing.assert_array_equal(from_fixed_lists(fixed_lists(values[::-2])), values[::-2])


def test_clinical_inputs_tell_unknown_from_zero(pixels):
    table = record_table(pixels)
    read = clinical_inputs(table)
    np.testing.assert_allclose(read.age_years, [0, np.nan, 38, np.nan, 76, np.nan])
    np.testing.assert_array_equal(read.male, [1, np.nan, 0, np.nan, 0, np.nan])
    np.testing.assert_array_equal(read.ap, [0, np.nan, 1, np.nan, 0, np.nan])
    assert np.isnan(read.ever[1::2]).all()
    np.testing.assert_array_equal(read.ever[0], [1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0])


def test_clinical_inputs_of_chunked_columns(pixels):
    table = record_table(pixels)
    cut = pa.concat_tables([table.slice(0, 1), table.slice(1, 3), table.slice(4)])
    for one, other in zip(vars(clinical_inputs(table)).values(), vars(clinical_inputs(cut)).values(), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(pixel_array(cut["pixels"]), pixels)
