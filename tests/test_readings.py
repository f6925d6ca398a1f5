"""Readings of a test split: each is noted, and a dataset that cannot be written to is no reason to fail."""

import json

import pytest
from pyarrow import fs

from cxr_ray.dataset import Dataset
from cxr_ray.readings import READINGS, note


@pytest.fixture
def dataset(tmp_path):
    split = {"images": 1, "patients": 1, "labelled": 1, "prevalence": {}, "shards": []}
    manifest = dict(
        run="r", created="2026-11-23T10:00:00Z", code_version="1", source="nih", metadata_sha256=None, settings={}, findings=[],
        size=None, pixel_recipe=None, splits={"test": split}, counts={}, images_per_second=None, warnings=[], left_out=[],
    )  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return Dataset(str(tmp_path))


def test_every_reading_is_counted(dataset, tmp_path):
    assert [reading.rows for reading in note(dataset, "clinical 1", "a" * 64, 5)] == [5]
    assert sorted(reading.rows for reading in note(dataset, "clinical 2", "b" * 64, 1)) == [1, 5]
    assert len(list((tmp_path / READINGS).iterdir())) == 2
    assert {reading.dataset_digest for reading in note(dataset, "clinical 2", "b" * 64, 1)} == {dataset.digest}


def test_readings_of_what_the_folder_held_before_are_not_counted(dataset, tmp_path):
    note(dataset, "clinical 1", "a" * 64, 5)
    (path,) = (tmp_path / READINGS).iterdir()
    path.write_text(path.read_text().replace(dataset.digest, "0" * 64))
    assert len(note(dataset, "clinical 2", "b" * 64, 1)) == 1


def test_a_dataset_that_cannot_be_written_to_is_not_counted(dataset):
    class ReadOnly(fs.LocalFileSystem):
        def create_dir(self, *_, **__):
            raise PermissionError("read-only")

    dataset.filesystem = ReadOnly()
    assert note(dataset, "clinical 1", "a" * 64, 5) is None
