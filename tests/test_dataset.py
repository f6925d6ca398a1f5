"""A dataset on disk: what the manifest names is read, in order; everything that does not agree with it is refused."""

import hashlib
import json
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr_ray.dataset import MANIFEST, Dataset, Manifest, Shard, Split
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS


def write(folder, size=24, **splits):
    """A dataset whose splits are lists of shards, each a list of image ids."""
    described = {}
    for name, shards in splits.items():
        listed = []
        for number, images in enumerate(shards):
            path = f"shards-1/{name}-{number:05d}.parquet"
            (folder / "shards-1").mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"image_id": images, "visit": list(range(len(images)))}), folder / path)
            listed.append(Shard(path=path, rows=len(images)))
        rows = sum(shard.rows for shard in listed)
        described[name] = Split(images=rows, patients=rows, labelled=rows, prevalence={}, shards=listed)
    manifest = Manifest(
        run="0" * 64,
        created=datetime(2026, 1, 2, tzinfo=UTC),
        code_version="0",
        source="test",
        metadata_sha256=None,
        settings={},
        findings=list(FINDINGS),
        size=size,
        pixel_recipe=None,
        splits=described,
        counts={},
        images_per_second=None,
        warnings=[],
        left_out=[],
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return Dataset(str(folder))


def refusal(action, *expected):
    with pytest.raises(CxrRayError) as refused:
        action()
    message = str(refused.value)
    assert "\n" not in message
    for part in expected:
        assert str(part) in message
    return message


def test_read_joins_the_shards_of_a_split(tmp_path):
    dataset = write(tmp_path, train=[["a", "b"], ["c"]], test=[["d"]])
    assert dataset.read("train", ["image_id"])["image_id"].to_pylist() == ["a", "b", "c"]
    assert dataset.read("test", ["image_id", "visit"]).to_pylist() == [{"image_id": "d", "visit": 0}]
    assert dataset.digest == hashlib.sha256((tmp_path / MANIFEST).read_bytes()).hexdigest()


def test_a_file_uri_is_the_same_place(tmp_path):
    write(tmp_path, train=[["a"]])
    assert Dataset(tmp_path.as_uri()).read("train", ["image_id"]).num_rows == 1


def test_row_groups_come_in_manifest_order(tmp_path):
    """Groups follow from the rows of each shard and the group size of the largest: no other file is opened."""
    dataset = write(tmp_path, val=[["a", "b", "c"], ["d", "e", "f", "g", "h"], ["i"]])
    largest = tmp_path / "shards-1" / "val-00001.parquet"
    pq.write_table(pq.read_table(largest), largest, row_group_size=2)
    (tmp_path / "shards-1" / "val-00000.parquet").unlink()
    found = [(group.path[-10:-8], group.index, group.rows, group.first) for group in dataset.row_groups("val")]
    assert found == [
        *(("00", 0, 2, 0), ("00", 1, 1, 2)),
        *(("01", 0, 2, 3), ("01", 1, 2, 5), ("01", 2, 1, 7)),
        ("02", 0, 1, 8),
    ]
    largest.unlink()
    refusal(lambda: dataset.row_groups("val"), "val-00001.parquet", "cannot be read", "ingest again")


def test_files_that_the_manifest_does_not_list_are_not_part_of_the_dataset(tmp_path):
    dataset = write(tmp_path, train=[["a"]])
    pq.write_table(pa.table({"image_id": ["stray"], "visit": [0]}), tmp_path / "shards-1" / "train-00001.parquet")
    assert dataset.read("train", ["image_id"])["image_id"].to_pylist() == ["a"]
    assert [group.rows for group in dataset.row_groups("train")] == [1]


def test_no_manifest(tmp_path):
    refusal(lambda: Dataset(str(tmp_path)), tmp_path, MANIFEST, "cxr-ray ingest")
    refusal(lambda: Dataset(str(tmp_path / "absent")), "absent", MANIFEST)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"\xff\xfe" + content,
        lambda content: json.dumps(json.loads(content) | {"schema_version": 1}).encode(),
        lambda content: json.dumps(json.loads(content) | {"unheard_of": 1}).encode(),
        lambda content: json.dumps({key: value for key, value in json.loads(content).items() if key != "splits"}).encode(),
    ],
    ids=["truncated", "empty", "no text", "other version", "unknown field", "absent field"],
)
def test_damaged_manifest(tmp_path, damage):
    write(tmp_path, train=[["a"]])
    path = tmp_path / MANIFEST
    path.write_bytes(damage(path.read_bytes()))
    refusal(lambda: Dataset(str(tmp_path)), path, "cxr-ray ingest")


def test_missing_shard(tmp_path):
    dataset = write(tmp_path, train=[["a"], ["b"]])
    lost = tmp_path / "shards-1" / "train-00001.parquet"
    lost.unlink()
    refusal(lambda: dataset.read("train", ["image_id"]), lost, "ingest again")


def test_damaged_shard(tmp_path):
    dataset = write(tmp_path, train=[["a"], ["b"]])
    damaged = tmp_path / "shards-1" / "train-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    refusal(lambda: dataset.read("train", ["image_id"]), damaged, "ingest again")


def test_rows_that_the_manifest_does_not_count(tmp_path):
    dataset = write(tmp_path, train=[["a"], ["b"]])
    pq.write_table(pa.table({"image_id": ["b", "c"], "visit": [0, 1]}), tmp_path / "shards-1" / "train-00001.parquet")
    refusal(lambda: dataset.read("train", ["image_id"]), tmp_path, "3 rows", "manifest says 2")


@pytest.mark.parametrize("split", ["val", "test", "training"])
def test_empty_or_unknown_split(tmp_path, split):
    dataset = write(tmp_path, train=[["a"]], val=[])
    refusal(lambda: dataset.read(split, ["image_id"]), tmp_path, split, "train (1)")


def test_pixels_are_required_for_training(tmp_path):
    assert write(tmp_path, train=[["a"]]).require_pixels() == 24
    refusal(write(tmp_path, size=None, train=[["a"]]).require_pixels, tmp_path, "--metadata-only")
