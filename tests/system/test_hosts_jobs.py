"""Ingest and a training of two workers across two hosts, data on an S3 server; a host is cut off, or killed, during each."""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator

import pytest
from host_site import Account, Site, environment, object_store, running_site, until
from local_cluster import watched
from pyarrow import fs
from s3_server import BUCKET, upload

from cxr_ray import storage
from cxr_ray.bundle import load_bundle
from cxr_ray.dataset import Dataset
from cxr_ray.records import SPLITS
from ingest.phantom_release import DICOM, PhantomSettings, make_release

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

# An epoch is over in less time than a line of the log takes to get here: several go by before a fault strikes.
EPOCHS = 6
RELEASE = f"s3://{BUCKET}/release"
GOING_ON = r"train: going on from the checkpoint after epoch (\d+), (\d+) workers"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with object_store() as variables, environment(variables), running_site() as made:
        yield made


@pytest.fixture(scope="module")
def release(site: Site, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Films large enough that reading and decoding them takes a while."""
    folder = tmp_path_factory.mktemp("release")
    make_release(PhantomSettings(out=str(folder), patients=120, size=256))
    # The ingest of a release does not look at the DICOM files beside it.
    shutil.rmtree(folder / DICOM)
    upload(folder, RELEASE)
    return RELEASE


def ingest(out: str) -> list[str]:
    return ["ingest", "nih", "--release", RELEASE, "--size", "32", "--out", out]


@pytest.fixture(scope="module")
def undisturbed(site: Site, release: str) -> tuple[str, float]:
    """A dataset whose ingest was left in peace, and how many seconds that took."""
    out, started = f"s3://{BUCKET}/undisturbed", time.monotonic()
    site.submit(*ingest(out))
    return out, time.monotonic() - started


def rows(uri: str) -> list[tuple[str, str, str]]:
    """All that a dataset holds: split, image, and a digest of its labels and pixels; sorted, so that a double would show."""
    dataset = Dataset(uri)
    found = []
    for split in SPLITS:
        if dataset.manifest.splits[split].images:
            for row in dataset.read(split, ["image_id", "labels", "pixels"]).to_pylist():
                digest = hashlib.sha256(repr(row["labels"]).encode() + row["pixels"]).hexdigest()
                found.append((split, row["image_id"], digest))
    return sorted(found)


def files(uri: str) -> set[str]:
    filesystem, root = storage.resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    return {info.path for info in infos if info.type == fs.FileType.File}


@pytest.mark.parametrize("fault", ["cut off", "killed"])
def test_ingest_loses_a_host_and_no_image(site: Site, undisturbed: tuple[str, float], account: Account, fault: str) -> None:
    calm, calm_seconds = undisturbed
    out = f"s3://{BUCKET}/ingest-{fault.replace(' ', '-')}"
    with watched(site.command(*ingest(out))) as job:
        until(lambda: len(files(out)) >= 2 and site.tasks_of(1), "both hosts at work")
        before = files(out)
        struck = time.monotonic()
        missed = site.take_away(fault)
        assert job.finish() == 0, job.said
        seconds = time.monotonic() - struck
    site.restore(1)
    expected, found = rows(calm), rows(out)
    assert found == expected, job.said
    # What was there before the fault is a part of what is there now, not made again under another name.
    shards = {shard.path for split in Dataset(out).manifest.splits.values() for shard in split.shards}
    kept = {name for name in before if name.endswith(".parquet")}
    assert {name.partition(f"{out.removeprefix('s3://')}/")[2] for name in kept} <= shards
    account.add(
        "ingest",
        f"worker host {fault}",
        f"{len(found)} of {len(expected)} rows, equal; 0 lost, 0 twice",
        f"missed after {missed:.0f} s, done after {seconds:.0f} s (undisturbed, the whole command: {calm_seconds:.0f} s)",
    )


def train(data: str, run: str, workers: str) -> list[str]:
    # One thread a worker: two hosts share this machine's cores.
    placed = ["--workers", workers, "--cpus-per-worker", "2", "--resize-seconds", "5"]
    return ["train", "--data", data, "--out", run, "--epochs", str(EPOCHS), "--batch-size", "32", "--threads", "1", *placed]


def epochs(run: str) -> list[dict]:
    filesystem, root = storage.resolve(run)
    return json.loads(storage.read_bytes(filesystem, f"{root}/epochs.json"))


@pytest.fixture(scope="module")
def trained(site: Site, undisturbed: tuple[str, float]) -> list[dict]:
    """The epochs of a run of two workers, each on a host of its own, that was left in peace."""
    run = f"s3://{BUCKET}/runs/undisturbed"
    said = site.submit(*train(undisturbed[0], run, "2"))
    assert "going on" not in said
    return epochs(run)


def test_a_training_loses_a_host_that_is_killed_and_ends_where_the_undisturbed_one_does(
    site: Site, undisturbed: tuple[str, float], trained: list[dict], account: Account
) -> None:
    run = f"s3://{BUCKET}/runs/killed"
    with watched(site.command(*train(undisturbed[0], run, "2"))) as job:
        started = job.wait_for(r"train: training, 2 workers \(processes (\d+), (\d+)\)")
        assert len(started.groups()) == 2
        job.wait_for(f"train: epoch 1/{EPOCHS}")
        assert any("TrainWorker" in title or "train" in title.lower() for title in site.tasks_of(1)), site.tasks_of(1)
        struck = time.monotonic()
        missed = site.take_away("killed")
        # There is room for one worker of two: the run waits for the host.
        site.restore(1)
        back = time.monotonic() - struck
        going_on = job.wait_for(GOING_ON)
        seconds = time.monotonic() - struck
        assert int(going_on[1]) >= 1, job.said
        assert going_on[2] == "2", job.said
        assert job.finish() == 0, job.said
    found = epochs(run)
    assert [result["epoch"] for result in found] == list(range(1, EPOCHS + 1))
    for figure in ("loss", "val_loss", "val_auc"):
        assert [each[figure] for each in found] == pytest.approx([each[figure] for each in trained], rel=1e-4)
    verify(run)
    account.add(
        "training, 2 workers",
        "worker host killed, started again",
        f"{EPOCHS} of {EPOCHS} epochs, losses and AUCs those of the undisturbed run",
        f"missed after {missed:.0f} s, host back after {back:.0f} s, going on after {seconds:.0f} s",
    )


def test_an_elastic_training_goes_on_without_a_host_that_is_cut_off_and_grows_again(
    site: Site, undisturbed: tuple[str, float], account: Account
) -> None:
    run = f"s3://{BUCKET}/runs/cut-off"
    with watched(site.command(*train(undisturbed[0], run, "1..2"))) as job:
        job.wait_for(r"train: training, 2 workers")
        job.wait_for(f"train: epoch 1/{EPOCHS}")
        struck = time.monotonic()
        missed = site.take_away("cut off")
        alone = job.wait_for(GOING_ON)
        seconds = time.monotonic() - struck
        assert alone[2] == "1", job.said
        job.wait_for(r"train: epoch \d+/")
        site.restore(1)
        assert job.finish() == 0, job.said
    found = epochs(run)
    assert [result["epoch"] for result in found] == list(range(1, EPOCHS + 1))
    assert {result["workers"] for result in found} == {1, 2}
    verify(run)
    grown = len(re.findall(r"going on from the checkpoint after epoch \d+, 2 workers", job.said))
    account.add(
        "training, 1 to 2 workers",
        "worker host cut off, plugged in again",
        f"{EPOCHS} of {EPOCHS} epochs, each once; {'grew again' if grown else 'ended with one worker'}",
        f"missed after {missed:.0f} s, going on with one worker after {seconds:.0f} s",
    )


def verify(run: str) -> None:
    """The bundle of a run is whole."""
    assert load_bundle(f"{run}/bundle").description.validation["epoch"] in range(1, EPOCHS + 1)
