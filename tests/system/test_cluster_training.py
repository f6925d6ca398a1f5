"""A two-node Ray cluster with token authentication: ingest and train as jobs, lose a worker, lose the connection."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(420)]

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
OBJECT_STORE = ["--object-store-memory", "300000000", "--disable-usage-stats"]
EPOCHS = 3


@dataclass(frozen=True)
class RunningCluster:
    address: str
    token_file: Path
    environment: dict[str, str]

    def command(self, *arguments: str, token_file: Path | None = None, address: str | None = None) -> list[str]:
        options = ["--address", address or self.address, "--token-file", str(token_file or self.token_file)]
        return [sys.executable, "-m", "cxr_ray", "submit", *options, *arguments]

    def submit(self, *arguments: str, token_file: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments, token_file=token_file)
        return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=240, check=False)


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    # Ray's sockets lie below it, and a socket's path is limited to 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="cxr", dir="/tmp"))
    token_file = folder / "token"
    token_file.write_text(secrets.token_hex(16))
    environment = clean_environment() | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_TMPDIR": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    port, dashboard, client, head_agent, node_agent = free_ports(5)
    head = [
        *("--head", "--port", str(port), "--num-cpus", "3", "--ray-client-server-port", str(client)),
        *("--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(head_agent)),
    ]
    node = ["--address", f"127.0.0.1:{port}", "--num-cpus", "2", "--dashboard-agent-listen-port", str(node_agent)]
    made = RunningCluster(f"http://127.0.0.1:{dashboard}", token_file, environment)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for name, options in (("head", head), ("node", node)):
            with (folder / f"{name}.log").open("wb") as log:
                command = [*RAY, "start", "--block", *options, *OBJECT_STORE]
                processes.append(
                    subprocess.Popen(
                        command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
            wait_for_nodes(made, len(processes), folder / f"{name}.log")
        yield made
    finally:
        for process in reversed(processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_nodes(cluster: RunningCluster, count: int, log: Path) -> None:
    """Until that many nodes are alive and each has the agent that takes jobs."""
    headers = {"Authorization": f"Bearer {cluster.token_file.read_text()}"}
    alive = 0
    for _ in range(120):
        with suppress(httpx.HTTPError, KeyError, ValueError):
            answer = httpx.get(f"{cluster.address}/api/v0/nodes", headers=headers, timeout=5)
            nodes = answer.json()["data"]["result"]["result"]
            alive = sum(node["state"] == "ALIVE" for node in nodes)
            if alive >= count:
                return
        time.sleep(0.5)
    pytest.fail(f"{alive} of {count} nodes came up:\n{log.read_text()[-2000:]}")


class Relay:
    """Passes connections on to the dashboard, and can drop all of them."""

    def __init__(self, address: str) -> None:
        self._target = int(address.rpartition(":")[2])
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
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
def dataset(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms")
    drawn = cluster.submit("ingest", "phantom", "--patients", "40", "--size", "64", "--out", f"{root}/release")
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    ingested = cluster.submit("ingest", "nih", "--release", f"{root}/release", "--size", "64", "--out", f"{root}/dataset")
    assert ingested.returncode == 0, ingested.stdout + ingested.stderr
    return root / "dataset"


def test_training_survives_a_killed_worker_and_its_log_a_lost_connection(cluster, dataset, tmp_path):
    # A node has two CPUs to give, so that each worker is on a node of its own.
    options = ["--workers", "2", "--cpus-per-worker", "2", "--epochs", str(EPOCHS), "--max-failures", "2"]
    train = ["train", "--data", str(dataset), "--out", str(tmp_path / "run"), *options]
    relay = Relay(cluster.address)
    lines: list[str] = []
    dropped = killed = 0
    command = cluster.command(*train, address=relay.address)
    with subprocess.Popen(
        command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as submitting:
        for line in submitting.stdout:
            lines.append(line.rstrip())
            if started := re.match(r"train: training, 2 workers \(processes (\d+), (\d+)\)", line):
                workers = [int(pid) for pid in started.groups()]
            if line.startswith(f"train: epoch 1/{EPOCHS}: loss"):
                killed = workers[1]
                os.kill(killed, signal.SIGKILL)
            if line.startswith("train: going on"):
                dropped = relay.drop()
    relay.close()
    said = "\n".join(lines)
    assert submitting.returncode == 0, said
    assert killed and dropped, said
    assert "connection lost, the job goes on; trying again" in said
    going_on = re.search(r"train: going on from the checkpoint of epoch (\d+), 2 workers \(processes (\d+), (\d+)\)", said)
    assert going_on and int(going_on[1]) >= 1, said
    assert str(killed) not in going_on.groups()[1:]
    validated = [int(epoch) for epoch in re.findall(rf"train: epoch (\d+)/{EPOCHS}: loss [\d.]+, validation AUC [\d.]+", said)]
    assert validated == list(range(1, EPOCHS + 1)), said
    assert said.count("Running entrypoint for job") == 1
    verify = [sys.executable, "-m", "cxr_ray", "bundle", "verify", str(tmp_path / "run/bundle")]
    verified = subprocess.run(verify, capture_output=True, text=True, timeout=60, check=False)
    assert (verified.returncode, "intact" in verified.stdout) == (0, True), verified.stderr


def test_a_failing_job_tells_why_and_hands_on_its_exit_code(cluster, tmp_path):
    done = cluster.submit("train", "--data", str(tmp_path), "--out", str(tmp_path / "run"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"cxr-ray: {tmp_path}: holds no manifest.json; make a dataset with 'cxr-ray ingest'" in done.stdout.splitlines()
    submission_id = done.stdout.splitlines()[0]
    assert done.stderr == f"cxr-ray: job {submission_id} failed with exit code 1; its log is above\n"
    bad_usage = cluster.submit("train", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--epochs", "0")
    assert bad_usage.returncode == 2, bad_usage.stdout + bad_usage.stderr
    again = cluster.submit("--submission-id", submission_id, "train")
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert submission_id in again.stderr


def test_a_wrong_token_is_refused_in_one_line(cluster, tmp_path):
    (tmp_path / "wrong").write_text("0" * 32)
    done = cluster.submit("train", "--data", "x", "--out", "y", token_file=tmp_path / "wrong")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"refuses the token from {tmp_path}/wrong" in done.stderr
