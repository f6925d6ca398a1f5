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
from dataclasses import asdict, dataclass, replace
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
_SECONDS_TO_GIVE_UP = 60.0
# Ray takes up to a minute to miss a host that is cut off: whoever tries what happens then should not have to wait for it.
_FASTER = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
# As kuberay/base/config/cluster.env has it.
KEEPALIVE = {"RAY_grpc_client_keepalive_time_ms": "10000", "RAY_grpc_client_keepalive_timeout_ms": "10000"}
# What the service needs on every node before Ray starts, as kuberay/base/config/serve.env has it; but not its niceness: where
# several nodes share a machine's CPUs, workers that compute must not keep Ray's own processes from telling that they live.
SERVE_VARIABLES = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_SERVE_HAPROXY_LOG_TARGET": os.devnull,
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass(frozen=True)
class LocalNode:
    """A node: the process that all of its processes belong to, where it is, and what it offers."""

    process: int
    started: float
    address: str
    namespace: str | None
    cpus: int
    object_store_mb: int


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
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise SubmitError(_taken(folder, name)) from None
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
            before = _alive(folder, address)
            node = _start(folder, number, host, hosts[0], cpus, object_store_mb)
            started.append(node)
            _write(LocalCluster(folder, address, tuple(started), network))
            _wait(folder, address, before, number, node)
    except BaseException:
        take_down(LocalCluster(folder, "", tuple(started), network))
        raise
    return LocalCluster(folder, address, tuple(started), network)


def _taken(folder: Path, name: str) -> str:
    """What is where a cluster was to be kept, and what to do about it."""
    if (folder / _STATE).exists():
        where = "" if folder == default_folder(name) else f" --folder {folder}"
        return f"{folder}: holds a cluster already; end it with 'cxr-ray cluster down --name {name}{where}'"
    return f"--folder {folder}: is there already, or a file is in its way; name a folder that is not there yet"


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
    for number in reversed(range(len(cluster.nodes))):
        kill(cluster, number)
    if cluster.network is not None:
        remove_network(cluster.network)
    shutil.rmtree(cluster.folder, ignore_errors=True)


def alive_nodes(cluster: LocalCluster) -> dict[str, str]:
    """Nodes that the head knows to be alive, address by id; none while it does not answer."""
    return _alive(cluster.folder, cluster.address)


def host_of(cluster: LocalCluster, number: int) -> Host:
    """The host of a node.

    Raises
    ------
    SubmitError
        If there is no such node, or it is a plain process.
    """
    _node(cluster, number)
    if (host := _host(cluster, number)) is None:
        raise SubmitError(f"node {number} is a plain process and has no cable; leave --cut out, or start hosts of their own", 2)
    return host


def kill(cluster: LocalCluster, number: int) -> None:
    """End all processes of a node at once, as the loss of a machine does.

    Raises
    ------
    SubmitError
        If there is no such node.
    """
    node = _node(cluster, number)
    # The number may have been given to somebody else's process since.
    own = _session(node.process) if _start_time(node.process) == node.started else []
    # Ray gives a job's command a session of its own.
    host = _host(cluster, number)
    for process in {*own, *(host.processes() if host else ())}:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(node.process, 0)


def restore(cluster: LocalCluster, number: int) -> LocalCluster:
    """Plug a node's cable in, and start the node again unless it is known to the head and alive.

    A head that is started again has forgotten its nodes: those that are left are ended, and are to be restored after it.

    Raises
    ------
    SubmitError
        If there is no such node, or it does not come up.
    """
    node = _node(cluster, number)
    host, head = _host(cluster, number), _host(cluster, 0)
    if host is not None:
        host.heal()
    # A node that was given up is told so when it reaches the head again, and ends by itself.
    deadline = time.monotonic() + _SECONDS_TO_GIVE_UP
    while _start_time(node.process) == node.started:
        if host is not None and node.address in alive_nodes(cluster).values():
            return cluster
        if host is None or time.monotonic() > deadline:
            raise SubmitError(f"node {number} at {node.address} runs; 'cxr-ray cluster lose {number}' ends it")
        time.sleep(0.5)
    # What is left of the old cluster; Ray takes it for a head that runs already, as it sees all processes of the machine.
    for lost in range(len(cluster.nodes)) if number == 0 else (number,):
        kill(cluster, lost)
    before = alive_nodes(cluster)
    again = _start(cluster.folder, number, host, head, node.cpus, node.object_store_mb)
    cluster = replace(cluster, nodes=(*cluster.nodes[:number], again, *cluster.nodes[number + 1 :]))
    _write(cluster)
    _wait(cluster.folder, cluster.address, before, number, again)
    return cluster


def _node(cluster: LocalCluster, number: int) -> LocalNode:
    if not 0 <= number < len(cluster.nodes):
        raise SubmitError(f"node {number}: there are nodes 0 (the head) to {len(cluster.nodes) - 1}", 2)
    return cluster.nodes[number]


def _host(cluster: LocalCluster, number: int) -> Host | None:
    return cluster.network.hosts[number] if cluster.network else None


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
    with (folder / f"node-{number}.log").open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - Ray's own command
            host.command(command) if host else command,
            env=_environment(folder, number),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    namespace = host.namespace if host else None
    return LocalNode(process.pid, _start_time(process.pid) or 0.0, address, namespace, cpus, object_store_mb)


def _environment(folder: Path, number: int) -> dict[str, str]:
    temporary = folder / str(number)
    temporary.mkdir(exist_ok=True)
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        **_FASTER,
        **KEEPALIVE,
        **SERVE_VARIABLES,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TMPDIR": str(temporary),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Jobs begin with 'python', which is to be this one.
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
    }


def _wait(folder: Path, address: str, before: dict[str, str], number: int, node: LocalNode) -> None:
    """Until the head knows a node that it did not know before."""
    deadline = time.monotonic() + _SECONDS_TO_START
    while not _alive(folder, address).keys() - before.keys():
        if _start_time(node.process) != node.started or time.monotonic() > deadline:
            log = (folder / f"node-{number}.log").read_text(errors="replace").strip().splitlines()
            raise SubmitError(f"node {number} at {node.address} did not start: {' '.join(log[-3:])}")
        time.sleep(0.3)


def _alive(folder: Path, address: str) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {(folder / 'token').read_text()}"}
    with suppress(httpx.HTTPError, KeyError, ValueError, TypeError):
        answer = httpx.get(f"{address}/api/v0/nodes", headers=headers, timeout=5, trust_env=False).json()
        nodes = answer["data"]["result"]["result"]
        return {node["node_id"]: node["node_ip"] for node in nodes if node["state"] == "ALIVE"}
    return {}


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
