"""A two-node Ray cluster with token authentication: ingest and train as jobs, lose the connection, a worker, and all nodes."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from local_cluster import LocalCluster, watched
from result_peers import certificate

pytestmark = [pytest.mark.system, pytest.mark.cluster, pytest.mark.timeout(900)]

# An epoch is over in less time than a line of the log takes to get here: several go by before a kill strikes.
EPOCHS = 12
HEAD_CPUS, NODE_CPUS = 3, 2
STARTED = r"train: training, 2 workers \(processes (\d+), (\d+)\)"
GOING_ON = r"train: going on from the checkpoint after epoch (\d+), 2 workers \(processes (\d+), (\d+)\)"


def start_nodes(cluster: LocalCluster) -> None:
    cluster.start_head(HEAD_CPUS)
    cluster.start_node(NODE_CPUS)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as made:
        start_nodes(made)
        yield made


class Relay:
    """Passes connections on to the dashboard, and can drop all of them; with a certificate and its key, TLS ends here."""

    def __init__(self, address: str, tls: tuple[Path, Path] | None = None) -> None:
        self._tls = None
        if tls is not None:
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._tls.load_cert_chain(*tls)
        self._target = int(address.rpartition(":")[2])
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.address = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def drop(self) -> int:
        dropped, self._open = self._open, []
        for each in dropped:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        return len(dropped)

    def close(self) -> None:
        self.drop()
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._server.accept()
                threading.Thread(target=self._connect, args=(here,), daemon=True).start()

    def _connect(self, here: socket.socket) -> None:
        # A client that does not trust the certificate goes away in the middle of the handshake.
        with suppress(OSError):
            here = here if self._tls is None else self._tls.wrap_socket(here, server_side=True)
            there = socket.create_connection(("127.0.0.1", self._target))
            self._open += [here, there]
            for source, sink in ((here, there), (there, here)):
                threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def dataset(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms")
    drawn = cluster.submit("ingest", "phantom", "--patients", "40", "--size", "64", "--out", f"{root}/release")
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    ingested = cluster.submit("ingest", "nih", "--release", f"{root}/release", "--size", "64", "--out", f"{root}/dataset")
    assert ingested.returncode == 0, ingested.stdout + ingested.stderr
    return root / "dataset"


def train(dataset: Path, run: Path, *options: str, workers: int = 2, cpus: float = 2) -> list[str]:
    """The command; with two CPUs for each worker, each is on a node of its own."""
    placed = ["--workers", str(workers), "--cpus-per-worker", str(cpus)]
    return ["train", "--data", str(dataset), "--out", str(run), "--epochs", str(EPOCHS), *placed, *options]


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose log was followed over a connection that broke; the training itself was left in peace."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    relay = Relay(cluster.address)
    with watched(cluster.command(*train(dataset, run), address=relay.address)) as job:
        job.wait_for(STARTED)
        assert relay.drop()
        job.wait_for("cxr-ray: .*connection lost, the job goes on; trying again")
        for epoch in range(1, EPOCHS + 1):
            job.wait_for(rf"train: epoch {epoch}/{EPOCHS}: loss [\d.]+, validation [\d.]+, AUC [\d.]+")
        assert job.finish() == 0, job.said
        assert "going on from" not in job.said
        assert job.said.count("Running entrypoint for job") == 1
    relay.close()
    return run


def test_a_log_is_followed_over_a_lost_connection_and_the_bundle_is_intact(undisturbed):
    verify = [sys.executable, "-m", "cxr_ray", "bundle", "verify", str(undisturbed / "bundle")]
    verified = subprocess.run(verify, capture_output=True, text=True, timeout=60, check=False)
    assert (verified.returncode, "intact" in verified.stdout) == (0, True), verified.stderr


def test_jobs_are_listed_printed_and_followed_again(cluster, undisturbed):
    listed = json.loads(cluster.jobs("list", "--json").stdout)
    trained = next(job for job in listed if job["command"].startswith("train "))
    assert (trained["state"], trained["exit_code"]) == ("succeeded", 0)
    assert listed == sorted(listed, key=lambda job: job["began"], reverse=True)
    table = cluster.jobs("list")
    assert trained["submission_id"] in table.stdout.replace("\n", "")
    assert max(map(len, table.stdout.splitlines())) <= 80
    again = cluster.submit("--attach", trained["submission_id"])
    assert (again.returncode, again.stdout) == (0, cluster.jobs("logs", trained["submission_id"]).stdout)
    assert f"train: epoch {EPOCHS}/{EPOCHS}" in again.stdout
    for asked in (cluster.submit("--attach", "nobody"), cluster.jobs("logs", "nobody"), cluster.jobs("stop", "nobody")):
        assert (asked.returncode, asked.stderr.count("\n")) == (1, 1)
        assert "job 'nobody' is not known" in asked.stderr


def test_a_dashboard_behind_tls_is_reached_with_its_authority(cluster, undisturbed, tmp_path):
    authority = certificate(tmp_path, "authority")
    relay = Relay(cluster.address, certificate(tmp_path, "head", authority))
    listed = json.loads(cluster.jobs("list", "--json").stdout)
    name = next(job["submission_id"] for job in listed if job["command"].startswith("train "))
    options = ["--ca-file", str(authority[0]), "--attach", name]
    with watched(cluster.command(*options, address=relay.address)) as job:
        job.wait_for(f"train: epoch {EPOCHS}/{EPOCHS}")
        assert job.finish() == 0, job.said
    with watched(cluster.command("--attach", name, address=relay.address)) as job:
        job.wait_for("cxr-ray: .*: its certificate is not trusted .*; give the file .* with --ca-file")
        assert job.finish() == 1
    relay.close()


def test_a_reservation_that_no_node_can_hold_is_refused_at_once(cluster):
    refused = cluster.submit("--num-cpus", "64", "train", "--data", "/x", "--out", "/y")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert f"the largest node of {cluster.address} has {HEAD_CPUS} CPUs" in refused.stderr


def test_a_killed_command_is_submitted_again_and_goes_on_and_a_stopped_one_is_not(cluster, dataset, tmp_path):
    run = tmp_path / "run"
    with watched(cluster.command("--retries", "1", *train(dataset, run))) as job:
        job.wait_for(STARTED)
        job.wait_for(f"train: epoch 1/{EPOCHS}")
        os.kill(cluster.driver_of("train", str(run)), signal.SIGKILL)
        job.wait_for(r"cxr-ray: submitting it again \(1 of 1\)")
        submission_id = job.wait_for("raysubmit_.*")[0]
        job.wait_for(GOING_ON)
        stopped = cluster.jobs("stop", submission_id)
        assert (stopped.returncode, "is being stopped" in stopped.stderr) == (0, True)
        job.wait_for(f"cxr-ray: job {submission_id} was stopped")
        assert job.finish() == 1
    assert "submitting it again (2" not in job.said


def test_workers_that_no_node_can_hold_fail_the_job_at_once(cluster, dataset, tmp_path):
    """Two of 2.5 CPUs are the five that the cluster has, and its second node has two."""
    with watched(cluster.command(*train(dataset, tmp_path / "run", workers=2, cpus=2.5))) as job:
        submission_id = job.wait_for("raysubmit_.*")[0]
        job.wait_for("resume: false")
        asked = time.monotonic()
        refused = job.wait_for("cxr-ray: setting 'workers' is 2 with 2.5 CPU each: the cluster has (.*), room for 1 beside")
        assert time.monotonic() - asked < 30, job.said
        assert set(refused[1].split(", ")) == {"1 x 3 CPU", "1 x 2 CPU"}
        job.wait_for(f"cxr-ray: job {submission_id} failed with exit code 1; its log is above$")
        assert job.finish() == 1, job.said
    assert not (tmp_path / "run").exists()
    again = cluster.submit("--submission-id", submission_id, "train", "--data", "x", "--out", "y")
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert submission_id in again.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a process a file system of its own")
def test_a_path_that_one_node_does_not_see_is_refused_before_anything_is_written(cluster, dataset, tmp_path):
    node = cluster.start_node(1, hidden=dataset.parent)
    try:
        unseen = cluster.submit(*train(dataset, tmp_path / "run"))
        unwritten = cluster.submit("ingest", "phantom", "--patients", "2", "--out", str(dataset.parent / "other"))
    finally:
        cluster.kill(node)
    for done, said in ((unseen, f"data {dataset}: node"), (unwritten, f"out {dataset.parent}/other: node")):
        assert done.returncode == 1, done.stdout
        assert said in done.stdout, done.stdout
        assert "does not see it; put it on storage that every node mounts" in done.stdout
    assert not (tmp_path / "run").exists()
    assert not (dataset.parent / "other").exists()


def test_a_job_hands_on_the_exit_code_of_bad_usage(cluster, tmp_path):
    bad_usage = cluster.submit("train", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--epochs", "0")
    assert bad_usage.returncode == 2, bad_usage.stdout + bad_usage.stderr


def test_a_wrong_token_is_refused_in_one_line(cluster, tmp_path):
    (tmp_path / "wrong").write_text("0" * 32)
    done = cluster.submit("train", "--data", "x", "--out", "y", token_file=tmp_path / "wrong")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"refuses the token from {tmp_path}/wrong" in done.stderr


def test_a_run_outlives_a_worker_and_its_whole_cluster(cluster, dataset, undisturbed, tmp_path):
    """Last here: the cluster is another one afterwards."""
    run = tmp_path / "run"
    with watched(cluster.command("--retries", "5", *train(dataset, run))) as job:
        lost = job.wait_for("raysubmit_.*")[0]
        started = job.wait_for(STARTED)
        job.wait_for(f"train: epoch 1/{EPOCHS}")
        os.kill(int(started[2]), signal.SIGKILL)
        going_on = job.wait_for(GOING_ON)
        assert int(going_on[1]) >= 1, job.said
        assert started[2] not in going_on.groups()
        # The worker may have got on to another epoch before it was gone.
        job.wait_for(f"train: epoch {int(going_on[1]) + 1}/{EPOCHS}")
        cluster.kill_all()
        assert not (run / "bundle").exists()
        done = [result["epoch"] for result in epochs_of(run)]
        cluster.start_head(HEAD_CPUS)
        # The new head knows nothing of the job, which is submitted again, and once more if its second node is late.
        job.wait_for(f"cxr-ray: job {lost} failed: .* does not know it any more")
        job.wait_for(r"cxr-ray: submitting it again \(1 of 5\)")
        cluster.start_node(NODE_CPUS)
        going_on = job.wait_for(GOING_ON)
        assert EPOCHS > int(going_on[1]) >= done[-1], job.said
        assert job.finish() == 0, job.said
    disturbed, in_peace = epochs_of(run), epochs_of(undisturbed)
    assert [result["epoch"] for result in disturbed] == list(range(1, EPOCHS + 1))
    for figure in ("loss", "val_loss", "val_auc"):
        assert [each[figure] for each in disturbed] == pytest.approx([each[figure] for each in in_peace], rel=1e-4)


def epochs_of(run: Path) -> list[dict]:
    return json.loads((run / "epochs.json").read_text())
