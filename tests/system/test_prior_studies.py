"""Earlier studies from an archive to the answer: Orthanc, the dispatcher with its asker, and the real service."""

import socket
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from archives import Orthanc, film, orthanc, report, until
from conftest import RunningService
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import JPEGLSLossless, generate_uid
from radiographs import file_of

from cxr_ray.findings import FINDINGS
from serve.node.dispatch import Dispatcher, DispatchSettings
from serve.node.node import NodeSettings, dicom_node
from serve.node.priors import Priors
from serve.node.priors_settings import PriorsSettings
from serve.node.spool import Origin, Spool
from serve.node.storage import store_part10

pytestmark = [pytest.mark.system, pytest.mark.ray]


@pytest.fixture(scope="module")
def door(service: RunningService, untrained_bundle: Path) -> Iterator[str]:
    """The service's network behind a door that counts its own earlier answers as history."""
    from ray import serve

    from serve.app import APPLICATION, Entrance, GraphSettings, Ingress

    models = {"default": serve.get_deployment_handle("Network", APPLICATION)}
    settings = GraphSettings(bundle=str(untrained_bundle), store=service.store, decoders=1, history_source="both")
    entrance = Ingress.options(ray_actor_options={"num_cpus": 0.1}).bind(models, None, settings, Entrance(None, required=False))
    serve.run(entrance, name="priors", route_prefix="/priors")
    yield f"{service.url}/priors"
    serve.delete("priors")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[Orthanc]:
    with orthanc(tmp_path_factory.mktemp("orthanc"), free_port) as running:
        yield running


@pytest.fixture
def node(door: str, archive: Orthanc, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Bring a film as the node does: through a spool, with a dispatcher that asks for priors."""
    spool = Spool(tmp_path / "spool")

    def bring(instance: Dataset, **settings: object) -> None:
        given = {"kind": "dicom", "host": "127.0.0.1", "port": archive.dicom_port, "called_ae": "ORTHANC", "budget_seconds": 60}
        priors = Priors(PriorsSettings(**given | settings), door)
        data = file_of(instance)
        start = 132 + 12 + int.from_bytes(data[140:144], "little")
        origin = Origin(instance.SOPClassUID, instance.SOPInstanceUID, instance.file_meta.TransferSyntaxUID, "PACS")
        spool.store(data[start:], origin)
        with Dispatcher(DispatchSettings(service_url=door), spool, priors=priors):
            until(lambda: not spool.pending(), "the answer", 60)

    yield bring
    assert list((spool.root / "dead").iterdir()) == []


def get(door: str, path: str, **parameters: str) -> dict:
    answer = httpx.get(f"{door}{path}", params=parameters, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def instance_of(door: str, instance: Dataset) -> dict:
    study = get(door, f"/v1/studies/{instance.StudyInstanceUID}")
    (found,) = [each for each in study["instances"] if each["sop_instance_uid"] == instance.SOPInstanceUID]
    return found


def listed(door: str, who: str, origin: str = "sent") -> set[str]:
    page = get(door, "/v1/studies", patient_id=who, origin=origin)
    return {study["study_instance_uid"] for study in page["studies"]}


def test_earlier_films_and_results_are_history(door: str, archive: Orthanc, node: Callable[..., None]) -> None:
    who = f"P{generate_uid()[-10:]}"
    shot, reported, new = film(who, "20180101"), film(who, "20190203"), film(who, "20200131", ViewPosition="AP")
    archive.keep(shot, reported, report(reported, ("Mass", "Hernia")))
    node(new)
    found = instance_of(door, new)
    assert {name: found["priors"][name] for name in ("asked", "outcome", "studies", "used", "reason")} == {
        **{"asked": True, "outcome": "found"},
        **{"studies": 2, "used": 2, "reason": ""},
    }
    assert found["warnings"] == instance_of(door, shot)["warnings"] == []
    first, second = found["clinical"]["earlier_visits"]
    assert (first["visit_date"], first["source"], first["view"]) == ("2018-01-01", "predicted", "PA")
    positive = [finding["name"] for finding in instance_of(door, shot)["findings"] if finding["positive"]]
    assert first["findings"] == positive
    assert (second["visit_date"], second["findings"], second["view"]) == ("2019-02-03", ["Mass", "Hernia"], None)
    assert set(found["clinical"]["history"]) == {*positive, "Mass", "Hernia"}
    assert (found["clinical"]["history_source"], found["clinical"]["missing"]) == ("stored", [])
    assert instance_of(door, shot)["priors"] is None
    # Nobody sent the earlier one: it stands in no list, and is nobody's new study.
    assert listed(door, who) == {new.StudyInstanceUID}
    assert listed(door, who, "archive") == {shot.StudyInstanceUID}

    # What is then sent, in other bytes than the archive had, is a study as any other, with what came before it.
    shot.ImageComments = "sent again by the modality"
    node(shot)
    again = instance_of(door, shot)
    assert (again["priors"]["outcome"], again["clinical"]["history"]) == ("none", None)
    assert listed(door, who) == {new.StudyInstanceUID, shot.StudyInstanceUID}
    assert listed(door, who, "archive") == set()


def test_a_compressed_film_comes_as_it_lies_in_the_archive(door: str, archive: Orthanc, node: Callable[..., None]) -> None:
    who = f"P{generate_uid()[-10:]}"
    earlier, new = film(who, "20180101"), film(who, "20200131")
    earlier.compress(JPEGLSLossless, encoding_plugin="pyjpegls", generate_instance_uid=False)
    archive.keep(earlier)
    node(new)
    assert instance_of(door, new)["priors"]["used"] == 1
    assert instance_of(door, earlier)["status"] == "answered"


def test_an_archive_that_hangs_is_said_in_the_answer(door: str, node: Callable[..., None]) -> None:
    new = film(f"P{generate_uid()[-10:]}")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        node(new, port=silent.getsockname()[1], budget_seconds=0.5)
    found = instance_of(door, new)
    assert found["status"] == "answered"
    assert found["warnings"][-1] == "priors: the archive did not answer within 0.5 s; predicted without its studies"
    assert (found["priors"]["outcome"], found["priors"]["used"], found["clinical"]["missing"]) == ("timeout", 0, ["history"])


def test_the_delivered_report_says_that_the_archive_hung(door: str, archive: Orthanc, tmp_path: Path) -> None:
    new = film(f"P{generate_uid()[-10:]}")
    destination = {"kind": "dicom", "name": "pacs", "host": "127.0.0.1", "port": archive.dicom_port, "called_ae": "ORTHANC"}
    sought = {"Level": "Instance", "Query": {"StudyInstanceUID": new.StudyInstanceUID, "Modality": "SR"}}

    def delivered() -> list[str]:
        found: list[str] = archive.client.post("/tools/find", json=sought).json()
        return found

    with socket.create_server(("127.0.0.1", 0)) as silent:
        silence = {"kind": "dicom", "host": "127.0.0.1", "port": silent.getsockname()[1], "called_ae": "SILENT"}
        settings = NodeSettings(
            spool=tmp_path / "spool",
            listener={"port": 0, "min_free_bytes": 0, "drain_seconds": 1},
            priors={**silence, "budget_seconds": 0.5},
            assembly={"quiet_seconds": 0.1},
            delivery={"destinations": [destination]},
        )
        with dicom_node(settings, service_url=door, token=None) as listener:
            store_part10(listener.storage, file_of(new))
            until(delivered, "the report in the archive", 60)
    (found,) = delivered()
    kept = dcmread(BytesIO(archive.client.get(f"/instances/{found}/file").content))
    said = [item.TextValue for group in kept.ContentSequence[-1].ContentSequence for item in texts(group)]
    sentence = "warning: priors: the archive did not answer within 0.5 s; predicted without its studies"
    assert said.count(sentence) == len(FINDINGS)


def texts(group: Dataset) -> list[Dataset]:
    return [item for item in group.ContentSequence if item.ValueType == "TEXT"]


def post(door: str, path: str, body: object) -> httpx.Response:
    return httpx.post(f"{door}{path}", json=body, timeout=60, trust_env=False)


def test_what_is_told_by_hand(door: str, guarded_service: RunningService) -> None:
    who = f"P{generate_uid()[-10:]}/7"
    assert post(door, "/v1/priors/known", {"patient_id": who, "before": "2020-01-31"}).json() == {
        "history_source": "both",
        "studies": [],
    }
    result = {"study_instance_uid": "1.2.9", "study_date": "2019-05-06", "findings": ["mass"]}
    assert post(door, "/v1/priors/results", {"patient_id": who, "results": [result]}).json() == {"kept": 1}
    assert post(door, "/v1/priors/known", {"patient_id": who, "before": "2020-01-31"}).json()["studies"] == ["1.2.9"]
    assert post(door, "/v1/priors/known", {"patient_id": who, "before": "2019-05-06"}).json()["studies"] == []
    for wrong in ({"findings": ["Broken"]}, {"study_date": "2999-01-01"}):
        refused = post(door, "/v1/priors/results", {"patient_id": who, "results": [result | wrong]})
        assert (refused.status_code, refused.json()["detail"][:8]) == (400, "results:")
    for path, body in (
        ("known", {"patient_id": " ", "before": "2020-01-31"}),
        ("known", {"patient_id": "a\\b", "before": "2020-01-31"}),
        ("known", {"patient_id": "a", "before": "20200131"}),
        ("results", {"patient_id": "a", "results": [result | {"study_instance_uid": "1.2/3"}]}),
        ("results", {"patient_id": "a", "results": []}),
    ):
        assert post(door, f"/v1/priors/{path}", body).status_code in {400, 422}, body
    assert post(guarded_service.url, "/v1/priors/known", {"patient_id": who, "before": "2020-01-31"}).status_code == 401


def test_what_came_of_asking_has_to_be_well_formed(door: str) -> None:
    instance = film(f"P{generate_uid()[-10:]}")
    for priors, named in (('{"asked": true}', "priors.outcome"), ("[]", "priors"), ('{"asked": 1, "outcome": "x"}', "priors.")):
        sent = httpx.post(
            f"{door}/v1/instances", files={"image": file_of(instance)}, data={"priors": priors}, timeout=60, trust_env=False
        )
        assert sent.status_code == 400
        assert sent.json()["detail"].startswith(named)
