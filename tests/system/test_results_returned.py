"""A PACS routes a study to the node and gets its results back: Orthanc on both ends, the real service between."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import RunningService, run_peer
from dicomweb_client import DICOMwebClient
from orthanc import RunningOrthanc, running, running_orthanc
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from requests import HTTPError
from waiting import until

from cxr_ray.findings import FINDINGS
from ingest.phantom import simulate_patients
from ingest.phantom_drawing import draw
from ingest.phantom_release import phantom_dicom

pytestmark = [pytest.mark.system, pytest.mark.ray]

SR, SC = "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.7"
VISITS = simulate_patients(6, 3)
# Each image that comes is sent on; results, which are no CR or DX, are not.
ROUTING = """
function OnStoredInstance(instance, tags, metadata, origin)
  if tags["Modality"] == "CR" or tags["Modality"] == "DX" then
    SendToModality(instance, "node")
  end
end
"""


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("returned") / "spool"


@pytest.fixture(scope="module")
def pacs(service: RunningService, spool: Path, free_port: Callable[[], int]) -> Iterator[RunningOrthanc]:
    """An Orthanc that routes to a node, and gets its results with storage commitment."""
    folder = spool.parent
    node_port, archive_port = free_port(), free_port()
    (folder / "route.lua").write_text(ROUTING)
    destination = {
        "name": "archive",
        "kind": "dicom",
        "host": "127.0.0.1",
        "port": archive_port,
        "called_ae": "ORTHANC",
        "commitment": True,
    }
    settings = {
        "spool": str(spool),
        "listener": {"port": node_port, "min_free_bytes": 0},
        "dispatch": {"service_url": service.url},
        "assembly": {"quiet_seconds": 0.5},
        "delivery": {"destinations": [destination]},
    }
    (folder / "node.yaml").write_text(yaml.safe_dump(settings))
    log = folder / "node.log"
    environment = {name: value for name, value in os.environ.items() if name != "CXR_RAY_TOKEN"}
    with ExitStack() as stack:
        command = [sys.executable, "-m", "cxr_ray", "listen", "--config", folder / "node.yaml"]
        node = stack.enter_context(running(command, log, environment))
        until(lambda: "DICOM node CXRRAY" in log.read_text() or node.poll() is not None, f"the node's start, see {log}")
        assert node.poll() is None, log.read_text()
        yield stack.enter_context(
            running_orthanc(
                folder / "orthanc",
                free_port(),
                archive_port,
                DicomModalities={"node": ["CXRRAY", "127.0.0.1", node_port]},
                LuaScripts=[str(folder / "route.lua")],
            )
        )
        assert "Traceback" not in log.read_text()


def film(study: str, **elements: object) -> Dataset:
    dataset = phantom_dicom(VISITS[0], draw(VISITS[0], 256))
    dataset.StudyInstanceUID = study
    dataset.SOPInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    # As read from a file: a client sends what its meta information says.
    written = BytesIO()
    dataset.save_as(written, enforce_file_format=True)
    return dcmread(BytesIO(written.getvalue()))


def archive(pacs: RunningOrthanc, dataset: Dataset, folder: Path) -> None:
    path = folder / f"{dataset.SOPInstanceUID}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    assert pacs.rest.post("/instances", content=path.read_bytes()).status_code == 200


def results(pacs: RunningOrthanc, study: str, modality: str) -> list[dict]:
    return [each for each in pacs.instances(modality) if each["StudyInstanceUID"] == study]


def fetched(pacs: RunningOrthanc, instance: dict, folder: Path) -> Path:
    path = folder / f"{instance['_id']}.dcm"
    path.write_bytes(pacs.rest.get(f"/instances/{instance['_id']}/file").content)
    return path


@pytest.fixture(scope="module")
def stow(pacs: RunningOrthanc, service: RunningService, untrained_bundle: Path, spool: Path) -> Iterator[DICOMwebClient]:
    """The service's network behind a door whose STOW-RS goes into the node's spool."""
    from ray import serve

    from serve.app import APPLICATION, Entrance, GraphSettings, Ingress

    models = {"default": serve.get_deployment_handle("Network", APPLICATION)}
    settings = GraphSettings(
        bundle=str(untrained_bundle), store=service.store, decoders=1, stow_spool=str(spool), stow_min_free_mb=0
    )
    door = Ingress.options(ray_actor_options={"num_cpus": 0.1}).bind(models, None, settings, Entrance(None, required=False))
    serve.run(door, name="stowed", route_prefix="/stowed")
    yield DICOMwebClient(f"{service.url}/stowed/dicom-web")
    serve.delete("stowed")


def test_a_study_that_came_by_stow_is_answered_from_the_spool_and_its_results_are_delivered(
    pacs: RunningOrthanc, stow: DICOMwebClient, spool: Path, service: RunningService
) -> None:
    study = generate_uid()
    sent, other = film(study), film(generate_uid())
    answer = stow.store_instances([sent], study_instance_uid=study)
    assert [item.ReferencedSOPInstanceUID for item in answer.ReferencedSOPSequence] == [sent.SOPInstanceUID]
    # Again: kept already, and nothing twice.
    assert len(stow.store_instances([sent], study_instance_uid=study).ReferencedSOPSequence) == 1
    with pytest.raises(HTTPError, match="409"):
        stow.store_instances([other], study_instance_uid=study)
    until(lambda: len(results(pacs, study, "SR")) == 1, "a report in the archive", 120)
    uid = hashlib.sha256(sent.SOPInstanceUID.encode()).hexdigest()[:32]
    until(lambda: list((spool / "done").glob(f"{uid}-*.dcm")), "the settled instance")
    assert results(pacs, other.StudyInstanceUID, "SR") == []
    known = httpx.get(f"{service.url}/v1/studies/{study}", timeout=30, trust_env=False).json()
    assert [instance["status"] for instance in known["instances"]] == ["answered"]


def test_a_routed_study_comes_back_as_report_and_picture_and_a_late_image_as_a_revision(
    pacs: RunningOrthanc, service: RunningService, tmp_path: Path
) -> None:
    study = generate_uid()
    first = film(study, PatientName="Müller^Jörg", SpecificCharacterSet="ISO_IR 192", AccessionNumber="A-4711")
    archive(pacs, first, tmp_path)
    until(lambda: results(pacs, study, "SR"), "a report in the archive", 120)
    until(lambda: len(results(pacs, study, "OT")) + len(results(pacs, study, "SC")) == 1, "a picture in the archive", 120)
    (report,) = results(pacs, study, "SR")
    assert (report["SOPClassUID"], report["PatientName"], report["AccessionNumber"]) == (SR, "Müller^Jörg", "A-4711")
    file = fetched(pacs, report, tmp_path)
    evidence = dcmread(file).CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert [item.ReferencedSOPInstanceUID for item in evidence] == [first.SOPInstanceUID]
    dumped = run_peer("dsrdump", file)
    assert dumped.returncode == 0, dumped.stdout
    assert dumped.stdout.count("Certainty of Finding") >= len(FINDINGS)

    second = film(study)
    archive(pacs, second, tmp_path)
    until(lambda: len(results(pacs, study, "SR")) == 2, "the revised report", 120)
    (revised,) = [each for each in results(pacs, study, "SR") if each["SOPInstanceUID"] != report["SOPInstanceUID"]]
    read = dcmread(fetched(pacs, revised, tmp_path))
    replaced = read.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert replaced.ReferencedSOPInstanceUID == report["SOPInstanceUID"]
