"""Every request's frame: its id, its trace, the limits on its body while it streams in, and the headers of its answer.

A limit that is looked at when the body is there has already been broken: memory is taken and time lost.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.admission import Admission
from serve.http.problems import ApiProblem, overloaded, problem_response
from serve.logs import fields, raised_at
from serve.trace import FinishedRequest, RequestWatch, Trace, current

_log = logging.getLogger(__name__)
# As nginx says it: whoever asked went away before there was an answer.
_CLIENT_GONE = 499
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
# The interactive documentation takes its script from where FastAPI puts it.
_DOCS_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'self' 'unsafe-inline' https://cdn.jsdelivr.net; img-src 'self' data: https://fastapi.tiangolo.com; "
    "frame-ancestors 'none'"
)
# Before an upload is read it is known whose it is.
_STRANGERS_BYTES = 4096


@dataclass(frozen=True)
class BodyLimits:
    """What bodies may take.

    Attributes
    ----------
    most_bytes
        Of one request.
    seconds
        That one body may take to arrive.
    bytes_at_once
        Of all requests that are under way.
    requests_at_once
        With a body.
    waiting_seconds
        That a request with a body may have to wait for those before it, at the pace at which they are answered.
    """

    most_bytes: int
    seconds: float
    bytes_at_once: int
    requests_at_once: int
    waiting_seconds: float


class RequestFrame:
    """ASGI middleware around the whole application.

    Parameters
    ----------
    stranger
        What is wrong with who sends these headers, None with somebody known; a stranger may send no more than a login's form.
    watch
        Who is told of each request, if anybody wants to know.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: BodyLimits,
        stranger: Callable[[Headers], Awaitable[ApiProblem | None]],
        watch: RequestWatch | None = None,
    ) -> None:
        self._app, self._limits, self._stranger, self._watch = app, limits, stranger, watch
        self._admission = Admission(limits.requests_at_once, limits.waiting_seconds)
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        trace, started, status = Trace(request_id), time.perf_counter(), _CLIENT_GONE

        async def send_framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                framed = MutableHeaders(scope=message)
                # Serve gives back the id that came, and every request comes to it with one or gets one there.
                if request_id != given:
                    framed["X-Request-ID"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    framed.setdefault(name, value)
                docs = scope["path"].endswith(("/docs", "/redoc", "/docs/oauth2-redirect"))
                framed.setdefault("Content-Security-Policy", _DOCS_POLICY if docs else _POLICY)
            await send(message)

        before = current.set(trace)
        if self._watch:
            self._watch.started()
        try:
            if scope["method"] in {"POST", "PUT", "PATCH"}:
                await self._with_body(headers, scope, receive, send_framed, trace)
            else:
                await self._app(scope, receive, send_framed)
        # Left to Serve, its text would stand in a log, and the text may quote the request.
        except Exception as error:  # noqa: BLE001
            _log.error("request failed", extra=fields(error=type(error).__name__, at=raised_at(error)))
            if status != _CLIENT_GONE:
                raise RuntimeError(f"request {request_id} failed while it was answered") from None
            await problem_response(_failed(request_id))(scope, receive, send_framed)
        finally:
            if self._watch:
                seconds = time.perf_counter() - started
                self._watch.finished(FinishedRequest(_template(scope), scope["method"], status, seconds, trace))
            current.reset(before)

    async def _with_body(self, headers: Headers, scope: Scope, receive: Receive, send: Send, trace: Trace) -> None:
        limits = self._limits
        too_large = await self._stranger(headers)
        if too_large is not None:
            limits = replace(limits, most_bytes=min(_STRANGERS_BYTES, limits.most_bytes))
        else:
            too_large = _too_large(limits)
        length = headers.get("content-length", "")
        announced = int(length) if length.isdigit() else None
        refusal = None
        if announced is not None and announced > limits.most_bytes:
            refusal = too_large
        # Who does not say how much will come is taken at the most.
        reserved = limits.most_bytes if announced is None else announced
        if not self._admission.admits() or self._bytes + reserved > limits.bytes_at_once:
            refusal = refusal or overloaded()
        if refusal:
            await problem_response(refusal)(scope, receive, send)
            return
        self._admission.enter()
        self._bytes += reserved
        try:
            await self._app(scope, _limited(receive, limits, too_large, trace), send)
        finally:
            self._admission.leave()
            self._bytes -= reserved


def _too_large(limits: BodyLimits) -> ApiProblem:
    return ApiProblem(413, f"the request has more than {limits.most_bytes / 1e6:g} MB; send a smaller file, or fewer at once")


def _limited(receive: Receive, limits: BodyLimits, too_large: ApiProblem, trace: Trace) -> Receive:
    started = time.monotonic()
    until = started + limits.seconds
    whole = False

    async def receive_limited() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(until - time.monotonic(), 0.0))
        except TimeoutError:
            raise ApiProblem(408, f"the upload took more than {limits.seconds:g} s; send it faster") from None
        trace.received += len(message.get("body", b""))
        if trace.received > limits.most_bytes:
            raise too_large
        whole = not message.get("more_body", False)
        if whole:
            trace.stages.append(("receive", time.monotonic() - started))
        return message

    return receive_limited


def _failed(request_id: str) -> ApiProblem:
    return ApiProblem(500, f"request {request_id} failed here; the service's log says where")


def _template(scope: Scope) -> str:
    """The template of the route that took the request, as ``/v1/studies/{study_uid}``."""
    route = scope.get("route")
    return str(route.path) if route is not None else "other"
