"""A Ray cluster on this machine, with token authentication: nodes that come and go, and jobs that are watched."""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
OBJECT_STORE = ["--object-store-memory", "300000000", "--disable-usage-stats"]
# A busy machine may need longer than Ray's half minute to start a node.
PATIENT = {"RAY_raylet_start_wait_time_s": "120"}
# Ray takes 15 seconds to miss a node, 5 to see that one will be taken away, and 60 to see that workers do not fit any more.
FASTER = {
    "RAY_health_check_period_ms": "1000",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
}
# As Ray's provider of fake nodes knows the head.
_HEAD_ID, _HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"
# What Ray's autoscaler wants to find in its configuration, though nothing is installed or copied anywhere.
_NOTHING_TO_DO: dict[str, object] = {
    **{f"{when}_commands": [] for when in ("initialization", "setup", "head_setup", "worker_setup")},
    **{f"{when}_commands": [] for when in ("head_start_ray", "worker_start_ray")},
    **{"cluster_synced_files": [], "rsync_exclude": [], "rsync_filter": []},
    **{"file_mounts": {}, "file_mounts_sync_continuously": False, "docker": {}, "auth": {"ssh_user": "nobody"}},
}


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


@dataclass(frozen=True)
class Node:
    """A node and all its processes, which are one session of their own."""

    process: "subprocess.Popen[bytes]"
    node_id: str


class LocalCluster:
    """Starts, kills and asks nodes; a context that kills all of them at its end.

    Attributes
    ----------
    address
        URL of the dashboard; a head that is started again has the same one.
    """

    def __init__(self) -> None:
        # Ray's sockets lie below it, and a socket's path is limited to 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="cxr", dir="/tmp"))
        self.token_file = self._folder / "token"
        self.token_file.write_text(secrets.token_hex(16))
        self._environment = (
            clean_environment()
            | PATIENT
            | FASTER
            | {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(self.token_file),
                "RAY_TMPDIR": str(self._folder),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            }
        )
        self._port, self._dashboard, self._client = free_ports(3)
        self.address = f"http://127.0.0.1:{self._dashboard}"
        self._nodes: list[Node] = []

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start_head(self, cpus: int) -> Node:
        ports = ["--port", str(self._port), "--dashboard-port", str(self._dashboard)]
        return self._start(["--head", *ports, "--ray-client-server-port", str(self._client)], cpus)

    def start_growing_head(self, most: int, cpus: int) -> Node:
        """Start a head without CPUs, whose autoscaler brings nodes to work that waits, and takes them away when none does.

        The nodes are processes of the head's, which Ray's own tests call fake; the autoscaler is the one of Kubernetes.
        """
        from ray.util import get_node_ip_address

        provider = {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": _HEAD_ID,
            "gcs_address": f"{get_node_ip_address()}:{self._port}",
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        }
        held = {"CPU": cpus, "object_store_memory": 300_000_000}
        config = {
            **_NOTHING_TO_DO,
            "cluster_name": "growing",
            "provider": provider,
            "max_workers": most,
            "idle_timeout_minutes": 1,
            "head_node_type": _HEAD_TYPE,
            "available_node_types": {
                _HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": {"resources": held, "node_config": {}, "min_workers": 0, "max_workers": most},
            },
        }
        path = self._folder / "autoscaling.json"
        path.write_text(json.dumps(config))
        self._environment |= {
            "CXR_RAY_MAX_CLUSTER": json.dumps([{"nodes": most, "CPU": cpus}]),
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        ports = ["--port", str(self._port), "--dashboard-port", str(self._dashboard)]
        ports += ["--ray-client-server-port", str(self._client)]
        return self._start(["--head", *ports, f"--autoscaling-config={path}"], 0)

    def start_node(self, cpus: int, *, hidden: Path | None = None) -> Node:
        """Start a node; `hidden` is a folder in which it finds nothing, as on another machine."""
        return self._start(["--address", f"127.0.0.1:{self._port}"], cpus, hidden)

    @staticmethod
    def processes(node: Node) -> list[int]:
        """All processes of a node, its workers among them."""
        return session_of(node.process.pid)

    def kill(self, node: Node) -> None:
        """End all processes of a node at once, as the loss of a machine does."""
        self._nodes.remove(node)
        for process in self.processes(node):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        node.process.wait()

    def kill_all(self) -> None:
        for node in reversed(self._nodes.copy()):
            self.kill(node)

    def drain(self, node: Node, seconds: int) -> None:
        """Say that a node will be taken away in so many seconds, as the machines of a spot market are."""
        command = ["drain-node", "--address", f"127.0.0.1:{self._port}", "--node-id", node.node_id]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        done = subprocess.run(
            [*RAY, *command, *reason, "--deadline-remaining-seconds", str(seconds)],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def alive(self) -> set[str]:
        """Ids of the nodes that are alive; empty while the cluster does not answer."""
        headers = {"Authorization": f"Bearer {self.token_file.read_text()}"}
        with suppress(httpx.HTTPError, KeyError, ValueError):
            answer = httpx.get(f"{self.address}/api/v0/nodes", headers=headers, timeout=5)
            nodes = answer.json()["data"]["result"]["result"]
            return {node["node_id"] for node in nodes if node["state"] == "ALIVE"}
        return set()

    def command(self, *arguments: str, token_file: Path | None = None, address: str | None = None) -> list[str]:
        options = ["--address", address or self.address, "--token-file", str(token_file or self.token_file)]
        return [sys.executable, "-m", "cxr_ray", "submit", *options, *arguments]

    def submit(self, *arguments: str, token_file: Path | None = None) -> "subprocess.CompletedProcess[str]":
        command = self.command(*arguments, token_file=token_file)
        return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=240, check=False)

    def jobs(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        where = ["--address", self.address, "--token-file", str(self.token_file)]
        command = [sys.executable, "-m", "cxr_ray", "jobs", arguments[0], *where, *arguments[1:]]
        environment = clean_environment() | {"COLUMNS": "80"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    @staticmethod
    def driver_of(*words: str) -> int:
        """The process that runs a submitted command which has these words; Ray gives it a session of its own."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError):
                    command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    if {"cxr_ray", *words} <= set(command) and "submit" not in command and not command[0].endswith("sh"):
                        found.append(int(entry.name))
        assert len(found) == 1, found
        return found[0]

    def _start(self, options: list[str], cpus: int, hidden: Path | None = None) -> Node:
        before = self.alive() if self._nodes else set()
        log = self._folder / f"{len(list(self._folder.glob('*.log')))}.log"
        agent = free_ports(1)[0]
        command = [*RAY, "start", "--block", *options, "--num-cpus", str(cpus), "--dashboard-agent-listen-port", str(agent)]
        command += OBJECT_STORE
        if hidden is not None:
            covered = f"mount -t tmpfs none {shlex.quote(str(hidden))} && exec {shlex.join(command)}"
            command = ["unshare", "--mount", "sh", "-c", covered]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                env=self._environment,
                cwd=self._folder,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # Before it is waited for, so that it is killed also if it never comes up.
        self._nodes.append(Node(process, ""))
        for _ in range(240):
            if joined := self.alive() - before:
                self._nodes[-1] = Node(process, joined.pop())
                return self._nodes[-1]
            time.sleep(0.5)
        pytest.fail(f"no node came up:\n{log.read_text()[-2000:]}")


def session_of(leader: int) -> list[int]:
    """Processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(ProcessLookupError, FileNotFoundError):
                # After the name, which may hold anything: state, parent, group, session.
                if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == leader:
                    found.append(int(entry.name))
    return found


class Watched:
    """A command whose lines are read as they come."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._started = time.monotonic()
        self._lines: list[str] = []
        self._seconds: list[float] = []
        self._read = 0
        self._changed = threading.Condition()
        self._collector = threading.Thread(target=self._collect, daemon=True)
        self._collector.start()

    @property
    def said(self) -> str:
        """All lines so far, and after how many seconds each of them came."""
        return "\n".join(f"{seconds:6.1f} {line}" for seconds, line in zip(self._seconds, self._lines, strict=False))

    def wait_for(self, pattern: str, seconds: float = 300) -> re.Match[str]:
        """The next line that begins with the pattern, after those that were waited for before."""
        until = time.monotonic() + seconds
        with self._changed:
            while True:
                while self._read < len(self._lines):
                    self._read += 1
                    if found := re.match(pattern, self._lines[self._read - 1]):
                        return found
                left = until - time.monotonic()
                if left <= 0 or (self._process.poll() is not None and not self._changed.wait(timeout=2)):
                    pytest.fail(f"no line {pattern!r}:\n{self.said}")
                self._changed.wait(timeout=min(left, 1))

    def finish(self, seconds: float = 400) -> int:
        """The exit code, when the command has ended and all that it said was read."""
        code = self._process.wait(timeout=seconds)
        self._collector.join()
        return code

    def kill(self) -> None:
        self._process.kill()
        self._collector.join()

    def _collect(self) -> None:
        for line in self._process.stdout:
            with self._changed:
                self._seconds.append(time.monotonic() - self._started)
                self._lines.append(line.rstrip())
                self._changed.notify_all()


@contextmanager
def watched(command: list[str]) -> Iterator[Watched]:
    """Run a command; it is killed at the end if it still runs."""
    with subprocess.Popen(
        command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        watching = Watched(process)
        try:
            yield watching
        finally:
            watching.kill()
