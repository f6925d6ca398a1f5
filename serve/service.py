"""A running service: the Serve application, and on the same machine the DICOM node, started and stopped together."""

import ipaddress
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import Field, SecretStr

from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.settings import Settings
from serve.app import APPLICATION, GraphSettings, build_graph
from serve.node.dispatch import Dispatcher, DispatchSettings
from serve.node.listener import Listener, ListenerSettings
from serve.node.spool import Spool
from serve.store import Store

TOKEN_VARIABLE = "CXR_RAY_TOKEN"  # noqa: S105 - the name of the variable, not a token
_KEEP_DONE_SECONDS = 7 * 24 * 3600.0


class NodeSettings(Settings):
    """Settings of the DICOM node: where it listens and where it keeps what it accepted."""

    spool: Path = Field(Path("cxr-ray-spool"), description="Folder of accepted instances, on a local disk.")
    listener: ListenerSettings = Field(default_factory=ListenerSettings, description="Whom and what to accept.")
    dispatch: DispatchSettings = Field(default_factory=DispatchSettings, description="The service to ask.")


class ServeSettings(GraphSettings):
    """Settings of `cxr-ray serve`."""

    host: str = Field("127.0.0.1", description="Address to listen on; others than loopback need a token.")
    port: int = Field(8000, ge=1, le=65535, description="TCP port of the HTTP service.")
    token_file: Path | None = Field(None, description=f"File with the bearer token; else the variable {TOKEN_VARIABLE}.")
    with_node: bool = Field(default=False, description="Also run the DICOM node on this machine.")
    node: NodeSettings = Field(default_factory=NodeSettings, description="The DICOM node's settings.")


class ListenSettings(NodeSettings):
    """Settings of `cxr-ray listen`: the node of a service that runs elsewhere."""

    store: str = Field("sqlite:///cxr-ray-results.sqlite", description="SQLAlchemy URL of the results store.")
    token_file: Path | None = Field(None, description=f"File with the service's token; else the variable {TOKEN_VARIABLE}.")


def read_token(token_file: Path | None) -> str | None:
    """The bearer token from a file, else from the environment; None if there is none.

    Raises
    ------
    CxrRayError
        If the file cannot be read or is empty.
    """
    if token_file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CxrRayError(f"--token-file {token_file}: cannot be read ({error}); write the token into it") from None
    if not token:
        raise CxrRayError(f"--token-file {token_file}: is empty; write the token into it")
    return token


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


@contextmanager
def dicom_node(settings: NodeSettings, store_url: str, *, service_url: str | None, token: str | None) -> Iterator[Listener]:
    """Run listener and dispatcher in this process.

    Parameters
    ----------
    service_url
        Overrides the URL of `settings.dispatch`; None keeps it.
    """
    given = settings.dispatch.model_dump(exclude={"token"})
    given |= {"service_url": service_url} if service_url else {}
    secret = token or (settings.dispatch.token.get_secret_value() if settings.dispatch.token else None)
    with ExitStack() as stack:
        spool = Spool(settings.spool)
        spool.sweep(_KEEP_DONE_SECONDS)
        store = Store(store_url)
        stack.callback(store.close)
        dispatcher = stack.enter_context(
            Dispatcher(DispatchSettings(**given, token=SecretStr(secret) if secret else None), spool, store)
        )
        yield stack.enter_context(Listener(settings.listener, spool, dispatcher.notify))
