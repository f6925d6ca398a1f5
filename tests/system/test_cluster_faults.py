"""Training on a Ray cluster whose nodes come and go: more workers, fewer workers, and a notice before a node is taken away."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from local_cluster import LocalCluster, watched

from cxr_ray.bundle import load_bundle
from cxr_ray.dataset import Dataset
from cxr_ray.train_state import STATE
from ingest.phantom import simulate_patients
from ingest.phantom_release import write_tables

pytestmark = [pytest.mark.system, pytest.mark.cluster, pytest.mark.timeout(900)]

HEAD_CPUS = 3
GOING_ON = r"train: going on from the checkpoint after epoch (\d+), (\d+) workers \(processes ([\d, ]+)\)"
WITHIN_EPOCH = r"train: going on from the checkpoint after (\d+) images of epoch 1, 2 workers"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head alone."""
    with LocalCluster() as made:
        made.start_head(HEAD_CPUS)
        yield made


@pytest.fixture(scope="module")
def dataset(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms without their films: the network that reads none is trained in seconds."""
    root = tmp_path_factory.mktemp("phantoms")
    write_tables(root, simulate_patients(4000, 0), size=1)
    options = ["--metadata-only", "--split", "random", "--out", f"{root}/dataset"]
    done = cluster.submit("ingest", "nih", "--release", str(root), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "dataset"


def train(dataset: Path, run: Path, **settings: object) -> list[str]:
    given = {"data": dataset, "out": run, "preset": "clinical"} | settings
    return ["train", *(part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value)))]


def test_a_notice_saves_the_middle_of_an_epoch_before_a_node_is_taken_away(cluster, dataset, tmp_path):
    # A single epoch of small steps, so that it lasts much longer than the notice takes to arrive.
    batch, run = 2, tmp_path / "run"
    images = Dataset(str(dataset)).split("train").images
    # Ray packs workers onto the node with the most room: both are lost, and both find room on the head.
    node = cluster.start_node(HEAD_CPUS + 2)
    options = {"workers": 2, "cpus_per_worker": 1, "epochs": 1, "batch_size": batch}
    with watched(cluster.command(*train(dataset, run, **options))) as job:
        started = job.wait_for(r"train: training, 2 workers \(processes (\d+), (\d+)\)")
        assert {int(pid) for pid in started.groups()} <= set(cluster.processes(node)), job.said
        cluster.drain(node, seconds=120)
        notice = job.wait_for(r"train: a node is about to be taken away: checkpoint after (\d+) images of the epoch")
        cluster.kill(node)
        going_on = job.wait_for(WITHIN_EPOCH)
        assert going_on[1] == notice[1], job.said
        assert 0 < int(notice[1]) < images
        assert job.finish() == 0, job.said
    (result,) = json.loads((run / "epochs.json").read_text())
    assert load_bundle(str(run / "bundle")).description.validation["epoch"] == result["epoch"] == 1
    # As many steps as without the interruption: none was trained again, and none left out.
    assert steps_trained(run) == images // batch
    assert 0 < result["loss"] < 0.5


def test_a_run_grows_with_a_node_that_joins_and_shrinks_with_one_that_is_lost(cluster, dataset, tmp_path):
    """Last here: the run is left when it has shown what it can, and ends with its cluster."""
    run = tmp_path / "run"
    # The head has room for one worker of two CPUs, and the node for another one. Ray counts its nodes every 20 seconds.
    options = {"workers": "1..2", "cpus_per_worker": 2, "epochs": 100, "batch_size": 128, "resize_seconds": 5}
    with watched(cluster.command(*train(dataset, run, **options))) as job:
        job.wait_for(r"train: training, 1 workers")
        node = cluster.start_node(2)
        grown = job.wait_for(GOING_ON)
        assert grown[2] == "2", job.said
        on_node = {int(pid) for pid in grown[3].split(", ")} & set(cluster.processes(node))
        assert len(on_node) == 1, job.said
        job.wait_for(r"train: epoch \d+/")
        cluster.kill(node)
        left = job.wait_for(GOING_ON)
        assert left[2] == "1", job.said
        assert int(left[1]) > int(grown[1]), job.said
        job.wait_for(r"train: epoch \d+/")
    alone, together = int(grown[1]), int(left[1]) - int(grown[1])
    results = json.loads((run / "epochs.json").read_text())
    assert [result["epoch"] for result in results] == list(range(1, len(results) + 1)), job.said
    assert len(results) > alone + together
    assert [result["workers"] for result in results] == [1] * alone + [2] * together + [1] * (len(results) - alone - together)


def steps_trained(run: Path) -> int:
    """Steps of the optimiser that led to the last checkpoint of a run."""
    last = max((run / "train").glob("checkpoint_2*"))
    state = torch.load(last / STATE, weights_only=True)
    return int(next(iter(state["optimizer"]["state"].values()))["step"])
