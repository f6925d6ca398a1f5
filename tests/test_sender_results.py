"""Results that go back to whoever sent the study, over real sockets: from a sender's C-STORE to the one that it gets."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import httpx
import pydicom
import pytest
from phantom_films import VISITS, dicom
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE
from result_answers import service_answer
from result_peers import PATIENCE, TIMEOUTS, StorageScp
from waiting import until

from serve.node.assembly import Assembler, AssemblySettings
from serve.node.delivery import Delivery
from serve.node.destinations import DeliverySettings
from serve.node.file_meta import presentation_address
from serve.node.listener import Listener, ListenerSettings
from serve.node.outbox import DestinationQueue, Outbox
from serve.node.results.settings import ResultSettings
from serve.node.spool import Origin, Spool
from serve.node.storage import StorageRules
from serve.node.study_record import Drawings
from serve.node.study_results import StudyResults
from serve.spooled_intake import SpooledIntake

CR = "1.2.840.10008.5.1.4.1.1.1"
QUICK = AssemblySettings(quiet_seconds=0.1)


class Node:
    """Listener, assembly and delivery on one spool; the service's answers are kept by `answer`."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.spool, self._stack = Spool(root), stack
        self.outbox = Outbox(root / "outbox")
        self.listener = stack.enter_context(Listener(ListenerSettings(port=0, min_free_bytes=0, drain_seconds=1), self.spool))

    def queue(self, destination: str = "sender") -> DestinationQueue:
        return self.outbox.queue(destination)

    def answer(self) -> None:
        for name in self.spool.pending():
            self.spool.answers.keep(name, json.dumps(service_answer()).encode())

    def assemble(self, *destinations: dict[str, object]) -> DeliverySettings:
        """Have results made for destinations, and not yet sent."""
        settings = DeliverySettings.model_validate({"destinations": destinations, "patience": PATIENCE, "poll_seconds": 0.1})
        # Reports have no pictures: nobody is asked for one.
        drawings = Drawings(self._stack.enter_context(httpx.Client(base_url="http://127.0.0.1:9", trust_env=False)))
        results = StudyResults(self.spool, drawings, self.outbox, settings.destinations, ResultSettings())
        self._stack.enter_context(Assembler(QUICK, self.spool, results))
        return settings

    def deliver(self, *destinations: dict[str, object]) -> None:
        self._stack.enter_context(Delivery(self.assemble(*destinations), self.outbox))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with ExitStack() as stack:
        yield Node(tmp_path / "spool", stack)


@pytest.fixture
def scp() -> Iterator[Callable[..., StorageScp]]:
    made: list[StorageScp] = []

    def make(title: str, port: int = 0) -> StorageScp:
        made.append(StorageScp(titles=[title], port=port))
        return made[-1]

    yield make
    for server in made:
        server.stop_soon()


def film(study: str) -> Dataset:
    content = pydicom.dcmread(BytesIO(dicom(VISITS[0], StudyInstanceUID=study, SOPInstanceUID=generate_uid())))
    content.file_meta.MediaStorageSOPInstanceUID = content.SOPInstanceUID
    return content


def send(node: Node, title: str, content: Dataset) -> None:
    entity = AE(title)
    entity.add_requested_context(content.SOPClassUID, content.file_meta.TransferSyntaxUID)
    association = entity.associate("127.0.0.1", node.listener.port, ae_title="CXRRAY")
    assert association.send_c_store(content).Status == 0x0000
    association.release()


def received(node: Node, content: Dataset, title: str, address: str) -> None:
    """Put an instance into the spool as if it had come from an address that this machine has not."""
    written = BytesIO()
    content.save_as(written, enforce_file_format=True)
    length = int.from_bytes(written.getvalue()[140:144], "little")
    origin = Origin(CR, content.SOPInstanceUID, content.file_meta.TransferSyntaxUID, title, address)
    node.spool.store(written.getvalue()[144 + length :], origin)


def post(node: Node, content: Dataset, address: str = "2001:db8::1") -> None:
    written = BytesIO()
    content.save_as(written, enforce_file_format=True)
    rules = StorageRules(max_object_bytes=1 << 24, min_free_bytes=0)
    SpooledIntake(node.spool.root, rules).take(written.getvalue(), study_uid=None, address=address)


def sender(**given: object) -> dict[str, object]:
    return dict(kind="sender", results=["sr"], timeouts=TIMEOUTS) | given


def settled(node: Node) -> bool:
    return len(list((node.spool.root / "done").glob("*.dcm"))) > 0 and not node.spool.answers.awaiting()


def test_both_senders_of_a_study_get_its_result_and_the_one_that_is_absent_when_it_comes(node: Node, scp, free_port) -> None:
    here, absent = scp("CT1").start(), scp("CR2", free_port())
    study = generate_uid()
    for title in ("CR2", "CT1"):
        send(node, title, film(study))
    node.answer()
    node.deliver(sender(peers={"CT1": here.port, "CR2": absent.port}))
    # A receipt is written before its parcel goes, and one parcel after the other comes into the outbox.
    until(lambda: (len(node.queue().receipts()), len(node.queue().waiting())) == (1, 1), "the result of the one that is there")
    (waiting,) = node.queue().waiting()
    until(lambda: node.queue().state(waiting).attempts >= 2, "attempts to reach the other")
    # A revision goes the same way.
    send(node, "CT1", film(study))
    node.answer()
    until(lambda: (len(node.queue().receipts()), len(node.queue().waiting())) == (2, 2), "the revision")
    assert (len(here.order), absent.order) == (2, [])
    absent.start()
    until(lambda: not node.queue().waiting(), "the results of the other")
    assert absent.order == here.order
    assert absent.callers == here.callers == {"CXRRAY"}
    assert node.queue().count_dead() == 0


def test_sender_with_several_addresses_gets_a_result_once(node: Node) -> None:
    study = generate_uid()
    for address in ("dicom://10.0.0.1:4242", "dicom://10.0.0.2:4242", "dicom://[2001:db8::2]:4242"):
        received(node, film(study), "GATEWAY", address)
        received(node, film(study), "CT1", address)
    node.answer()
    node.assemble(sender(peers={"GATEWAY": "gateway.example:104", "CT1": 104}))
    until(lambda: settled(node), "the results")
    parcels = [node.queue().read(name) for name in node.queue().waiting()]
    origins = [(parcel.origin.calling_ae, parcel.origin.address) for parcel in parcels]
    assert sorted(title for title, _ in origins) == ["CT1", "CT1", "CT1", "GATEWAY"]
    assert {address for title, address in origins if title == "CT1"} == {"10.0.0.1", "10.0.0.2", "2001:db8::2"}


def test_study_that_came_over_http_is_returned_to_nobody_and_goes_everywhere_else(node: Node, scp, caplog) -> None:
    pacs = scp("PACS").start()
    archive = dict(kind="dicom", name="pacs", host="127.0.0.1", port=pacs.port, called_ae="PACS", results=["sr"])
    study = generate_uid()
    for _ in range(2):
        post(node, film(study))
    # Of a spool that was written when the way stood in the place of a title.
    received(node, film(study), "STOW-RS", "http://2001:db8::1")
    node.answer()
    with caplog.at_level(logging.INFO):
        node.deliver(archive, sender(default_port=104))
        until(lambda: pacs.order, "the archive's result")
        until(lambda: settled(node), "the end of the study")
    assert (node.queue().waiting(), node.queue().count_dead()) == ([], 0)
    told = [record for record in caplog.records if record.name == "serve.node.study_results"]
    (message,) = [record.getMessage() for record in told if record.levelno == logging.INFO]
    assert message.endswith("none of its images came by C-STORE: destination sender has nobody to return its results to")


def test_of_a_study_that_came_both_ways_the_sender_gets_the_result(node: Node) -> None:
    study = generate_uid()
    post(node, film(study))
    received(node, film(study), "CT1", "dicom://10.0.0.1:4242")
    node.answer()
    node.assemble(sender(default_port=104))
    until(lambda: settled(node), "the results")
    (name,) = node.queue().waiting()
    assert node.queue().read(name).origin.model_dump() == {"calling_ae": "CT1", "address": "10.0.0.1"}


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::1", "::1", "2001:db8:0:1:1:1:1:1"])
def test_address_of_an_http_client_is_read_as_it_was_written(node: Node, address: str) -> None:
    post(node, film(generate_uid()), address)
    (name,) = node.spool.pending()
    instance = node.spool.read(name)
    assert (instance.peer_scheme, instance.peer_address, instance.calling_ae) == ("http", address, None)


@pytest.mark.parametrize(
    ("scheme", "host", "port", "wanted"),
    [
        ("dicom", "192.0.2.7", 104, "dicom://192.0.2.7:104"),
        ("dicom", "2001:db8::1", 104, "dicom://[2001:db8::1]:104"),
        ("http", "2001:db8::1", None, "http://[2001:db8::1]"),
        ("http", "192.0.2.7", None, "http://192.0.2.7"),
    ],
)
def test_presentation_address_is_a_uri(scheme: str, host: str, port: int | None, wanted: str) -> None:
    assert presentation_address(scheme, host, port) == wanted
