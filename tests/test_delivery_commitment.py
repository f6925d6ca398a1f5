"""Deliveries that are over when the peer has committed to what it stores: reports, refusals, and peers that say nothing."""

import threading
import time
from pathlib import Path

import pytest
from delivering import CommittingScp, asked, committing, deliver, outbox, queue, uids
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel
from result_peers import SECONDARY_CAPTURE, SR_3D, StorageScp, destination, orthanc, parcel, stored_uids, until

from serve.node.outbox import Outbox
from serve.node.storage_commitment import CommitmentRegistry, encoded_request, read_event_report

__all__ = ["committing", "deliver", "outbox", "queue"]

INSTANCES = [(SR_3D, "1.2.1.1"), (SECONDARY_CAPTURE, "1.2.1.2")]


def test_delivered_is_what_the_peer_commits_to(deliver, outbox: Outbox, queue, committing: CommittingScp) -> None:
    registry = CommitmentRegistry(outbox)
    deliver(destination(committing.port, commitment={"linger_seconds": 0}), registry=registry)
    outbox.add(parcel("1"))
    outbox.add(parcel("2", sequence=2))
    until(lambda: committing.questions)
    ((transaction, instances),) = committing.questions
    assert sorted(instances) == sorted(INSTANCES)
    time.sleep(0.3)
    assert (len(queue.waiting()), queue.receipts()) == (2, [])
    assert not registry.report("1.2.3", instances, [])
    assert registry.report(transaction, instances, [])
    until(lambda: queue.receipts() == [parcel("1").id])
    assert queue.receipt(parcel("1").id).committed
    # The next revision was held back until now.
    until(lambda: len(committing.questions) == 2)
    # A report that is repeated is of no transaction any more.
    assert not registry.report(transaction, instances, [])
    assert committing.times == uids("1", "2")


def test_report_after_a_restart_counts_and_nothing_is_sent_or_asked_again(deliver, outbox, queue, committing) -> None:
    outbox.add(parcel())
    delivery = deliver(destination(committing.port, commitment=True))
    until(lambda: queue.state(parcel().id).asked_at)
    delivery.stop()
    ((transaction, instances),) = committing.questions
    # While nobody delivers, in what might be another process.
    assert CommitmentRegistry(Outbox(outbox.root)).report(transaction, instances, [])
    deliver(destination(committing.port, commitment=True))
    until(queue.receipts)
    assert (len(committing.questions), committing.times) == (1, uids("1"))
    until(lambda: list((queue.root / "commitments").iterdir()) == [])


def test_what_is_not_committed_to_is_sent_again_and_then_dead(deliver, outbox, queue, committing: CommittingScp) -> None:
    registry = CommitmentRegistry(outbox)
    outbox.add(parcel())
    deliver(destination(committing.port, commitment={"resends": 1}), registry=registry)
    until(lambda: committing.questions)
    transaction, (report, capture) = committing.questions[0][0], INSTANCES
    assert registry.report(transaction, [report], [(*capture, 0x0112)])
    until(lambda: len(committing.questions) == 2)
    assert committing.times == {"1.2.1.1": 1, "1.2.1.2": 2}
    # Not naming an instance is not committing to it.
    assert registry.report(committing.questions[1][0], [report], [])
    until(queue.dead_letters)
    assert queue.dead_letters()[0].letter.reason == "not committed to with 0x0000, sent 2 times"


def test_class_that_is_never_committed_to_is_dead_at_once(deliver, outbox, queue, committing: CommittingScp) -> None:
    registry = CommitmentRegistry(outbox)
    outbox.add(parcel())
    deliver(destination(committing.port, commitment=True), registry=registry)
    until(lambda: committing.questions)
    registry.report(committing.questions[0][0], [], [(*instance, 0x0122) for instance in INSTANCES])
    until(queue.dead_letters)
    assert queue.dead_letters()[0].letter.reason == "storage commitment refused with 0x0122"


def test_peer_that_does_not_report_is_asked_again(deliver, outbox, queue, committing: CommittingScp) -> None:
    registry = CommitmentRegistry(outbox)
    outbox.add(parcel())
    deliver(destination(committing.port, commitment={"timeout_seconds": 0.3, "linger_seconds": 0}), registry=registry)
    until(lambda: len(committing.questions) >= 3)
    # The answer to the first question is as good as any.
    assert registry.report(*committing.questions[0], [])
    until(queue.receipts)
    assert committing.times == uids("1")


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (StorageScp(), "presentation context refused: storage commitment"),
        (CommittingScp(0x0122), "storage commitment refused with 0x0122, SOP class not supported"),
    ],
)
def test_peer_without_commitment_makes_a_dead_letter(deliver, outbox, queue, server: StorageScp, reason: str) -> None:
    server.start()
    outbox.add(parcel())
    deliver(destination(server.port, commitment=True))
    until(queue.dead_letters)
    assert queue.dead_letters()[0].letter.reason == reason
    server.stop()


def event_information(transaction: str, committed: list[tuple[str, str]], failed: list[tuple[str, str, int]]) -> Dataset:
    report = Dataset()
    report.TransactionUID = transaction
    for keyword, entries in (("ReferencedSOPSequence", committed), ("FailedSOPSequence", failed)):
        items = []
        for sop_class, sop_instance, *reason in entries:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_instance
            if reason:
                item.FailureReason = reason[0]
            items.append(item)
        if items:
            setattr(report, keyword, items)
    return report


def test_report_on_our_own_association_is_taken(deliver, outbox, queue) -> None:
    answers: list[int] = []

    def commits(event: evt.Event) -> tuple[int, None]:
        transaction, items = asked(event)

        def report() -> None:
            time.sleep(0.2)
            status, _ = event.assoc.send_n_event_report(
                event_information(transaction, items, []), 1, StorageCommitmentPushModel, "1.2.840.10008.1.20.1.1"
            )
            answers.append(status.Status)

        threading.Thread(target=report, daemon=True).start()
        return 0x0000, None

    server = StorageScp(commits=commits).start()
    outbox.add(parcel())
    deliver(destination(server.port, commitment={"linger_seconds": 30}))
    until(queue.receipts)
    until(lambda: answers)
    assert (answers, server.associations) == ([0x0000], 1)
    assert queue.receipt(parcel().id).committed
    server.stop()


def test_report_that_makes_no_sense_is_refused(outbox: Outbox) -> None:
    registry = CommitmentRegistry(outbox)
    uid = registry.open("pacs", "parcel-1")
    explicit = "1.2.840.10008.1.2.1"
    assert registry.handle_event_report(1, explicit, encoded_request("1.2.3", INSTANCES, explicit)) == 0x0115
    assert registry.handle_event_report(3, explicit, encoded_request(uid, INSTANCES, explicit)) == 0x0115
    assert registry.handle_event_report(1, explicit, b"\x08\x00\x95\x11UI\xff\xff1") == 0x0115
    assert registry.handle_event_report(1, explicit, b"") == 0x0115
    assert registry.handle_event_report(1, explicit, encoded_request(uid, INSTANCES * 3000, explicit)) == 0x0213
    assert [registry.is_open(each) for each in (uid, "1.2.3", "../" + uid)] == [True, False, False]
    for syntax in ("1.2.840.10008.1.2", explicit, "1.2.840.10008.1.2.2"):
        encoded = encoded_request(uid, INSTANCES, syntax)
        assert (read_event_report(encoded, syntax).committed, read_event_report(encoded, syntax).failed) == (INSTANCES, [])
        assert registry.handle_event_report(1, syntax, encoded) == 0x0000


@pytest.mark.system
def test_orthanc_commits_on_an_association_of_its_own(deliver, outbox, queue, free_port, tmp_path: Path) -> None:
    registry = CommitmentRegistry(outbox)
    node = AE("NODE")
    node.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
    node.add_supported_context(StorageCommitmentPushModel)
    answered: list[int] = []

    def reported(event: evt.Event) -> tuple[int, None]:
        encoded = event.request.EventInformation.getvalue()
        answered.append(registry.handle_event_report(event.request.EventTypeID, event.context.transfer_syntax, encoded))
        return answered[-1], None

    listener = node.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, reported)])
    modalities = {"node": {"AET": "NODE", "Host": "127.0.0.1", "Port": listener.server_address[1]}}
    dicom_port = free_port()
    with orthanc(tmp_path / "orthanc", free_port(), dicom_port, DicomModalities=modalities) as client:
        outbox.add(parcel("1", study="1.2.3"))
        outbox.add(parcel("2", study="1.2.4"))
        deliver(destination(dicom_port, called_ae="ORTHANC", calling_ae="NODE", commitment=True), registry=registry)
        until(lambda: len(queue.receipts()) == 2)
        assert stored_uids(client) == sorted(uids("1", "2"))
    assert answered == [0x0000, 0x0000]
    assert all(queue.receipt(name).committed for name in queue.receipts())
    threading.Thread(target=listener.shutdown, daemon=True).start()
