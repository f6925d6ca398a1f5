"""Rows of a split by position: the right ones, in the order asked for, or an error."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from cxr_ray.clinical import ClinicalLayout, encode, fit_statistics
from cxr_ray.epoch_order import RowGroup
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.records import clinical_inputs, from_fixed_lists, packed, pixel_array, pixel_column, record_schema, unpacked
from cxr_ray.shard_rows import ShardReader

SIZE = 8
SHARDS = (23, 10, 7)
GROUP = 6


def table(first: int, rows: int) -> pa.Table:
    """Records whose values follow from their position in the split."""
    positions = np.arange(first, first + rows)
    schema = record_schema(SIZE)
    flags = np.array(
        [[(position >> finding) & 1 for finding in range(len(FINDINGS))] for position in positions], dtype=np.uint8
    )
    columns = {
        "image_id": [f"{position:04d}.png" for position in positions],
        "patient_key": ["p"] * rows,
        "visit": positions.astype(np.int32),
        "age_years": positions.astype(np.float32),
        "sex": ["M" if position % 2 else "F" for position in positions],
        "view": ["AP" if position % 3 else None for position in positions],
        "history_ever": pa.array(
            [list(row) if position % 5 else None for position, row in zip(positions, flags, strict=True)],
            type=schema.field("history_ever").type,
        ),
        "labels": pa.array(
            [list(row) if position % 7 else None for position, row in zip(positions, flags, strict=True)],
            type=schema.field("labels").type,
        ),
        "split": ["train"] * rows,
        "source": ["test"] * rows,
        "pixels": pixel_column(np.broadcast_to(positions.astype(np.uint8)[:, None, None], (rows, SIZE, SIZE))),
    }
    return pa.table([columns.get(field.name, pa.nulls(rows, field.type)) for field in schema], schema=schema)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[RowGroup, ...]:
    folder = tmp_path_factory.mktemp("shards")
    groups, first = [], 0
    for number, rows in enumerate(SHARDS):
        path = str(folder / f"{number}.parquet")
        pq.write_table(table(first, rows), path, row_group_size=GROUP)
        for index, begin in enumerate(range(0, rows, GROUP)):
            count = min(GROUP, rows - begin)
            groups.append(RowGroup(path, index, count, first))
            first += count
    return tuple(groups)


@pytest.fixture(scope="module")
def whole() -> pa.Table:
    return table(0, sum(SHARDS))


def reader(shards, whole, *, size=SIZE, layout=ClinicalLayout()) -> ShardReader:  # noqa: B008 - frozen
    return ShardReader(fs.LocalFileSystem(), shards, size, layout, fit_statistics(clinical_inputs(whole)))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.integers(0, sum(SHARDS) - 1), min_size=1, max_size=30))
def test_rows_come_in_the_order_asked_for(shards, whole, rows):
    made = reader(shards, whole)
    asked = np.array(rows, dtype=np.int64)
    read = made.read(asked)
    expected = whole.take(asked)
    assert read["row"].to_pylist() == rows
    np.testing.assert_array_equal(pixel_array(read["pixels"]), pixel_array(expected["pixels"]))
    np.testing.assert_array_equal(unpacked(read["labels"], np.float32), from_fixed_lists(expected["labels"]))
    np.testing.assert_array_equal(
        unpacked(read["clinical"], np.float32), encode(clinical_inputs(expected), made.statistics, made.layout)
    )
    assert made.image_ids(asked) == expected["image_id"].to_pylist()


def test_what_the_network_does_not_read_is_not_read(shards, whole):
    rows = np.arange(sum(SHARDS))
    assert reader(shards, whole, size=None).read(rows).column_names == ["row", "labels", "clinical"]
    bare = reader(shards, whole, layout=ClinicalLayout("paper", meta=False, history=False)).read(rows)
    assert bare.column_names == ["row", "labels", "pixels"]


def test_withheld_values_take_the_training_mean(shards, whole):
    rows = np.tile(np.arange(sum(SHARDS)), 500)
    made = reader(shards, whole)
    full, hidden = (
        unpacked(made.read(rows)["clinical"], np.float32),
        unpacked(made.read(rows, withhold=0.2, seed=(1, 2))["clinical"], np.float32),
    )
    again = unpacked(made.read(rows, withhold=0.2, seed=(1, 2))["clinical"], np.float32)
    np.testing.assert_array_equal(hidden, again)
    assert not np.array_equal(hidden, unpacked(made.read(rows, withhold=0.2, seed=(1, 3))["clinical"], np.float32))
    age_hidden = (hidden[:, 0] == 0) & (full[:, 0] != 0)
    # Hidden alone or together with the other three: 1 - 0.8 * 0.8.
    assert age_hidden.mean() == pytest.approx(0.36, abs=0.03)
    changed = (hidden != full).any(axis=1)
    np.testing.assert_array_equal(hidden[~changed], full[~changed])
    known_history = (full[:, 3:] != np.array(made.statistics.ever_mean, dtype=np.float32)).any(axis=1)
    history_hidden = (hidden[:, 3:] == np.array(made.statistics.ever_mean, dtype=np.float32)).all(axis=1)
    assert history_hidden[known_history].mean() == pytest.approx(0.36, abs=0.03)


def test_packing_keeps_every_bit():
    values = np.array([[0.1, np.nan, -np.inf], [1e-40, 3.0, -0.0]], dtype=np.float32)
    column = pa.chunked_array([packed(values), packed(values[:1])])
    assert unpacked(column, np.float32).tobytes() == np.concatenate([values, values[:1]]).tobytes()
    assert unpacked(column.slice(1, 2), np.float32).tobytes() == np.concatenate([values[1:], values[:1]]).tobytes()


def test_a_shard_that_is_gone_or_another_is_told(shards, whole, tmp_path):
    gone = RowGroup(str(tmp_path / "gone.parquet"), 0, GROUP, 0)
    with pytest.raises(CxrRayError, match=r"gone\.parquet: cannot be read .*; ingest again"):
        reader((gone,), whole).read(np.array([0]))
    other = RowGroup(shards[0].path, 0, GROUP + 1, 0)
    with pytest.raises(CxrRayError, match=rf"row group 0 has {GROUP} rows instead of {GROUP + 1}; ingest again"):
        reader((other,), whole).read(np.array([0]))
