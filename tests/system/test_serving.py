"""`cxr-ray serve` as an operator runs it: TLS, tokens, another bundle put in place under load, HAProxy, metrics, lines."""

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from conftest import require_program
from phantom_films import VISITS, assert_problem, dicom, encoded, film
from pydicom.uid import generate_uid

from cxr_ray.bundle import load_bundle, read_description, write_bundle
from cxr_ray.errors import UsageError
from serve.deployment import DeploymentSettings, application
from serve.service import ServeSettings, http_service
from serve.store import Store

pytestmark = pytest.mark.system
PATIENCE_SECONDS = 120.0
PNG = encoded(film(VISITS[0]))


class Serving:
    """A running `cxr-ray serve`, and what it said."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, url: str, trust: ssl.SSLContext | bool) -> None:
        self.process, self.log, self.url, self.trust = process, log, url, trust

    def client(self, token: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.url, headers=headers, verify=self.trust, timeout=60, trust_env=False)

    def said(self) -> str:
        return self.log.read_text()


@contextmanager
def serving(
    log: Path, bundle: Path, store: str, port: int, *options: str, trust: ssl.SSLContext | bool = True
) -> Iterator[Serving]:
    command = [sys.executable, "-m", "cxr_ray", "serve", "--bundle", str(bundle), "--store", store, "--port", str(port)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CXR_RAY_"))}
    environment = {**kept, "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options], stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    scheme = "https" if trust is not True else "http"
    try:
        until(lambda: "answering on" in log.read_text() or process.poll() is not None, f"the start, see {log}")
        assert process.poll() is None, log.read_text()
        yield Serving(process, log, f"{scheme}://127.0.0.1:{port}", trust)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS:.0f} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def other_bundle(untrained_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with another head, so that its answers are other ones."""
    bundle = load_bundle(str(untrained_bundle))
    head = bundle.model.get_submodule("head")
    head.bias.data.add_(0.5)
    path = tmp_path_factory.mktemp("other") / "bundle"
    write_bundle(str(path), bundle.model, bundle.description)
    return path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for the loopback address, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "certificate.pem", folder / "key.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-out", str(files[0]), "-keyout", str(files[1]), *subject]
    subprocess.run([require_program("openssl"), *made], check=True, capture_output=True)
    return files


class Load:
    """Clients that ask without a pause and keep account of what they are answered."""

    def __init__(self, serving: Serving, token: str, clients: int = 3) -> None:
        self.digests: Counter[str] = Counter()
        self.failures: list[str] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(serving, token)) for _ in range(clients)]

    def _ask(self, serving: Serving, token: str) -> None:
        with serving.client(token) as client:
            while not self._stopping.is_set():
                try:
                    answer = client.post("/v1/predict", files={"image": PNG})
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                if answer.status_code == 200:
                    self.digests[answer.json()["model"]["digest"]] += 1
                else:
                    self.failures.append(f"{answer.status_code} {answer.text}")

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()


def replaced_under_load(serving: Serving, place: Path, other: Path, token: str) -> None:
    """Put another bundle in the place of one, and tell the service; nobody notices but by the answers."""
    before, after = read_description(str(place)).digest, read_description(str(other)).digest
    assert before != after
    with Load(serving, token) as load:
        until(lambda: load.digests[before] >= 10, "the first answers")
        shutil.rmtree(place)
        shutil.copytree(other, place)
        serving.process.send_signal(signal.SIGHUP)
        until(lambda: load.digests[after] >= 10, f"the other bundle's answers, see {serving.log}")
    assert load.failures == []
    assert set(load.digests) == {before, after}
    until(lambda: "the bundles as they are now answer" in serving.said(), "word of it")
    with serving.client(token) as client:
        answers = [client.post("/v1/predict", files={"image": PNG}).json()["model"]["digest"] for _ in range(10)]
    assert set(answers) == {after}


def test_tls_tokens_roles_and_a_bundle_replaced_under_load(
    untrained_bundle: Path, other_bundle: Path, certificate: tuple[Path, Path], free_port: Callable[[], int], tmp_path: Path
) -> None:
    place = shutil.copytree(untrained_bundle, tmp_path / "bundle")
    url = f"sqlite:///{tmp_path / 'results.sqlite'}"
    store = Store(url)
    tokens = {role: store.add_token(name, role) for name, role in (("a reader", "read"), ("a writer", "write"))}
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    options = ["--tls-certificate", str(certificate[0]), "--tls-key", str(certificate[1]), "--also", f"other={other_bundle}"]
    with (
        ExitStack() as clients,
        serving(tmp_path / "serve.log", place, url, free_port(), *options, trust=trust) as running,
    ):
        reader, writer = (clients.enter_context(running.client(tokens[role])) for role in ("read", "write"))
        stranger = clients.enter_context(running.client())
        with pytest.raises(httpx.ConnectError, match="self-signed"):
            httpx.get(f"{running.url}/healthz", trust_env=False)
        assert stranger.get("/healthz").status_code == 200

        study = generate_uid()
        instance = dicom(VISITS[0], StudyInstanceUID=study, SOPInstanceUID=generate_uid())
        for path, kind in (("/v1/instances", "post"), ("/v1/patients/P/history", "put"), ("/dicom-web/studies", "post")):
            assert_problem(stranger.request(kind, path), 401, "no bearer token")
            assert_problem(reader.request(kind, path), 403, "the token's role is read")
        assert writer.post("/v1/instances", files={"image": instance}).status_code == 200
        # Who sees pseudonyms asks for nobody's history by name; who knows the patients does so on record.
        named = {"files": {"image": PNG}, "data": {"patient_id": "P-1", "study_date": "2024-01-01"}}
        assert_problem(reader.post("/v1/predict", **named), 403, "patient_id", "role is read")
        assert_problem(reader.post("/v1/heatmap/Mass", **named), 403, "patient_id")
        assert writer.post("/v1/predict", **named).status_code == 200
        latest = store.accesses(limit=1)[0]
        assert (latest.actor, latest.action, latest.patient_id) == ("a writer", "use history", "P-1")
        # Nor by a header that names the patient.
        visits = {"visits": [{"visit_date": "2000-01-01", "findings": ["Mass"]}]}
        assert writer.put("/v1/patients/P-2/history", json=visits).status_code == 200
        header = {"files": {"image": dicom(VISITS[0], PatientID="P-2")}}
        histories = [client.post("/v1/predict", **header).json()["clinical"]["history"] for client in (reader, writer)]
        assert histories == [None, ["Mass"]]
        assert_problem(stranger.get(f"/v1/studies/{study}"), 401)
        assert reader.get(f"/v1/studies/{study}").status_code == 200
        assert [access.actor for access in store.accesses(study)] == ["a reader"]

        # Another model by its name, beside the default one.
        described = {model["model"]: model["identity"]["digest"] for model in reader.get("/v1/models").json()["models"]}
        other = reader.post("/v1/predict", params={"model": "other"}, files={"image": PNG}).json()
        assert other["model"]["digest"] == described["other"] == read_description(str(other_bundle)).digest
        assert reader.post("/v1/predict", files={"image": PNG}).json()["model"]["digest"] == described["default"]

        replaced_under_load(running, place, other_bundle, tokens["read"])

        # A bundle that cannot be read replaces nothing.
        (place / "model.safetensors").write_bytes(b"damaged")
        running.process.send_signal(signal.SIGHUP)
        until(lambda: "what runs goes on: " in running.said(), "word of the damage")
        assert reader.post("/v1/predict", files={"image": PNG}).status_code == 200

        store.revoke_token("a reader")
        until(lambda: reader.get("/v1/models").status_code == 401, "the token's end")
        assert writer.get("/v1/models").status_code == 200
    store.close()


@pytest.mark.long
def test_haproxy_and_the_shadow(
    untrained_bundle: Path, other_bundle: Path, free_port: Callable[[], int], tmp_path: Path
) -> None:
    place = shutil.copytree(untrained_bundle, tmp_path / "bundle")
    url = f"sqlite:///{tmp_path / 'results.sqlite'}"
    (tmp_path / "token").write_text("secret\n")
    port, metrics_port = free_port(), free_port()
    options = ["--front", "haproxy", "--token-file", str(tmp_path / "token"), "--shadow", str(other_bundle)]
    options += ["--metrics-port", str(metrics_port), "--log-format", "json"]
    with serving(tmp_path / "serve.log", place, url, port, *options) as running, running.client("secret") as client:
        assert_problem(httpx.get(f"{running.url}/v1/studies", trust_env=False), 401)
        assert client.post("/v1/predict", files={"image": PNG}).status_code == 200
        # Beside it, replicas have ports of their own; none of them is open to other machines.
        listening = listening_addresses()
        assert listening[port] == {"127.0.0.1"}
        assert {address for number, found in listening.items() if 30000 <= number <= 31000 for address in found} == {
            "127.0.0.1"
        }

        uid = generate_uid()
        instance = dicom(VISITS[0], SOPInstanceUID=uid, StudyInstanceUID=generate_uid())
        shown = client.post("/v1/instances", files={"image": instance}).json()
        store = Store(url)
        until(lambda: store.shadow_answers(uid), "the shadow's answer")
        (shadow,) = store.shadow_answers(uid)
        assert shadow.model_digest == read_description(str(other_bundle)).digest != shown["model"]["digest"]
        assert shadow.findings[0].probability != shown["findings"][0]["probability"]
        assert shadow.model_digest not in client.get("/v1/studies").text
        store.close()
        watched_from_outside(running, client, metrics_port)

        replaced_under_load(running, place, other_bundle, "secret")


def watched_from_outside(running: Serving, client: httpx.Client, metrics_port: int) -> None:
    """What the operator of one machine has: the lines of all processes on the terminal, and a port to scrape."""
    study = generate_uid()
    missing = client.get(f"/v1/studies/{study}", headers={"X-Request-ID": "a-study-asked-for"})
    assert missing.headers.get_list("x-request-id") == ["a-study-asked-for"]
    client.post("/v1/predict", files={"image": PNG}, headers={"X-Request-ID": "an-image-sent"})
    until(lambda: running.said().count("an-image-sent") == 2, "the lines of the ingress and of the network")
    lines = [json.loads(line) for line in running.said().splitlines() if line.startswith("{")]
    assert lines[0]["settings"]["metrics_port"] == metrics_port
    (looked,) = (line for line in lines if line.get("request_id") == "a-study-asked-for")
    assert (looked["route"], looked["status"]) == ("/v1/studies/{study_uid}", 404)
    (inference,) = (line for line in lines if line["message"] == "inference" and "an-image-sent" in line["request_ids"])
    assert inference["deployment"] == "Network"
    assert study not in running.said()

    def shown() -> bool:
        metrics = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics", trust_env=False).text
        return "ray_cxr_requests_total{" in metrics and 'deployment="Network-shadow"' in metrics

    until(shown, "the metrics")


@pytest.mark.long
def test_serves_own_tools_run_the_written_configuration(
    untrained_bundle: Path, free_port: Callable[[], int], tmp_path: Path
) -> None:
    config, port = tmp_path / "serve.yaml", free_port()
    written = ["--bundle", str(untrained_bundle), "--store", f"sqlite:///{tmp_path / 'r.sqlite'}", "--port", str(port)]
    command = [sys.executable, "-m", "cxr_ray", "serve", *written, "--decoders", "1", "--write-config", str(config)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    run = [sys.executable, "-m", "ray.serve.scripts", "run", str(config)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CXR_RAY_"))}
    with (tmp_path / "run.log").open("wb") as log:
        process = subprocess.Popen(
            run, stdout=log, stderr=subprocess.STDOUT, env={**kept, "CXR_RAY_TOKEN": "secret"}, start_new_session=True
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            until(lambda: answers(client), f"the first answer, see {tmp_path}/run.log")
            assert_problem(client.post("/v1/predict", files={"image": PNG}), 401)
            bearer = {"Authorization": "Bearer secret"}
            assert client.post("/v1/predict", files={"image": PNG}, headers=bearer).status_code == 200
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_nothing_is_deployed_that_nobody_could_be_kept_from(untrained_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("CXR_RAY_TOKEN", raising=False)
    settings = {"bundle": str(untrained_bundle), "store": f"sqlite:///{tmp_path / 'r.sqlite'}"}
    with pytest.raises(UsageError, match="there is no token: set CXR_RAY_TOKEN"):
        application(DeploymentSettings(**settings))
    application(DeploymentSettings(**settings, insecure=True))


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def listening_addresses() -> dict[int, set[str]]:
    """IPv4 and IPv6 addresses that this machine's TCP ports listen on."""
    listed = subprocess.run([require_program("ss"), "-Hltn"], capture_output=True, text=True, check=True).stdout
    found: dict[int, set[str]] = {}
    for line in listed.splitlines():
        address, _, port = line.split()[3].rpartition(":")
        found.setdefault(int(port), set()).add(address)
    return found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 can be reached from other machines; give --token-file"),
        ({"host": "0.0.0.0", "token": True}, "tokens and images would travel readable; give --tls-certificate"),
        ({"tls_key": Path("key.pem")}, "--tls-certificate is missing"),
        ({"tls_key": Path("no.pem"), "tls_certificate": Path("no.pem")}, "cannot be used"),
    ],
)
def test_a_service_that_would_be_open_does_not_start(
    untrained_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, said: str
) -> None:
    monkeypatch.delenv("CXR_RAY_TOKEN", raising=False)
    if options.pop("token", None):
        monkeypatch.setenv("CXR_RAY_TOKEN", "secret")
    settings = ServeSettings(bundle=str(untrained_bundle), store=f"sqlite:///{tmp_path / 'results.sqlite'}", **options)
    with pytest.raises(UsageError, match=said), http_service(settings):
        pytest.fail("it was started")
