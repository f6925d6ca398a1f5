"""The HTTP service as a client meets it: a real Serve application, real sockets, images as files."""

import io
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import SIZE, RunningService
from fastapi.security import HTTPAuthorizationCredentials
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage

from cxr_ray.bundle import Bundle, load_bundle
from cxr_ray.clinical import ClinicalInputs, from_request
from cxr_ray.engines import TorchEngine
from cxr_ray.errors import UsageError
from cxr_ray.findings import FINDINGS
from cxr_ray.pixels import full_range, stored_square
from ingest.phantom import PhantomVisit, simulate_patients
from ingest.phantom_drawing import draw
from ingest.phantom_release import phantom_dicom
from serve.api import ApiProblem, authorise
from serve.service import ServeSettings, http_service

VISITS = [visit for visit in simulate_patients(20, 1) if 20 <= visit.age_years < 100]
# As stored, one is MONOCHROME2 and the next MONOCHROME1.
PAIR = next([one, other] for one, other in pairwise(VISITS) if one.visit % 2 == 0 and other.visit == 1)
Post = Callable[..., httpx.Response]


def film(visit: PhantomVisit) -> np.ndarray:
    return draw(visit, 256)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def dicom(visit: PhantomVisit, **elements: object) -> bytes:
    dataset: Dataset = phantom_dicom(visit, film(visit))
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    content = io.BytesIO()
    dataset.save_as(content, enforce_file_format=True)
    return content.getvalue()


def stated(visit: PhantomVisit) -> dict[str, object]:
    return {"age": visit.age_years, "sex": visit.sex, "view": visit.view}


def probabilities(answer: httpx.Response) -> list[float]:
    assert answer.status_code == 200, answer.text
    return [finding["probability"] for finding in answer.json()["findings"]]


def assert_problem(answer: httpx.Response, status: int, *said: str) -> None:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    problem = answer.json()
    assert set(problem) == {"type", "title", "status", "detail"}
    assert problem["status"] == status
    assert problem["title"]
    assert "\n" not in problem["detail"]
    for words in said:
        assert words in problem["detail"]


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
    assert body["clinical"] == {**stated(visit), "history": ["Mass", "Nodule"], "missing": []}
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
    assert answer.json()["clinical"] == {**stated(visit), "history": history, "missing": missing}
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
    from_header = post(dicom(visit)).json()["clinical"]
    assert from_header == {**stated(visit), "history": None, "missing": ["history"]}
    opposite = {"age": 33.5, "sex": "F" if visit.sex == "M" else "M", "view": "PA" if visit.view == "AP" else "AP"}
    overridden = post(dicom(visit), **opposite, history="No Finding").json()["clinical"]
    assert overridden == {**opposite, "history": [], "missing": []}


@pytest.mark.ray
def test_what_is_unknown_is_missing_and_not_zero(post: Post) -> None:
    image = encoded(film(VISITS[0]))
    nothing = post(image)
    assert nothing.json()["clinical"] == {
        **dict.fromkeys(["age", "sex", "view", "history"]),
        "missing": ["age", "sex", "view", "history"],
    }
    known = post(image, history="No Finding")
    assert known.json()["clinical"]["missing"] == ["age", "sex", "view"]
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
    assert_problem(http.post("/v1/predict", content=b"{}", headers={"Content-Type": "application/json"}), 400, "image")
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
        ("/v1/studies", "get"),
        ("/v1/studies/{study_uid}", "get"),
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
    assert set(schemas[form]["properties"]) == {"image", "age", "sex", "view", "history"}
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
        assert_problem(ask(path, Authorization=f"Bearer {secrets.token_urlsafe(24)}"), 403)
        assert_problem(ask(path, Authorization=b"Bearer \xfc"), 403)
        assert ask(path, Authorization=f"Bearer {token}").status_code == 200
    assert_problem(ask("/v1/studies/1.2.3"), 401)
    assert ask("/healthz").status_code == ask("/readyz").status_code == 200


def test_authorise_compares_the_token() -> None:
    def bringing(token: str) -> HTTPAuthorizationCredentials:
        return HTTPAuthorizationCredentials(scheme="Bearer", credentials=token)

    authorise(None, None)
    authorise(None, bringing("anything"))
    authorise("secret", bringing("secret"))
    for credentials, status in ((None, 401), (bringing("secre"), 403), (bringing("secret "), 403), (bringing("ü"), 403)):
        with pytest.raises(ApiProblem) as refused:
            authorise("secret", credentials)
        assert refused.value.status == status
        assert "secret" not in refused.value.detail


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "pacs.hospital.example"])
def test_no_service_for_other_machines_without_a_token(
    host: str, untrained_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXR_RAY_TOKEN", raising=False)
    settings = ServeSettings(bundle=str(untrained_bundle), store=f"sqlite:///{tmp_path / 'results.sqlite'}", host=host)
    with pytest.raises(UsageError, match=f"--host {host} .*--token-file"), http_service(settings):
        pytest.fail("it was started")
    assert list(tmp_path.iterdir()) == []
