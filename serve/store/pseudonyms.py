"""Pseudonyms: what patients are called before those who may not know who they are.

HMAC-SHA256 of the PatientID under a key that is drawn once a store and kept in it, so that one patient has one pseudonym
at every replica and after every restart, and nobody can try identifiers out against it. The key protects from those who ask
the service; who can read the database reads the identifiers themselves.
"""

import base64
import hashlib
import hmac
import secrets

import sqlalchemy as sa
from sqlalchemy.orm import Session

from serve.store.database import Database
from serve.store.tables import SecretRow

_NAME = "pseudonym key"
_KEY_BYTES = 32
# 50 bits: among a million patients the odds that any two share one are 1 to 2,000.
_LETTERS = 10


class Pseudonyms(Database):
    """The store's pseudonyms of patients."""

    _pseudonym_key: bytes | None = None

    def pseudonym(self, patient_id: str) -> str:
        """Return what this patient is called instead of the PatientID, e.g. ``P-7KQ2MWX4AB``; blanks around it mean nothing.

        Raises
        ------
        CxrRayError
            When the database gives no key and takes none.
        """
        key = self._pseudonym_key = self._pseudonym_key or self._stored_key()
        digest = hmac.digest(key, patient_id.strip().encode(errors="surrogateescape"), hashlib.sha256)
        return f"P-{base64.b32encode(digest).decode()[:_LETTERS]}"

    def _stored_key(self) -> bytes:
        with self._read() as session:
            known = session.scalar(sa.select(SecretRow.value).filter_by(name=_NAME))
        return known or self._write(_drawn_key)


def _drawn_key(session: Session) -> bytes:
    row = session.get(SecretRow, _NAME)
    if row is None:
        row = SecretRow(name=_NAME, value=secrets.token_bytes(_KEY_BYTES))
        session.add(row)
    return row.value
