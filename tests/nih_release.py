"""Releases made for tests: a few images of noise with the release's table and lists, and how they are ingested."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cxr_ray.dataset import MANIFEST, Dataset, Manifest
from cxr_ray.errors import CxrRayError
from cxr_ray.records import SPLITS, pixel_array
from ingest.nih import NihSettings, ingest_nih

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


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


def refused(release, out, *expected: object, **settings) -> str:
    """Ingest fails with one line that holds all of `expected`, and no dataset comes to be."""
    with pytest.raises(CxrRayError) as error:
        ingest(release, out, **{"size": 16} | settings)
    message = str(error.value)
    assert "\n" not in message
    for part in expected:
        assert str(part) in message
    assert not (out / MANIFEST).exists()
    return message
