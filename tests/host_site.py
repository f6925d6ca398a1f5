"""What runs on several hosts, as a hospital has it: Ray on two of them, and beside them an object store and a database.

The hosts are network namespaces with addresses of their own (`cluster.hosts`), started by `cxr-ray cluster up`'s own code. This
machine is on their network too, under the address of the bridge: there the object store, the database, the DICOM node and the
clients are, none of which Ray starts.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from local_cluster import RAY, clean_environment, session_of
from s3_server import REGION, SECRET, USER, s3_server

from cluster.hosts import Host, permitted
from cluster.local import LocalCluster, alive_nodes, default_folder, kill, restore, take_down, up

NAME, SUBNET, GATEWAY = "tests", "10.98.7.0/24", "10.98.7.1"
CPUS = 3
S3_PORT = 9000


def until(condition: Callable[[], object], what: str, seconds: float = 120) -> float:
    """Wait for it; returns how many seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)
    return time.monotonic() - started


@dataclass
class Account:
    """What was done to hosts, what came of it, and how long it took; told when the tests are over."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, work: str, fault: str, counted: str, recovery: str) -> None:
        self.rows.append((work, fault, counted, recovery))

    def lines(self) -> list[str]:
        heads = ("work", "fault", "counted", "recovery")
        return ["| " + " | ".join(row) + " |" for row in (heads, ("---",) * len(heads), *self.rows)]


class Site:
    """Two Ray nodes, each on a host of its own; node 0 is the head."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster

    @property
    def worker(self) -> Host:
        """The second host, which the tests take away."""
        assert self.cluster.network is not None
        return self.cluster.network.hosts[1]

    @property
    def head(self) -> Host:
        assert self.cluster.network is not None
        return self.cluster.network.hosts[0]

    @property
    def token(self) -> str:
        return self.cluster.token_file.read_text()

    def take_away(self, fault: str) -> float:
        """Have the worker host "killed" or "cut off"; returns the seconds until the head misses it."""
        if fault == "killed":
            self.lose(1)
        else:
            self.worker.cut()
        return until(lambda: not self.is_known(self.worker), "the head misses the host")

    def lose(self, number: int) -> None:
        kill(self.cluster, number)

    def restore(self, number: int) -> None:
        self.cluster = restore(self.cluster, number)

    def is_known(self, host: Host) -> bool:
        """Whether the head believes that a host is alive."""
        return host.address in alive_nodes(self.cluster).values()

    def drain(self, host: Host, seconds: int) -> None:
        """Tell Ray (`ray drain-node`) that a host will be taken away in so many seconds, as spot markets do."""
        (node_id,) = (known for known, address in alive_nodes(self.cluster).items() if address == host.address)
        where = ["--address", f"{self.head.address}:6379", "--node-id", node_id]
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "maintenance"]
        environment = clean_environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.cluster.token_file)}
        done = subprocess.run(
            [*RAY, "drain-node", *where, *why, "--deadline-remaining-seconds", str(seconds)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def command(self, *arguments: str) -> list[str]:
        where = ["--address", self.cluster.address, "--token-file", str(self.cluster.token_file)]
        return [sys.executable, "-m", "cxr_ray", "submit", *where, *arguments]

    def submit(self, *arguments: str, seconds: float = 300) -> str:
        """Run a command on the cluster to its good end; returns what it said."""
        done = subprocess.run(
            self.command(*arguments),
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def tasks_of(self, number: int) -> list[str]:
        """What a node's workers are doing, by the titles that Ray gives their processes."""
        titles = []
        for process in session_of(self.cluster.nodes[number].process):
            with suppress(OSError):
                title = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                if title.startswith("ray::") and title != "ray::IDLE":
                    titles.append(title.removeprefix("ray::"))
        return titles


@contextmanager
def running_site() -> Iterator[Site]:
    """The hosts and Ray on them; skipped where they cannot be made."""
    if reason := permitted():
        pytest.skip(f"no hosts of their own can be made here: {reason}")
    folder = default_folder(NAME)
    site = Site(up(folder, NAME, 2, CPUS, 300, SUBNET))
    try:
        yield site
    finally:
        take_down(site.cluster)


@contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """An S3 server with an empty bucket; yields the environment by which clients on all hosts find it.

    It is reached at the bridge's address, and begins before the bridge is there: it listens everywhere, on a port of its own.
    """
    with s3_server(S3_PORT, "0.0.0.0"):
        yield {
            "AWS_ENDPOINT_URL": f"http://{GATEWAY}:{S3_PORT}",
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
        }


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables of this process, and so of all that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def replicas(site: Site) -> list[tuple[str, str]]:
    """Deployment and address of each replica of the service that runs."""
    answer = httpx.get(
        f"{site.cluster.address}/api/serve/applications/",
        headers={"Authorization": f"Bearer {site.token}"},
        timeout=10,
        trust_env=False,
    )
    if answer.status_code != httpx.codes.OK:
        return []
    found = []
    for application in answer.json()["applications"].values():
        for deployment in application["deployments"].values():
            found += [
                (deployment["name"], replica["node_ip"]) for replica in deployment["replicas"] if replica["state"] == "RUNNING"
            ]
    return sorted(found)
