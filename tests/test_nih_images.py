"""Images of the NIH release wherever people have them: in folders, flat, in the archives as downloaded, and twice."""

import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from nih_release import ROWS, film, image_of, ingest, make, refused
from PIL import Image

from cxr_ray.pixels import decode_picture, stored_square
from ingest.files import list_files
from ingest.nih_images import find_images, without_litter

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

NAMES = [row[0] for row in ROWS]


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "dataset"


@pytest.fixture
def release(tmp_path) -> Path:
    return make(tmp_path / "release")


def pack(archive: Path, folder: Path, names, inside: str) -> None:
    """Move images of a folder into a new archive, of the kind that its name says."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for name in names:
                packed.write(folder / name, f"{inside}{name}")
    else:
        with tarfile.open(archive, "w:" if archive.suffix == ".tar" else "w:gz") as packed:
            for name in names:
                packed.add(folder / name, f"{inside}{name}")
    for name in names:
        (folder / name).unlink()


def assert_whole(made) -> None:
    """All images are there, with their own pixels."""
    images = made.images()
    assert set(images) == set(NAMES)
    for name, square in images.items():
        content = io.BytesIO()
        Image.fromarray(film(name)).save(content, format="PNG")
        np.testing.assert_array_equal(square, stored_square(decode_picture(content.getvalue(), name), 16))


def counts_of(made) -> dict[str, int]:
    return {name: made.manifest.counts[name] for name in ("present", "absent", "not_in_table", "duplicate_files", "ingested")}


ALL = {"present": 6, "absent": 0, "not_in_table": 0, "duplicate_files": 0, "ingested": 6}


def test_one_flat_folder(release, out):
    for name in NAMES:
        shutil.move(image_of(release, name), release / name)
    made = ingest(release, out, size=16)
    assert_whole(made)
    assert counts_of(made) == ALL


@pytest.mark.parametrize("name", ["images_001.tar.gz", "images_001.TGZ", "images_001.tar", "archive.zip"])
def test_archives_are_read_without_being_extracted(release, out, name):
    folder = image_of(release, NAMES[0]).parent
    if name.endswith("TGZ"):
        pack(release / "images_001.tgz", folder, NAMES, "images/")
        (release / "images_001.tgz").rename(release / name)
    else:
        pack(release / name, folder, NAMES, "images/")
    before = {path for path in release.rglob("*") if path.is_file()}
    made = ingest(release, out, size=16)
    assert_whole(made)
    assert counts_of(made) == ALL
    assert {path for path in release.rglob("*") if path.is_file()} == before


def test_a_mixture_of_folders_and_archives(release, out):
    folder = image_of(release, NAMES[0]).parent
    (release / "more").mkdir()
    pack(release / "images_002.tar.gz", folder, NAMES[:2], "images/")
    pack(release / "more" / "images_003.tar", folder, NAMES[2:4], "./")
    shutil.move(folder / NAMES[4], release / NAMES[4])
    made = ingest(release, out, size=16)
    assert_whole(made)
    assert counts_of(made) == ALL


def test_an_image_that_is_there_twice_is_taken_once_and_the_plain_file_first(release, out):
    folder = image_of(release, NAMES[0]).parent
    copies = release / "images_002"
    shutil.copytree(folder, copies)
    # What the archive holds under this name is no image at all: taken, it would be quarantined.
    (copies / NAMES[0]).write_bytes(b"nothing")
    pack(release / "images_000.tar.gz", copies, NAMES[:3], "images/")
    made = ingest(release, out, size=16)
    assert_whole(made)
    assert counts_of(made) == ALL | {"duplicate_files": 6}


def test_images_outside_the_table_are_counted_and_left_out(release, out):
    shutil.copy(image_of(release, "a0.png"), image_of(release, "stray.png"))
    other = release / "other"
    other.mkdir()
    shutil.copy(image_of(release, "a0.png"), other / "stray_too.png")
    pack(release / "images_002.tgz", other, ["stray_too.png"], "images/")
    made = ingest(release, out, size=16)
    assert_whole(made)
    assert counts_of(made) == ALL | {"not_in_table": 2}


def test_what_macos_leaves_behind_is_ignored(release, out):
    folder = image_of(release, NAMES[0]).parent
    litter = release / "__MACOSX" / "images"
    litter.mkdir(parents=True)
    for name in NAMES:
        (folder / f"._{name}").write_bytes(b"\x00\x05\x16\x07")
        (litter / name).write_bytes(b"\x00\x05\x16\x07")
    (release / "._Data_Entry_2017_v2020.csv").write_bytes(b"\x00\x05\x16\x07")
    pack(release / "images_002.tar.gz", folder, [f"._{name}" for name in NAMES], "images/")
    pack(release / "images_003.zip", litter, NAMES[:3], "__MACOSX/images/")
    made = ingest(release, out, size=16)
    assert_whole(made)
    assert counts_of(made) == ALL


@pytest.mark.parametrize("damage", ["breaks off", "no archive"])
def test_a_damaged_archive_is_named(release, out, damage):
    folder = image_of(release, NAMES[0]).parent
    archive = release / "images_002.tar.gz"
    pack(archive, folder, NAMES, "images/")
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2] if damage == "breaks off" else b"<html>quota exceeded</html>")
    refused(release, out, "images_002.tar.gz", "download it again")


def test_metadata_only_needs_no_images_and_opens_no_archive(release, out):
    shutil.rmtree(release / "images_001")
    (release / "images_001.tar.gz").write_bytes(b"<html>quota exceeded</html>")
    made = ingest(release, out, metadata_only=True)
    assert {row["image_id"] for row in made.rows("image_id")} == set(NAMES)


def test_files_are_found_in_the_same_order_every_time(release):
    folder = image_of(release, NAMES[0]).parent
    pack(release / "z.tar", folder, NAMES[3:], "")
    found = []
    for _ in range(2):
        filesystem, _, files = list_files(str(release), "--release")
        images, duplicates = find_images(filesystem, without_litter(files))
        found.append([(name, file.location, file.stamp) for name, file in images.items()])
    assert found[0] == found[1]
    assert duplicates == 0
    assert dict(entry[:2] for entry in found[0])[NAMES[3]] == f"{release}/z.tar!/{NAMES[3]}"
