"""STOW-RS as a DICOMweb client speaks it, and as a broken one does."""

from io import BytesIO

import httpx
import pydicom
import pytest
from conftest import RunningService
from dicom_peers import CR, DEFLATED, data_set_of, deflated
from dicomweb_client import DICOMwebClient
from phantom_films import VISITS, assert_problem, dicom
from pydicom.uid import generate_uid

from serve.node.file_meta import FileMeta, encode_head

pytestmark = pytest.mark.ray
KIND = 'multipart/related; type="application/dicom"; boundary=here'


def instance(number: int = 0, **elements: object) -> bytes:
    """A film under UIDs that no other test uses."""
    names = dict.fromkeys(["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
    own = {name: generate_uid() for name in names} | elements
    content = dicom(VISITS[number], **own)
    dataset = pydicom.dcmread(BytesIO(content))
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    written = BytesIO()
    dataset.save_as(written, enforce_file_format=True)
    return written.getvalue()


def read(content: bytes) -> pydicom.Dataset:
    return pydicom.dcmread(BytesIO(content))


def related(*parts: bytes, kind: bytes = b"application/dicom", end: bytes = b"\r\n--here--\r\n") -> bytes:
    return b"".join(b"\r\n--here\r\nContent-Type: " + kind + b"\r\n\r\n" + part for part in parts) + end


@pytest.fixture(scope="module")
def http(service: RunningService):
    with httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def client(service: RunningService) -> DICOMwebClient:
    return DICOMwebClient(f"{service.url}/dicom-web")


def uids(sequence: pydicom.Sequence) -> set[str]:
    return {item.ReferencedSOPInstanceUID for item in sequence}


def test_a_dicomweb_client_stores_a_study(client: DICOMwebClient, http: httpx.Client) -> None:
    study = generate_uid()
    films = [read(instance(number, StudyInstanceUID=study)) for number in range(2)]
    answer = client.store_instances(films, study_instance_uid=study)
    assert uids(answer.ReferencedSOPSequence) == {film.SOPInstanceUID for film in films}
    assert "FailedSOPSequence" not in answer
    kept = http.get(f"/v1/studies/{study}").json()
    assert {entry["sop_instance_uid"]: entry["status"] for entry in kept["instances"]} == {
        film.SOPInstanceUID: "answered" for film in films
    }
    # The study's answer is the highest of its films.
    for finding in kept["findings"]:
        assert finding["probability"] == max(finding["by_instance"].values())


def test_what_is_refused_is_named_beside_what_is_kept(http: httpx.Client) -> None:
    study = generate_uid()
    good, lateral = instance(StudyInstanceUID=study), instance(StudyInstanceUID=study, ViewPosition="LL")
    elsewhere = instance()
    sent = related(good, lateral, elsewhere, b"no DICOM")
    answer = http.post(f"/dicom-web/studies/{study}", content=sent, headers={"Content-Type": KIND})
    assert (answer.status_code, answer.headers["content-type"]) == (202, "application/dicom+json")
    told = pydicom.Dataset.from_json(answer.json())
    assert uids(told.ReferencedSOPSequence) == {read(good).SOPInstanceUID}
    reasons = {item.get("ReferencedSOPInstanceUID"): item.FailureReason for item in told.FailedSOPSequence}
    assert reasons == {read(lateral).SOPInstanceUID: 0xA900, read(elsewhere).SOPInstanceUID: 0x0111, None: 0xC000}
    kept = {entry["sop_instance_uid"]: entry for entry in http.get(f"/v1/studies/{study}").json()["instances"]}
    assert kept[read(lateral).SOPInstanceUID]["status"] == "refused"
    assert "ViewPosition is LL" in kept[read(lateral).SOPInstanceUID]["reason"]
    assert http.get(f"/v1/studies/{read(elsewhere).StudyInstanceUID}").status_code == 404
    none = http.post("/dicom-web/studies", content=related(lateral), headers={"Content-Type": KIND})
    assert none.status_code == 409


def test_again_is_the_same_answer_and_other_bytes_are_a_conflict(http: httpx.Client) -> None:
    first = instance()
    answer = http.post("/v1/instances", files={"image": first}, data={"calling_ae": "PACS"})
    assert answer.status_code == 200, answer.text
    again = http.post("/v1/instances", files={"image": first})
    assert again.json() == answer.json()
    # The same data set in another sender's file meta information is the same instance.
    dataset = read(first)
    dataset.file_meta.SourceApplicationEntityTitle = "ARCHIVE"
    meant = BytesIO()
    dataset.save_as(meant, enforce_file_format=True)
    assert http.post("/v1/instances", files={"image": meant.getvalue()}).json() == answer.json()
    dataset.PatientID = "another"
    other = BytesIO()
    dataset.save_as(other, enforce_file_format=True)
    sent = http.post("/v1/instances", files={"image": other.getvalue()})
    assert_problem(sent, 409, dataset.SOPInstanceUID, "other bytes")
    (entry,) = http.get(f"/v1/studies/{dataset.StudyInstanceUID}").json()["instances"]
    assert entry["status"] == "answered"


@pytest.mark.parametrize(
    ("content", "kind", "status", "said"),
    [
        pytest.param(related(b"x"), "application/dicom", 415, "multipart/related", id="no multipart"),
        pytest.param(related(b"x"), KIND.replace("; boundary=here", ""), 415, "boundary", id="no boundary"),
        pytest.param(related(b"x"), KIND.replace("dicom", "dicom+json"), 415, "dicom+json", id="metadata as JSON"),
        pytest.param(related(b"x", kind=b"image/png"), KIND, 415, "part 1 is 'image/png'", id="a picture"),
        pytest.param(related(b"x", end=b""), KIND, 400, "cut off", id="cut off"),
        pytest.param(b"", KIND, 400, "cut off", id="empty"),
        pytest.param(related(*[b"x"] * 33), KIND, 413, "33 instances", id="33"),
    ],
)
def test_broken_messages_are_problems(http: httpx.Client, content: bytes, kind: str, status: int, said: str) -> None:
    answer = http.post("/dicom-web/studies", content=content, headers={"Content-Type": kind})
    assert_problem(answer, status, said)


def test_a_picture_is_no_instance(http: httpx.Client) -> None:
    assert_problem(http.post("/v1/instances", files={"image": b"\x89PNG\r\n\x1a\n"}), 415, "no DICOM file")


def test_deflate_bombs_are_refused(http: httpx.Client) -> None:
    """A gigabyte in a megabyte: in the pixels, and before the header has named a study."""
    film = instance()
    data, uid = data_set_of(film), str(read(film).SOPInstanceUID)
    head = encode_head(FileMeta(CR, uid, DEFLATED))
    pixels, study = data.index(b"\xe0\x7f\x10\x00"), data.index(b"\x20\x00\x0d\x00")
    endless = b"OW\x00\x00\xfe\xff\xff\xff"
    large = head + deflated(data[: pixels + 4] + endless, mebibytes=1000)
    nameless = head + deflated(data[:study] + b"\x09\x00\x01\x10" + endless, mebibytes=1000)
    assert_problem(http.post("/v1/instances", files={"image": large}), 413, "inflates to more than")
    assert_problem(http.post("/v1/instances", files={"image": nameless}), 400, "its header does not end within")
    answer = http.post("/dicom-web/studies", content=related(large, nameless), headers={"Content-Type": KIND})
    assert answer.status_code == 409
    reasons = [item.FailureReason for item in pydicom.Dataset.from_json(answer.json()).FailedSOPSequence]
    assert reasons == [0xC101, 0xC000]
    assert http.post("/v1/instances", files={"image": head + deflated(data)}).status_code == 200
