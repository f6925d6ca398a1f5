"""The NIH release through real Ray: the counts of the real one, and every way in which a copy can be wrong."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cxr_ray.dataset import MANIFEST, Dataset, Manifest
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.findings import FINDINGS, names, parse
from cxr_ray.pixels import decode_picture, stored_square
from cxr_ray.records import SPLITS, pixel_array
from cxr_ray.settings import load_settings
from ingest.nih import NihSettings, ingest_nih

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

METADATA = ["image_id", "patient_key", "visit", "age_years", "sex", "view", "labels", "split", "source"]
HISTORY = ["history_count", "history_ever", "history_last", "history_fraction"]
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
PLAIN_READER = """
import json, sys
import pyarrow as pa
import pyarrow.parquet as pq

tables = [pq.read_table(path) for path in sys.argv[1:]]
table = pa.concat_tables(tables)
print(json.dumps({
    "rows": table.num_rows, "names": table.column_names, "pixels": str(table.schema.field("pixels").type),
    "shape": [sum(len(t["pixels"].combine_chunks().to_numpy_ndarray()) for t in tables), 64, 64],
    "foreign": sorted({"cxr_ray", "ingest", "ray"} & set(sys.modules)),
}))
"""


@dataclass(frozen=True)
class Ingested:
    """A dataset and its manifest."""

    manifest: Manifest
    dataset: Dataset
    out: Path

    def rows(self, *columns: str) -> list[dict]:
        held = [split for split in SPLITS if self.manifest.splits[split].images]
        return pa.concat_tables([self.dataset.read(split, list(columns)) for split in held]).to_pylist()

    def images(self) -> dict[str, np.ndarray]:
        """Image id to stored square."""
        held = [split for split in SPLITS if self.manifest.splits[split].images]
        tables = [self.dataset.read(split, ["image_id", "pixels"]) for split in held]
        return {
            name: square
            for table in tables
            for name, square in zip(table["image_id"].to_pylist(), pixel_array(table["pixels"]), strict=True)
        }


def ingest(release, out, **settings) -> Ingested:
    manifest = ingest_nih(NihSettings(release=str(release), out=str(out), **settings))
    return Ingested(manifest, Dataset(str(out)), Path(out))


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
    assert seen["shape"] == [909, 64, 64]
    assert "fixed_shape_tensor" in seen["pixels"]
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
    assert 0.098 < share <= 0.1


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
    assert rows[0]["history_count"] == sum(rows[0]["history_ever"]) == 0


def test_history_counts_visits_whose_images_are_absent(real, whole_table):
    """The part that is there has the history of the whole table: nothing is dropped before it is computed."""
    whole = {row["image_id"]: row for row in whole_table.rows("image_id", "visit", *HISTORY)}
    part = real.rows("image_id", "visit", *HISTORY)
    assert all(row == whole[row["image_id"]] for row in part)
    assert any(row["history_count"] for row in part)


# Small releases made here.

ROWS = [
    # image, labels, follow-up, patient, age, sex, view, list
    ("a0.png", "Mass", 0, 1, 40, "M", "PA", "train_val"),
    ("a1.png", "Mass|Nodule", 1, 1, 41, "M", "AP", "train_val"),
    ("b0.png", "No Finding", 0, 2, 50, "F", "PA", "train_val"),
    ("c0.png", "Hernia", 0, 3, 60, "F", "PA", "train_val"),
    ("d0.png", "Effusion", 0, 4, 70, "M", "AP", "test"),
    ("d1.png", "Edema", 1, 4, 70, "M", "AP", "test"),
]


def film(name: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    return np.random.default_rng(seed).integers(0, 256, (20, 24), dtype=np.uint8)


def make(folder: Path, rows=ROWS, header=HEADER) -> Path:
    """A release of noise; rows are those of the table, each with the list it stands in."""
    images = folder / "images_001" / "images"
    images.mkdir(parents=True)
    lines = [",".join([*map(str, row[:-1]), "24", "20", "0.143", "0.143"]) for row in rows]
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join([header, *lines]) + "\n")
    for part in ("train_val", "test"):
        (folder / f"{part}_list.txt").write_text("\n".join(row[0] for row in rows if row[-1] == part))
    for row in rows:
        Image.fromarray(film(row[0])).save(images / row[0])
    return folder


def changed(target: str, /, **values) -> list[tuple]:
    """The rows, one of them with other values."""
    places = ("image", "labels", "follow_up", "patient", "age", "sex", "view", "part")
    return [
        tuple(values.get(place, value) for place, value in zip(places, row, strict=True)) if row[0] == target else row
        for row in ROWS
    ]


def table_of(release: Path) -> Path:
    return release / "Data_Entry_2017_v2020.csv"


def image_of(release: Path, name: str) -> Path:
    return release / "images_001" / "images" / name


def refused(release, out, *expected: object, **settings) -> None:
    """Ingest fails with one line that holds all of `expected`, and no dataset comes to be."""
    with pytest.raises(CxrRayError) as error:
        ingest(release, out, **{"size": 16} | settings)
    message = str(error.value)
    assert "\n" not in message
    for part in expected:
        assert str(part) in message
    assert not (out / MANIFEST).exists()
    assert list(out.glob("shards-*")) == []


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


def test_columns_are_found_whatever_their_spelling_and_order(tmp_path, out):
    """Copies of the release rename columns, and the first edition ends its header with a comma."""
    renamed = HEADER.replace("Image Index", "ImageIndex").replace("Patient ID", "patient_id").replace("Follow-up #", "FollowUp")
    release = make(tmp_path / "release", header=renamed)
    assert ingest(release, out, size=16).manifest.counts["ingested"] == len(ROWS)


def test_spelling_of_pleural_thickening(tmp_path, out):
    made = ingest(make(tmp_path / "release", changed("b0.png", labels="Pleural Thickening")), out, metadata_only=True)
    rows = {row["image_id"]: row for row in made.rows("image_id", "labels")}
    assert rows["b0.png"]["labels"] == parse("Pleural_Thickening").tolist()


def test_impossible_ages_are_unknown_and_counted(tmp_path, out):
    made = ingest(make(tmp_path / "release", changed("b0.png", age=414)), out, metadata_only=True)
    rows = {row["image_id"]: row for row in made.rows("image_id", "age_years")}
    assert rows["b0.png"]["age_years"] is None
    assert made.manifest.counts["age_unknown"] == 1


def test_missing_table(release, out):
    table_of(release).unlink()
    refused(release, out, release, "found none", "put Data_Entry_2017_v2020.csv there")


def test_two_tables(release, out):
    shutil.copy(table_of(release), release / "Data_Entry_2017.csv")
    refused(release, out, release, "Data_Entry_2017.csv, Data_Entry_2017_v2020.csv")


def test_missing_release(tmp_path, out):
    refused(tmp_path / "nowhere", out, tmp_path / "nowhere", "give the release's folder")


@pytest.mark.parametrize("name", ["train_val_list.txt", "test_list.txt"])
def test_missing_list(release, out, name):
    (release / name).unlink()
    refused(release, out, release / name, "check the path")


def test_missing_column(tmp_path, out):
    release = make(tmp_path / "release", header=HEADER.replace("Patient Age", "Age of Patient"))
    refused(release, out, table_of(release), "patientage", "Age of Patient", "download it again")


def test_a_table_that_is_none(release, out):
    table_of(release).write_bytes(b"\x89PNG\r\n\xff\xfe\x00")
    refused(release, out, table_of(release), "download it again")
    table_of(release).write_text(HEADER + "\n")
    refused(release, out, table_of(release), "no rows", "download it again")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": "Mass|Mss"}, ("'Mss'", "use one of: Atelectasis")),
        ({"labels": ""}, ("empty", "'No Finding'")),
        ({"labels": "Mass|No Finding"}, ("'Mass|No Finding'", "remove one")),
        ({"age": "old"}, ("Patient Age", "'old'", "whole numbers")),
        ({"age": "058Y"}, ("Patient Age", "'058Y'", "2020 release")),
        ({"age": "inf"}, ("Patient Age", "'inf'", "whole numbers")),
        ({"age": "4.5"}, ("Patient Age", "'4.5'", "whole numbers")),
        ({"follow_up": "first"}, ("Follow-up #", "'first'", "whole numbers")),
        ({"patient": ""}, ("Patient ID", "''", "whole numbers")),
        ({"sex": "X"}, ("Patient Gender", "'X'", "M, F")),
        ({"view": "LL"}, ("View Position", "'LL'", "PA, AP")),
        ({"image": "a0.png"}, ("Image Index", "a0.png", "remove one of the rows")),
        ({"patient": 1, "follow_up": 1}, ("Patient ID and Follow-up #", "1, 1", "remove one of the rows")),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_named_with_its_line(tmp_path, out, change, expected):
    release = make(tmp_path / "release", changed("c0.png", **change))
    refused(release, out, f"{table_of(release)} line 5:", *expected)


def test_list_names_unknown_images(release, out):
    with (release / "test_list.txt").open("a") as lines:
        lines.write("\nzz.png\n")
    refused(release, out, release / "test_list.txt", "1 images", "zz.png", "one release")


def test_image_in_both_lists(release, out):
    with (release / "test_list.txt").open("a") as lines:
        lines.write("\nb0.png")
    refused(release, out, release, "both lists", "b0.png", "correct the lists")


def test_image_in_no_list(release, out):
    (release / "test_list.txt").write_text("d0.png")
    refused(release, out, release, "d1.png", "no list", "train_val_list.txt or test_list.txt")


def test_patient_in_both_lists(tmp_path, out):
    release = make(tmp_path / "release", changed("d1.png", part="train_val"))
    refused(release, out, release, "train_val_list.txt", "test_list.txt", "first: 4", "one list")


def test_no_image_at_all(release, out):
    shutil.rmtree(release / "images_001")
    refused(release, out, "no image to ingest", "check the folder")


def test_a_truncated_image_is_quarantined_and_the_run_goes_on(release, out):
    cut = image_of(release, "a0.png")
    cut.write_bytes(cut.read_bytes()[:120])
    made = ingest(release, out, size=16, max_quarantined=0.5)
    assert [entry.image for entry in made.manifest.quarantined] == ["a0.png"]
    assert re.match(r"a0\.png: .*truncated.*", made.manifest.quarantined[0].reason)
    assert made.manifest.counts["quarantined"] == 1
    rows = {row["image_id"]: row for row in made.rows("image_id", "history_ever")}
    assert set(rows) == {row[0] for row in ROWS} - {"a0.png"}
    assert sum(split.images for split in made.manifest.splits.values()) == made.manifest.counts["ingested"] == 5
    # Its labels are still part of the next visit's past.
    assert names(rows["a1.png"]["history_ever"]) == ["Mass"]


def test_a_truncated_image_stops_the_run_by_default_and_leaves_nothing_behind(release, out):
    cut = image_of(release, "a0.png")
    cut.write_bytes(cut.read_bytes()[:120])
    refused(release, out, "1 of 6 images", "1.0%", "a0.png", "--max-quarantined")
    assert list(out.iterdir()) == []


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
    assert [entry.image for entry in made.manifest.quarantined] == ["c0.png"]
    assert made.manifest.quarantined[0].reason.startswith("c0.png: ")
    assert reason in made.manifest.quarantined[0].reason


def test_all_images_unreadable(release, out):
    for row in ROWS:
        image_of(release, row[0]).write_bytes(b"nothing")
    refused(release, out, "every image is unreadable", max_quarantined=1)


def test_a_second_run_is_refused_and_overwrite_replaces(release, out):
    first = ingest(release, out, size=16)
    before = (out / MANIFEST).read_bytes()
    with pytest.raises(CxrRayError, match=r"already holds a dataset.*--overwrite"):
        ingest(release, out, size=16)
    assert (out / MANIFEST).read_bytes() == before
    assert len(first.images()) == 6

    second = ingest(release, out, size=24, overwrite=True)
    assert {square.shape for square in second.images().values()} == {(24, 24)}
    listed = {shard.path for split in second.manifest.splits.values() for shard in split.shards}
    on_disk = {str(path.relative_to(out)) for path in out.rglob("*.parquet")}
    assert on_disk == listed
    assert {path.name for path in out.iterdir()} == {MANIFEST, next(iter(listed)).split("/")[0]}


def test_a_failed_overwrite_leaves_the_dataset_as_it_was(release, out):
    before = ingest(release, out, size=16)
    image_of(release, "a0.png").write_bytes(b"nothing")
    with pytest.raises(CxrRayError, match="unreadable"):
        ingest(release, out, size=24, overwrite=True)
    after = Dataset(str(out))
    assert after.digest == before.dataset.digest
    assert {square.shape for square in Ingested(after.manifest, after, out).images().values()} == {(16, 16)}
    assert len(list(out.glob("shards-*"))) == 1


def test_leftovers_of_a_crash_are_ignored_and_removed(release, out):
    crashed = out / "shards-0badcafe"
    crashed.mkdir(parents=True)
    (crashed / "train-00000.parquet").write_bytes(b"half a shard")
    (out / f"{MANIFEST}.partial").write_text("{")
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


def test_an_image_outside_the_table_is_counted_and_left_out(release, out):
    shutil.copy(image_of(release, "a0.png"), image_of(release, "stray.png"))
    (release / "images_002").mkdir()
    shutil.copy(image_of(release, "a0.png"), release / "images_002" / "a0.png")
    made = ingest(release, out, size=16)
    assert (made.manifest.counts["not_in_table"], made.manifest.counts["duplicate_files"]) == (1, 1)
    assert len(made.images()) == 6


@pytest.mark.parametrize(("name", "value"), [("size", 8), ("val_fraction", 0), ("max_quarantined", 1.5), ("sise", 64)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UsageError, match=name) as error:
        load_settings(NihSettings, None, {"release": "r", "out": "o", name: value})
    assert "\n" not in str(error.value)
