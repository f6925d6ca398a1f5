"""Tokens and the audit: secrets are kept by nobody, what is over is over, and what was done stays written."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from stored_answers import RECEIVED

from cxr_ray.errors import CxrRayError
from serve.store import ROLES, Access, Store
from serve.store.tables import TokenRow


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url)
    yield store
    store.close()


def test_a_token_is_found_by_its_secret_alone(store: Store) -> None:
    secrets = {role: store.add_token(f"a {role}", role) for role in ROLES}
    assert len(set(secrets.values())) == 3
    for role, secret in secrets.items():
        assert secret.startswith("cxr_")
        assert (store.find_token(secret).name, store.find_token(secret).role) == (f"a {role}", role)
    for wrong in ("", "cxr_", secrets["admin"][:-1], secrets["admin"].upper(), "a admin", "\udcff"):
        assert store.find_token(wrong) is None


def test_roles_include_what_is_below_them(store: Store) -> None:
    for role in ROLES:
        token = store.find_token(store.add_token(role, role))
        assert [token.may(wanted) for wanted in ROLES] == [ROLES.index(wanted) <= ROLES.index(role) for wanted in ROLES]


def test_secrets_are_in_no_file(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'results.db'}")
    secret = store.add_token("pacs", "write")
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"pacs" in content
    assert secret.removeprefix("cxr_").encode() not in content
    assert store.find_token(store.tokens()[0].name) is None
    with store._engine.connect() as connection:
        digest = connection.scalar(sa.select(TokenRow.digest))
    assert store.find_token(digest) is None
    store.close()


def test_expired_and_revoked_tokens_are_none(store: Store) -> None:
    now = datetime.now(UTC)
    kept = store.add_token("kept", "read", expires_at=now + timedelta(days=1))
    expired = store.add_token("expired", "read", expires_at=now - timedelta(seconds=1))
    revoked = store.add_token("revoked", "read")
    assert store.find_token(revoked) is not None
    store.revoke_token("revoked")
    assert [store.find_token(secret) is None for secret in (kept, expired, revoked)] == [False, True, True]
    first = store.tokens()
    store.revoke_token("revoked")
    assert store.tokens() == first
    assert [(token.name, token.revoked_at is None) for token in first] == [
        ("kept", True),
        ("expired", True),
        ("revoked", False),
    ]
    with pytest.raises(CxrRayError, match="token 'nobody' is not known"):
        store.revoke_token("nobody")


def test_names_are_given_once(store: Store) -> None:
    store.add_token("pacs", "read")
    store.revoke_token("pacs")
    with pytest.raises(CxrRayError, match="token 'pacs' exists already, or did once"):
        store.add_token("pacs", "read")
    for name in ("", " ", "x" * 65, "two\nlines"):
        with pytest.raises(CxrRayError, match="cannot be used"):
            store.add_token(name, "read")
    assert len(store.tokens()) == 1


def test_the_day_of_the_last_use_is_known(store: Store) -> None:
    secret = store.add_token("pacs", "read")
    assert store.tokens()[0].last_used_on is None
    before = datetime.now(UTC).date()
    store.find_token(secret)
    assert before <= store.tokens()[0].last_used_on <= datetime.now(UTC).date()


def test_a_use_is_written_once_a_day(store: Store) -> None:
    secret = store.add_token("pacs", "read")
    store.find_token(secret)
    asked: list[str] = []
    sa.event.listen(store._engine, "before_cursor_execute", lambda *arguments: asked.append(arguments[2]))
    store.find_token(secret)
    assert [query.split()[0] for query in asked if query != "BEGIN"] == ["SELECT"]


def test_accesses_come_newest_first_in_pages_and_by_study(store: Store) -> None:
    entries = [
        Access(RECEIVED + timedelta(minutes=number), "ada", f"read {number}", f"1.{number % 2}", "P1", f"r{number}")
        for number in range(6)
    ]
    for entry in entries:
        store.record_access(entry.actor, entry.action, entry.study_instance_uid, entry.patient_id, entry.request_id, entry.at)
    store.record_access("bob", "put history", patient_id="P2")
    newest = store.accesses(limit=1)[0]
    assert (newest.actor, newest.study_instance_uid, newest.request_id) == ("bob", None, None)
    assert abs(newest.at - datetime.now(UTC)) < timedelta(minutes=5)
    assert store.accesses(limit=3, offset=2) == entries[4:1:-1]
    assert store.accesses("1.1") == [entries[5], entries[3], entries[1]]
    assert store.accesses("1.1", limit=1, offset=1) == [entries[3]]
    assert store.accesses("7.7") == []
