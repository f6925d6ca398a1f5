"""A store that does not answer says nothing about a token: neither that it is good nor that it is not."""

import asyncio
import sqlite3
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from serve.http.access import Guard
from serve.http.problems import ApiProblem
from serve.store import Store


def test_a_store_without_an_answer_is_no_unknown_token(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'results.sqlite'}")
    guard = Guard("the service's own", store.find_token, required=True)
    with pytest.raises(ApiProblem) as unknown:
        asyncio.run(guard.actor("never added"))
    with sqlite3.connect(tmp_path / "results.sqlite") as database:
        database.execute("DROP TABLE token")
    with pytest.raises(ApiProblem) as unanswered:
        asyncio.run(guard.actor("not asked before"))
    stranger = asyncio.run(guard.stranger(Headers({"Authorization": "Bearer nor this"})))
    assert (unknown.value.status_code, unanswered.value.status_code, stranger.status_code) == (401, 503, 503)
    assert asyncio.run(guard.actor("the service's own")).role == "admin"
