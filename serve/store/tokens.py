"""Bearer tokens: who may ask the service for what.

A secret is shown once, when it is made, and only its SHA-256 is kept. A slow hash protects secrets that can be guessed; 256
random bits cannot, and a request should not pay for it. A token is found by that digest, so how long the search takes tells
nothing of the secret. Names are never given again: the audit knows people by them.
"""

import hashlib
import secrets
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from cxr_ray.errors import CxrRayError
from serve.store.database import Database
from serve.store.records import Role, Token
from serve.store.tables import TokenRow

_PREFIX = "cxr_"
_SECRET_BYTES = 32


class Tokens(Database):
    """The store's bearer tokens."""

    def add_token(self, name: str, role: Role, expires_at: datetime | None = None) -> str:
        """Make a token and return its secret, which nobody can read again.

        Raises
        ------
        CxrRayError
            When the name is empty, too long or was given before, or the database does not take it.
        """
        secret = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        if not name.strip() or len(name) > 64 or not name.isprintable():
            raise CxrRayError(f"token name {name[:64]!r} cannot be used; give 1 to 64 printable characters")

        def work(session: Session) -> None:
            if session.scalar(sa.select(TokenRow.id).filter_by(name=name)) is not None:
                raise CxrRayError(f"token {name!r} exists already, or did once; give another name")
            row = TokenRow(name=name, digest=_digest(secret), role=role, created_at=datetime.now(UTC), expires_at=expires_at)
            session.add(row)

        self._write(work)
        return secret

    def tokens(self) -> list[Token]:
        """Return all tokens, those that are no longer good included, by age."""
        with self._read() as session:
            return [_token(row) for row in session.scalars(sa.select(TokenRow).order_by(TokenRow.id))]

    def revoke_token(self, name: str) -> None:
        """Let a token be good no longer; one that was revoked before keeps the time when it was.

        Raises
        ------
        CxrRayError
            When there is none of this name, or the database does not take it.
        """

        def work(session: Session) -> None:
            row = session.scalar(sa.select(TokenRow).filter_by(name=name))
            if row is None:
                raise CxrRayError(f"token {name[:64]!r} is not known; 'cxr-ray token list' names those that are")
            row.revoked_at = row.revoked_at or datetime.now(UTC)

        self._write(work)

    def find_token(self, secret: str) -> Token | None:
        """Return the token of this secret; None if there is none, or it is expired or revoked."""
        now = datetime.now(UTC)
        with self._read() as session:
            row = session.scalar(sa.select(TokenRow).filter_by(digest=_digest(secret)))
            found = None if row is None else _token(row)
        if found is None or found.revoked_at or (found.expires_at and found.expires_at <= now):
            return None
        if found.last_used_on != now.date():
            # Once a day, for a write costs more than the request may.
            used = sa.update(TokenRow).filter_by(name=found.name).values(last_used_on=now.date())
            self._write(lambda session: session.execute(used))
        return found


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def _token(row: TokenRow) -> Token:
    return Token(row.name, row.role, row.created_at, row.expires_at, row.last_used_on, row.revoked_at)
