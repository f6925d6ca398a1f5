"""A PACS routes a study to the node and gets its results back: Orthanc on both ends, the real service between."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from conftest import RunningService, run_peer
from orthanc import RunningOrthanc, running, running_orthanc
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
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
def pacs(
    service: RunningService, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[RunningOrthanc]:
    """An Orthanc that routes to a node, and gets its results with storage commitment."""
    folder = tmp_path_factory.mktemp("returned")
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
        "spool": str(folder / "spool"),
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
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


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
