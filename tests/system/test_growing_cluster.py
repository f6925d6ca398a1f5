"""A cluster of a head without CPUs, whose nodes come when work waits for them, by Ray's own autoscaler."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_cluster import LocalCluster, clean_environment

pytestmark = [pytest.mark.system, pytest.mark.cluster, pytest.mark.timeout(900)]

MOST, CPUS = 2, 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as made:
        made.start_growing_head(MOST, CPUS)
        yield made


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phantoms") / "release"
    command = [sys.executable, "-m", "cxr_ray", "ingest", "phantom", "--out", str(path), "--patients", "40", "--size", "64"]
    subprocess.run(command, env=clean_environment(), check=True, capture_output=True)
    return path


def until_alone(cluster: LocalCluster) -> None:
    """Nodes without work are taken away after a minute."""
    deadline = time.monotonic() + 240
    while len(cluster.alive()) != 1:
        assert time.monotonic() < deadline
        time.sleep(1)


@pytest.fixture(scope="module")
def dataset(cluster: LocalCluster, release: Path) -> Path:
    """Ingested when the cluster was its head alone."""
    until_alone(cluster)
    path = release.with_name("dataset")
    done = cluster.submit("ingest", "nih", "--release", str(release), "--out", str(path), "--size", "64")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the cluster has no CPU now, and may grow to 4; waiting for its first node" in done.stdout
    assert len(cluster.alive()) > 1
    return path


def test_training_evaluation_and_prediction_bring_their_nodes(cluster: LocalCluster, dataset: Path, release: Path) -> None:
    run = dataset.with_name("run")
    until_alone(cluster)
    placed = ["--workers", "1..2", "--cpus-per-worker", "1"]
    trained = cluster.submit(
        *("train", "--data", str(dataset), "--out", str(run), "--preset", "multi-input", "--epochs", "1", *placed)
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert re.search(r"train: training, [12] workers?", trained.stdout)
    until_alone(cluster)
    evaluated = cluster.submit("evaluate", "--bundle", f"{run}/bundle", "--data", str(dataset))
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    until_alone(cluster)
    answers = dataset.with_name("answers.parquet")
    predicted = cluster.submit(
        *("predict", "--bundle", f"{run}/bundle", "--input", f"{release}/images_001/images", "--out", str(answers), "--json")
    )
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr
    assert answers.exists()


def test_what_it_can_never_grow_to_is_refused_within_seconds(cluster: LocalCluster, dataset: Path) -> None:
    asked = time.monotonic()
    refused = cluster.submit(
        *("train", "--data", str(dataset), "--out", str(dataset.with_name("never")), "--workers", "4", "--cpus-per-worker", "1")
    )
    assert refused.returncode == 1
    assert "setting 'workers' is 4 with 1 CPU each: the cluster has " in refused.stdout
    assert "may grow to 1 x 0 CPU, 2 x 2 CPU, room for 3" in refused.stdout
    assert "Traceback" not in refused.stdout
    assert time.monotonic() - asked < 180
    assert json.loads(cluster.jobs("list", "--json").stdout)[0]["exit_code"] == 1
