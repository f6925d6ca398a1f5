"""Senders as tests need them: one of each kind, parcels for them, and what comes of sending one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from result_peers import WebServer, destination, lying_in, parcel

from serve.node.destinations import Destination
from serve.node.parcels import Parcel
from serve.node.senders import sender_for
from serve.node.senders.sender import Outcome, Sender


def settings_of(**given: object) -> Destination:
    return TypeAdapter(Destination).validate_python(given)


def sender_of(**given: object) -> Sender:
    return sender_for(settings_of(**given), lambda *_: 0x0000, lambda: False)


def dicom(port: int, **given: object) -> Sender:
    return sender_of(**destination(port, **given))


def stow(url: str, **given: object) -> Sender:
    return sender_of(**dict(kind="stow", name="web", url=url, connect_seconds=5, timeout_seconds=5) | given)


def webhook(url: str, **given: object) -> Sender:
    return sender_of(**dict(kind="webhook", name="hook", url=url, connect_seconds=5, timeout_seconds=5) | given)


class Sent:
    """What came of sending a parcel: the outcome and what was confirmed."""

    def __init__(self, sender: Sender, sent: Parcel, confirmed: frozenset[str] = frozenset()) -> None:
        self.confirmed: list[str] = []
        self.outcome: Outcome = sender.send(sent, confirmed, self.confirmed.append)
        sender.rest(lambda: False)


@pytest.fixture
def waiting(tmp_path: Path) -> Parcel:
    return lying_in(tmp_path / "parcel", parcel())


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer()
    yield server
    server.stop()
