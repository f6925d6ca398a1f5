"""A running service: the Serve application with its HTTP door, started, checked and stopped."""

import ipaddress
import logging
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from cxr_ray.errors import CxrRayError, UsageError
from serve.app import APPLICATION, GraphSettings, build_graph
from serve.node.node import NodeSettings
from serve.store import Store
from serve.token import TOKEN_VARIABLE, read_token


class ServeSettings(GraphSettings):
    """Settings of `cxr-ray serve`."""

    host: str = Field("127.0.0.1", description="Address to listen on; others than loopback need a token.")
    port: int = Field(8000, ge=1, le=65535, description="TCP port of the HTTP service.")
    token_file: Path | None = Field(None, description=f"File with the bearer token; else the variable {TOKEN_VARIABLE}.")
    with_node: bool = Field(default=False, description="Also run the DICOM node on this machine.")
    node: NodeSettings = Field(default_factory=NodeSettings, description="The DICOM node's settings.")


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def http_service(settings: ServeSettings) -> Iterator[str]:
    """Run the Serve application; yields its URL once it is ready. Ray has to be initialised.

    Raises
    ------
    UsageError
        If another machine could reach it and there is no token.
    CxrRayError
        If the port is taken, or bundle or store cannot be used.
    """
    token = read_token(settings.token_file)
    if token is None and not is_loopback(settings.host):
        raise UsageError(
            f"--host {settings.host} can be reached from other machines; give --token-file or set {TOKEN_VARIABLE}, "
            f"for instance to {secrets.token_urlsafe(24)}"
        )
    _check_port(settings.host, settings.port)
    Store(settings.store).close()
    graph = build_graph(GraphSettings(**settings.model_dump(include=set(GraphSettings.model_fields))), token)

    from ray import serve  # noqa: PLC0415 - its logger is set up at import

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(http_options={"host": settings.host, "port": settings.port}, logging_config={"log_level": "WARNING"})
    try:
        serve.run(graph, name=APPLICATION, route_prefix="/")
        yield f"http://{settings.host}:{settings.port}"
    finally:
        serve.delete(APPLICATION)


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CxrRayError(
                f"{host}:{port} cannot be listened on ({error.strerror}); choose another --host or --port"
            ) from None
