"""Over which network interface the workers of a training talk: the one that has their node's address in the cluster.

Left alone, Gloo and NCCL choose by the machine's name. Where that resolves to loopback, as Debian's installer writes it into
/etc/hosts, workers on other machines are told to connect to themselves.
"""

import fcntl
import os
import socket
import struct
from dataclasses import dataclass

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SIOCGIFADDR = 0x8915


@dataclass
class NodeNetworkConfig(TorchConfig):
    """Ray Train's configuration of torch.distributed, over the interface of each node's address."""

    @property
    def backend_cls(self) -> type["_NodeNetworkBackend"]:
        """See `ray.train.backend.BackendConfig`."""
        return _NodeNetworkBackend


class _NodeNetworkBackend(_TorchBackend):
    def on_start(self, worker_group, backend_config: TorchConfig) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001 - of either version of Train
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


def use_node_interface() -> None:
    """Name the interface to Gloo and NCCL, where nobody named one."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        for variable in _VARIABLES:
            os.environ.setdefault(variable, name)


def interface_of(address: str) -> str | None:
    """The interface that has an IPv4 address; None where none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                # struct ifreq: the name, then a struct sockaddr_in, whose address begins at its fifth byte.
                answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
