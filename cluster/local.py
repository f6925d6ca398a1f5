"""A Ray cluster of several nodes on this machine, for development: hosts of their own where that is permitted.

A folder holds what is known of it: the token, the logs, and the processes that were started, so that another command can take
it down again.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from cluster.connection import DEFAULT_ADDRESS
from cluster.errors import SubmitError
from cluster.hosts import Host, Network, make_network, remove_network

GCS_PORT, DASHBOARD_PORT = 6379, 8265
_STATE = "cluster.json"
_SECONDS_TO_START = 120.0
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_WITHOUT_HOSTS = "127.0.0.1"


@dataclass(frozen=True)
class LocalNode:
    """A node: the process that all of its processes belong to, and where it is."""

    process: int
    started: float
    address: str
    namespace: str | None


@dataclass(frozen=True)
class LocalCluster:
    """What is known of a cluster."""

    folder: Path
    address: str
    nodes: tuple[LocalNode, ...]
    network: Network | None

    @property
    def token_file(self) -> Path:
        """The cluster's token."""
        return self.folder / "token"


def default_folder(name: str) -> Path:
    """Where a cluster of this name is kept; short, as sockets lie below it."""
    return Path("/tmp") / f"cxr-ray-{name}-{os.getuid()}"  # noqa: S108 - a folder of one user's own, made with its rights


def up(folder: Path, name: str, nodes: int, cpus: int, object_store_mb: int, subnet: str | None) -> LocalCluster:
    """Start a head and further nodes.

    Parameters
    ----------
    subnet
        IPv4 network for hosts of their own; None starts all nodes as plain processes on loopback.

    Raises
    ------
    SubmitError
        If there is one in the folder already, or a node does not come up; nothing is left behind then.
    """
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise SubmitError(f"{folder}: holds a cluster already; end it with 'cxr-ray cluster down --name {name}'") from None
    except OSError as error:
        raise SubmitError(f"{folder}: cannot be made ({error.strerror}); name another folder with --folder") from None
    network: Network | None = None
    started: list[LocalNode] = []
    try:
        network = None if subnet is None else make_network(name, nodes, subnet)
        (folder / "token").write_text(secrets.token_hex(16))
        (folder / "token").chmod(0o600)
        hosts: list[Host | None] = list(network.hosts) if network else [None] * nodes
        address = f"http://{hosts[0].address}:{DASHBOARD_PORT}" if hosts[0] else DEFAULT_ADDRESS
        for number, host in enumerate(hosts):
            node = _start(folder, number, host, hosts[0], cpus, object_store_mb)
            started.append(node)
            _write(LocalCluster(folder, address, tuple(started), network))
            _wait(folder, address, number + 1, node)
    except BaseException:
        take_down(LocalCluster(folder, "", tuple(started), network))
        raise
    return LocalCluster(folder, address, tuple(started), network)


def find(folder: Path) -> LocalCluster:
    """Read what is known of a cluster.

    Raises
    ------
    SubmitError
        If there is none.
    """
    try:
        known = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise SubmitError(f"{folder}: holds no cluster; start one with 'cxr-ray cluster up'") from None
    network = known["network"]
    if network is not None:
        network = Network(network["name"], network["gateway"], tuple(Host(**host) for host in network["hosts"]))
    return LocalCluster(folder, known["address"], tuple(LocalNode(**node) for node in known["nodes"]), network)


def take_down(cluster: LocalCluster) -> None:
    """End every process of a cluster, and take its network and its folder away."""
    for node in reversed(cluster.nodes):
        kill(node)
    if cluster.network is not None:
        remove_network(cluster.network)
    shutil.rmtree(cluster.folder, ignore_errors=True)


def kill(node: LocalNode) -> None:
    """End all processes of a node at once, as the loss of a machine does."""
    # The number may have been given to somebody else's process since.
    if _start_time(node.process) != node.started:
        return
    for process in _session(node.process):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(node.process, 0)


def alive_nodes(cluster: LocalCluster) -> int:
    """How many nodes the head knows to be alive; 0 while it does not answer."""
    return _alive(cluster.folder, cluster.address)


def _start(folder: Path, number: int, host: Host | None, head: Host | None, cpus: int, object_store_mb: int) -> LocalNode:
    address = host.address if host else _WITHOUT_HOSTS
    command = [*_RAY, "start", "--block", "--num-cpus", str(cpus), "--disable-usage-stats"]
    command += ["--object-store-memory", str(object_store_mb * 1_000_000)]
    command += ["--node-ip-address", address] if host else []
    if number == 0:
        dashboard = ["--dashboard-host", address, "--dashboard-port", str(DASHBOARD_PORT)]
        command += ["--head", "--port", str(GCS_PORT), *dashboard]
    else:
        command += ["--address", f"{head.address if head else _WITHOUT_HOSTS}:{GCS_PORT}"]
        # On one host the agents of several nodes would want the same port.
        command += [] if host else ["--dashboard-agent-listen-port", str(52365 + number)]
    with (folder / f"node-{number}.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - Ray's own command
            host.command(command) if host else command,
            env=_environment(folder, number),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return LocalNode(process.pid, _start_time(process.pid) or 0.0, address, host.namespace if host else None)


def _environment(folder: Path, number: int) -> dict[str, str]:
    temporary = folder / str(number)
    temporary.mkdir()
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TMPDIR": str(temporary),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Jobs begin with 'python', which is to be this one.
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
    }


def _wait(folder: Path, address: str, nodes: int, node: LocalNode) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while _alive(folder, address) < nodes:
        if _start_time(node.process) != node.started or time.monotonic() > deadline:
            log = (folder / f"node-{nodes - 1}.log").read_text(errors="replace").strip().splitlines()
            raise SubmitError(f"node {nodes - 1} at {node.address} did not start: {' '.join(log[-3:])}")
        time.sleep(0.3)


def _alive(folder: Path, address: str) -> int:
    headers = {"Authorization": f"Bearer {(folder / 'token').read_text()}"}
    with suppress(httpx.HTTPError, KeyError, ValueError, TypeError):
        answer = httpx.get(f"{address}/api/v0/nodes", headers=headers, timeout=5, trust_env=False).json()
        return sum(node["state"] == "ALIVE" for node in answer["data"]["result"]["result"])
    return 0


def _write(cluster: LocalCluster) -> None:
    known = {
        "address": cluster.address,
        "nodes": [asdict(node) for node in cluster.nodes],
        "network": asdict(cluster.network) if cluster.network else None,
    }
    (cluster.folder / _STATE).write_text(json.dumps(known, indent=2), encoding="utf-8")


def _start_time(process: int) -> float | None:
    """When a process began, in ticks since boot; None where there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] in "ZX" else float(fields[19])


def _session(leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                # After the name, which may hold anything: state, parent, group, session.
                if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == leader:
                    found.append(int(entry.name))
    return found
