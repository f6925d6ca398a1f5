"""What several tests share: the real data, real peers, one Ray for the session, and what runs on it."""

import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from postgres import postgres_server, postgres_url

from cxr_ray.ray_session import ray_session

if TYPE_CHECKING:
    from host_site import Account

__all__ = ["postgres_server", "postgres_url"]

REPOSITORY = Path(__file__).resolve().parent.parent
SIZE = 64
PHANTOM_EPOCHS = 4
_ACCOUNT = pytest.StashKey["Account"]()
# Not PATH: pynetdicom and others install programs of DCMTK's names beside Python.
_SYSTEM_FOLDERS = "/usr/bin:/usr/sbin"


_FIRST = (
    "test_cluster_training",
    "test_cluster_faults",
    "test_train_and_evaluate",
    "test_training_runs",
    "test_ingest_s3",
    "test_ingest_interrupted",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What trains goes first, on clusters of its own before all: what later tests share would take CPU from it."""
    ranks = {name: rank for rank, name in enumerate(_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def require_program(name: str, folders: str = _SYSTEM_FOLDERS, remedy: str = "install it with 'make peers'") -> Path:
    """A peer that the system has installed; without it the test is skipped, and fails where CI is to have all of them."""
    found = shutil.which(name, path=folders)
    if found is None:
        reason = f"{name} is in none of {folders}; {remedy}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return Path(found)


def peer_environment() -> dict[str, str]:
    """For DCMTK and Orthanc, which without TCP_NODELAY wait 40 ms with each small PDU."""
    return {**os.environ, "TCP_NODELAY": "1"}


def run_peer(name: str, *arguments: object, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    """Run a peer's program to its end; what it says is in `stdout`, complaints included."""
    return subprocess.run(
        [require_program(name), *map(str, arguments)],
        env=peer_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real images: folders nih, nih-1024 and dicom below CXR_REAL_DATA."""
    path = (REPOSITORY / os.environ.get("CXR_REAL_DATA", "../shared/data")).resolve()
    if not path.is_dir():
        pytest.skip(f"no real data in {path}; set CXR_REAL_DATA")
    return path


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A TCP port of the loopback address that nobody uses, another one at each call."""
    given: set[int] = set()

    def port() -> int:
        while True:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                found = int(probe.getsockname()[1])
            if found not in given:
                given.add(found)
                return found

    return port


@pytest.fixture(scope="session")
def account(request: pytest.FixtureRequest) -> "Account":
    """What was done to hosts and what came of it; printed at the end."""
    from host_site import Account

    return request.config.stash.setdefault(_ACCOUNT, Account())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The account as Markdown, for docs/reliability.md."""
    if kept := terminalreporter.config.stash.get(_ACCOUNT, None):
        terminalreporter.section("hosts that were cut off, killed and drained")
        for line in kept.lines():
            terminalreporter.write_line(line)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database of each kind that the results store is made for."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'results.db'}"
    return request.getfixturevalue("postgres_url")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    from serve.service import ServeSettings, prepare_environment

    prepare_environment(ServeSettings(bundle=""))
    with ray_session(local_cpus=4):
        yield


@pytest.fixture(scope="session")
def untrained_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights for images of 64 pixels: what it answers is nonsense, and always the same nonsense."""
    import torch

    from cxr_ray import presets, vision
    from cxr_ray.bundle import describe, write_bundle
    from cxr_ray.clinical import ClinicalStatistics, from_request
    from cxr_ray.findings import FINDINGS
    from cxr_ray.input_profile import profile
    from ingest.phantom import simulate_patients
    from ingest.phantom_drawing import draw

    network = presets.options(presets.find("multi-input"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = presets.build("multi-input", network).eval()
    film = draw(simulate_patients(1, 0)[0], SIZE)
    head = model.get_submodule("head")
    with torch.no_grad():
        # An untrained network answers nearly the same to everything; made steep around one film, it tells images apart.
        head.weight.mul_(30)
        head.bias.sub_(model(vision.as_input(torch.from_numpy(film)[None]), torch.zeros(1, network.layout.width))[0])
    description = describe(
        preset="multi-input",
        network=network,
        size=SIZE,
        input_size=SIZE,
        statistics=asdict(ClinicalStatistics(48.0, 16.5, 0.56, 0.4, (0.1,) * len(FINDINGS))),
        training_inputs=profile(film[None], from_request(50, "M", "PA", [])[0]),
        thresholds={name: 0.3 + 0.03 * number for number, name in enumerate(FINDINGS)},
        other_thresholds={},
        validation={"auc": 0.5, "epoch": 1, "images": 100},
        settings={},
        dataset_digest="0" * 64,
    )
    path = tmp_path_factory.mktemp("untrained") / "bundle"
    write_bundle(str(path), model, description)
    return path


@dataclass(frozen=True)
class RunningService:
    """A service that answers; `token` is what it asks for, None where it asks for none."""

    url: str
    store: str
    token: str | None = None


@pytest.fixture(scope="session")
def service(
    ray_cluster: None, untrained_bundle: Path, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    """One real Serve application for the session, on loopback, with the untrained bundle and SQLite."""
    from serve.service import ServeSettings, http_service

    store = f"sqlite:///{tmp_path_factory.mktemp('service') / 'results.sqlite'}"
    settings = ServeSettings(bundle=str(untrained_bundle), store=store, port=free_port(), engine="torch")
    with http_service(settings) as url:
        yield RunningService(url, store)


@pytest.fixture(scope="session")
def guarded_service(service: RunningService, untrained_bundle: Path) -> Iterator[RunningService]:
    """The same network behind a second door, which asks for a token."""
    from ray import serve

    from serve.app import APPLICATION, Entrance, GraphSettings, Ingress

    token = secrets.token_urlsafe(24)
    models = {"default": serve.get_deployment_handle("Network", APPLICATION)}
    settings = GraphSettings(bundle=str(untrained_bundle), store=service.store, decoders=1)
    door = Ingress.options(ray_actor_options={"num_cpus": 0.1}).bind(models, None, settings, Entrance(token, required=True))
    serve.run(door, name="guarded", route_prefix="/guarded")
    yield RunningService(f"{service.url}/guarded", service.store, token)
    serve.delete("guarded")


@dataclass(frozen=True)
class PhantomRun:
    """A release of phantoms, the dataset made of it, a run on it, and the `TrainEvent`s of that run."""

    release: Path
    dataset: Path
    run: Path
    events: tuple[object, ...]


@pytest.fixture(scope="session")
def phantom_run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> PhantomRun:
    """200 made-up patients, drawn, ingested and trained on for a few epochs by two workers: a minute."""
    from cxr_ray.distributed import train
    from cxr_ray.train_events import TrainEvent
    from cxr_ray.train_settings import TrainSettings
    from ingest.nih import NihSettings, ingest_nih
    from ingest.phantom_release import PhantomSettings, make_release

    root = tmp_path_factory.mktemp("phantoms")
    release, dataset, run = root / "release", root / "dataset", root / "run"
    make_release(PhantomSettings(out=str(release), patients=200, size=2 * SIZE))
    ingest_nih(NihSettings(release=str(release), out=str(dataset), size=SIZE))
    events: list[TrainEvent] = []
    train(TrainSettings(data=str(dataset), out=str(run), workers=2, epochs=PHANTOM_EPOCHS), events.append)
    return PhantomRun(release, dataset, run, tuple(events))
