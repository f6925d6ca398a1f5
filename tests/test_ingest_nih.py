"""The NIH release through real Ray: the counts of the real one, and every way in which a copy can be wrong."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from nih_release import HEADER, ROWS, Ingested, changed, film, image_of, ingest, make, refused, table_of
from PIL import Image

from cxr_ray.dataset import Dataset
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.findings import FINDINGS, names
from cxr_ray.pixels import decode_picture, stored_square
from cxr_ray.records import SPLITS, record_schema
from cxr_ray.settings import load_settings
from ingest.nih import NihSettings

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

METADATA = ["image_id", "patient_key", "visit", "age_years", "sex", "view", "labels", "split", "source"]
HISTORY = [name for name in record_schema(None).names if name.startswith("history_")]
PLAIN_READER = """
import json, sys
import pyarrow as pa
import pyarrow.parquet as pq

tables = [pq.read_table(path) for path in sys.argv[1:]]
table = pa.concat_tables(tables)
print(json.dumps({
    "rows": table.num_rows, "names": table.column_names, "pixels": str(table.schema.field("pixels").type),
    "bytes": sorted({len(square) for square in table["pixels"].to_pylist()}),
    "foreign": sorted({"cxr_ray", "ingest", "ray"} & set(sys.modules)),
}))
"""


# The real release: its table and lists whole, 909 of its images.


@pytest.fixture(scope="module")
def real(real_data, ray_cluster, tmp_path_factory) -> Ingested:
    return ingest(real_data / "nih", tmp_path_factory.mktemp("nih") / "dataset", size=64)


@pytest.fixture(scope="module")
def whole_table(real_data, ray_cluster, tmp_path_factory) -> Ingested:
    return ingest(real_data / "nih", tmp_path_factory.mktemp("nih") / "metadata", metadata_only=True)


def test_counts_of_the_part_of_the_release_that_is_there(real, real_data):
    counts = real.manifest.counts
    assert counts["rows"] == 112_120
    assert (counts["ingested"], counts["present"], counts["absent"]) == (909, 909, 111_211)
    assert (counts["official_train_val"], counts["official_test"]) == (86_524, 25_596)
    assert (counts["quarantined"], counts["duplicate_files"], counts["not_in_table"]) == (0, 0, 0)
    table = (real_data / "nih" / "Data_Entry_2017_v2020.csv").read_bytes()
    assert real.manifest.metadata_sha256 == hashlib.sha256(table).hexdigest()
    assert real.manifest.findings == list(FINDINGS)


def test_shards_hold_each_image_once_and_no_patient_twice(real, real_data):
    listed = set((real_data / "nih" / "test_list.txt").read_text().split())
    patients: dict[str, set[str]] = {}
    seen: Counter[str] = Counter()
    for split in SPLITS:
        table = real.dataset.read(split, METADATA)
        assert set(table["split"].to_pylist()) == {split}
        patients[split] = set(table["patient_key"].to_pylist())
        images = table["image_id"].to_pylist()
        seen.update(images)
        assert {name in listed for name in images} == {split == "test"}
        assert real.manifest.splits[split].patients == len(patients[split])
        assert sum(shard.rows for shard in real.manifest.splits[split].shards) == real.manifest.splits[split].images
    assert len(seen) == seen.total() == 909
    assert not patients["train"] & patients["val"]
    assert not (patients["train"] | patients["val"]) & patients["test"]
    assert real.manifest.splits["test"].images == 219


def test_prevalence_is_that_of_the_rows(real):
    for split in SPLITS:
        labels = np.array(real.dataset.read(split, ["labels"])["labels"].to_pylist())
        assert real.manifest.splits[split].labelled == len(labels)
        stated = [real.manifest.splits[split].prevalence[name] for name in FINDINGS]
        np.testing.assert_allclose(stated, labels.mean(axis=0), atol=1e-6)


def test_pixels_are_those_of_the_files(real, real_data):
    images = real.images()
    files = {path.name: path for path in (real_data / "nih").glob("images_*/images/*.png")}
    assert set(images) == set(files)
    by_mode: dict[str, list[str]] = {}
    for name, path in sorted(files.items()):
        with Image.open(path) as picture:
            by_mode.setdefault(picture.mode, []).append(name)
    assert {"RGB", "RGBA"} <= set(by_mode)
    for named in by_mode.values():
        for name in named[:: max(1, len(named) // 10)]:
            square = stored_square(decode_picture(files[name].read_bytes(), name), 64)
            np.testing.assert_array_equal(images[name], square)


def test_pixels_are_read_by_plain_pyarrow(real):
    paths = [path for split in SPLITS for path in real.dataset.paths(split)]
    ran = subprocess.run([sys.executable, "-c", PLAIN_READER, *paths], capture_output=True, text=True, timeout=60, check=True)
    seen = json.loads(ran.stdout)
    assert seen["rows"] == 909
    assert seen["bytes"] == [64 * 64]
    assert "binary" in seen["pixels"]
    assert set(METADATA + HISTORY) < set(seen["names"])
    assert seen["foreign"] == []


def test_the_whole_table_without_pixels(whole_table):
    rows = whole_table.rows("image_id", "patient_key", "visit", "age_years", "sex", "view", "split")
    assert len(rows) == len({row["image_id"] for row in rows}) == 112_120
    assert len({row["patient_key"] for row in rows}) == 30_805
    assert Counter(row["view"] for row in rows) == {"PA": 67_310, "AP": 44_810}
    assert Counter(row["sex"] for row in rows) == {"M": 63_340, "F": 48_780}
    ages = np.array([row["age_years"] for row in rows])
    assert (ages.min(), ages.max()) == (0, 95)
    assert max(Counter(row["patient_key"] for row in rows).values()) == max(row["visit"] for row in rows) + 1 == 184
    assert sum(row["split"] == "test" for row in rows) == 25_596
    assert whole_table.manifest.size is None
    with pytest.raises(CxrRayError, match="metadata only"):
        whole_table.dataset.require_pixels()


def test_no_patient_of_the_whole_table_is_in_two_splits(whole_table):
    patients = {split: set(whole_table.dataset.read(split, ["patient_key"])["patient_key"].to_pylist()) for split in SPLITS}
    assert [len(patients["test"]), len(patients["train"] | patients["val"])] == [2_797, 28_008]
    assert sum(map(len, patients.values())) == 30_805
    share = whole_table.manifest.splits["val"].images / 86_524
    assert share == pytest.approx(0.1, abs=1e-3)
    assert whole_table.manifest.splits["val"].prevalence["Hernia"] > 0


def test_test_set_prevalence_is_the_published_shift(whole_table):
    """Pneumothorax: 10.4 % of the test images and 3.05 % of the others."""
    splits = whole_table.manifest.splits
    assert splits["test"].prevalence["Pneumothorax"] == pytest.approx(0.104, abs=5e-4)
    train_val = [splits["train"], splits["val"]]
    positives = sum(split.prevalence["Pneumothorax"] * split.labelled for split in train_val)
    assert positives / 86_524 == pytest.approx(0.0305, abs=5e-5)
    assert round(splits["test"].prevalence["Hernia"] * 25_596) == 86


def test_visits_of_patient_3_follow_the_2020_table_and_not_the_file_names(whole_table):
    rows = [row for row in whole_table.rows(*METADATA, *HISTORY) if row["patient_key"] == "nih-3"]
    rows.sort(key=lambda row: row["visit"])
    assert [row["image_id"] for row in rows] == [f"00000003_00{suffix}.png" for suffix in (1, 2, 3, 4, 5, 6, 7, 0)]
    assert [row["age_years"] for row in rows] == list(range(74, 82))
    earlier = np.array([row["labels"] for row in rows[:-1]])
    last = rows[-1]
    assert last["history_count"] == 7
    assert last["history_ever"] == earlier.max(axis=0).tolist()
    assert names(last["history_ever"]) == ["Infiltration", "Hernia"]
    assert last["history_last"] == earlier[-1].tolist()
    np.testing.assert_allclose(last["history_fraction"], earlier.mean(axis=0), rtol=1e-6)
    assert [row["history_age_gap"] for row in rows] == [None, *[1.0] * 7]
    assert [last[f"history_last{back}_view"] for back in ("", "_2", "_3")] == [row["view"] for row in rows[-2:-5:-1]]
    assert last["history_no_finding"] == pytest.approx(np.mean(~earlier.any(axis=1)))
    assert rows[0]["history_count"] == sum(rows[0]["history_ever"]) == 0


def test_history_counts_visits_whose_images_are_absent(real, whole_table):
    """The part that is there has the history of the whole table: nothing is dropped before it is computed."""
    whole = {row["image_id"]: row for row in whole_table.rows("image_id", "visit", *HISTORY)}
    part = real.rows("image_id", "visit", *HISTORY)
    assert all(row == whole[row["image_id"]] for row in part)
    assert any(row["history_count"] for row in part)
    assert all(count == 0 for name, count in real.manifest.counts.items() if name.startswith(("age", "patients_")))
    assert real.manifest.warnings == whole_table.manifest.warnings == []


# Small releases made here.


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "dataset"


@pytest.fixture
def release(tmp_path) -> Path:
    return make(tmp_path / "release")


def test_a_small_release(release, out):
    # Images are found whichever folder holds them.
    shutil.move(image_of(release, "c0.png"), release / "c0.png")
    made = ingest(release, out, size=16)
    rows = {row["image_id"]: row for row in made.rows(*METADATA, *HISTORY)}
    assert set(rows) == {row[0] for row in ROWS}
    second = rows["a1.png"]
    assert (second["patient_key"], second["visit"], second["history_count"]) == ("nih-1", 1, 1)
    assert (second["age_years"], second["sex"], second["view"]) == (41, "M", "AP")
    assert names(second["labels"]) == ["Mass", "Nodule"]
    assert names(second["history_ever"]) == ["Mass"]
    for name, square in made.images().items():
        np.testing.assert_array_equal(square, stored_square(decode_picture(_png(film(name)), name), 16))


def _png(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(values).save(content, format="PNG")
    return content.getvalue()


def test_rgb_and_rgba_files_give_the_square_of_their_grey(release, out):
    for name, mode in (("a0.png", "RGB"), ("b0.png", "RGBA"), ("c0.png", "LA")):
        Image.fromarray(film(name)).convert(mode).save(image_of(release, name))
    made = ingest(release, out, size=16)
    assert made.manifest.counts["quarantined"] == 0
    images = made.images()
    for name in ("a0.png", "b0.png", "c0.png", "d0.png"):
        np.testing.assert_array_equal(images[name], stored_square(decode_picture(_png(film(name)), name), 16))


def test_missing_table(release, out):
    table_of(release).unlink()
    refused(release, out, release, "found none", "put Data_Entry_2017_v2020.csv there")


def test_two_tables(release, out):
    shutil.copy(table_of(release), release / "Data_Entry_2017.csv")
    refused(release, out, release, "Data_Entry_2017.csv, Data_Entry_2017_v2020.csv")


def test_missing_release(tmp_path, out):
    refused(tmp_path / "nowhere", out, tmp_path / "nowhere", "check the path")


def test_missing_column(tmp_path, out):
    release = make(tmp_path / "release", header=HEADER.replace("Patient Age", "Age of Patient"))
    refused(release, out, table_of(release), "'Patient Age'", "'Age of Patient'", "download the table again")


def test_a_wrong_value_is_named_with_its_line(tmp_path, out):
    release = make(tmp_path / "release", changed("c0.png", view="LL"))
    refused(release, out, f"{table_of(release)} line 5:", "'LL'")


def test_visits_of_a_table_that_is_not_chronological(tmp_path, out):
    """As in the file of 2017: the second visit by number was years before the first, and one age is impossible."""
    rows = [*changed("a1.png", age=38), ("a2.png", "Hernia", 2, 1, 414, "M", "PA", "train_val")]
    made = ingest(make(tmp_path / "release", rows), out, metadata_only=True)
    visits = {row["image_id"]: row for row in made.rows("image_id", "visit", "age_years", *HISTORY)}
    assert [visits[f"a{number}.png"]["visit"] for number in range(3)] == [2, 0, 1]
    assert names(visits["a0.png"]["history_ever"]) == ["Mass", "Nodule", "Hernia"]
    assert names(visits["a0.png"]["history_last"]) == ["Hernia"]
    assert sum(visits["a1.png"]["history_ever"]) == 0
    assert (visits["a2.png"]["age_years"], visits["a2.png"]["history_age_gap"]) == (None, None)
    counts = made.manifest.counts
    assert (counts["patients_reordered"], counts["ages_impossible"], counts["age_unknown"]) == (1, 1, 1)
    (warning,) = made.manifest.warnings
    assert "1 patients" in warning


def test_no_image_at_all(release, out):
    shutil.rmtree(release / "images_001")
    refused(release, out, "no image to ingest", "check the folder")


def test_a_truncated_image_is_quarantined_and_the_run_goes_on(release, out):
    cut = image_of(release, "a0.png")
    cut.write_bytes(cut.read_bytes()[:120])
    made = ingest(release, out, size=16, max_quarantined=0.5)
    (entry,) = made.manifest.left_out
    assert (entry.image, entry.refused) == ("a0.png", False)
    assert "truncated" in entry.reason
    assert "a0.png" not in entry.reason
    assert made.manifest.counts["quarantined"] == 1
    rows = {row["image_id"]: row for row in made.rows("image_id", "history_ever")}
    assert set(rows) == {row[0] for row in ROWS} - {"a0.png"}
    assert sum(split.images for split in made.manifest.splits.values()) == made.manifest.counts["ingested"] == 5
    # Its labels are still part of the next visit's past.
    assert names(rows["a1.png"]["history_ever"]) == ["Mass"]


def test_a_truncated_image_stops_the_run_by_default_and_leaves_no_dataset(release, out):
    cut = image_of(release, "a0.png")
    cut.write_bytes(cut.read_bytes()[:120])
    refused(release, out, "1 of 6 images", "1.0%", "truncated", "--max-quarantined")
    assert list(out.glob("*.json")) == list(out.glob("*.csv")) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "neither PNG"), (b"%PDF-1.7 a report", "neither PNG"), ("black", "every pixel"), ("colour", "colour picture")],
    ids=["empty", "pdf", "black", "colour"],
)
def test_files_that_are_no_film_are_quarantined_with_the_reason(release, out, content, reason):
    path = image_of(release, "c0.png")
    if content == "black":
        Image.fromarray(np.zeros((20, 20), dtype=np.uint8)).save(path)
    elif content == "colour":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    else:
        path.write_bytes(content)
    made = ingest(release, out, size=16, max_quarantined=0.5)
    (entry,) = made.manifest.left_out
    assert entry.image == "c0.png"
    assert reason in entry.reason


def test_all_images_unreadable(release, out):
    for row in ROWS:
        image_of(release, row[0]).write_bytes(b"nothing")
    refused(release, out, "every image is unreadable", max_quarantined=1)


def test_an_identical_second_run_changes_nothing_and_another_one_needs_overwrite(release, out):
    first = ingest(release, out, size=16)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert ingest(release, out, size=16).manifest == first.manifest
    refusal = r"holds a dataset.*--overwrite"
    with pytest.raises(CxrRayError, match=refusal):
        ingest(release, out, size=24)
    with image_of(release, "a0.png").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CxrRayError, match=refusal):
        ingest(release, out, size=16)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before

    second = ingest(release, out, size=24, overwrite=True)
    assert {square.shape for square in second.images().values()} == {(24, 24)}
    listed = {shard.path for split in second.manifest.splits.values() for shard in split.shards}
    assert {str(path.relative_to(out)) for path in out.rglob("*.parquet")} == listed


def test_a_failed_overwrite_leaves_the_dataset_as_it_was(release, out):
    before = ingest(release, out, size=16)
    image_of(release, "a0.png").write_bytes(b"nothing")
    with pytest.raises(CxrRayError, match="unreadable"):
        ingest(release, out, size=24, overwrite=True)
    after = Dataset(str(out))
    assert after.digest == before.dataset.digest
    assert {square.shape for square in Ingested(after.manifest, after, out).images().values()} == {(16, 16)}


def test_leftovers_of_a_crash_are_ignored_and_removed(release, out):
    crashed = out / "shards-0badcafe"
    crashed.mkdir(parents=True)
    (crashed / "train-00000.parquet").write_bytes(b"half a shard")
    made = ingest(release, out, size=16)
    assert len(made.images()) == 6
    assert not crashed.exists()


def test_equal_settings_give_equal_rows(release, tmp_path):
    def content(folder):
        made = ingest(release, tmp_path / folder, size=16, seed=3)
        return sorted(made.rows(*METADATA, *HISTORY), key=lambda row: row["image_id"]), made.images()

    (rows, images), (other_rows, other_images) = content("one"), content("two")
    assert rows == other_rows
    for name, square in images.items():
        np.testing.assert_array_equal(square, other_images[name])


@pytest.mark.parametrize(("name", "value"), [("size", 8), ("val_fraction", 0), ("max_quarantined", 1.5), ("sise", 64)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UsageError, match=name) as error:
        load_settings(NihSettings, None, {"release": "r", "out": "o", name: value})
    assert "\n" not in str(error.value)
