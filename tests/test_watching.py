"""The service watched: what Prometheus scrapes, what its log lines join, and that no identifier of a patient is in either."""

import io
import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import SIZE
from phantom_films import VISITS, dicom, encoded, film
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from pydicom import dcmread
from pynetdicom import AE

from cxr_ray.bundle import load_bundle
from cxr_ray.clinical import ClinicalInputs, from_request
from cxr_ray.findings import FINDINGS
from cxr_ray.input_profile import drift, profile
from cxr_ray.pixels import full_range, stored_square
from cxr_ray.ray_session import metrics_urls

pytestmark = pytest.mark.ray

DASHBOARD = Path(__file__).parents[1] / "docs" / "monitoring" / "grafana-dashboard.json"
TOKEN = "token-of-this-service-alone"
WINDOW = 4
# No identifier that a client sends may come back in a log or a metric; these cannot come from anywhere else.
UID = "1.2.826.0.1.3680043.9.7777.424242"
SECRETS = {
    "PatientID": "QXZPATIENT77",
    "PatientName": "QXZDOE^JANE",
    "AccessionNumber": "QXZACC123",
    "StudyInstanceUID": f"{UID}.1",
    "SeriesInstanceUID": f"{UID}.2",
    "SOPInstanceUID": f"{UID}.3",
}
FILE_NAME = "QXZ-Jane-Doe.dcm"
NEEDLES = ("QXZ", UID, "Jane-Doe")


@dataclass(frozen=True)
class Watched:
    """What was left behind by the traffic of this module: log lines by file, all files' text, the scrape, the answers."""

    lines: dict[Path, list[dict]]
    texts: dict[str, str]
    metrics: str
    answers: list[dict]
    failed: httpx.Response
    node_lines: list[dict]

    def requests(self, **wanted: object) -> list[dict]:
        found = [line for lines in self.lines.values() for line in lines if line["message"] == "request"]
        return [line for line in found if wanted.items() <= line.items()]

    def samples(self, metric: str, /, **labels: str) -> list[float]:
        return samples(self.metrics, metric, labels | {"application": "watched"})


def samples(text: str, metric: str, labels: dict[str, str]) -> list[float]:
    return [sample.value for sample in parsed(text) if sample.name == metric and labels.items() <= sample.labels.items()]


@cache
def parsed(text: str) -> list[Sample]:
    """All samples of a scrape, of which there are many thousands after a session's tests."""
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


@pytest.fixture(scope="module")
def watched(
    ray_cluster: None, untrained_bundle: Path, service, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Watched]:
    """A graph beside the session's, with logs of its own, after some traffic of every kind."""
    from ray import serve

    from serve.app import Entrance, GraphSettings, build_graph
    from serve.log_files import session_log_folder

    folder = tmp_path_factory.mktemp("watched")
    store, logs = folder / "results.sqlite", folder / "logs"
    settings = GraphSettings(
        bundle=str(untrained_bundle), store=f"sqlite:///{store}", drift_window=WINDOW, log_folder=str(logs), decoders=1
    )
    serve.run(build_graph(settings, Entrance(TOKEN, required=True)), name="watched", route_prefix="/watched")
    try:
        answers = talk(f"{service.url}/watched")
        node_log = speak_dicom(f"{service.url}/watched", folder, free_port())
        failed = fail(f"{service.url}/watched", store)
        metrics = scraped(whole)
        lines = {file: [json.loads(line) for line in file.read_text().splitlines()] for file in logs.iterdir()}
        files = [*(file for file in session_log_folder().parent.rglob("*") if file.is_file()), *logs.iterdir(), node_log]
        texts = {str(file): file.read_text(errors="replace") for file in files}
        node_lines = [json.loads(line) for line in node_log.read_text().splitlines() if line.startswith("{")]
        yield Watched(lines, texts, metrics, answers, failed, node_lines)
    finally:
        serve.delete("watched")


def whole(text: str) -> bool:
    """Whether all that the traffic should count has come, that of the session's own application left aside."""
    own = {"application": "watched"}
    failed = samples(text, "ray_cxr_requests_total", own | {"status": "500"})
    # A gauge may have been set last while a request was still being answered, and is set anew seconds later.
    at_rest = samples(text, "ray_cxr_requests_under_way", own) == [0] == samples(text, "ray_cxr_decoder_queue_images", own)
    return failed == [1] and samples(text, "ray_cxr_images_total", own) == [5] and at_rest and "cxr_input_drift_psi" in text


def talk(url: str) -> list[dict]:
    """Send identifiers over every road there is, in what is answered and in what is refused; returns the answers of images."""
    content = dicom(VISITS[0], **SECRETS)
    cut = content[: len(content) // 2]
    answers = []
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=url, timeout=60, trust_env=False, headers=headers) as http:

        def send(path: str, image: bytes, status: int, **options: object) -> None:
            answer = http.post(path, files={"image": (FILE_NAME, image)}, **options)
            assert answer.status_code == status, answer.text
            if status == 200 and path != "/v1/heatmap/Mass":
                answers.append(answer.json())

        for visit in VISITS[1:4]:
            send("/v1/predict", encoded(film(visit)), 200, data={"age": visit.age_years}, headers={"X-Request-ID": "followed"})
        stated = {"patient_id": SECRETS["PatientID"], "study_date": "2024-01-01", "history": SECRETS["PatientName"]}
        send("/v1/predict", content, 400, data=stated)
        send("/v1/predict", cut, 400)
        send("/v1/instances", content, 200)
        send("/v1/instances", content[:200], 400)
        send("/v1/instances", dicom(VISITS[0], **{**SECRETS, "SOPInstanceUID": f"{UID}.9", "StudyInstanceUID": ""}), 400)
        send("/v1/instances", dicom(VISITS[1], **SECRETS), 409)
        lateral = {**SECRETS, "SOPInstanceUID": f"{UID}.4", "ViewPosition": "LL"}
        send("/v1/instances", dicom(VISITS[0], **lateral), 422)
        send("/v1/instances", encoded(film(VISITS[0])), 415)
        boundary = "parts"
        form = f'multipart/related; type="application/dicom"; boundary={boundary}'
        parts = b"".join(b"--parts\r\nContent-Type: application/dicom\r\n\r\n" + part + b"\r\n" for part in (content, cut))
        stored = http.post("/dicom-web/studies", content=parts + b"--parts--\r\n", headers={"Content-Type": form})
        assert stored.status_code == 202, stored.text
        place = f"/v1/studies/{UID}.1"
        visits = {"visits": [{"visit_date": "2010-01-01", "findings": ["Mass"]}]}
        asked = [
            (http.get(place), 200),
            (http.get(f"{place}/instances/{UID}.3/film.png"), 200),
            (http.get(f"{place}/instances/{UID}.3/heatmap/Mass.png"), 200),
            (http.get(f"{place}/instances/{UID}.5/film.png"), 404),
            (http.get(f"/v1/studies/{UID}.6"), 404),
            (http.get("/v1/studies", params={"patient_id": SECRETS["PatientID"], "finding": "QXZFINDING"}), 400),
            (http.get("/v1/studies", params={"patient_id": SECRETS["PatientID"]}), 200),
            (http.put(f"/v1/patients/{SECRETS['PatientID']}/history", json=visits), 200),
            (http.get(f"/v1/patients/{SECRETS['PatientID']}/history"), 200),
            (http.get(f"/wado/{UID}.1"), 404),
            (http.delete(place), 405),
            (http.get("/v1/models"), 200),
            (http.get("/v1/models", headers={"Authorization": "Bearer QXZTOKEN"}), 401),
            (http.get("/healthz"), 200),
        ]
        assert [answer.status_code for answer, _ in asked] == [status for _, status in asked]
    return answers


def speak_dicom(url: str, folder: Path, port: int) -> Path:
    """Send one instance that is answered and one that is refused to a node before this service; returns the node's log."""
    import subprocess
    import sys

    token, log = folder / "token", folder / "listen.log"
    token.write_text(TOKEN)
    places = ["--service", url, "--spool", str(folder / "spool"), "--port", str(port), "--token-file", str(token)]
    with log.open("wb") as output:
        node = subprocess.Popen(
            [sys.executable, "-m", "cxr_ray", "listen", "--min-free-mb", "0", *places], stdout=output, stderr=output
        )
    try:
        until(lambda: "DICOM node CXRRAY" in log.read_text())
        entity = AE("QXZAE")
        frontal, lateral = {"SOPInstanceUID": f"{UID}.7"}, {"SOPInstanceUID": f"{UID}.8", "ViewPosition": "LL"}
        sent = [dcmread(io.BytesIO(dicom(VISITS[2], **SECRETS | elements))) for elements in (frontal, lateral)]
        entity.add_requested_context(sent[0].SOPClassUID, sent[0].file_meta.TransferSyntaxUID)
        association = entity.associate("127.0.0.1", port, ae_title="CXRRAY")
        assert association.is_established
        assert [association.send_c_store(instance).Status for instance in sent] == [0, 0]
        association.release()
        until(lambda: ": answered" in log.read_text() and ": dead letter" in log.read_text())
    finally:
        node.terminate()
        node.wait()
    return log


def fail(url: str, store: Path) -> httpx.Response:
    """Have a request fail in the replica: it reads an answer that nothing here has written."""
    with sqlite3.connect(store) as database:
        database.execute("""UPDATE result SET findings = '[{"QXZTABLE": 1}]'""")
    headers = {"Authorization": f"Bearer {TOKEN}", "X-Request-ID": "failing"}
    return httpx.get(f"{url}/v1/studies/{UID}.1", headers=headers, trust_env=False)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def scraped(complete: Callable[[str], bool]) -> str:
    """The metrics once they are there: replicas hand them on every ten seconds."""
    found = ""

    def there() -> bool:
        nonlocal found
        found = httpx.get(metrics_urls()[0], trust_env=False).text
        return complete(found)

    until(there)
    return found


def test_no_identifier_is_in_a_log_or_a_metric(watched: Watched) -> None:
    assert watched.failed.status_code == 500
    found = {name: needle for name, text in watched.texts.items() for needle in NEEDLES if needle in text}
    # The column's name stands for what an exception says; the calling AE title is logged, and is no patient's.
    assert not {name: needle for name, needle in found.items() if not name.endswith("listen.log")}
    node = next(text for name, text in watched.texts.items() if name.endswith("listen.log"))
    assert not [needle for needle in NEEDLES if needle in node.replace("QXZAE", "")]
    assert not [needle for needle in NEEDLES if needle in watched.metrics]
    assert len(watched.texts) > 10
    assert any("ServeReplica" in name or "replica" in name for name in watched.texts)


def test_one_id_leads_from_the_node_through_http_and_decoding_to_inference(watched: Watched) -> None:
    answered, dead = (
        next(line for line in watched.node_lines if word in line["message"]) for word in (": answered", "dead letter")
    )
    name = answered["message"].partition(":")[0]
    subject, content = name.removesuffix(".dcm").split("-")
    assert re.fullmatch(rf"{subject[:16]}-{content[:8]}-\d+", answered["request_id"])
    (request,) = watched.requests(request_id=answered["request_id"])
    assert (request["route"], request["method"], request["status"]) == ("/v1/instances", "POST", 200)
    assert request["bytes"] > 10_000
    stages = [request[f"{stage}_ms"] for stage in ("receive", "decode", "history", "network", "store")]
    assert all(0 <= stage <= request["ms"] for stage in stages)
    (inference,) = [
        line
        for lines in watched.lines.values()
        for line in lines
        if line["message"] == "inference" and answered["request_id"] in line["request_ids"]
    ]
    assert inference["deployment"] == "Network"
    assert 0 < inference["ms"] <= request["network_ms"]
    assert inference["model"] == request["model"] == watched.answers[0]["model"]["digest"][:12]
    (refused,) = watched.requests(request_id=dead["request_id"])
    assert (refused["status"], refused["refused"]) == (422, [422])
    assert len(watched.requests(request_id="followed")) == 3


def test_a_failure_names_its_place_and_its_request(watched: Watched) -> None:
    problem = watched.failed.json()
    assert problem["status"] == 500
    assert "failing" in problem["detail"]
    (line,) = [line for lines in watched.lines.values() for line in lines if line["message"] == "request failed"]
    assert (line["level"], line["request_id"], line["error"]) == ("error", "failing", "TypeError")
    assert any("store/tables.py" in place for place in line["at"])
    assert watched.requests(request_id="failing")[0]["status"] == 500


def test_requests_are_counted_by_template_and_timed_by_stage(watched: Watched) -> None:
    counted = {
        (line["route"], line["method"], line["status"]): len(
            watched.requests(**{key: line[key] for key in ("route", "method", "status")})
        )
        for line in watched.requests()
    }
    assert ("/v1/studies/{study_uid}", "GET", 404) in counted
    for (route, method, status), number in counted.items():
        labels = {"route": route, "method": method, "status": str(status)}
        assert watched.samples("ray_cxr_requests_total", **labels) == [number]
    assert watched.samples("ray_cxr_requests_under_way") == [0]
    assert watched.samples("ray_cxr_decoder_queue_images") == [0]
    decoded = len([1 for line in watched.requests() if "decode_ms" in line])
    assert sum(watched.samples("ray_cxr_stage_seconds_count", stage="decode")) >= decoded
    assert sum(watched.samples("ray_cxr_refused_images_total", status="422")) == 2
    assert sum(watched.samples("ray_cxr_refused_images_total", status="409")) == 2


def test_answers_model_and_drift_are_those_of_what_was_answered(watched: Watched, untrained_bundle: Path) -> None:
    bundle = load_bundle(str(untrained_bundle))
    shown = {"name": bundle.description.name, "version": bundle.description.version, "digest": bundle.description.digest}
    assert watched.samples("ray_cxr_model_info", **shown) == [1]
    images = sum(watched.samples("ray_cxr_images_total"))
    # Three films, two instances over HTTP (one by form, none by STOW: it was known), and one by the node.
    assert images == 5
    assert sum(watched.samples("ray_cxr_batch_images_count")) == sum(watched.samples("ray_cxr_batches_total"))
    assert sum(watched.samples("ray_cxr_stage_seconds_count", stage="inference")) == sum(
        watched.samples("ray_cxr_batches_total")
    )
    for number, name in enumerate(FINDINGS):
        seen = [answer["findings"][number]["positive"] for answer in watched.answers]
        positive = sum(watched.samples("ray_cxr_answers_total", finding=name, positive="true"))
        assert sum(seen) <= positive <= images
        assert positive + sum(watched.samples("ray_cxr_answers_total", finding=name, positive="false")) == images


def test_drift_is_that_of_the_last_inputs(watched: Watched, untrained_bundle: Path) -> None:
    about = [(VISITS[2], "age"), (VISITS[3], "age"), (VISITS[0], "header"), (VISITS[2], "history")]
    inputs = []
    for visit, known in about:
        header = (None, None) if known == "age" else (visit.sex, visit.view)
        inputs.append(from_request(visit.age_years, *header, ["Mass"] if known == "history" else None)[0])
    squares = np.stack([stored_square(full_range(film(visit)), SIZE) for visit, _ in about])
    observed = profile(squares, ClinicalInputs.concatenate(inputs))
    expected = drift(load_bundle(str(untrained_bundle)).training_inputs, observed)
    assert set(expected) == {"brightness", "contrast", "age", "sex", "view", "history"}

    def told(text: str) -> dict[str, list[float]]:
        labels = {"application": "watched", "deployment": "Network"}
        return {name: samples(text, "ray_cxr_input_drift_psi", labels | {"quantity": name}) for name in expected}

    # A gauge tells of what was there when it was last set.
    scraped(lambda text: told(text) == {name: [pytest.approx(index, abs=1e-6)] for name, index in expected.items()})


def test_dashboard_asks_for_metrics_that_there_are(watched: Watched) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] >= 36
    (source,) = [variable for variable in dashboard["templating"]["list"] if variable["type"] == "datasource"]
    reference = {"type": "prometheus", "uid": f"${{{source['name']}}}"}
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert all(panel["datasource"] == reference for panel in panels)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    there = {sample.name for family in text_string_to_metric_families(watched.metrics) for sample in family.samples}
    names = {name for expression in asked for name in re.findall(r"\bray_\w+", expression)}
    assert names <= there
    # And what is counted is shown.
    own = {name for name in there if name.startswith("ray_cxr_") and not name.endswith(("_count", "_sum"))}
    assert own <= names | {"ray_cxr_batch_images_bucket"}
