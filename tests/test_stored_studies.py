"""Studies that are kept: looked up, looked at, reviewed, and the history that they and people's statements make."""

import io

import httpx
import numpy as np
import pytest
from conftest import RunningService
from phantom_films import VISITS, assert_problem, dicom, encoded, film
from PIL import Image
from pydicom.uid import generate_uid

from cxr_ray.bundle import load_bundle
from cxr_ray.clinical import from_request
from cxr_ray.findings import FINDINGS
from cxr_ray.heatmap import explain, overlay
from serve.store import Store

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def http(service: RunningService):
    with httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def store(service: RunningService):
    opened = Store(service.store)
    yield opened
    opened.close()


def keep(http: httpx.Client, number: int = 0, **elements: object) -> dict[str, str]:
    """Have a film answered and kept; returns its UIDs."""
    own = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")} | elements
    content = dicom(VISITS[number], **own)
    answer = http.post("/v1/instances", files={"image": content})
    assert answer.status_code == 200, answer.text
    return {"study": own["StudyInstanceUID"], "sop": own["SOPInstanceUID"], **answer.json()}


def test_studies_are_found_by_what_they_are(http: httpx.Client) -> None:
    kept = keep(http, PatientID="FILTER-1", AccessionNumber="A-77", StudyDate="20240203")
    other = keep(http, PatientID="FILTER-2", StudyDate="20250203")

    def found(**filters: object) -> list[str]:
        answer = http.get("/v1/studies", params=filters)
        assert answer.status_code == 200, answer.text
        return [study["study_instance_uid"] for study in answer.json()["studies"]]

    assert found(patient_id="FILTER-1") == [kept["study"]]
    assert found(accession_number="A-77") == [kept["study"]]
    assert found(study_date_from="2024-02-03", study_date_to="2024-02-03") == [kept["study"]]
    assert other["study"] in found(study_date_from="2024-02-04")
    positive = next(finding["name"] for finding in kept["findings"] if finding["positive"])
    negative = next(finding["name"] for finding in kept["findings"] if not finding["positive"])
    assert kept["study"] in found(finding=positive, patient_id="FILTER-1")
    assert found(finding=negative, patient_id="FILTER-1") == []
    assert found(status="refused", patient_id="FILTER-1") == []
    assert_problem(http.get("/v1/studies", params={"finding": "Flu"}), 400, "'Flu'")
    assert_problem(http.get("/v1/studies", params={"status": "lost"}), 400, "status", "'lost'")
    assert_problem(http.get("/v1/studies", params={"study_date_from": "3.2.2024"}), 400, "study_date_from")


def test_film_and_heatmap_of_a_kept_instance(http: httpx.Client, untrained_bundle) -> None:
    kept = keep(http, PatientID="PICTURE-1")
    place = f"/v1/studies/{kept['study']}/instances/{kept['sop']}"
    shown = np.asarray(Image.open(io.BytesIO(http.get(f"{place}/film.png").content)))
    # A film of 256 pixels is not blown up.
    assert np.abs(shown.astype(int) - film(VISITS[0])).max() <= 1
    answer = http.get(f"{place}/heatmap/Mass.png")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png"), answer.text
    bundle = load_bundle(str(untrained_bundle))
    square = np.asarray(Image.fromarray(shown).resize((64, 64), Image.Resampling.BOX))
    visit = VISITS[0]
    inputs, _ = from_request(visit.age_years, visit.sex, visit.view, None)
    expected = overlay(shown, explain(bundle, square, inputs, FINDINGS.index("Mass")))
    drawn = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert np.abs(drawn.astype(int) - expected).mean() < 1
    layer = Image.open(io.BytesIO(http.get(f"{place}/heat/Mass.png").content))
    assert layer.mode == "RGBA"
    laid_over = Image.alpha_composite(Image.fromarray(shown).convert("RGBA"), layer).convert("RGB")
    assert np.abs(np.asarray(laid_over).astype(int) - drawn).max() <= 2
    assert_problem(http.get(f"{place}/heatmap/Flu.png"), 404, "'Flu'")
    assert_problem(http.get(f"/v1/studies/{kept['study']}/instances/1.2.3/film.png"), 404, "'1.2.3'")


def test_every_look_is_on_record(http: httpx.Client, store: Store) -> None:
    kept = keep(http, PatientID="AUDIT-1")
    http.get(f"/v1/studies/{kept['study']}", headers={"X-Request-ID": "look-1"})
    http.get(f"/v1/studies/{kept['study']}/instances/{kept['sop']}/film.png")
    looks = store.accesses(kept["study"])
    assert [look.action for look in looks] == ["read film", "read study"]
    assert (looks[1].actor, looks[1].patient_id, looks[1].request_id) == ("anybody on this machine", "AUDIT-1", "look-1")


def test_what_people_state_of_earlier_visits_counts_for_later_studies_alone(http: httpx.Client) -> None:
    visits = [
        {"visit_date": "2020-05-01", "findings": ["Mass"], "view": "PA"},
        {"visit_date": "2021-05-01", "findings": [], "view": None},
        {"visit_date": "2022-05-01", "findings": ["Hernia", "Effusion"], "view": "AP"},
    ]
    stated = http.put("/v1/patients/HISTORY-1/history", json={"visits": visits})
    assert stated.status_code == 200, stated.text
    assert http.get("/v1/patients/HISTORY-1/history").json() == stated.json()

    def used(day: str) -> dict:
        return keep(http, PatientID="HISTORY-1", StudyDate=day, AcquisitionDate=day, ContentDate=day, SeriesDate=day)[
            "clinical"
        ]

    later = used("20220502")
    assert later["history"] == ["Effusion", "Mass", "Hernia"]
    assert [visit["visit_date"] for visit in later["earlier_visits"]] == ["2020-05-01", "2021-05-01", "2022-05-01"]
    assert (later["history_source"], later["study_date"], later["missing"]) == ("stored", "2022-05-02", [])
    # The day itself is not earlier.
    assert used("20220501")["history"] == ["Mass"]
    first = used("20200501")
    assert (first["history"], first["earlier_visits"], first["missing"]) == ([], [], [])
    # What a client states comes before what is stored, and a picture has a patient if the client says which.
    png = {"image": encoded(film(VISITS[0]))}
    form = {"patient_id": "HISTORY-1", "study_date": "2021-01-01"}
    assert http.post("/v1/predict", files=png, data=form).json()["clinical"]["history"] == ["Mass"]
    told = http.post("/v1/predict", files=png, data={**form, "history": "No Finding"}).json()["clinical"]
    assert (told["history"], told["history_source"]) == ([], "stated")
    unknown = http.post("/v1/predict", files=png, data={**form, "patient_id": "NOBODY"}).json()["clinical"]
    assert (unknown["history"], unknown["history_source"]) == (None, None)
    assert "history" in unknown["missing"]


def test_history_changes_the_answer_as_it_does_when_a_client_states_it(http: httpx.Client) -> None:
    day = {"StudyDate": "20230101", "AcquisitionDate": "20230101", "ContentDate": "20230101", "SeriesDate": "20230101"}
    http.put("/v1/patients/HISTORY-2/history", json={"visits": [{"visit_date": "2020-01-01", "findings": ["Mass"]}]})
    stored = keep(http, PatientID="HISTORY-2", **day)
    stated = http.post("/v1/predict", files={"image": dicom(VISITS[0])}, data={"history": "Mass"}).json()
    one = [finding["probability"] for finding in stored["findings"]]
    assert one == pytest.approx([finding["probability"] for finding in stated["findings"]], abs=1e-4)
    without = keep(http, PatientID="HISTORY-3", **day)
    assert one != pytest.approx([finding["probability"] for finding in without["findings"]], abs=1e-3)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"visits": [{"visit_date": "2999-01-01", "findings": []}]}, "2999-01-01 is in the future"),
        ({"visits": [{"visit_date": "2020-01-01", "findings": ["Flu"]}]}, "'Flu'"),
        ({"visits": [{"visit_date": "1.1.2020"}]}, "visit_date"),
        ({"visits": [{"visit_date": "2020-01-01", "view": "LL"}]}, "'LL'"),
        ({"visits": [{"findings": []}]}, "visit_date"),
        ({"visit": []}, "visits"),
        ([], "body"),
    ],
)
def test_histories_that_cannot_be_are_named(http: httpx.Client, body: object, said: str) -> None:
    assert_problem(http.put("/v1/patients/HISTORY-9/history", json=body), 400, said)
    assert http.get("/v1/patients/HISTORY-9/history").status_code == 404


def test_what_a_reader_confirms_is_history_of_the_next_study(http: httpx.Client, store: Store) -> None:
    def keep_on(day: str) -> dict:
        return keep(http, PatientID="REVIEW-1", StudyDate=day, AcquisitionDate=day, ContentDate=day, SeriesDate=day)

    first = keep_on("20230101")
    for finding, verdict in (("Mass", "confirmed"), ("Hernia", "rejected"), ("Edema", "confirmed"), ("Edema", None)):
        place = f"/v1/studies/{first['study']}/findings/{finding}/review"
        answer = http.put(place, params={"verdict": verdict} if verdict else {})
        assert answer.status_code == 200, answer.text
    reviews = store.study(first["study"]).reviews
    assert {review.finding: review.verdict for review in reviews} == {"Mass": "confirmed", "Hernia": "rejected"}
    assert keep_on("20230601")["clinical"]["history"] == ["Mass"]
    assert_problem(http.put(f"/v1/studies/{first['study']}/findings/Flu/review"), 404, "'Flu'")
    assert_problem(http.put("/v1/studies/1.2.3/findings/Mass/review", params={"verdict": "confirmed"}), 404, "'1.2.3'")
