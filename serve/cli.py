"""`cxr-ray serve`, `cxr-ray listen` and `cxr-ray demo`."""

import logging
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from json import dumps as json_text
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated

import typer

from cxr_ray.settings import Settings, load_settings, without_credentials
from cxr_ray.terminal import console, print_settings, single_command

if TYPE_CHECKING:
    from serve.service import ServeSettings

Config = Annotated[Path | None, typer.Option(help="YAML file with settings; flags override it.")]
StoreUrl = Annotated[str | None, typer.Option(help="SQLAlchemy URL of the results [sqlite:///cxr-ray-results.sqlite].")]
SpoolFolder = Annotated[
    Path | None, typer.Option(help="Folder of accepted instances, on a local disk [CXR_RAY_SPOOL, else cxr-ray-spool].")
]
AeTitle = Annotated[str | None, typer.Option(help="AE title that peers call [CXRRAY].")]
DicomHost = Annotated[str | None, typer.Option(help="Address the node listens on [127.0.0.1].")]
DicomPort = Annotated[int | None, typer.Option(help="TCP port the node listens on [11112].")]
Networks = Annotated[list[str] | None, typer.Option(help="Network let in, CIDR; repeatable [127.0.0.0/8, ::1/128].")]
Callers = Annotated[list[str] | None, typer.Option(help="Calling AE title let in; repeatable [any].")]
MinFree = Annotated[int | None, typer.Option(help="MB of free disk below which nothing is accepted; 0 is off [2147].")]
DicomCertificate = Annotated[Path | None, typer.Option(help="PEM file of the DICOM port's certificate and chain [no TLS].")]
DicomKey = Annotated[Path | None, typer.Option(help="PEM file with the key of the DICOM port's certificate.")]
DicomClientCa = Annotated[Path | None, typer.Option(help="PEM file of authorities whose DICOM clients are let in [any].")]
AcceptAll = Annotated[bool | None, typer.Option("--accept-all", help="File every other class and syntax too, unread.")]
NodeMetricsPort = Annotated[int | None, typer.Option(help="TCP port of the node's Prometheus metrics on loopback [none].")]
LogFormat = Annotated[str | None, typer.Option(help="json, text, or auto: text on a terminal [auto].")]
LogLevel = Annotated[str | None, typer.Option(help="Least that is logged: debug, info or warning [info].")]
TokenFile = Annotated[Path | None, typer.Option(help="File with the bearer token; else the variable CXR_RAY_TOKEN.")]


def _given(**flags: object) -> dict[str, object]:
    return {name: value for name, value in flags.items() if value is not None}


def _listener_flags(
    ae_title: str | None,
    host: str | None,
    port: int | None,
    networks: list[str] | None,
    callers: list[str] | None,
    min_free_mb: int | None,
    **others: object,
) -> dict[str, object]:
    return _given(
        **others,
        ae_title=ae_title,
        host=host,
        port=port,
        allowed_networks=networks or None,
        allowed_calling=callers or None,
        min_free_bytes=None if min_free_mb is None else min_free_mb * 1_000_000,
    )


def _serve(
    bundle: Annotated[str | None, typer.Option(help="Folder or URI of the bundle that answers.")] = None,
    host: Annotated[str | None, typer.Option(help="Address of the HTTP service [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port of the HTTP service [8000].")] = None,
    store: StoreUrl = None,
    token_file: TokenFile = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file with the certificate and its chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file with the certificate's key.")] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Answer other machines without a token, or without TLS.")
    ] = None,
    front: Annotated[str | None, typer.Option(help="proxy, or haproxy: faster, on every interface [proxy].")] = None,
    also: Annotated[list[str] | None, typer.Option(help="NAME=BUNDLE to ask for with model=NAME; repeatable.")] = None,
    shadow: Annotated[str | None, typer.Option(help="Bundle asked about every stored instance, never shown.")] = None,
    history_source: Annotated[
        str | None, typer.Option(help="Earlier findings: none, confirmed, predicted or both [confirmed].")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="auto, torch or openvino [auto].")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a network [the CPUs, shared by the replicas].")] = None,
    replicas: Annotated[int | None, typer.Option(help="Processes that run the network [1].")] = None,
    decoders: Annotated[int | None, typer.Option(help="Processes that decode images [2].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a forward pass at most [16].")] = None,
    gpu: Annotated[bool | None, typer.Option("--gpu", help="Give each network a GPU.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="TCP port of the Prometheus metrics, on every interface [one that is free].")
    ] = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
    with_node: Annotated[bool | None, typer.Option("--with-node", help="Also run the DICOM node here.")] = None,
    write_config: Annotated[
        Path | None, typer.Option(help="Write what 'serve deploy' reads for these settings, and end.")
    ] = None,
    spool: SpoolFolder = None,
    ae_title: AeTitle = None,
    dicom_host: DicomHost = None,
    dicom_port: DicomPort = None,
    allow_network: Networks = None,
    allow_caller: Callers = None,
    min_free_mb: MinFree = None,
    dicom_tls_certificate: DicomCertificate = None,
    dicom_tls_key: DicomKey = None,
    dicom_tls_client_ca: DicomClientCa = None,
    accept_all: AcceptAll = None,
    node_metrics_port: NodeMetricsPort = None,
    config: Config = None,
) -> None:
    """Answer over HTTP with Ray Serve; with --with-node also over DICOM."""
    listener = _listener_flags(
        ae_title,
        dicom_host,
        dicom_port,
        allow_network,
        allow_caller,
        min_free_mb,
        tls_certificate=dicom_tls_certificate,
        tls_key=dicom_tls_key,
        tls_client_ca=dicom_tls_client_ca,
        accept_all=accept_all,
        metrics_port=node_metrics_port,
    )
    node = _given(spool=spool, listener=listener or None)
    flags = _given(
        bundle=bundle,
        host=host,
        port=port,
        store=store,
        token_file=token_file,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        insecure=insecure,
        front=front,
        also=_named_bundles(also) if also else None,
        shadow=shadow,
        history_source=history_source,
        engine=engine,
        threads=threads,
        replicas=replicas,
        decoders=decoders,
        batch_size=batch_size,
        gpu=gpu,
        metrics_port=metrics_port,
        log_format=log_format,
        log_level=log_level,
        with_node=with_node,
        node=node or None,
    )
    from cxr_ray.ray_session import metrics_urls, ray_session  # noqa: PLC0415 - takes seconds, --help need not wait
    from serve.log_files import LogFollower, session_log_folder  # noqa: PLC0415
    from serve.logs import log_to_stderr  # noqa: PLC0415
    from serve.node.node import dicom_node  # noqa: PLC0415
    from serve.service import (  # noqa: PLC0415
        ServeSettings,
        check_metrics_port,
        http_service,
        prepare_environment,
        replace_graph,
    )
    from serve.token import read_token  # noqa: PLC0415

    settings = load_settings(ServeSettings, config, flags)
    if write_config is not None:
        _write_serve_config(settings, write_config)
        return
    as_json = log_to_stderr(settings.log_format, settings.log_level)
    _tell_settings("serve", settings, as_json)
    prepare_environment(settings)
    check_metrics_port(settings.metrics_port)

    def replace() -> None:
        console.print("reading the bundles again")
        replace_graph(load_settings(ServeSettings, config, flags))
        console.print("the bundles as they are now answer")

    with ExitStack() as stack:
        stack.enter_context(ray_session(metrics_port=settings.metrics_port))
        folder = Path(settings.log_folder) if settings.log_folder else session_log_folder()
        stack.enter_context(LogFollower(folder, _replica_lines(as_json)))
        url = stack.enter_context(http_service(settings))
        console.print(f"answering on {url} (page: {url}/, documentation: {url}/docs)")
        console.print(f"metrics: {' '.join(metrics_urls())}, log files: {folder}")
        if not settings.with_node:
            _wait_for_signal(replace)
            return
        token = read_token(settings.token_file)
        with dicom_node(settings.node, service_url=_local(url), token=token) as node_listener:
            console.print(f"DICOM node {settings.node.listener.ae_title} on port {node_listener.port}")
            _wait_for_signal(replace)


def _write_serve_config(settings: "ServeSettings", path: Path) -> None:
    import yaml  # noqa: PLC0415 - as above

    from cxr_ray import storage  # noqa: PLC0415
    from serve.deployment import serve_config  # noqa: PLC0415

    text = yaml.safe_dump(serve_config(settings, settings.host, settings.port), sort_keys=False)
    filesystem, target = storage.resolve(str(path))
    storage.write_atomically(filesystem, target, text.encode())
    console.print(f"{path}: next: serve deploy {path}")


def _named_bundles(pairs: list[str]) -> dict[str, str]:
    from cxr_ray.errors import UsageError  # noqa: PLC0415 - as above

    named: dict[str, str] = {}
    for pair in pairs:
        name, separator, bundle = pair.partition("=")
        if not separator or not bundle or name in named:
            raise UsageError(
                f"--also {pair}: is no NAME=BUNDLE, or names a model twice; write e.g. --also baseline=runs/b/bundle"
            )
        named[name] = bundle
    return named


def _local(url: str) -> str:
    return url.replace("://0.0.0.0:", "://127.0.0.1:").replace("://[::]:", "://[::1]:")


def _listen(
    service: Annotated[str | None, typer.Option(help="URL of the service [http://127.0.0.1:8000].")] = None,
    token_file: TokenFile = None,
    spool: SpoolFolder = None,
    ae_title: AeTitle = None,
    host: DicomHost = None,
    port: DicomPort = None,
    allow_network: Networks = None,
    allow_caller: Callers = None,
    min_free_mb: MinFree = None,
    tls_certificate: DicomCertificate = None,
    tls_key: DicomKey = None,
    tls_client_ca: DicomClientCa = None,
    accept_all: AcceptAll = None,
    share_port: Annotated[
        bool | None, typer.Option("--share-port", help="Let several of this user's listeners share the port.")
    ] = None,
    metrics_port: NodeMetricsPort = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
    config: Config = None,
) -> None:
    """Receive studies by C-STORE and bring them to a running service, which answers them and keeps the results."""
    from serve.logs import log_to_stderr  # noqa: PLC0415 - --help need not wait
    from serve.node.node import ListenSettings, dicom_node  # noqa: PLC0415
    from serve.token import read_token  # noqa: PLC0415

    listener = _listener_flags(
        ae_title,
        host,
        port,
        allow_network,
        allow_caller,
        min_free_mb,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        accept_all=accept_all,
        share_port=share_port,
        metrics_port=metrics_port,
    )
    flags = _given(
        token_file=token_file,
        spool=spool,
        listener=listener or None,
        dispatch=_given(service_url=service) or None,
        log_format=log_format,
        log_level=log_level,
    )
    settings = load_settings(ListenSettings, config, flags)
    as_json = log_to_stderr(settings.log_format, settings.log_level)
    _tell_settings("listen", settings, as_json)
    token = read_token(settings.token_file)
    with dicom_node(settings, service_url=None, token=token) as running:
        console.print(f"DICOM node {settings.listener.ae_title} on {settings.listener.host}:{running.port}")
        _wait_for_signal()


def _tell_settings(command: str, settings: Settings, as_json: bool) -> None:
    """As they are printed elsewhere, or as one line among lines."""
    if not as_json:
        print_settings(command, settings)
        return
    from serve.logs import fields  # noqa: PLC0415 - as above

    said = without_credentials(settings).model_dump(mode="json")
    logging.getLogger(__name__).info("%s starts", command, extra=fields(settings=said))


def _replica_lines(as_json: bool) -> Callable[[dict[str, object]], None]:
    """What is done with the lines of replicas: all of them as JSON, or for people those that somebody should look at."""
    from serve.logs import as_text, write_line  # noqa: PLC0415 - as above

    def write_json(line: dict[str, object]) -> None:
        write_line(sys.stderr, json_text(line))

    def write_text(line: dict[str, object]) -> None:
        if line.get("level") not in {"debug", "info"}:
            write_line(sys.stderr, as_text(line))

    return write_json if as_json else write_text


def _wait_for_signal(on_hangup: Callable[[], None] | None = None) -> None:
    """Until SIGTERM or Ctrl-C; what is accepted by then is in the spool. SIGHUP calls `on_hangup`, whose errors are told."""
    from cxr_ray.errors import CxrRayError  # noqa: PLC0415 - as above

    signals: SimpleQueue[int] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if on_hangup else [])):
        signal.signal(number, lambda received, _frame: signals.put(received))
    while signals.get() == signal.SIGHUP:
        try:
            if on_hangup:
                on_hangup()
        except CxrRayError as error:
            console.print(f"what runs goes on: {error}", style="red")
    console.print("stopping")


serve = single_command(_serve)
listen = single_command(_listen)


def _demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo"),
    stay: Annotated[bool, typer.Option("--serve", help="Leave the service up until Ctrl-C.")] = False,
    patients: Annotated[int, typer.Option(help="Patients of the made-up release.")] = 300,
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 6,
    http_port: Annotated[int, typer.Option(help="TCP port of the HTTP service.")] = 8000,
    dicom_port: Annotated[int, typer.Option(help="TCP port of the DICOM node.")] = 11112,
) -> None:
    """The whole way on synthetic radiographs: ingest, train, evaluate, serve, C-STORE, result."""
    from serve.demo import DemoSettings, run_demo  # noqa: PLC0415

    flags = dict(out=out, stay=stay, patients=patients, epochs=epochs, http_port=http_port, dicom_port=dicom_port)
    run_demo(load_settings(DemoSettings, None, flags), _wait_for_signal)


demo = single_command(_demo)
