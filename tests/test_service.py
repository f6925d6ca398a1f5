"""The HTTP service as a client meets it: a real Serve application, real sockets, images as files."""

import io
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from conftest import SIZE, RunningService
from phantom_films import VISITS, assert_problem, dicom, encoded, film
from PIL import Image
from pydicom.uid import CTImageStorage

from cxr_ray.bundle import Bundle, load_bundle
from cxr_ray.clinical import ClinicalInputs, from_request
from cxr_ray.errors import UsageError
from cxr_ray.findings import FINDINGS
from cxr_ray.heatmap import explain, overlay
from cxr_ray.pixels import full_range, stored_square
from cxr_ray.torch_engine import TorchEngine
from ingest.phantom import PhantomVisit
from serve.service import ServeSettings, http_service

# As stored, one is MONOCHROME2 and the next MONOCHROME1.
PAIR = next([one, other] for one, other in pairwise(VISITS) if one.visit % 2 == 0 and other.visit == 1)
Post = Callable[..., httpx.Response]


def stated(visit: PhantomVisit) -> dict[str, object]:
    return {"age": visit.age_years, "sex": visit.sex, "view": visit.view}


def clinical(answer: httpx.Response) -> dict[str, object]:
    """What a client that states everything itself reads of the clinical values."""
    used = answer.json()["clinical"]
    assert (used.pop("earlier_visits"), used.pop("study_date")) == ([], None)
    assert used.pop("history_source") == (None if used["history"] is None else "stated")
    return used


def probabilities(answer: httpx.Response) -> list[float]:
    assert answer.status_code == 200, answer.text
    return [finding["probability"] for finding in answer.json()["findings"]]


@pytest.fixture(scope="module")
def bundle(untrained_bundle: Path) -> Bundle:
    return load_bundle(str(untrained_bundle))


@pytest.fixture(scope="module")
def http(service: RunningService):
    with httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def post(http: httpx.Client) -> Post:
    def send(image: bytes, name: str = "image", **form: object) -> httpx.Response:
        return http.post("/v1/predict", files={"image": (name, image)}, data=form)

    return send


@pytest.mark.ray
def test_answer_keeps_the_contract(post: Post, bundle: Bundle) -> None:
    visit = VISITS[0]
    answer = post(encoded(film(visit)), **stated(visit), history="Mass|Nodule")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["model", "findings", "clinical", "warnings"]
    described = bundle.description
    assert body["model"] == {"name": described.name, "version": described.version, "digest": described.digest}
    assert [finding["name"] for finding in body["findings"]] == list(FINDINGS)
    for finding in body["findings"]:
        assert list(finding) == ["name", "probability", "threshold", "positive"]
        assert 0 <= finding["probability"] <= 1
        assert finding["threshold"] == described.thresholds[finding["name"]]
        assert finding["positive"] is (finding["probability"] >= finding["threshold"])
    assert {finding["positive"] for finding in body["findings"]} == {True, False}
    assert clinical(answer) == {**stated(visit), "history": ["Mass", "Nodule"], "missing": []}
    assert body["warnings"] == []


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "DICOM"])
@pytest.mark.parametrize("history", [["Mass", "Nodule"], [], None])
def test_probabilities_are_those_of_the_engine(post: Post, bundle: Bundle, kind: str, history: list[str] | None) -> None:
    visit = VISITS[3]
    pixels = film(visit)
    image = dicom(visit) if kind == "DICOM" else encoded(pixels, kind)
    if kind == "JPEG":
        pixels = np.asarray(Image.open(io.BytesIO(image)))
    form = {} if history is None else {"history": "|".join(history) or "No Finding"}
    answer = post(image, **stated(visit), **form)
    inputs, missing = from_request(visit.age_years, visit.sex, visit.view, history)
    expected = TorchEngine(bundle).predict(stored_square(full_range(pixels), SIZE)[None], inputs)[0]
    assert probabilities(answer) == pytest.approx(expected.tolist(), abs=1e-4)
    assert clinical(answer) == {**stated(visit), "history": history, "missing": missing}
    # That this bundle tells inputs apart, or the comparison would be empty.
    other, _ = from_request(visit.age_years, visit.sex, visit.view, ["Hernia"])
    assert np.abs(TorchEngine(bundle).predict(stored_square(full_range(pixels), SIZE)[None], other)[0] - expected).max() > 1e-3


@pytest.mark.ray
@pytest.mark.parametrize("visit", PAIR, ids=["MONOCHROME2", "MONOCHROME1"])
def test_one_picture_as_png_and_as_dicom_is_answered_alike(post: Post, visit: PhantomVisit) -> None:
    as_png = probabilities(post(encoded(film(visit)), **stated(visit)))
    assert probabilities(post(dicom(visit))) == pytest.approx(as_png, abs=1e-4)


@pytest.mark.ray
def test_header_is_used_and_the_form_overrides_it(post: Post) -> None:
    visit = VISITS[0]
    from_header = clinical(post(dicom(visit)))
    assert from_header == {**stated(visit), "history": None, "missing": ["history"]}
    opposite = {"age": 33.5, "sex": "F" if visit.sex == "M" else "M", "view": "PA" if visit.view == "AP" else "AP"}
    overridden = clinical(post(dicom(visit), **opposite, history="No Finding"))
    assert overridden == {**opposite, "history": [], "missing": []}


@pytest.mark.ray
def test_what_is_unknown_is_missing_and_not_zero(post: Post) -> None:
    image = encoded(film(VISITS[0]))
    nothing = post(image)
    assert clinical(nothing) == {
        **dict.fromkeys(["age", "sex", "view", "history"]),
        "missing": ["age", "sex", "view", "history"],
    }
    known = post(image, history="No Finding")
    assert clinical(known)["missing"] == ["age", "sex", "view"]
    assert probabilities(known) != pytest.approx(probabilities(nothing), abs=1e-4)
    empty = dicom(VISITS[0], PatientAge="", PatientBirthDate="", PatientSex="", ViewPosition="", BodyPartExamined="")
    answer = post(empty).json()
    assert answer["clinical"]["missing"] == ["age", "sex", "view", "history"]
    assert len(answer["warnings"]) == 2
    assert any("BodyPartExamined" in warning for warning in answer["warnings"])


GOOD_PNG = encoded(film(VISITS[0]))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("image", "status", "said"),
    [
        pytest.param(lambda: b"", 400, "0 bytes", id="empty"),
        pytest.param(lambda: b"Dear colleague, thank you for your patience.", 415, "convert", id="text"),
        pytest.param(lambda: GOOD_PNG[: len(GOOD_PNG) // 2], 400, "truncated", id="truncated PNG"),
        pytest.param(lambda: GOOD_PNG[:20], 400, "damaged", id="PNG header only"),
        pytest.param(lambda: dicom(VISITS[0])[:-1000], 400, "send the file again", id="truncated DICOM"),
        pytest.param(lambda: dicom(VISITS[0], Modality="CT", SOPClassUID=CTImageStorage), 422, "Modality is CT", id="CT"),
        pytest.param(lambda: dicom(VISITS[0], ViewPosition="LL"), 422, "ViewPosition is LL", id="lateral"),
        pytest.param(lambda: dicom(VISITS[0], BodyPartExamined="HAND"), 422, "BodyPartExamined is HAND", id="hand"),
        pytest.param(lambda: encoded(np.zeros((64, 64), np.uint8)), 422, "every pixel", id="black"),
        pytest.param(lambda: encoded(np.eye(10_000, 20_000, dtype=bool)), 413, "megapixels", id="200 megapixels"),
        pytest.param(lambda: encoded(np.eye(10_000, 10_000, dtype=bool)), 413, "100 megapixels", id="100 megapixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unusable_images_say_why(post: Post, image: Callable[[], bytes], status: int, said: str) -> None:
    assert_problem(post(image(), "chest.img"), status, "chest.img", said)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"age": "old"}, ("age", "'old'")),
        ({"age": "121"}, ("age", "'121'")),
        ({"age": "-1"}, ("age", "'-1'")),
        ({"age": "nan"}, ("age", "'nan'")),
        ({"sex": "X"}, ("sex", "'X'")),
        ({"view": "LL"}, ("view", "'LL'")),
        ({"history": "Mass|Cough"}, ("history", "'Cough'", "Pleural_Thickening")),
        ({"history": "No Finding|Mass"}, ("history", "No Finding")),
    ],
)
def test_wrong_values_are_named(post: Post, form: dict[str, str], said: tuple[str, ...]) -> None:
    assert_problem(post(GOOD_PNG, **form), 400, *said)


@pytest.mark.ray
def test_requests_for_nothing_are_problems_too(http: httpx.Client) -> None:
    assert_problem(http.post("/v1/predict", data={"age": "60"}), 400, "image")
    assert_problem(http.post("/v1/predict", data={"image": "a text field"}), 400, "image")
    assert_problem(http.post("/v1/predict", content=b"{}", headers={"Content-Type": "application/json"}), 415, "multipart")
    broken = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\nabc'
    assert_problem(http.post("/v1/predict", content=broken, headers={"Content-Type": "multipart/form-data"}), 400)
    assert_problem(http.get("/v1/predict"), 405)
    assert_problem(http.get("/v2/predict"), 404)
    assert_problem(http.get("/v1/studies/1.2.3.4"), 404, "'1.2.3.4'")
    assert_problem(http.get("/v1/studies/" + "1" * 65), 400, "study_uid")
    assert_problem(http.get("/v1/studies", params={"limit": 0}), 400, "limit")


@pytest.mark.ray
def test_one_bad_image_among_many_fails_alone(post: Post, bundle: Bundle) -> None:
    visits = VISITS[:16]
    images = [encoded(film(visit)) for visit in visits]
    images.insert(7, images[7][:500])
    forms = [stated(visit) for visit in visits]
    forms.insert(7, {})
    with ThreadPoolExecutor(len(images)) as pool:
        answers = list(pool.map(lambda image, form: post(image, **form), images, forms))
    assert_problem(answers.pop(7), 400)
    squares = np.stack([stored_square(full_range(film(visit)), SIZE) for visit in visits])
    each = [from_request(visit.age_years, visit.sex, visit.view, None)[0] for visit in visits]
    expected = TorchEngine(bundle).predict(squares, ClinicalInputs.concatenate(each))
    assert np.array([probabilities(answer) for answer in answers]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.ray
def test_health_documentation_and_studies_answer(http: httpx.Client, bundle: Bundle) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"status": "ready", "model": bundle.description.digest}
    page = http.get("/v1/studies", params={"limit": 3, "offset": 1_000_000}).json()
    assert page == {"studies": [], "limit": 3, "offset": 1_000_000}
    shown = http.get("/docs")
    assert (shown.status_code, "swagger" in shown.text.lower()) == (200, True)


@pytest.mark.ray
def test_openapi_describes_what_is_there(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    operations = {(path, method) for path, item in document["paths"].items() for method in item}
    assert operations == {
        ("/v1/predict", "post"),
        ("/v1/heatmap/{finding}", "post"),
        ("/v1/models", "get"),
        ("/v1/instances", "post"),
        ("/v1/studies", "get"),
        ("/v1/studies/{study_uid}", "get"),
        ("/v1/studies/{study_uid}/instances/{sop_uid}/film.png", "get"),
        ("/v1/studies/{study_uid}/instances/{sop_uid}/heatmap/{finding}.png", "get"),
        ("/v1/studies/{study_uid}/instances/{sop_uid}/heat/{finding}.png", "get"),
        ("/v1/studies/{study_uid}/findings/{finding}/review", "put"),
        ("/v1/patients/{patient_id}/history", "get"),
        ("/v1/patients/{patient_id}/history", "put"),
        ("/dicom-web/studies", "post"),
        ("/dicom-web/studies/{study_uid}", "post"),
        ("/v1/priors/known", "post"),
        ("/v1/priors/results", "post"),
        ("/healthz", "get"),
        ("/readyz", "get"),
    }
    predict = document["paths"]["/v1/predict"]["post"]
    assert {"200", "400", "401", "403", "413", "415", "422", "503"} <= set(predict["responses"])
    for status, response in predict["responses"].items():
        assert response["description"]
        kinds = {"application/json"} if status == "200" else {"application/problem+json"}
        assert set(response["content"]) == kinds, status

    def references(node: object) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if "$ref" in node else []
            return own + [found for value in node.values() for found in references(value)]
        return [found for value in node for found in references(value)] if isinstance(node, list) else []

    schemas = document["components"]["schemas"]
    assert references(document)
    assert all(reference.removeprefix("#/components/schemas/") in schemas for reference in references(document))
    form = predict["requestBody"]["content"]["multipart/form-data"]["schema"]["$ref"].rpartition("/")[2]
    assert set(schemas[form]["properties"]) == {"image", "age", "sex", "view", "history", "patient_id", "study_date"}
    assert schemas[form]["required"] == ["image"]
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"


@pytest.mark.ray
def test_guarded_service_lets_in_only_who_brings_the_token(guarded_service: RunningService) -> None:
    url, token = guarded_service.url, guarded_service.token

    def ask(path: str, **headers: str | bytes) -> httpx.Response:
        if path == "/v1/predict":
            return httpx.post(url + path, files={"image": GOOD_PNG}, headers=headers, timeout=60, trust_env=False)
        return httpx.get(url + path, headers=headers, timeout=60, trust_env=False)

    for path in ("/v1/predict", "/v1/studies"):
        without = ask(path)
        assert_problem(without, 401)
        assert without.headers["www-authenticate"] == "Bearer"
        assert_problem(ask(path, Authorization="Basic Og=="), 401)
        assert_problem(ask(path, Authorization=f"Bearer {secrets.token_urlsafe(24)}"), 401, "not known here")
        assert_problem(ask(path, Authorization=b"Bearer \xfc"), 401)
        assert ask(path, Authorization=f"Bearer {token}").status_code == 200
    assert_problem(ask("/v1/studies/1.2.3"), 401)
    assert ask("/healthz").status_code == ask("/readyz").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "pacs.hospital.example"])
def test_no_service_for_other_machines_without_a_token(
    host: str, untrained_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXR_RAY_TOKEN", raising=False)
    settings = ServeSettings(bundle=str(untrained_bundle), store=f"sqlite:///{tmp_path / 'results.sqlite'}", host=host)
    with pytest.raises(UsageError, match=f"--host {host} .*--token-file"), http_service(settings):
        pytest.fail("it was started")


@pytest.mark.ray
def test_a_heatmap_is_the_one_of_the_report(http: httpx.Client, bundle: Bundle) -> None:
    visit = VISITS[0]
    sent = {"files": {"image": ("image", encoded(film(visit)))}, "data": {**stated(visit), "history": "Mass"}}
    answer = http.post("/v1/heatmap/pleural%20thickening", **sent)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png"), answer.text
    picture = np.asarray(Image.open(io.BytesIO(answer.content)))
    pixels = stored_square(full_range(film(visit)), SIZE, "film")
    inputs, _ = from_request(visit.age_years, visit.sex, visit.view, ["Mass"])
    heat = explain(bundle, pixels, inputs, FINDINGS.index("Pleural_Thickening"))
    shown = cv2.resize(pixels, (512, 512), interpolation=cv2.INTER_CUBIC)
    assert np.abs(picture.astype(int) - overlay(shown, heat)).max() <= 2
    assert http.post("/v1/heatmap/Hernia", **sent).content != answer.content
    assert_problem(http.post("/v1/heatmap/Flu", **sent), 404, "finding 'Flu' is not known; use one of: Atelectasis")
    sent["files"] = {"image": ("image", b"nothing")}
    assert_problem(http.post("/v1/heatmap/Hernia", **sent), 415)


@pytest.mark.ray
def test_a_heatmap_needs_the_token_too(guarded_service: RunningService) -> None:
    sent = {"image": ("image", encoded(film(VISITS[0])))}
    assert_problem(httpx.post(f"{guarded_service.url}/v1/heatmap/Mass", files=sent, timeout=60, trust_env=False), 401)
