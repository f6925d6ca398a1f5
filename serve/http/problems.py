"""Errors as RFC 9457 problem details."""

from collections.abc import Sequence
from http import HTTPStatus

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from cxr_ray.pixels import DamagedImage, ImageError, OversizedImage, UnsupportedImage, UnusableImage

PROBLEM_TYPE = "application/problem+json"
RETRY_SECONDS = "2"
_STATUS_OF_IMAGE_ERROR: tuple[tuple[type[ImageError], int], ...] = (
    (UnsupportedImage, 415),
    (OversizedImage, 413),
    (UnusableImage, 422),
    (DamagedImage, 400),
)


class ApiProblem(HTTPException):
    """An error with its HTTP status, answered as problem details."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, detail, headers)

    @property
    def details(self) -> "ProblemDetails":
        """What a client reads."""
        return ProblemDetails(title=HTTPStatus(self.status_code).phrase, status=self.status_code, detail=self.detail)


class ProblemDetails(BaseModel):
    """RFC 9457."""

    model_config = ConfigDict(frozen=True)

    type: str = "about:blank"
    title: str
    status: int
    detail: str


def image_problem(error: ImageError) -> ApiProblem:
    """The HTTP form of an image error: 400 damaged, 413 too large, 415 not a type we read, 422 readable but unusable."""
    status = next((status for kind, status in _STATUS_OF_IMAGE_ERROR if isinstance(error, kind)), 400)
    return ApiProblem(status, str(error))


def overloaded(detail: str = "too many requests are waiting; ask again later") -> ApiProblem:
    """503, to be asked again."""
    return ApiProblem(503, detail, {"Retry-After": RETRY_SECONDS})


def problem_response(problem: ApiProblem) -> JSONResponse:
    """The response for an error that is answered outside of any route."""
    headers = dict(problem.headers or {})
    return JSONResponse(problem.details.model_dump(), problem.status_code, headers, PROBLEM_TYPE)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler of whatever has an HTTP status."""
    if not isinstance(error, HTTPException):
        raise error
    if not isinstance(error, ApiProblem):
        error = ApiProblem(error.status_code, str(error.detail), dict(error.headers or {}))
    if error.status_code == 405:
        # Starlette names the methods of the first route of this path alone.
        error = ApiProblem(405, f"{request.method} is not allowed here; use {_allowed(request)}", {"Allow": _allowed(request)})
    return problem_response(error)


def _allowed(request: Request) -> str:
    methods: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


async def on_invalid(_request: Request, error: Exception) -> JSONResponse:
    """Exception handler of values that do not fit their description: 400, naming the field and the value."""
    if not isinstance(error, RequestValidationError):
        raise error
    return problem_response(ApiProblem(400, "; ".join(_describe(entry) for entry in error.errors()[:3])))


def _describe(entry: dict[str, object]) -> str:
    place = entry["loc"]
    field = ".".join(map(str, place[1:])) if isinstance(place, Sequence) and len(place) > 1 else str(place)
    given = "" if entry["type"] == "missing" else f" is {str(entry.get('input'))[:60]!r}"
    return f"{field}{given}: {entry['msg']}"


def problems(*statuses: int) -> dict[int | str, dict[str, object]]:
    """What a route's description says of these errors."""
    # Not as "model", which FastAPI would describe as plain application/json.
    content = {PROBLEM_TYPE: {"schema": ProblemDetails.model_json_schema()}}
    return {status: {"description": _MEANING[status], "content": content} for status in statuses}


_MEANING = {
    400: "malformed request or damaged file",
    401: "no token, or one that is not valid (any more)",
    403: "the token's role does not allow this",
    404: "not known here",
    408: "the upload took too long",
    409: "another content under the same UID",
    413: "file or image too large",
    415: "not a type that is read here",
    422: "readable, but no frontal chest radiograph",
    503: "overloaded; ask again after Retry-After seconds",
}
READING = problems(400, 401, 403, 503)
UPLOADING = problems(400, 401, 403, 408, 413, 415, 422, 503)
