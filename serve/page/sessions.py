"""Signing in and out: a browser keeps the token in a cookie that no script reads and no other site's page sends."""

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import RedirectResponse

from serve.http.access import SESSION_COOKIE, Reader
from serve.http.problems import ApiProblem
from serve.http.services import Services, Serving
from serve.page.rendering import PageRoute, page, path, problem_page

router = APIRouter(include_in_schema=False, route_class=PageRoute)
# For scripts, which want a status and not a page.
watch = APIRouter(include_in_schema=False)
Next = Annotated[str, Query(max_length=2000)]


@router.get("/login")
async def sign_in(request: Request, serving: Serving, next: Next = "") -> Response:
    """The form, for those who need it."""
    if not serving.guard.required or await _is_known(serving, request.cookies.get(SESSION_COOKIE)):
        return RedirectResponse(_local(request, next), 303)
    return _form(request, next)


@router.post("/login")
async def signed_in(
    request: Request,
    serving: Serving,
    token: Annotated[str, Form(max_length=1000)] = "",
    next: Annotated[str, Form(max_length=2000)] = "",
) -> Response:
    """Take the token into a cookie."""
    if _is_from_elsewhere(request):
        return problem_page(request, 403, "this form came from another site's page; sign in on the page of this service")
    if not await _is_known(serving, token.strip()):
        return _form(request, next, 401, "This token is not known here, has expired or was revoked.")
    response = RedirectResponse(_local(request, next), 303)
    response.set_cookie(
        SESSION_COOKIE,
        token.strip(),
        path=path(request) or "/",
        httponly=True,
        samesite="strict",
        secure=_is_encrypted(request),
    )
    return response


@router.post("/logout")
async def signed_out(request: Request) -> Response:
    """Forget the token in this browser; it stays valid elsewhere."""
    if _is_from_elsewhere(request):
        return problem_page(request, 403, "this form came from another site's page; sign out on the page of this service")
    response = RedirectResponse(path(request, "login"), 303)
    response.delete_cookie(
        SESSION_COOKIE, path=path(request) or "/", httponly=True, samesite="strict", secure=_is_encrypted(request)
    )
    return response


@watch.get("/session", status_code=204)
async def session(_actor: Reader) -> None:
    """204 while the token is good; an open page asks, to cover what it shows once it is not."""


def _form(request: Request, next: str, status: int = 200, complaint: str = "") -> Response:
    came_for = _local(request, next)
    return page(request, "login.html", status, complaint=complaint, next=came_for, came_for=bool(next), actor=None)


async def _is_known(serving: Services, secret: str | None) -> bool:
    try:
        await serving.guard.actor(secret or None)
    except ApiProblem as problem:
        if problem.status_code == 401:
            return False
        raise
    return True


def _is_from_elsewhere(request: Request) -> bool:
    # Browsers say so over TLS and on loopback (Fetch Metadata, W3C). Whose form signs somebody in, signs for their reviews.
    return request.headers.get("sec-fetch-site", "none") not in {"same-origin", "none"}


def _is_encrypted(request: Request) -> bool:
    # What speaks TLS before the service says so; a client that lies about it harms its own cookie alone.
    return request.url.scheme == "https" or request.headers.get("x-forwarded-proto") == "https"


def _local(request: Request, next: str) -> str:
    """A path of this service; its worklist for whatever leads elsewhere."""
    home = path(request, "")
    parts = urlsplit(next)
    # Browsers read a backslash as a slash, and drop control characters.
    strange = "\\" in next or not next.isprintable() or bool(parts.scheme or parts.netloc)
    return home if strange or not next.startswith(home) or next.startswith("//") else next
