"""Archives with earlier studies, for those who ask for priors: films and reports, Orthanc, and one that misbehaves."""

import json
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
from conftest import peer_environment, require_program
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    ComputedRadiographyImageStorage,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
)
from radiographs import file_of, radiograph

from cxr_ray.findings import CODES, FINDINGS

COMPREHENSIVE_3D_SR = "1.2.840.10008.5.1.4.1.1.88.34"
DICOMWEB_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
PRESENT, ABSENT = ("52101004", "SCT", "Present"), ("272519000", "SCT", "Absent")


def film(patient: str = "P1", date: str = "20200131", **attributes: object) -> Dataset:
    """A chest film of noise that no other test has."""
    uids = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")}
    pixels = np.random.default_rng(len(date) + int(uids["SOPInstanceUID"][-6:])).integers(0, 256, (48, 40)).astype(np.uint8)
    return radiograph(pixels, **{"PatientID": patient, "StudyDate": date, **uids, **attributes})


def report(of: Dataset, present: tuple[str, ...], manufacturer: str = "cxr-ray", **attributes: object) -> Dataset:
    """A result as TID 1500 has it: a group a finding, its probability 0.9 where it is present, 0.1 where not."""
    result = Dataset()
    result.file_meta = FileMetaDataset()
    result.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    result.SOPClassUID, result.SOPInstanceUID, result.SeriesInstanceUID = COMPREHENSIVE_3D_SR, generate_uid(), generate_uid()
    for keyword in ("PatientID", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime"):
        setattr(result, keyword, of.get(keyword))
    result.Modality, result.Manufacturer, result.InstanceNumber = "SR", manufacturer, 1
    result.ContentDate, result.ContentTime = of.StudyDate, "120000"
    result.CompletionFlag, result.VerificationFlag = "COMPLETE", "UNVERIFIED"
    root = item("CONTAINER", ("126000", "DCM", "Imaging Measurement Report"))
    measurements = item("CONTAINER", ("126010", "DCM", "Imaging Measurements"))
    measurements.ContentSequence = Sequence([group(name, name in present) for name in FINDINGS])
    root.ContentSequence = Sequence([measurements])
    result.update(root)
    for keyword, value in attributes.items():
        setattr(result, keyword, value)
    return result


def group(name: str, present: bool) -> Dataset:
    code = CODES[name]
    number = item("NUM", ("122157", "DCM", "Probability"))
    number.MeasuredValueSequence = Sequence([Dataset()])
    number.MeasuredValueSequence[0].NumericValue = "0.9" if present else "0.1"
    number.MeasuredValueSequence[0].MeasurementUnitsCodeSequence = Sequence([coded("1", "UCUM", "no units")])
    finding = item("CODE", ("121071", "DCM", "Finding"))
    finding.ConceptCodeSequence = Sequence([coded(code.value, code.scheme, code.meaning)])
    said = item("CODE", (code.value, code.scheme, code.meaning))
    said.ConceptCodeSequence = Sequence([coded(*(PRESENT if present else ABSENT))])
    found = item("CONTAINER", ("125007", "DCM", "Measurement Group"))
    found.ContentSequence = Sequence([finding, number, said])
    return found


def item(kind: str, concept: tuple[str, str, str]) -> Dataset:
    found = Dataset()
    found.ValueType = kind
    found.ConceptNameCodeSequence = Sequence([coded(*concept)])
    return found


def coded(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


class Orthanc:
    """A running Orthanc, DICOM and DICOMweb; `log` is what it says."""

    def __init__(self, folder: Path, dicom_port: int, http_port: int) -> None:
        self.folder, self.dicom_port = folder, dicom_port
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=30, trust_env=False)
        self.web = f"http://127.0.0.1:{http_port}/dicom-web"

    def keep(self, *instances: Dataset) -> None:
        for instance in instances:
            answer = self.client.post("/instances", content=file_of(instance))
            assert answer.status_code == 200, answer.text


@contextmanager
def orthanc(folder: Path, free_port: Callable[[], int]) -> Iterator[Orthanc]:
    program = require_program("Orthanc")
    archive = Orthanc(folder, free_port(), free_port())
    plugins = [str(DICOMWEB_PLUGIN)] if DICOMWEB_PLUGIN.exists() else []
    settings = {
        **{"Name": "PACS", "StorageDirectory": str(folder), "IndexDirectory": str(folder), "Plugins": plugins},
        **{"HttpPort": archive.client.base_url.port, "RemoteAccessAllowed": False, "AuthenticationEnabled": False},
        **{"DicomAet": "ORTHANC", "DicomPort": archive.dicom_port, "DicomModalities": {"node": ["CXRRAY", "127.0.0.1", 1]}},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen(
            [program, folder / "orthanc.json"], env=peer_environment(), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        until(lambda: answers(archive, process), "Orthanc's start", 60)
        yield archive
    finally:
        process.kill()
        process.wait()
        archive.client.close()


def answers(archive: Orthanc, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, (archive.folder / "orthanc.log").read_text()
    with suppress(httpx.TransportError):
        return archive.client.get("/system").status_code == 200
    return False


def until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.02)


def match_of(instance: Dataset, **changes: object) -> Dataset:
    """A C-FIND match at the level of studies, or of series if it says so."""
    match = Dataset()
    match.QueryRetrieveLevel = "STUDY"
    for keyword in ("PatientID", "StudyInstanceUID", "StudyDate", "StudyTime"):
        setattr(match, keyword, instance.get(keyword))
    match.ModalitiesInStudy = instance.Modality
    for keyword, value in changes.items():
        setattr(match, keyword, value)
    return match


class BadArchive:
    """An archive by pynetdicom whose answers a test scripts.

    `find` yields status and match for an identifier; `films` are what C-GET sends, whatever was asked for.
    """

    def __init__(self) -> None:
        self.find: Callable[[evt.Event], Iterator[tuple[int, Dataset | None]]] = lambda _: iter([(0x0000, None)])
        self.films: list[Dataset] = []
        self.asked: list[Dataset] = []
        self.gotten = 0
        self.stopping = threading.Event()
        self._entity = AE(ae_title="ARCHIVE")
        for context in (StudyRootQueryRetrieveInformationModelFind, StudyRootQueryRetrieveInformationModelGet):
            self._entity.add_supported_context(context)
        self._entity.add_supported_context(ComputedRadiographyImageStorage, scu_role=True, scp_role=True)

    def _found(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        self.asked.append(event.identifier)
        yield from self.find(event)

    def _got(self, _event: evt.Event) -> Iterator[object]:
        self.gotten += 1
        yield len(self.films)
        for instance in self.films:
            yield 0xFF00, instance

    @contextmanager
    def running(self, tls: ssl.SSLContext | None = None) -> Iterator[int]:
        handlers = [(evt.EVT_C_FIND, self._found), (evt.EVT_C_GET, self._got)]
        server = self._entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers, ssl_context=tls)
        try:
            yield int(server.server_address[1])
        finally:
            self.stopping.set()
            self._entity.shutdown()
