"""Writing shards: every row once, whatever happens on the way, in files that others read."""

import hashlib
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

import ingest.shards
from cxr_ray import storage
from cxr_ray.dataset import MANIFEST, Dataset
from cxr_ray.decoding import Format
from cxr_ray.errors import CxrRayError
from cxr_ray.records import SPLITS, fixed_lists, pixel_array, record_schema
from ingest.contact_sheet import CONTACT_SHEET
from ingest.shard_tasks import OUTCOMES, Outcome, ShardPlan, write_shards
from ingest.shards import LEFT_OUT, LeftOut, Source, write_dataset

SIZE = 16


def film(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (40, 30), dtype=np.uint8)


def images(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(film(number)).save(folder / f"{number:04d}.png")
    return [f"{folder}/{number:04d}.png" for number in range(count)]


def records(locations: list[str | None], stamps: list[str] | None = None) -> pa.Table:
    """Rows whose split is train, val or test in turns of ten: eight, one and one."""
    count = len(locations)
    known = {
        "image_id": [f"image-{number:04d}" for number in range(count)],
        "patient_key": [f"patient-{number:04d}" for number in range(count)],
        "visit": [0] * count,
        "split": ["val" if number % 10 == 8 else "test" if number % 10 == 9 else "train" for number in range(count)],
        "source": ["made"] * count,
        "labels": fixed_lists(np.arange(count * 14).reshape(count, 14).astype(np.uint8) % 3 % 2),
    }
    schema = record_schema(None)
    table = pa.table({field.name: known.get(field.name, pa.nulls(count, field.type)) for field in schema}, schema=schema)
    return table.append_column("location", pa.array(locations, pa.string())).append_column(
        "stamp", pa.array(stamps or ["1-1"] * count)
    )


def made_of(**values: object) -> Source:
    given = dict(
        kind="made", filesystem=fs.LocalFileSystem(), format=Format.PICTURE, metadata_sha256=None, settings={}, counts={}
    )
    return Source(**given | values)


def write(table: pa.Table, out: Path, source: Source | None = None, **options: object):
    return write_dataset(
        table, str(out), source or made_of(), **dict(size=SIZE, max_quarantined=0.1, overwrite=False) | options
    )


def squares(out: Path) -> dict[str, np.ndarray]:
    """Image id to stored square; every id once."""
    dataset = Dataset(str(out))
    held = [split for split in SPLITS if dataset.manifest.splits[split].images]
    table = pa.concat_tables([dataset.read(split, ["image_id", "pixels"]) for split in held])
    names = table["image_id"].to_pylist()
    assert len(set(names)) == len(names)
    return dict(zip(names, pixel_array(table["pixels"]), strict=True))


def everything(out: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of change of every file."""
    return {
        str(path.relative_to(out)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in out.rglob("*")
        if path.is_file()
    }


def expected(count: int) -> dict[str, np.ndarray]:
    from cxr_ray.pixels import full_range, stored_square

    return {f"image-{number:04d}": stored_square(full_range(film(number)), SIZE) for number in range(count)}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name, square in wanted.items():
        np.testing.assert_array_equal(found[name], square)


pytestmark = pytest.mark.ray


def test_every_row_once_in_files_that_the_manifest_names(ray_cluster, tmp_path):
    manifest = write(records(images(tmp_path / "png", 100)), tmp_path / "out")
    assert_same(squares(tmp_path / "out"), expected(100))
    assert {name: split.images for name, split in manifest.splits.items()} == {"train": 80, "val": 10, "test": 10}
    on_disk = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    shards = {shard.path for split in manifest.splits.values() for shard in split.shards}
    assert on_disk == shards | {MANIFEST, LEFT_OUT, CONTACT_SHEET}
    assert manifest.images_per_second > 0
    Image.open(tmp_path / "out" / CONTACT_SHEET).verify()


def test_a_second_identical_run_changes_nothing(ray_cluster, tmp_path):
    table = records(images(tmp_path / "png", 40))
    first = write(table, tmp_path / "out")
    before = everything(tmp_path / "out")
    assert write(table, tmp_path / "out") == first
    assert everything(tmp_path / "out") == before


def test_other_rows_need_overwrite(ray_cluster, tmp_path):
    paths = images(tmp_path / "png", 40)
    write(records(paths), tmp_path / "out")
    before = everything(tmp_path / "out")
    for other in (records(paths[:30]), records(paths, ["2-2"] * 40)):
        with pytest.raises(CxrRayError, match=r"holds a dataset of other rows.*--overwrite"):
            write(other, tmp_path / "out")
    assert everything(tmp_path / "out") == before
    write(records(paths[:30]), tmp_path / "out", overwrite=True)
    assert_same(squares(tmp_path / "out"), expected(30))
    assert len([path for path in (tmp_path / "out").iterdir() if path.is_dir()]) == 1


def test_a_dataset_that_cannot_be_read_needs_overwrite(ray_cluster, tmp_path):
    paths = images(tmp_path / "png", 20)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text('{"schema_version": 1}')
    with pytest.raises(CxrRayError, match=r"cannot be read \(.*Input should be 2\); choose another place or give --overwrite"):
        ingest.shards.claim(str(tmp_path / "out"), {}, overwrite=False)
    with pytest.raises(CxrRayError, match=r"cannot be read .*--overwrite"):
        write(records(paths), tmp_path / "out")
    write(records(paths), tmp_path / "out", overwrite=True)
    assert_same(squares(tmp_path / "out"), expected(20))


@pytest.mark.parametrize("archive", ["zip", "tar", "tar.gz"])
def test_members_of_archives_are_rows_like_files(ray_cluster, tmp_path, archive):
    paths = images(tmp_path / "png", 90)
    place = tmp_path / f"archive.{archive}"
    if archive == "zip":
        with zipfile.ZipFile(place, "w") as made:
            for path in paths:
                made.write(path, f"in/{Path(path).name}")
    else:
        with tarfile.open(place, f"w:{archive.partition('.')[2]}") as made:
            for path in reversed(paths):
                made.add(path, f"in/{Path(path).name}")
    members = [f"{place}!/in/{Path(path).name}" for path in paths]
    manifest = write(records(members[:60] + paths[60:]), tmp_path / "out")
    assert_same(squares(tmp_path / "out"), expected(90))
    assert manifest.counts == {"ingested": 90, "quarantined": 0, "refused": 0}


def test_a_bad_file_costs_itself_only_and_is_accounted_for(ray_cluster, tmp_path):
    paths = images(tmp_path / "png", 50)
    Path(paths[3]).write_bytes(Path(paths[3]).read_bytes()[:200])
    Path(paths[9]).unlink()
    before = LeftOut("other/file.dcm", "hash", "Modality is CT; only radiographs are read", refused=True)
    source = made_of(root=str(tmp_path / "png"), left_out=(before,))
    manifest = write(records(paths), tmp_path / "out", source)
    assert set(squares(tmp_path / "out")) == set(expected(50)) - {"image-0003", "image-0009"}
    assert manifest.counts == {"ingested": 48, "quarantined": 2, "refused": 1}
    listed = pd.read_csv(tmp_path / "out" / LEFT_OUT).set_index("file")
    assert list(listed.index) == ["other/file.dcm", "0003.png", "0009.png"]
    assert list(listed["outcome"]) == ["refused", "unreadable", "unreadable"]
    assert "truncated" in listed["reason"]["0003.png"]
    assert {(entry.image, entry.refused) for entry in manifest.left_out} == {
        ("hash", True),
        ("image-0003", False),
        ("image-0009", False),
    }
    assert not any("png" in entry.reason or str(tmp_path) in entry.reason for entry in manifest.left_out)


def test_too_many_unreadable_files_stop_the_run_and_a_higher_limit_goes_on(ray_cluster, tmp_path):
    paths = images(tmp_path / "png", 60)
    for path in paths[::4]:
        Path(path).write_bytes(b"nothing")
    with pytest.raises(CxrRayError, match=r"of 60 images are unreadable, more than 10.0% .*--max-quarantined"):
        write(records(paths), tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()
    manifest = write(records(paths), tmp_path / "out", max_quarantined=0.5)
    assert manifest.counts == {"ingested": 45, "quarantined": 15, "refused": 0}


def test_an_interrupted_run_goes_on_behind_the_last_outcome(ray_cluster, tmp_path, monkeypatch):
    table = records(images(tmp_path / "png", 100))
    collect, collected = ingest.shards._collect, []

    def interrupt(outcome: Outcome, written: object) -> None:
        collect(outcome, written)
        collected.append(outcome)
        if len(collected) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ingest.shards, "_collect", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(table, tmp_path / "out")
    (run,) = (tmp_path / "out").glob("shards-*")
    written = {path.name: path.stat().st_mtime_ns for path in run.glob("*.parquet")}
    assert written
    # A shard without an outcome was torn; it is written again.
    torn = sorted(run.glob("*.parquet"))[0]
    torn.write_bytes(torn.read_bytes()[:100])
    number = torn.stem.split("-", 1)[1]
    (run / OUTCOMES / f"{number}.json").unlink(missing_ok=True)
    monkeypatch.setattr(ingest.shards, "_collect", collect)
    # Another cluster has another number of CPUs; the run keeps its layout.
    monkeypatch.setattr(ingest.shards, "cpus_at_most", lambda: 1)
    write(table, tmp_path / "out")
    assert_same(squares(tmp_path / "out"), expected(100))
    kept = [path for path in run.glob("*.parquet") if written.get(path.name) == path.stat().st_mtime_ns]
    assert len(kept) >= 1


def test_a_task_that_is_run_again_goes_on_within_its_archive(tmp_path):
    """Without Ray: the second attempt of a task writes only what the first has not."""
    paths = images(tmp_path / "png", 30)
    place = tmp_path / "a.tar"
    with tarfile.open(place, "w") as made:
        for path in paths:
            made.add(path, Path(path).name)
    table = records([f"{place}!/{Path(path).name}" for path in paths])
    table = table.append_column("task", pa.array([7] * 30, pa.int32()))
    (tmp_path / "out" / "shards-x" / OUTCOMES).mkdir(parents=True)
    plan = ShardPlan(str(tmp_path / "out"), "shards-x", 8, SIZE, fs.LocalFileSystem(), Format.PICTURE)

    def outcomes(rows):
        return [Outcome.from_row(row) for part in rows for row in part.to_pylist()]

    first = write_shards(table, plan)
    early = outcomes([next(first), next(first)])
    first.close()
    place.rename(tmp_path / "b.tar")
    (tmp_path / "b.tar").rename(place)
    again = outcomes(write_shards(table, plan))
    assert [outcome.fresh for outcome in again] == [False, False, *[True] * (len(again) - 2)]
    assert [outcome.images for outcome in again[:2]] == [outcome.images for outcome in early]
    found = [image for outcome in again for image in outcome.images]
    assert sorted(found) == sorted(expected(30))
    assert [outcome.fresh for outcome in outcomes(write_shards(table, plan))] == [False] * len(again)


def test_pandas_pyarrow_and_duckdb_open_a_shard(ray_cluster, tmp_path):
    import duckdb

    manifest = write(records(images(tmp_path / "png", 40)), tmp_path / "out")
    path = str(tmp_path / "out" / manifest.splits["train"].shards[0].path)
    wanted = expected(40)
    frame = pd.read_parquet(path)
    arrow = pq.read_table(path)
    duck = duckdb.sql(f"select image_id, pixels, labels from '{path}'").fetchall()
    assert len(frame) == arrow.num_rows == len(duck) == manifest.splits["train"].shards[0].rows
    for name, pixels in [
        *zip(frame["image_id"], frame["pixels"], strict=True),
        *zip(arrow["image_id"].to_pylist(), arrow["pixels"].to_pylist(), strict=True),
        *[(name, pixels) for name, pixels, _ in duck],
    ]:
        np.testing.assert_array_equal(np.frombuffer(pixels, np.uint8).reshape(SIZE, SIZE), wanted[name])
    assert len(duck[0][2]) == 14


def test_row_groups_are_a_few_megabytes(ray_cluster, tmp_path, monkeypatch):
    # Small squares make large groups of rows; the bound is on bytes.
    import ingest.shard_tasks

    table = records(images(tmp_path / "png", 64))
    shard = table.select(record_schema(None).names).append_column("pixels", pa.nulls(64, pa.binary(512 * 512)))
    content = ingest.shard_tasks.parquet_bytes(shard, 512)
    file = pq.ParquetFile(pa.BufferReader(content))
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [32, 32]
    assert file.metadata.row_group(0).column(file.schema.names.index("pixels")).compression == "UNCOMPRESSED"


def test_secrets_of_a_uri_stay_out_of_the_manifest(ray_cluster, tmp_path):
    settings = {"release": "s3://key:secret@bucket/nih?secret_key=secret&region=eu", "out": str(tmp_path), "overwrite": True}
    manifest = write(records(images(tmp_path / "png", 20)), tmp_path / "out", made_of(settings=settings))
    assert manifest.settings == {"release": "s3://bucket/nih?region=eu"}
    assert b"secret@" not in (tmp_path / "out" / MANIFEST).read_bytes()


def test_shown_leaves_other_places_as_they_are():
    for uri in ("/data/nih", "relative/nih", "s3://bucket/nih", "s3://bucket/nih?endpoint_override=127.0.0.1%3A9"):
        assert storage.shown(uri) == uri
    assert json.dumps(storage.shown("gs://user@bucket/x")) == '"gs://bucket/x"'
