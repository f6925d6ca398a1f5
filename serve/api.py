"""The HTTP side: what goes in and out as JSON, how errors look, who may ask.

Errors are RFC 9457 problem details. A bearer token is asked for wherever the service can be reached from another machine.
"""

import hmac
from collections.abc import Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from starlette.exceptions import HTTPException

from cxr_ray import __version__, findings
from cxr_ray.errors import CxrRayError
from cxr_ray.pixels import DamagedImage, ImageError, OversizedImage, UnsupportedImage, UnusableImage
from serve.store import InstanceView, StudyView

PROBLEM_TYPE = "application/problem+json"
_STATUS_OF_IMAGE_ERROR: tuple[tuple[type[ImageError], int], ...] = (
    (UnsupportedImage, 415),
    (OversizedImage, 413),
    (UnusableImage, 422),
    (DamagedImage, 400),
)
bearer = HTTPBearer(auto_error=False, description="The service's token; not needed on a service bound to loopback.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


class ApiProblem(Exception):
    """An error with its HTTP status, answered as problem details."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}

    def __reduce__(self) -> tuple[type["ApiProblem"], tuple[int, str, dict[str, str]]]:
        return ApiProblem, (self.status, self.detail, self.headers)


def image_problem(error: ImageError) -> ApiProblem:
    """The HTTP form of an image error: 400 damaged, 413 too large, 415 not a type we read, 422 readable but unusable."""
    status = next((status for kind, status in _STATUS_OF_IMAGE_ERROR if isinstance(error, kind)), 400)
    return ApiProblem(status, str(error))


class _Json(BaseModel):
    model_config = ConfigDict(frozen=True)


class ProblemDetails(_Json):
    """RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


class ModelIdentity(_Json):
    """Which model answered; `digest` names the bundle's exact content."""

    name: str
    version: str
    digest: str


class FindingAnswer(_Json):
    """One finding: probability, and whether it reaches the operating threshold chosen on validation."""

    name: str
    probability: float = Field(ge=0, le=1)
    threshold: float
    positive: bool


class ClinicalUsed(_Json):
    """The clinical values that were used, and the names of those that were unknown."""

    age: float | None
    sex: Literal["M", "F"] | None
    view: Literal["PA", "AP"] | None
    history: list[str] | None = Field(description="Findings of earlier visits; null if nothing is known of them.")
    missing: list[str]


class Prediction(_Json):
    """Answer to one image."""

    model: ModelIdentity
    findings: list[FindingAnswer]
    clinical: ClinicalUsed
    warnings: list[str]


class InstanceAnswer(_Json):
    """What became of one instance of a study: `answered` with fourteen findings, or `refused` with the reason."""

    sop_instance_uid: str
    series_instance_uid: str
    status: str
    reason: str | None
    received_at: datetime
    answered_at: datetime
    model: ModelIdentity | None
    findings: list[FindingAnswer]
    clinical: dict[str, JsonValue] | None
    warnings: list[str]


class StudyFindingAnswer(_Json):
    """A finding of a study: the highest probability over its images, and each image's own."""

    name: str
    probability: float
    positive: bool
    by_instance: dict[str, float]


class StudyAnswer(_Json):
    """A study and its instances; `findings` is empty while no instance was answered."""

    study_instance_uid: str
    patient_id: str | None
    accession_number: str | None
    study_date: str | None
    received_at: datetime
    findings: list[StudyFindingAnswer]
    instances: list[InstanceAnswer]


class StudyPage(_Json):
    """Studies, the last received first."""

    studies: list[StudyAnswer]
    limit: int
    offset: int


def study_answer(view: StudyView) -> StudyAnswer:
    """A study of the store as JSON."""
    return StudyAnswer(
        study_instance_uid=view.study_instance_uid,
        patient_id=view.patient_id,
        accession_number=view.accession_number,
        study_date=view.study_date,
        received_at=view.received_at,
        findings=[StudyFindingAnswer(**vars(finding)) for finding in view.findings],
        instances=[_instance_answer(instance) for instance in view.instances],
    )


def _instance_answer(view: InstanceView) -> InstanceAnswer:
    answer = view.answer
    model = None
    if answer is not None:
        model = ModelIdentity(name=answer.model_name, version=answer.model_version, digest=answer.model_digest)
    return InstanceAnswer(
        sop_instance_uid=view.sop_instance_uid,
        series_instance_uid=view.series_instance_uid,
        status=view.status,
        reason=view.reason,
        received_at=view.received_at,
        answered_at=view.answered_at,
        model=model,
        findings=[FindingAnswer(**vars(finding)) for finding in answer.findings] if answer else [],
        clinical=answer.clinical if answer else None,
        warnings=list(answer.warnings) if answer else [],
    )


def parse_history(text: str | None) -> list[str] | None:
    """Findings of earlier visits as a form sends them: ``Mass|Nodule``, ``No Finding`` if there were none, None if unknown.

    Raises
    ------
    ApiProblem
        400, naming the finding that is not known.
    """
    if text is None or not text.strip():
        return None
    try:
        return findings.names(findings.parse(text))
    except CxrRayError as error:
        raise ApiProblem(400, f"history: {error}") from None


def finding_answers(probabilities: list[float], thresholds: dict[str, float]) -> list[FindingAnswer]:
    """Probabilities in NIH order beside their thresholds."""
    return [
        FindingAnswer(name=name, probability=value, threshold=thresholds[name], positive=value >= thresholds[name])
        for name, value in zip(findings.FINDINGS, probabilities, strict=True)
    ]


def authorise(token: str | None, credentials: HTTPAuthorizationCredentials | None) -> None:
    """Refuse who does not bring the token; without a token (loopback only) everybody is let in.

    Raises
    ------
    ApiProblem
        401 without credentials, 403 with wrong ones.
    """
    if token is None:
        return
    if credentials is None:
        raise ApiProblem(401, "no bearer token; send 'Authorization: Bearer TOKEN'", {"WWW-Authenticate": "Bearer"})
    if not hmac.compare_digest(credentials.credentials.encode(), token.encode()):
        raise ApiProblem(403, "the bearer token is not this service's; use the one it was started with")


def _problem_response(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    problem = ProblemDetails(title=HTTPStatus(status).phrase, status=status, detail=detail)
    return JSONResponse(problem.model_dump(), status_code=status, headers=headers, media_type=PROBLEM_TYPE)


async def _on_problem(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, ApiProblem):
        raise error
    return _problem_response(error.status, error.detail, error.headers)


async def _on_invalid(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    return _problem_response(400, "; ".join(_describe(entry) for entry in error.errors()[:3]))


def _describe(entry: dict[str, object]) -> str:
    place = entry["loc"]
    field = ".".join(map(str, place[1:])) if isinstance(place, Sequence) and len(place) > 1 else str(place)
    given = "" if entry["type"] == "missing" else f" is {str(entry.get('input'))[:60]!r}"
    return f"{field}{given}: {entry['msg']}"


async def _on_http(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    return _problem_response(error.status_code, str(error.detail), dict(error.headers or {}))


PROBLEMS: dict[int | str, dict[str, object]] = {
    # Not as "model", which FastAPI would describe as plain application/json.
    status: {"description": description, "content": {PROBLEM_TYPE: {"schema": ProblemDetails.model_json_schema()}}}
    for status, description in (
        (400, "malformed request or damaged file"),
        (401, "no token"),
        (403, "wrong token"),
        (413, "file or image too large"),
        (415, "not an image that is read here"),
        (422, "readable, but no frontal chest radiograph"),
        (503, "overloaded; ask again after Retry-After seconds"),
    )
}


def create_api() -> FastAPI:
    """The FastAPI application without its routes."""
    return FastAPI(
        title="cxr-ray",
        version=__version__,
        summary="Probabilities of fourteen findings from a frontal chest radiograph. Research use only.",
        exception_handlers={
            ApiProblem: _on_problem,
            RequestValidationError: _on_invalid,
            HTTPException: _on_http,
        },
    )
