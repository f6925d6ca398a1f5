"""A release and an archive on an S3-compatible server become a dataset there, and a run there reads it: real sockets."""

import io
import tarfile
import zipfile

import pytest
from nih_release import ROWS, make
from pyarrow import fs
from s3_server import SECRET, bucket, upload

from cxr_ray import storage
from cxr_ray.bundle import load_bundle
from cxr_ray.dataset import Dataset
from cxr_ray.distributed import train
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.evaluation import evaluate
from cxr_ray.records import SPLITS
from cxr_ray.train_settings import TrainSettings
from ingest.contact_sheet import CONTACT_SHEET
from ingest.dicom import DicomSettings, ingest_dicom
from ingest.nih import NihSettings, ingest_nih
from ingest.phantom_release import PhantomSettings, make_release
from ingest.shards import LEFT_OUT

__all__ = ["bucket"]

pytestmark = [pytest.mark.system, pytest.mark.ray]


def names(uri: str) -> set[str]:
    filesystem, root = storage.resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    return {info.path.removeprefix(f"{root}/") for info in infos if info.type == fs.FileType.File}


def image_ids(uri: str) -> list[str]:
    dataset = Dataset(uri)
    held = [split for split in SPLITS if dataset.manifest.splits[split].images]
    return sorted(name for split in held for name in dataset.read(split, ["image_id"])["image_id"].to_pylist())


def test_a_release_with_folders_and_archives(ray_cluster, bucket, tmp_path, capfd):
    release = make(tmp_path / "release")
    images = release / "images_001" / "images"
    with tarfile.open(release / "images_002.tar.gz", "w:gz") as made:
        for name in ("a0.png", "d1.png"):
            made.add(images / name, f"images/{name}")
            (images / name).unlink()
    upload(release, bucket("nih"))
    settings = NihSettings(release=bucket("nih"), out=bucket("out/nih"), size=16)
    manifest = ingest_nih(settings)
    assert image_ids(bucket("out/nih")) == sorted(row[0] for row in ROWS)
    shards = {shard.path for split in manifest.splits.values() for shard in split.shards}
    assert names(bucket("out/nih")) == shards | {"manifest.json", LEFT_OUT, CONTACT_SHEET}
    assert ingest_nih(settings) == manifest
    assert SECRET not in manifest.model_dump_json()
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err


def test_an_archive_of_dicom_files_and_zips(ray_cluster, bucket, real_data, tmp_path, monkeypatch):
    chests = sorted((real_data / "dicom").glob("chest*.dcm"))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as made:
        made.write(chests[1], "study/1.dcm")
    (tmp_path / "archive" / "a").mkdir(parents=True)
    (tmp_path / "archive" / "a" / "0.dcm").write_bytes(chests[0].read_bytes())
    (tmp_path / "archive" / "b.zip").write_bytes(zipped.getvalue())
    upload(tmp_path / "archive", bucket("dicom"))
    monkeypatch.setenv("CXR_RAY_PATIENT_KEY", "a key of the test's own, long")
    manifest = ingest_dicom(DicomSettings(source=bucket("dicom"), out=bucket("out/dicom"), size=16))
    assert manifest.counts["ingested"] == 2
    assert len(image_ids(bucket("out/dicom"))) == 2


@pytest.mark.long
def test_a_run_reads_its_dataset_from_there_and_leaves_everything_there(ray_cluster, bucket, tmp_path, capfd):
    make_release(PhantomSettings(out=str(tmp_path / "release"), patients=15, size=64))
    ingest_nih(NihSettings(release=str(tmp_path / "release"), out=bucket("out/phantoms"), size=32))
    chosen = dict(preset="chexnet", workers=2, epochs=2, batch_size=16)
    settings = TrainSettings.model_validate(dict(data=bucket("out/phantoms"), out=bucket("runs/one")) | chosen)
    description = train(settings, lambda event: None)
    held = names(bucket("runs/one"))
    assert {"settings.yaml", "epochs.json", "training.png", "bundle/bundle.json", "bundle/model.safetensors"} <= held
    assert any(name.startswith("tensorboard/") for name in held)
    assert load_bundle(storage.child(bucket("runs/one"), "bundle")).description.digest == description.digest
    # A finished run, resumed from the checkpoints that lie there.
    resumed = train(settings.model_copy(update={"resume": True}), lambda event: None)
    assert resumed.files["model.safetensors"] == description.files["model.safetensors"]
    scored = evaluate(
        EvaluateSettings(bundle=storage.child(bucket("runs/one"), "bundle"), data=bucket("out/phantoms"), resamples=100)
    )
    assert scored.scores.images == Dataset(bucket("out/phantoms")).split("test").images
    filesystem, root = storage.resolve(bucket("runs/one"))
    for name in ("settings.yaml", "bundle/bundle.json", "bundle/MODEL_CARD.md"):
        assert SECRET not in storage.read_bytes(filesystem, f"{root}/{name}").decode()
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err
