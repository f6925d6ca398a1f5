"""A running service: the Serve application with its HTTP door, started, checked, replaced and stopped.

Two doors. Serve's own proxy speaks TLS. HAProxy costs half the time, needs the ports 8404 and 9101 beside the service's, on
which it shows counts and states to whoever can reach them, and leaves TLS to what stands before it.
"""

import ipaddress
import logging
import os
import secrets
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field

from cxr_ray.errors import CxrRayError, UsageError
from serve.app import APPLICATION, SERVE_LOGGING, Entrance, build_graph
from serve.graph_settings import GraphSettings
from serve.logs import LogFormat
from serve.node.node import NodeSettings
from serve.store import Store
from serve.token import TOKEN_VARIABLE, read_token


class ServeSettings(GraphSettings):
    """Settings of `cxr-ray serve`."""

    host: str = Field("127.0.0.1", description="Address to listen on; others than loopback need a token and TLS.")
    port: int = Field(8000, ge=1, le=65535, description="TCP port of the HTTP service.")
    token_file: Path | None = Field(None, description=f"File with the bearer token; else the variable {TOKEN_VARIABLE}.")
    tls_certificate: Path | None = Field(None, description="PEM file with the certificate and its chain.")
    tls_key: Path | None = Field(None, description="PEM file with the certificate's key.")
    front: Literal["proxy", "haproxy"] = Field(
        "proxy", description="Serve's own proxy, or HAProxy: faster, one service a machine, TLS left to what stands before it."
    )
    insecure: bool = Field(
        default=False, description="Answer other machines without a token, or without TLS where one before it does it."
    )
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="TCP port of the metrics, on every interface; default: one that is free."
    )
    log_format: LogFormat = Field("auto", description="json, text, or auto: text on a terminal, where only warnings show.")
    with_node: bool = Field(default=False, description="Also run the DICOM node on this machine.")
    node: NodeSettings = Field(default_factory=NodeSettings, description="The DICOM node's settings.")


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def prepare_environment(settings: ServeSettings) -> None:
    """Set what Ray and Serve read from the environment; before Ray starts, and on a cluster on every node."""
    haproxy = "1" if settings.front == "haproxy" else "0"
    for name, value in {
        # Else user code and the router run in further threads, which costs a quarter of the requests.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": haproxy,
        # Only HAProxy needs the replicas to have ports of their own.
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": haproxy,
        # HAProxy would send each request's path, and the identifiers in it, to whatever listens for syslog.
        "RAY_SERVE_HAPROXY_LOG_TARGET": os.devnull,
        # For load balancers that look once in a while; HAProxy is told.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        # Threads that wait for each other by spinning take the CPUs from whatever else runs here: seconds an image, once busy.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Somebody waits for each answer: unlike a training, a replica shall not stand back behind everything else.
        "RAY_worker_niceness": "0",
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def http_service(settings: ServeSettings) -> Iterator[str]:
    """Run the Serve application; yields its URL once it is ready. Ray has to be initialised.

    Raises
    ------
    UsageError
        If another machine could reach it and there is no token, or no TLS.
    CxrRayError
        If the port is taken, or bundle or store cannot be used.
    """
    _check_tls(settings)
    entrance = _entrance(settings)
    _check_port(settings.host, settings.port)

    from ray import serve  # noqa: PLC0415 - its logger is set up at import

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    tls = {"ssl_certfile": str(settings.tls_certificate), "ssl_keyfile": str(settings.tls_key)} if settings.tls_key else {}
    serve.start(http_options={"host": settings.host, "port": settings.port, **tls}, logging_config=SERVE_LOGGING)
    try:
        _run(settings, entrance)
        yield f"{'https' if tls else 'http'}://{settings.host}:{settings.port}"
    finally:
        serve.delete(APPLICATION)


def replace_graph(settings: ServeSettings) -> None:
    """Read the bundles again and put what has changed in place of what runs; requests go on being answered.

    Raises
    ------
    CxrRayError
        If a bundle cannot be used; what runs goes on.
    """
    _run(settings, _entrance(settings))


def _run(settings: ServeSettings, entrance: Entrance) -> None:
    from ray import serve  # noqa: PLC0415 - as above

    own = settings.model_dump(include=set(GraphSettings.model_fields))
    if settings.with_node and settings.stow_spool is None:
        free = settings.node.listener.min_free_bytes // 1_000_000
        own |= {"stow_spool": str(settings.node.spool.absolute()), "stow_min_free_mb": free}
    graph = build_graph(GraphSettings(**own), entrance)
    serve.run(graph, name=APPLICATION, route_prefix="/")


def _entrance(settings: ServeSettings) -> Entrance:
    """Who is let in: without any token everybody, where that is nobody but this machine."""
    secret = read_token(settings.token_file)
    with closing(Store(settings.store)) as store:
        some = secret is not None or bool(store.tokens())
    if not is_loopback(settings.host) and not settings.insecure:
        if not some:
            raise UsageError(
                f"--host {settings.host} can be reached from other machines; give --token-file, set {TOKEN_VARIABLE}, for "
                f"instance to {secrets.token_urlsafe(24)}, or make a token by 'cxr-ray token add' (--insecure does without)"
            )
        if settings.tls_key is None:
            raise UsageError(
                f"--host {settings.host} can be reached from other machines, and tokens and images would travel readable; give "
                "--tls-certificate and --tls-key, or --insecure where something before it speaks TLS"
            )
    return Entrance(secret, required=some)


def _check_tls(settings: ServeSettings) -> None:
    files = {"--tls-certificate": settings.tls_certificate, "--tls-key": settings.tls_key}
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        absent = next(flag for flag, file in files.items() if file is None)
        raise UsageError(f"{absent} is missing; TLS needs both --tls-certificate and --tls-key")
    if settings.tls_certificate is None or settings.tls_key is None:
        return
    if settings.front == "haproxy":
        raise UsageError("--front haproxy speaks no TLS; leave --tls-certificate out and let what stands before it do TLS")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certificate, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"--tls-certificate {settings.tls_certificate}, --tls-key {settings.tls_key}: cannot be used ({reason}); give a "
            "certificate and its own key, both PEM and readable"
        ) from None


def check_metrics_port(port: int | None) -> None:
    """Refuse a port that is taken: Ray would go on without metrics.

    Raises
    ------
    CxrRayError
        If something listens on it.
    """
    if port is not None:
        _check_port("0.0.0.0", port)  # noqa: S104 - where Ray listens


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CxrRayError(
                f"{host}:{port} cannot be listened on ({error.strerror}); choose another --host or --port"
            ) from None
