"""Separate hosts on one machine: network namespaces on a bridge, each with its own address, loopback and ports.

What runs in one reaches the others over the bridge alone, as machines do over a switch; this machine is on the bridge too, as
the address that ends in 1. A link can be taken down, which is what a pulled cable looks like. Linux, root and iproute2 needed.
"""

import contextlib
import ipaddress
import os
import shutil
import subprocess
from dataclasses import dataclass
from itertools import islice

from cluster.errors import SubmitError

# Of the 15 characters that an interface's name may have, what is left beside the prefix and a number.
LONGEST_NAME = 8
# A network larger than this is somebody's mistake: there are 16 nodes at most.
_SHORTEST_PREFIX = 16


@dataclass(frozen=True)
class Host:
    """One namespace: its name, and its address on the bridge."""

    namespace: str
    address: str
    link: str

    def command(self, command: list[str]) -> list[str]:
        """The same command, run on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def processes(self) -> list[int]:
        """All that runs on this host."""
        done = subprocess.run(  # noqa: S603 - a name of our own
            ["ip", "netns", "pids", self.namespace],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(number) for number in done.stdout.split()]

    def cut(self) -> None:
        """Pull the cable: nothing comes or goes until `heal`."""
        _ip("link", "set", self.link, "down")

    def heal(self) -> None:
        """Plug the cable in again."""
        _ip("link", "set", self.link, "up")


@dataclass(frozen=True)
class Network:
    """A bridge and the hosts on it.

    Attributes
    ----------
    gateway
        This machine's address on the bridge.
    """

    name: str
    gateway: str
    hosts: tuple[Host, ...]


def permitted() -> str | None:
    """Why namespaces cannot be made here; None where they can."""
    if shutil.which("ip") is None:
        return "the program ip is not installed (Debian's package iproute2)"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    probe = f"cxr-probe-{os.getpid()}"
    try:
        _ip("netns", "add", probe)
    except SubmitError as error:
        return str(error)
    _ip("netns", "delete", probe)
    return None


def check_network(name: str, hosts: int, subnet: str) -> ipaddress.IPv4Network:
    """Check what `make_network` is given; returns the network of `subnet`.

    Raises
    ------
    SubmitError
        If the name is none, or `subnet` is no IPv4 network with room for this machine and the hosts.
    """
    if not (name.isascii() and name.isalnum()) or len(name) > LONGEST_NAME:
        raise SubmitError(f"--name {name}: give 1 to {LONGEST_NAME} letters and digits", code=2)
    try:
        given = ipaddress.IPv4Network(subnet)
    except ValueError as error:
        raise SubmitError(f"--subnet {subnet}: is no IPv4 network ({error}); give one as 10.97.0.0/24", code=2) from None
    if given.prefixlen < _SHORTEST_PREFIX:
        raise SubmitError(f"--subnet {subnet}: is larger than /{_SHORTEST_PREFIX}; give a smaller one, as 10.97.0.0/24", code=2)
    # The network's own address, its broadcast and this machine are no hosts' addresses.
    if given.num_addresses - 3 < hosts:
        raise SubmitError(f"--subnet {subnet}: has no room for {hosts} nodes; give a larger one, as 10.97.0.0/24", code=2)
    return given


def make_network(name: str, hosts: int, subnet: str) -> Network:
    """Make a bridge with hosts on it.

    Parameters
    ----------
    name
        At most `LONGEST_NAME` letters and digits; the bridge is called ``cxr-`` and this.
    subnet
        IPv4 network of the bridge, e.g. 10.97.1.0/24; this machine takes its first address, the hosts the next.

    Raises
    ------
    SubmitError
        If something of this name is there already, or the system refuses; nothing is left behind then.
    """
    given = check_network(name, hosts, subnet)
    gateway, *addresses = map(str, islice(given.hosts(), hosts + 1))
    network = Network(
        name,
        gateway,
        tuple(Host(f"cxr-{name}-{n}", address, f"cxr{name}{n}") for n, address in enumerate(addresses)),
    )
    prefix = given.prefixlen
    try:
        bridge = f"cxr-{name}"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{network.gateway}/{prefix}", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in network.hosts:
            _add(host, bridge, prefix)
    except SubmitError:
        remove_network(network)
        raise
    return network


def remove_network(network: Network) -> None:
    """Take a network away, as far as it is there."""
    for host in network.hosts:
        with contextlib.suppress(SubmitError):
            _ip("netns", "delete", host.namespace)
        # Goes with the namespace only when the last process in it has ended.
        with contextlib.suppress(SubmitError):
            _ip("link", "delete", host.link)
    with contextlib.suppress(SubmitError):
        _ip("link", "delete", f"cxr-{network.name}")


def _add(host: Host, bridge: str, prefix: int) -> None:
    _ip("netns", "add", host.namespace)
    _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _ip("link", "set", host.link, "master", bridge, "up")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/{prefix}", "dev", "eth0")
    _ip("-n", host.namespace, "link", "set", "eth0", "up")
    _ip("-n", host.namespace, "link", "set", "lo", "up")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)  # noqa: S603, S607 - names of our own
    if done.returncode:
        raise SubmitError(
            f"ip {' '.join(arguments)}: {done.stderr.strip() or done.returncode}; 'cluster down' clears what is left"
        )
