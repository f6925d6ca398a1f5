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

from cxr_ray.clinical import ClinicalInputs, ClinicalLayout, ClinicalStatistics, encode
from cxr_ray.records import (
    clinical_columns,
    clinical_inputs,
    fixed_lists,
    from_fixed_lists,
    pixel_array,
    pixel_column,
    record_schema,
)

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


def test_the_past_is_read_only_where_it_is_asked_for(pixels):
    table = record_table(pixels)
    assert clinical_inputs(table).past is None
    past = clinical_inputs(table, "rich").past
    for values in vars(past).values():
        assert values.dtype == np.float32
        assert np.isnan(values[1::2]).all()
    np.testing.assert_array_equal(past.count[::2], [0, 0, 0])
    np.testing.assert_allclose(past.age_gap[::2], [0, 1.2, 2.4])
    np.testing.assert_allclose(past.no_finding[::2], [0, 0.4, 0.8])
    np.testing.assert_allclose(past.ap[::2], [1, 0.6, 0.2])
    np.testing.assert_array_equal(past.last_ap[::2], [[0] * 3, [1] * 3, [1] * 3])
    flags = np.array([1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(past.last[0], [flags] * 3)
    for shares in (past.fraction, past.decayed_80, past.decayed_50):
        np.testing.assert_array_equal(shares[0], flags / 4)


def test_each_column_of_the_past_is_read_into_its_own_place():
    """A single row in which no two columns agree."""
    lists = ("history_ever", "history_last", "history_last_2", "history_last_3", *_SHARES)
    columns = {name: fixed_lists(np.eye(14, dtype=np.float32)[place : place + 1]) for place, name in enumerate(lists)}
    numbers = {"history_count": 5, "history_age_gap": 1.5, "history_no_finding": 0.25, "history_ap": 0.75}
    views = dict(zip(_VIEWS, ("AP", None, "PA"), strict=True))
    stated = {"age_years": 61.0, "sex": "F", "view": "AP"} | numbers | views
    read = clinical_inputs(pa.table(columns | {name: pa.array([value]) for name, value in stated.items()}), "rich")
    past = read.past
    assert (read.age_years, read.male, read.ap) == (61, 0, 1)
    assert (past.count, past.age_gap, past.no_finding, past.ap) == (5, 1.5, 0.25, 0.75)
    np.testing.assert_array_equal(past.last_ap, [[1, np.nan, 0]])
    read_lists = (read.ever[0], *past.last[0], past.fraction[0], past.decayed_80[0], past.decayed_50[0])
    assert [int(values.argmax()) for values in read_lists] == list(range(7))


@pytest.mark.parametrize("encoding", ["paper", "rich"])
def test_clinical_columns_are_what_is_read(pixels, encoding):
    table = record_table(pixels).select(clinical_columns(encoding))
    assert len(clinical_inputs(table, encoding)) == 6
    for name in clinical_columns(encoding):
        with pytest.raises(KeyError, match=name):
            clinical_inputs(table.drop_columns([name]), encoding)


def test_all_of_the_history_is_read_by_the_rich_encoding():
    history = {name for name in record_schema(None).names if name.startswith("history_")}
    assert {"age_years", "sex", "view"} | history == set(clinical_columns("rich"))


@pytest.mark.parametrize("encoding", ["paper", "rich"])
@pytest.mark.parametrize("rows", [0, 6])
def test_clinical_inputs_of_chunked_columns(pixels, encoding, rows):
    table = record_table(pixels).slice(0, rows)
    cut = pa.concat_tables([table.slice(0, 1), table.slice(1, 3), table.slice(4)])
    statistics = ClinicalStatistics(48.0, 16.5, 0.56, 0.4, (0.1,) * 14, (0.2,) * 111)
    one, other = (encode(clinical_inputs(each, encoding), statistics, ClinicalLayout(encoding)) for each in (table, cut))
    assert len(one) == rows
    np.testing.assert_array_equal(one, other)
    parts = [clinical_inputs(each, encoding) for each in (cut.slice(0, 2), cut.slice(2))]
    joined = encode(ClinicalInputs.concatenate(parts), statistics, ClinicalLayout(encoding))
    np.testing.assert_array_equal(one, joined)


def test_pixels_of_chunked_columns(pixels):
    table = record_table(pixels)
    cut = pa.concat_tables([table.slice(0, 1), table.slice(1, 3), table.slice(4)])
    np.testing.assert_array_equal(pixel_array(cut["pixels"]), pixels)
