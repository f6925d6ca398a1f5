"""`cxr-ray serve`, `cxr-ray listen`, `cxr-ray deadletter` and `cxr-ray demo`."""

import logging
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from cxr_ray.settings import load_settings
from cxr_ray.terminal import command_group, console, print_json, print_settings, single_command, table

Config = Annotated[Path | None, typer.Option(help="YAML file with settings; flags override it.")]
StoreUrl = Annotated[str | None, typer.Option(help="SQLAlchemy URL of the results [sqlite:///cxr-ray-results.sqlite].")]
SpoolFolder = Annotated[Path | None, typer.Option(help="Folder of accepted instances, on a local disk [cxr-ray-spool].")]
AeTitle = Annotated[str | None, typer.Option(help="AE title that peers call [CXRRAY].")]
DicomHost = Annotated[str | None, typer.Option(help="Address the node listens on [127.0.0.1].")]
DicomPort = Annotated[int | None, typer.Option(help="TCP port the node listens on [11112].")]
Networks = Annotated[list[str] | None, typer.Option(help="Network let in, CIDR; repeatable [127.0.0.0/8, ::1/128].")]
Callers = Annotated[list[str] | None, typer.Option(help="Calling AE title let in; repeatable [any].")]
MinFree = Annotated[int | None, typer.Option(help="MB of free disk below which nothing is accepted; 0 is off [2147].")]
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
) -> dict[str, object]:
    return _given(
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
    replicas: Annotated[int | None, typer.Option(help="Processes that run the network [1].")] = None,
    decoders: Annotated[int | None, typer.Option(help="Processes that decode images [1].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a forward pass at most [16].")] = None,
    gpu: Annotated[bool | None, typer.Option("--gpu", help="Give each network a GPU.")] = None,
    with_node: Annotated[bool | None, typer.Option("--with-node", help="Also run the DICOM node here.")] = None,
    spool: SpoolFolder = None,
    ae_title: AeTitle = None,
    dicom_host: DicomHost = None,
    dicom_port: DicomPort = None,
    allow_network: Networks = None,
    allow_caller: Callers = None,
    min_free_mb: MinFree = None,
    config: Config = None,
) -> None:
    """Answer over HTTP with Ray Serve; with --with-node also over DICOM."""
    listener = _listener_flags(ae_title, dicom_host, dicom_port, allow_network, allow_caller, min_free_mb)
    node = _given(spool=spool, listener=listener or None)
    flags = _given(
        bundle=bundle,
        host=host,
        port=port,
        store=store,
        token_file=token_file,
        replicas=replicas,
        decoders=decoders,
        batch_size=batch_size,
        gpu=gpu,
        with_node=with_node,
        node=node or None,
    )
    from cxr_ray.ray_session import ray_session  # noqa: PLC0415 - takes seconds, --help need not wait
    from serve.node.node import dicom_node  # noqa: PLC0415
    from serve.service import ServeSettings, http_service  # noqa: PLC0415
    from serve.token import read_token  # noqa: PLC0415

    settings = load_settings(ServeSettings, config, flags)
    print_settings("serve", settings)
    _log_to_standard_error()
    with ray_session(), http_service(settings) as url:
        console.print(f"answering on {url} (documentation: {url}/docs)")
        if not settings.with_node:
            _wait_for_signal()
            return
        token = read_token(settings.token_file)
        with dicom_node(settings.node, settings.store, service_url=_local(url), token=token) as node_listener:
            console.print(f"DICOM node {settings.node.listener.ae_title} on port {node_listener.port}")
            _wait_for_signal()


def _local(url: str) -> str:
    return url.replace("://0.0.0.0:", "://127.0.0.1:").replace("://[::]:", "://[::1]:")


def _listen(
    service: Annotated[str | None, typer.Option(help="URL of the service [http://127.0.0.1:8000].")] = None,
    store: StoreUrl = None,
    token_file: TokenFile = None,
    spool: SpoolFolder = None,
    ae_title: AeTitle = None,
    host: DicomHost = None,
    port: DicomPort = None,
    allow_network: Networks = None,
    allow_caller: Callers = None,
    min_free_mb: MinFree = None,
    config: Config = None,
) -> None:
    """Receive studies by C-STORE, send them to a running service, keep the results."""
    from serve.node.node import ListenSettings, dicom_node  # noqa: PLC0415 - --help need not wait
    from serve.token import read_token  # noqa: PLC0415

    flags = _given(
        store=store,
        token_file=token_file,
        spool=spool,
        listener=_listener_flags(ae_title, host, port, allow_network, allow_caller, min_free_mb) or None,
        dispatch=_given(service_url=service) or None,
    )
    settings = load_settings(ListenSettings, config, flags)
    print_settings("listen", settings)
    _log_to_standard_error()
    token = read_token(settings.token_file)
    with dicom_node(settings, settings.store, service_url=None, token=token) as listener:
        console.print(f"DICOM node {settings.listener.ae_title} on {settings.listener.host}:{listener.port}")
        _wait_for_signal()


def _log_to_standard_error() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _wait_for_signal() -> None:
    """Until SIGTERM or Ctrl-C; what is accepted by then is in the spool."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
    console.print("stopping")


serve = single_command(_serve)
listen = single_command(_listen)
deadletter = command_group("Instances that were accepted and could not be answered.")


@deadletter.command("list")
def list_dead_letters(
    spool: Annotated[Path, typer.Option(help="Folder of accepted instances.")] = Path("cxr-ray-spool"),
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List dead letters with their reasons."""
    letters = _open_spool(spool).dead_letters()
    if json:
        print_json([{**vars(letter), "when": letter.when.isoformat()} for letter in letters])
        return
    shown = table(f"{len(letters)} dead letters in {spool}", [("name", False), ("when (UTC)", False), ("reason", False)])
    for letter in letters:
        shown.add_row(letter.name, f"{letter.when:%Y-%m-%d %H:%M}", letter.reason)
    console.print(shown)


@deadletter.command("replay")
def replay_dead_letters(
    names: Annotated[list[str], typer.Argument(help="Names of dead letters, as 'list' prints them.")],
    spool: Annotated[Path, typer.Option(help="Folder of accepted instances.")] = Path("cxr-ray-spool"),
) -> None:
    """Put dead letters back in front of the dispatcher."""
    opened = _open_spool(spool)
    for name in names:
        opened.replay(name)
        console.print(f"{name}: waiting again")


def _open_spool(folder: Path):  # type: ignore[no-untyped-def]  # noqa: ANN202 - its module is imported late
    from cxr_ray.errors import CxrRayError  # noqa: PLC0415
    from serve.node.spool import Spool  # noqa: PLC0415

    if not folder.is_dir():
        raise CxrRayError(f"--spool {folder}: is no folder; give the one that 'cxr-ray listen' or 'serve' uses")
    return Spool(folder)


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
