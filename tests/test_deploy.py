"""`cxr-ray deploy`: the service is on the cluster, and comes back to a head that was started anew."""

import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from manifests import CLUSTER
from result_peers import certificate

from cluster import deployment
from cluster.connection import reach
from cluster.deployment import Keeper, read_configuration
from cluster.errors import SubmitError

CONFIGURATION = CLUSTER / "compose/serve-deploy.yaml"
TOKEN = "the-cluster's-own"
PATH = "/api/serve/applications/"


class Head:
    """A head's dashboard, as far as Serve's REST API goes (Ray 2.60): a server that may be away, and forgets what it served.

    Attributes
    ----------
    outcome
        State of an application once it was put here; None refuses to take one.
    certificate
        Certificate and key of one behind TLS.
    """

    def __init__(self) -> None:
        self.applications: dict[str, dict[str, str]] = {}
        self.put: list[dict[str, Any]] = []
        self.outcome: str | None = "RUNNING"
        self.certificate: tuple[Path, Path] | None = None
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    @property
    def address(self) -> str:
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self._port}"

    def start(self) -> None:
        self.applications = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler())
        self._port = self._server.server_port
        if self.certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*self.certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True).start()

    def end(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        head = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answers: dict[str, object] = {
                    "/api/version": {"ray_version": ray.__version__},
                    "/api/v0/cluster_metadata": {"data": {"pythonVersion": ".".join(map(str, sys.version_info[:3]))}},
                    PATH: {"applications": head.applications},
                }
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self.answer(401, "Unauthorized")
                else:
                    self.answer(200, json.dumps(answers[self.path]))

            def do_PUT(self) -> None:
                assert self.path == PATH
                assert self.headers["Authorization"] == f"Bearer {TOKEN}"
                given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                head.put.append(given)
                if head.outcome is None:
                    self.answer(400, "ValidationError: args")
                    return
                head.applications = {each["name"]: {"status": head.outcome} for each in given["applications"]}
                self.answer(200, "")

            def answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler


@pytest.fixture
def head() -> Iterator[Head]:
    made = Head()
    made.start()
    yield made
    made.end()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def keeper(head: Head, told: list[str], monkeypatch: pytest.MonkeyPatch) -> Keeper:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    return Keeper(lambda: reach(head.address, None), read_configuration(CONFIGURATION), told.append)


def run(*arguments: object, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cxr_ray", "deploy", *map(str, arguments)]
    environment = os.environ | {"RAY_AUTH_TOKEN": token}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_puts_what_was_written(head: Head) -> None:
    done = run(CONFIGURATION, "--address", head.address)
    assert (done.returncode, done.stdout) == (0, f"cxr-ray put on {head.address}\n"), done.stderr
    assert head.put == [yaml.safe_load(CONFIGURATION.read_text())]


def test_a_cluster_behind_tls_is_trusted_by_its_authority(head: Head, tmp_path: Path) -> None:
    authority = certificate(tmp_path, "authority")
    head.end()
    head.certificate = certificate(tmp_path, "head", authority)
    head.start()
    refused = run(CONFIGURATION, "--address", head.address)
    assert (refused.returncode, refused.stderr.count("\n"), head.put) == (1, 1, [])
    assert "give the file with the authority that it comes from with --ca-file" in refused.stderr
    done = run(CONFIGURATION, "--address", head.address, "--ca-file", authority[0])
    assert done.returncode == 0, done.stderr
    assert len(head.put) == 1


def test_what_is_wrong_is_one_line(head: Head, tmp_path: Path) -> None:
    head.outcome = None
    refused = run(CONFIGURATION, "--address", head.address)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (f"cxr-ray: {head.address}{PATH}: answers 400 (ValidationError: args); the head's log has more\n")
    for text, reason in (
        ("applications: []", "names no application"),
        ("applications: [{}]", "is no list of named"),
        ("bundle: /data", "is no list of named"),
        ("[", "cannot be read"),
    ):
        (tmp_path / "serve.yaml").write_text(text)
        with pytest.raises(SubmitError, match=f"serve.yaml: {reason}.*; give a file that") as error:
            read_configuration(tmp_path / "serve.yaml")
        assert error.value.code == 2
    with pytest.raises(SubmitError, match="nowhere: cannot be read"):
        read_configuration(tmp_path / "nowhere")


def test_an_application_that_is_there_is_put_once_for_it_may_be_older(head: Head, keeper: Keeper, told: list[str]) -> None:
    head.applications = {"cxr-ray": {"status": "RUNNING"}}
    for _ in range(3):
        keeper.look()
    assert len(head.put) == 1
    assert told == [f"cxr-ray put on {head.address}"]


def test_a_head_that_has_forgotten_is_told_again(head: Head, keeper: Keeper, told: list[str]) -> None:
    keeper.look()
    keeper.look()
    head.applications = {"somebody-else's": {"status": "RUNNING"}}
    keeper.look()
    assert len(head.put) == 2
    head.end()
    for _ in range(3):
        keeper.look()
    head.start()
    keeper.look()
    keeper.look()
    assert len(head.put) == 3
    assert set(head.applications) == {"cxr-ray"}
    assert [line.partition(" (")[0] for line in told] == [
        f"cxr-ray put on {head.address}: cxr-ray was not there",
        f"cxr-ray put on {head.address}: cxr-ray was not there",
        f"{head.address}: no answer",
        f"cxr-ray put on {head.address}: cxr-ray was not there",
    ]


def test_a_head_that_is_not_there_yet_is_waited_for(head: Head, keeper: Keeper, told: list[str]) -> None:
    head.end()
    keeper.look()
    keeper.look()
    head.start()
    keeper.look()
    assert len(head.put) == 1
    assert len(told) == 2


def test_what_could_not_be_built_is_tried_again_more_and_more_seldom(
    head: Head, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the database comes up after the head: Serve builds the application once, and gives up."""
    head.outcome = "DEPLOY_FAILED"
    monkeypatch.setattr(deployment, "_LONGEST_PAUSE", 80.0)
    now = [1000.0]
    monkeypatch.setattr(deployment.time, "monotonic", lambda: now[0])
    attempts = []
    for second in range(0, 400, 10):
        now[0] = 1000.0 + second
        before = len(head.put)
        keeper.look()
        attempts += [second] * (len(head.put) - before)
    assert attempts == [0, 20, 60, 140, 220, 300, 380]
    head.outcome = "RUNNING"
    now[0] += 80
    keeper.look()
    keeper.look()
    assert len(head.put) == 8
    head.applications = {}
    keeper.look()
    assert len(head.put) == 9


def test_a_refusal_is_told_once_and_tried_again(
    head: Head, keeper: Keeper, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    head.outcome = None
    monkeypatch.setattr(deployment, "_FIRST_PAUSE", 0.0)
    keeper._rest()
    keeper.look()
    keeper.look()
    assert len(head.put) == 2
    assert told == [f"{head.address}{PATH}: answers 400 (ValidationError: args); the head's log has more; trying again"]
    head.outcome = "RUNNING"
    keeper.look()
    assert told[1:] == [f"cxr-ray put on {head.address}: cxr-ray was not there"]


def test_an_application_that_is_on_its_way_is_left_alone(head: Head, keeper: Keeper) -> None:
    head.outcome = "DEPLOYING"
    for _ in range(3):
        keeper.look()
        keeper._rest()
    assert len(head.put) == 1


def test_an_address_that_can_be_none_ends_the_keeping() -> None:
    done = run(CONFIGURATION, "--keep", "--address", "head:8265")
    assert done.returncode == 2
    assert done.stderr.startswith("cxr-ray: --address head:8265: is no http")


def test_the_command_stays_and_is_ended_by_a_signal(head: Head) -> None:
    command = [sys.executable, "-m", "cxr_ray", "deploy", "--keep", "--address", head.address, str(CONFIGURATION)]
    environment = os.environ | {"RAY_AUTH_TOKEN": TOKEN}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"cxr-ray put on {head.address}: cxr-ray was not there\n"
        assert process.poll() is None
        process.terminate()
        assert process.wait(20) != 0
