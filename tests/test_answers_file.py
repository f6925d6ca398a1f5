"""The result of many images: whole under its name or not there, and read by what people read Parquet with."""

import json

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.findings import FINDINGS
from serve.answers_file import ANSWER_SCHEMA, METADATA_KEY, answers_file, claim, positive_column

MODEL = ("multi-input", "3", "f" * 64)
ROW_SCHEMA = pa.schema([field for field in ANSWER_SCHEMA if not field.name.startswith("model_")])


def rows(first, count):
    """Even files are answered, odd ones refused."""
    made = []
    for number in range(first, first + count):
        row = {
            "file": f"{number}.png",
            "status": "answered",
            "age": 60.5,
            "history": [],
            "missing": ["sex", "view"],
            "warnings": [],
        }
        row |= dict.fromkeys(FINDINGS, 0.25) | {positive_column(name): name == "Mass" for name in FINDINGS}
        made.append({"file": f"{number}.png", "status": "refused", "reason": "is empty"} if number % 2 else row)
    return pa.Table.from_pylist(made, schema=ROW_SCHEMA)


def test_rows_come_back_in_their_order_in_groups_of_bounded_size(tmp_path):
    out = tmp_path / "results.parquet"
    with answers_file(str(out), MODEL, {"thresholds": {"Mass": 0.2}}) as answers:
        for first in range(0, 20_000, 100):
            answers.write(rows(first, 100))
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["results.parquet"]
    read = pq.read_table(out)
    assert read.schema.equals(ANSWER_SCHEMA)
    assert read.drop_columns(["model_name", "model_version", "model_digest"]).equals(rows(0, 20_000))
    assert set(read["model_digest"].to_pylist()) == {"f" * 64}
    described = pq.read_metadata(out)
    assert max(described.row_group(group).num_rows for group in range(described.num_row_groups)) < 10_000
    assert json.loads(described.metadata[METADATA_KEY.encode()]) == {"thresholds": {"Mass": 0.2}}


def test_pandas_and_duckdb_read_it(tmp_path):
    out = tmp_path / "results.parquet"
    with answers_file(str(out), MODEL, {}) as answers:
        answers.write(rows(0, 10))
    frame = pd.read_parquet(out)
    assert frame[frame.status == "answered"].Mass.mean() == 0.25
    asked = f"SELECT count(*), sum(Mass_positive::int), max(age) FROM '{out}' WHERE list_contains(missing, 'sex')"
    assert duckdb.sql(asked).fetchall() == [(5, 5, 60.5)]


def test_a_run_that_breaks_off_leaves_what_was_there(tmp_path):
    out = tmp_path / "results.parquet"
    out.write_bytes(b"the result of yesterday")
    with pytest.raises(KeyboardInterrupt), answers_file(str(out), MODEL, {}) as answers:
        answers.write(rows(0, 20_000))
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"results.parquet": b"the result of yesterday"}


def test_what_a_killed_run_left_is_replaced(tmp_path):
    out = tmp_path / "results.parquet"
    out.with_name("results.parquet.partial").write_bytes(b"PAR1 and then nothing")
    claim(str(out), overwrite=False)
    with answers_file(str(out), MODEL, {}) as answers:
        answers.write(rows(0, 3))
    assert pq.read_table(out).num_rows == 3
    assert [path.name for path in tmp_path.iterdir()] == ["results.parquet"]


def test_a_place_is_claimed_before_the_work(tmp_path):
    held = tmp_path / "held.parquet"
    held.write_bytes(b"precious")
    with pytest.raises(CxrRayError, match="is there already; choose another name or give --overwrite"):
        claim(str(held), overwrite=False)
    claim(str(held), overwrite=True)
    assert held.read_bytes() == b"precious"
    for folder in (str(tmp_path), f"{tmp_path}/new/"):
        with pytest.raises(UsageError, match=r"is a folder; name a file in it, such as .*/results\.parquet"):
            claim(folder, overwrite=True)
    with pytest.raises(CxrRayError, match="cannot be written"):
        claim(f"{held}/below.parquet", overwrite=False)
    claim(f"{tmp_path}/new/results.parquet", overwrite=False)
    assert list((tmp_path / "new").iterdir()) == []
