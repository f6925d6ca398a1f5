"""`cxr-ray cluster`: a Ray cluster of several nodes on this machine, for development."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import SubmitError
from cluster.hosts import check_network, permitted
from cluster.local import LocalCluster, alive_nodes, default_folder, find, host_of, kill, restore, take_down, up

Name = Annotated[str, typer.Option(help="Name of the cluster, 1 to 8 letters and digits.")]
Folder = Annotated[Path | None, typer.Option(help="Where it is kept; the path should be short [/tmp/cxr-ray-NAME-UID].")]

Number = Annotated[int, typer.Argument(metavar="NODE", help="Number of the node; 0 is the head.")]

local = typer.Typer(
    help="A Ray cluster of several nodes on this machine, for development.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


@local.command("up")
def start(
    nodes: Annotated[int, typer.Option(min=1, max=16, help="Nodes, the head among them.")] = 2,
    cpus: Annotated[int, typer.Option(min=1, help="Logical CPUs of each node.")] = 2,
    object_store_mb: Annotated[int, typer.Option(min=100, help="Object store of each node, in MB.")] = 300,
    name: Name = "dev",
    subnet: Annotated[str, typer.Option(help="IPv4 network of the nodes' own addresses, /16 or smaller.")] = "10.97.0.0/24",
    plain: Annotated[bool, typer.Option("--plain", help="Plain processes on loopback, no hosts of their own.")] = False,
    folder: Folder = None,
) -> None:
    """Start a head and further nodes, each a host of its own where that is permitted (Linux, root, iproute2)."""
    try:
        # Bad usage is told everywhere, also where no network can be made.
        check_network(name, nodes, subnet)
        reason = "--plain was given" if plain else permitted()
        if reason is not None:
            _say(f"all nodes are plain processes on loopback: {reason}")
        cluster = up(folder or default_folder(name), name, nodes, cpus, object_store_mb, None if reason else subnet)
    except SubmitError as error:
        raise _failed(error) from None
    _show(cluster)
    options = f"--address {cluster.address} --token-file {cluster.token_file}"
    _say(f"next: cxr-ray submit {options} train --data DATASET --out RUN --workers {nodes}")


@local.command("status")
def show(name: Name = "dev", folder: Folder = None) -> None:
    """Print the nodes, and how many of them are alive."""
    try:
        _show(find(folder or default_folder(name)))
    except SubmitError as error:
        raise _failed(error) from None


@local.command("lose")
def lose_node(
    number: Number,
    cut: Annotated[bool, typer.Option("--cut", help="Pull its network cable; its processes go on.")] = False,
    name: Name = "dev",
    folder: Folder = None,
) -> None:
    """End all processes of a node at once, to see what its loss does to a job."""
    try:
        cluster = find(folder or default_folder(name))
        if cut:
            host_of(cluster, number).cut()
        else:
            kill(cluster, number)
    except SubmitError as error:
        raise _failed(error) from None
    _say(f"node {number} is {'cut off' if cut else 'lost'}; 'cxr-ray cluster restore {number}' brings it back")


@local.command("restore")
def restore_node(number: Number, name: Name = "dev", folder: Folder = None) -> None:
    """Bring a node back that was lost or cut off."""
    try:
        _show(restore(find(folder or default_folder(name)), number))
    except SubmitError as error:
        raise _failed(error) from None


@local.command("down")
def end(name: Name = "dev", folder: Folder = None) -> None:
    """End all nodes, and take away their hosts, logs and token."""
    try:
        cluster = find(folder or default_folder(name))
    except SubmitError as error:
        raise _failed(error) from None
    take_down(cluster)
    _say(f"{len(cluster.nodes)} nodes ended")


def _show(cluster: LocalCluster) -> None:
    alive = len(alive_nodes(cluster))
    _say(f"{alive} of {len(cluster.nodes)} nodes alive, dashboard {cluster.address}, token {cluster.token_file}")
    for number, node in enumerate(cluster.nodes):
        where = f"host {node.namespace}" if node.namespace else "a plain process"
        _say(f"  {'head' if number == 0 else 'node'} {node.address} ({where}), log {cluster.folder}/node-{number}.log")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _failed(error: SubmitError) -> SystemExit:
    sys.stderr.write(f"cxr-ray: {error}\n")
    return SystemExit(error.code)
