"""What an ingest leaves for people: the table at its end and the contact sheet."""

import io
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

from cxr_ray.dataset import LeftOutImage, Manifest, Shard, Split
from cxr_ray.findings import FINDINGS
from cxr_ray.records import SPLITS, fixed_lists, pixel_column
from ingest.contact_sheet import contact_sheet
from ingest.summary import print_summary

SIZE = 32


def left_out(reason: str, *, refused: bool) -> LeftOutImage:
    return LeftOutImage(image="x", reason=reason, refused=refused)


def manifest_of(shards: dict[str, list[Shard]], **values: object) -> Manifest:
    splits = {
        name: Split(
            images=sum(shard.rows for shard in shards.get(name, [])),
            patients=3,
            labelled=2,
            prevalence=dict.fromkeys(FINDINGS, 0.1234) if name == "train" else {},
            shards=shards.get(name, []),
        )
        for name in SPLITS
    }
    given = dict(run="0" * 64, created=datetime(2026, 1, 2, tzinfo=UTC), code_version="0", source="nih", metadata_sha256=None)
    given |= dict(settings={}, findings=list(FINDINGS), size=SIZE, pixel_recipe={}, splits=splits, counts={"ingested": 12_345})
    return Manifest(
        **given | dict(images_per_second=151.2, warnings=["visits were put in another order"], left_out=[]) | values
    )


def printed(manifest: Manifest, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, out: str = "/data/set") -> str:
    monkeypatch.setenv("COLUMNS", "80")
    print_summary(out, manifest)
    return capsys.readouterr().out


def test_the_table_says_what_is_there_what_is_not_and_how_fast(capsys, monkeypatch):
    entries = [left_out("BodyPartExamined is HAND; only chest radiographs are read", refused=True)] * 3
    entries += [left_out(f"its code stream is {n}x7, the header says 8x9; send again", refused=False) for n in (1, 22)]
    entries += [left_out("pixels do not decode as JPEG 2000; send again", refused=False)]
    shards = {"train": [Shard(path="a", rows=1200), Shard(path="b", rows=1034)]}
    shown = printed(manifest_of(shards, left_out=entries), capsys, monkeypatch)
    lines = [line.split() for line in shown.splitlines()]
    assert ["images", "2,234", "0", "0"] in lines
    assert ["shards", "2", "0", "0"] in lines
    assert ["Hernia", "12.34%", "-", "-"] in lines
    assert ["3", "refused", "BodyPartExamined", "is", "HAND"] in lines
    assert ["2", "unreadable", "its", "code", "stream", "is", "#,", "the", "header", "says", "#"] in lines
    assert ["1", "unreadable", "pixels", "do", "not", "decode", "as", "JPEG", "2000"] in lines
    assert "file by file: /data/set/left-out.csv" in shown
    assert "warning: visits were put in another order" in shown
    assert "151 images/s; look at /data/set/contact-sheet.png" in shown
    assert "ingested 12,345" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_many_reasons_are_cut_and_counted(capsys, monkeypatch):
    entries = [left_out(f"reason {letter}; remedy", refused=False) for letter in "abcdefghijklm"]
    shown = printed(manifest_of({}, left_out=entries), capsys, monkeypatch)
    assert "3 further reasons" in shown


def test_without_labels_there_is_no_prevalence(capsys, monkeypatch):
    manifest = manifest_of({})
    splits = {name: split.model_copy(update={"prevalence": {}}) for name, split in manifest.splits.items()}
    shown = printed(manifest.model_copy(update={"splits": splits}), capsys, monkeypatch)
    assert "images" in shown
    assert "Hernia" not in shown


def test_metadata_only_has_no_sheet_and_no_rate_to_speak_of(capsys, monkeypatch):
    shown = printed(manifest_of({}, size=None, pixel_recipe=None), capsys, monkeypatch)
    assert "contact-sheet" not in shown
    assert "Left out" not in shown


def test_secrets_of_the_place_are_not_printed(capsys, monkeypatch):
    assert "secret" not in printed(manifest_of({}), capsys, monkeypatch, "s3://me:secret@bucket/set")


@pytest.mark.parametrize("rows", [1, 9, 200])
def test_the_sheet_shows_up_to_64_radiographs_each_once(tmp_path, rows):
    """Each radiograph is of one grey, which is found again in the sheet."""
    greys = np.arange(rows) % 200 + 30
    squares = np.broadcast_to(greys[:, None, None], (rows, SIZE, SIZE)).astype(np.uint8)
    labels = np.zeros((rows, 14), np.uint8)
    labels[::2, :6] = 1
    table = pa.table(
        {
            "pixels": pixel_column(squares),
            "split": ["train"] * rows,
            "age_years": pa.array([None if row % 3 else 50.0 for row in range(rows)], pa.float32()),
            "sex": pa.array([None if row % 4 else "F" for row in range(rows)]),
            "view": pa.array([None if row % 5 else "AP" for row in range(rows)]),
            "labels": fixed_lists(labels, np.arange(rows) % 7 > 0),
        }
    )
    shards = []
    for number, start in enumerate(range(0, rows, 50)):
        part = table.slice(start, 50)
        pq.write_table(part, tmp_path / f"{number}.parquet", row_group_size=20)
        shards.append(Shard(path=f"{number}.parquet", rows=part.num_rows))
    manifest = manifest_of({"train": shards})
    content = contact_sheet(manifest, fs.LocalFileSystem(), str(tmp_path))
    sheet = np.asarray(Image.open(io.BytesIO(content)))
    found = [grey for grey in range(30, 230) if (sheet == grey).sum() >= 100 * 100]
    assert len(found) == min(rows, 64)
    assert set(found) <= set(greys)
    assert content == contact_sheet(manifest, fs.LocalFileSystem(), str(tmp_path))
