"""Who may ask: bearer tokens and their roles.

A token is one that the service was started with, or one of the store's. Where neither exists and only this machine can
reach the service, everybody is let in.
"""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from cxr_ray.errors import CxrRayError
from serve.http.problems import ApiProblem, overloaded

Role = Literal["read", "write", "admin"]
_RANK: dict[str, int] = {"read": 0, "write": 1, "admin": 2}
# A revoked token is let in so long at most.
_REMEMBERED_SECONDS = 5.0
_MOST_REMEMBERED = 1000
SESSION_COOKIE = "cxr_session"
bearer = HTTPBearer(
    auto_error=False, description="A token of this service; not needed on one bound to loopback without tokens."
)


@dataclass(frozen=True)
class Actor:
    """Who asks: a token's name and role."""

    name: str
    role: Role


class KnownToken(Protocol):
    """What the guard wants to know of a token."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def role(self) -> Role:
        """Its role."""


class Guard:
    """Tells actors by their secrets.

    Parameters
    ----------
    secret
        The token that the service was started with; its role is admin. None if there is none.
    find
        Looks a secret up among the store's tokens; called in a thread.
    required
        Whether somebody without a token is turned away.
    """

    def __init__(self, secret: str | None, find: Callable[[str], KnownToken | None], *, required: bool) -> None:
        self._secret, self._find, self.required = secret, find, required
        self._remembered: dict[bytes, tuple[float, Actor | None]] = {}

    async def actor(self, secret: str | None) -> Actor:
        """Who brings this secret.

        Raises
        ------
        ApiProblem
            401 without a secret, or with one that is not known, expired or revoked; 503 if the store does not say which.
        """
        if not self.required:
            return Actor("anybody on this machine", "admin")
        if secret is None:
            raise ApiProblem(401, "no bearer token; send 'Authorization: Bearer TOKEN'", {"WWW-Authenticate": "Bearer"})
        if self._secret is not None and hmac.compare_digest(secret.encode(), self._secret.encode()):
            return Actor("the service's own token", "admin")
        actor = await self._known(secret)
        if actor is None:
            raise ApiProblem(
                401,
                "the bearer token is not known here, has expired or was revoked; ask for one by 'cxr-ray token add'",
                {"WWW-Authenticate": 'Bearer error="invalid_token"'},
            )
        return actor

    async def stranger(self, headers: Headers) -> ApiProblem | None:
        """What is wrong with who sends these headers; None with somebody known here, whatever the role."""
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            secret = cookie_parser(headers.get("cookie", "")).get(SESSION_COOKIE, "")
        try:
            await self.actor(secret.strip() or None)
        except ApiProblem as problem:
            return problem
        return None

    async def _known(self, secret: str) -> Actor | None:
        key, now = hashlib.sha256(secret.encode()).digest(), time.monotonic()
        until, actor = self._remembered.get(key, (0.0, None))
        if now < until:
            return actor
        try:
            token = await asyncio.to_thread(self._find, secret)
        except CxrRayError:
            raise overloaded("the store of tokens does not answer; ask again later") from None
        actor = Actor(token.name, token.role) if token else None
        if len(self._remembered) >= _MOST_REMEMBERED:
            self._remembered.clear()
        self._remembered[key] = (now + _REMEMBERED_SECONDS, actor)
        return actor


Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


def needs(role: Role) -> Callable[[Request, HTTPAuthorizationCredentials | None], Awaitable[Actor]]:
    """A dependency that lets in who has this role or a higher one.

    A page's session counts as its token. Browsers send its cookie by themselves, so what changes something must also come from
    this site's own page.
    """

    async def admitted(request: Request, credentials: Credentials) -> Actor:
        guard: Guard = request.app.state.services.guard
        secret = credentials.credentials if credentials else None
        if secret is None and SESSION_COOKIE in request.cookies:
            check_same_site(request)
            secret = request.cookies[SESSION_COOKIE]
        actor = await guard.actor(secret)
        if _RANK[actor.role] < _RANK[role]:
            raise ApiProblem(403, f"the token's role is {actor.role}; this needs a token of role {role}")
        request.state.actor = actor.name
        return actor

    return admitted


def check_same_site(request: Request) -> None:
    """Refuse what another site's page makes a browser send with this site's cookie.

    Raises
    ------
    ApiProblem
        403.
    """
    if request.method in {"GET", "HEAD"}:
        return
    # Fetch Metadata (W3C); a browser sets it and no script can.
    if request.headers.get("sec-fetch-site") != "same-origin":
        raise ApiProblem(403, "this came from another site's page; open the page of this service, or send a bearer token")


# First among a route's dependencies: who may not ask is told no more than that.
READ, WRITE = Depends(needs("read")), Depends(needs("write"))
Reader = Annotated[Actor, READ]
Writer = Annotated[Actor, WRITE]
