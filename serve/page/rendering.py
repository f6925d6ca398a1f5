"""Templates to HTML; errors as pages, and the way to the sign-in for those who need one."""

from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from functools import cache, partial
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException

from cxr_ray import __version__
from serve.http.services import Services
from serve.page.assets import assets_version

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class PageRoute(APIRoute):
    """A route for people: without a valid token it leads to the sign-in, and other errors are pages."""

    def get_route_handler(self) -> Handler:
        """See FastAPI."""
        answer = super().get_route_handler()

        async def answer_people(request: Request) -> Response:
            try:
                return await answer(request)
            except RequestValidationError:
                return problem_page(request, 400, "the address holds a value that cannot be used; go back to the worklist")
            except HTTPException as error:
                if error.status_code == HTTPStatus.UNAUTHORIZED:
                    return RedirectResponse(sign_in_path(request), 303)
                return problem_page(request, error.status_code, str(error.detail))

        return answer_people


def path(request: Request, *parts: str) -> str:
    """The path of a page or route of this service, under whatever prefix it is mounted.

    Without scheme and host: behind what speaks TLS for it, the service knows neither.
    """
    return "/".join([request.scope.get("root_path", "").rstrip("/"), *(quote(part, safe="") for part in parts)])


def sign_in_path(request: Request) -> str:
    """Where to sign in, and come back to this page."""
    asked = quote(request.url.path) + (f"?{request.url.query}" if request.url.query else "")
    return f"{path(request, 'login')}?{urlencode({'next': asked})}"


def render(request: Request, template: str, **context: object) -> str:
    """A template as HTML."""
    services: Services = request.app.state.services
    return (
        _environment()
        .get_template(template)
        .render(
            link=partial(path, request),
            asset=partial(path, request, "static", assets_version()),
            sign_in=sign_in_path(request),
            guarded=services.guard.required,
            version=__version__,
            **context,
        )
    )


def page(request: Request, template: str, status: int = 200, **context: object) -> HTMLResponse:
    """A template as a response."""
    return HTMLResponse(render(request, template, **context), status)


def problem_page(request: Request, status: int, detail: str) -> HTMLResponse:
    """An error for people."""
    return page(request, "problem.html", status, title=HTTPStatus(status).phrase, detail=detail, actor=None)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("serve.page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "spaced": _spaced,
        "percent": _percent,
        "along": _along,
        "utc": _utc,
        "iso": _iso,
        "day": _day,
    }
    return environment


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _percent(probability: float) -> str:
    """As near as people compare: a tenth below 10 %, where most thresholds of rare findings lie; never rounded to certainty."""
    value = probability * 100
    if value < 0.05:
        return "<0.1"
    if value >= 99.5:
        return ">99"
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _along(probability: float) -> str:
    """The place of a probability on a bar, as SVG has lengths.

    On a scale of square roots: thresholds of rare findings lie at one percent, where a linear bar shows nothing.
    """
    return f"{100 * probability**0.5:.1f}%"


def _utc(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _iso(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _day(value: str | None) -> str:
    """A DICOM date (DA) for people; one that is none as it came."""
    given = (value or "").strip()
    return f"{given[:4]}-{given[4:6]}-{given[6:]}" if len(given) == 8 and given.isdecimal() else given
