"""Several images in one request, models by name, and values that contradict each other."""

import httpx
import pytest
from conftest import RunningService
from phantom_films import VISITS, assert_problem, dicom, encoded, film

from cxr_ray.bundle import read_description
from cxr_ray.findings import FINDINGS

pytestmark = pytest.mark.ray
PNGS = [encoded(film(visit)) for visit in VISITS[:3]]


@pytest.fixture(scope="module")
def http(service: RunningService):
    with httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:
        yield client


def send(http: httpx.Client, *images: bytes, **form: object) -> httpx.Response:
    return http.post(
        "/v1/predict", files=[("image", (f"film-{number}", data)) for number, data in enumerate(images)], data=form
    )


def test_each_of_several_images_is_answered_as_it_is_alone(http: httpx.Client) -> None:
    lateral = dicom(VISITS[0], ViewPosition="LL")
    results = send(http, PNGS[0], lateral, PNGS[1], b"no image", PNGS[2], age=61).json()["results"]
    assert [result["index"] for result in results] == list(range(5))
    for number, png in ((0, PNGS[0]), (2, PNGS[1]), (4, PNGS[2])):
        alone = send(http, png, age=61).json()
        together = results[number]["prediction"]
        assert results[number]["problem"] is None
        for one, other in zip(together["findings"], alone["findings"], strict=True):
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)
        assert together["clinical"] == alone["clinical"]
    assert [results[number]["prediction"] for number in (1, 3)] == [None, None]
    assert (results[1]["problem"]["status"], results[3]["problem"]["status"]) == (422, 415)
    assert "ViewPosition is LL" in results[1]["problem"]["detail"]


def test_32_images_are_answered_and_33_refused(http: httpx.Client) -> None:
    assert len(send(http, *PNGS[:1] * 32).json()["results"]) == 32
    assert_problem(send(http, *PNGS[:1] * 33), 400, "33 images", "32", "cxr-ray predict")


def test_a_value_that_is_sent_twice_is_not_chosen_from(http: httpx.Client) -> None:
    twice = {"age": ["61", "16"]}
    assert_problem(send(http, PNGS[0], **twice), 400, "age was sent 2 times")
    assert send(http, PNGS[0], age=["61", "61"]).status_code == 200
    header = dicom(VISITS[0])
    age = send(http, header).json()["clinical"]["age"]
    answer = send(http, header, age=age + 10).json()
    assert answer["clinical"]["age"] == age + 10
    assert answer["warnings"] == [
        f"age: {age + 10:g} years were stated and the DICOM header says {age:g}; the stated age was used"
    ]
    assert send(http, header, age=age + 1).json()["warnings"] == []


def test_models_are_listed_and_asked_by_name(http: httpx.Client, untrained_bundle) -> None:
    (model,) = http.get("/v1/models").json()["models"]
    described = read_description(str(untrained_bundle))
    assert (model["model"], model["default"], model["identity"]["digest"]) == ("default", True, described.digest)
    assert list(model["thresholds"]) == list(FINDINGS)
    assert "CPU" in model["engine"]
    files = {"image": PNGS[0]}
    assert http.post("/v1/predict", params={"model": "default"}, files=files).status_code == 200
    assert_problem(http.post("/v1/predict", params={"model": "better"}, files=files), 400, "'better'", "default")


def test_a_future_study_date_is_refused(http: httpx.Client) -> None:
    assert_problem(send(http, PNGS[0], study_date="2999-01-01"), 400, "study_date 2999-01-01 is in the future")
