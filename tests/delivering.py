"""Deliveries as tests need them: an outbox, peers that store and that commit to what they store, and delivery by the test."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pynetdicom import evt
from result_peers import PATIENCE, StorageScp

from serve.node.delivery import Delivery
from serve.node.destinations import DeliverySettings
from serve.node.outbox import DestinationQueue, Outbox
from serve.node.storage_commitment import CommitmentRegistry


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox")


@pytest.fixture
def queue(outbox: Outbox) -> DestinationQueue:
    return outbox.queue("pacs")


@pytest.fixture
def scp() -> Iterator[StorageScp]:
    server = StorageScp().start()
    yield server
    server.stop_soon()


def settings_of(*destinations: dict[str, object], patience: dict[str, object] | None = None, **given: object):
    return DeliverySettings.model_validate(
        {"destinations": destinations, "patience": {**PATIENCE, **(patience or {})}, "poll_seconds": 0.1, **given}
    )


@pytest.fixture
def deliver(outbox: Outbox) -> Iterator[Callable[..., Delivery]]:
    started: list[Delivery] = []

    def start(*destinations: dict[str, object], registry: CommitmentRegistry | None = None, metrics=None, **given: object):
        made = Delivery(settings_of(*destinations, **given), outbox, registry, metrics)
        started.append(made)
        made.start()
        return made

    yield start
    for made in started:
        made.stop()


def uids(*names: str) -> dict[str, int]:
    return {f"1.2.{name}.{item}": 1 for name in names for item in (1, 2)}


def asked(event: evt.Event) -> tuple[str, list[tuple[str, str]]]:
    request = event.action_information
    items = [(str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID)) for item in request.ReferencedSOPSequence]
    return str(request.TransactionUID), items


class CommittingScp(StorageScp):
    """Takes questions for storage commitment and keeps them in `questions`."""

    def __init__(self, status: int = 0x0000) -> None:
        self.questions: list[tuple[str, list[tuple[str, str]]]] = []

        def commits(event: evt.Event) -> tuple[int, Dataset | None]:
            self.questions.append(asked(event))
            return status, None

        super().__init__(commits=commits)


@pytest.fixture
def committing() -> Iterator[CommittingScp]:
    server = CommittingScp()
    server.start()
    yield server
    server.stop_soon()
