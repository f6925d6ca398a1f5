"""Storage commitment, push model (PS3.4 Annex J): what was asked, and what destinations report.

A transaction lies on disk before its question is sent, and a report before it is acknowledged: the answer may come minutes or
days later, on our association or on one that the peer opens to our listener, in this process or in another, before or after a
restart. Delivery looks into the folder and goes on from there.

::

    <destination>/commitments/<digest>.json          asked: transaction UID, parcel
    <destination>/commitments/<digest>.report.json   answered, not yet acted on
"""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from serve.node.durable import write_durably
from serve.node.outbox import Outbox

STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"
SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
RESOURCE_LIMITATION = 0x0213
NO_SUCH_OBJECT_INSTANCE = 0x0112
INVALID_ARGUMENT = 0x0115
# A transaction of ours has a handful of instances, of some 120 bytes each; a parser takes thirty times as much memory.
LONGEST_REPORT = 256 * 1024
_REPORT = ".report.json"
_IMPLICIT = "1.2.840.10008.1.2"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"

_log = logging.getLogger(__name__)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


Record = TypeVar("Record", bound=_Record)


class Transaction(_Record):
    """A question that was, or is about to be, asked."""

    transaction_uid: str
    parcel: str
    asked_at: datetime


class Report(_Record):
    """What a destination answered: instances by SOP class and instance UID, those that failed with a reason."""

    committed: tuple[tuple[str, str], ...]
    failed: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class EventReport:
    """An N-EVENT-REPORT of the storage commitment class, read."""

    transaction_uid: str
    committed: list[tuple[str, str]]
    failed: list[tuple[str, str, int]]


class CommitmentRegistry:
    """Open transactions of an outbox; safe for several threads and processes.

    Parameters
    ----------
    outbox
        Whose parcels the transactions are about.
    on_report
        Called with the destination's name after each report that is taken; must return at once.
    """

    def __init__(self, outbox: Outbox, on_report: Callable[[str], None] | None = None) -> None:
        self._outbox = outbox
        self.on_report = on_report

    def open(self, destination: str, parcel: str) -> str:
        """Begin a transaction, durably; returns its UID.

        Raises
        ------
        OSError
            When it cannot be written.
        """
        from pydicom.uid import generate_uid  # noqa: PLC0415 - commands that list need not wait

        uid = str(generate_uid(prefix=None))
        transaction = Transaction(transaction_uid=uid, parcel=parcel, asked_at=datetime.now(UTC))
        write_durably(self._folder(destination) / f"{_digest(uid)}.json", transaction.model_dump_json().encode())
        return uid

    def is_open(self, transaction_uid: str) -> bool:
        """Whether a destination was asked under this UID and is waited for.

        Raises
        ------
        OSError
            When the outbox cannot be read.
        """
        return self._asked(transaction_uid) is not None

    def report(
        self, transaction_uid: str, committed: Iterable[tuple[str, str]], failed: Iterable[tuple[str, str, int]]
    ) -> bool:
        """Take a destination's answer, durably.

        Parameters
        ----------
        committed
            SOP class and instance UID of what it keeps.
        failed
            SOP class and instance UID of what it does not keep, and the failure reason (PS3.3 section C.14.1.1).

        Returns
        -------
        bool
            False when there is no such transaction.

        Raises
        ------
        OSError
            When the answer cannot be kept; the peer has to report again.
        """
        destination = self._asked(transaction_uid)
        if destination is None:
            return False
        kept = self._folder(destination) / f"{_digest(transaction_uid)}{_REPORT}"
        if not kept.exists():
            report = Report(committed=tuple(committed), failed=tuple(failed))
            write_durably(kept, report.model_dump_json().encode())
        if self.on_report is not None:
            self.on_report(destination)
        return True

    def reports(self, destination: str) -> dict[str, list[Report]]:
        """Reports that came in, by parcel; those of one parcel in the order in which they came."""
        folder = self._folder(destination)
        found: dict[str, list[Report]] = {}
        for path in sorted(folder.glob(f"*{_REPORT}"), key=_age):
            transaction = _read(Transaction, path.with_name(path.name.removesuffix(_REPORT) + ".json"))
            report = _read(Report, path)
            if transaction is not None and report is not None:
                found.setdefault(transaction.parcel, []).append(report)
        return found

    def close(self, destination: str, parcel: str) -> None:
        """End the transactions of a parcel: a report that comes after this is of none."""
        for path in self._folder(destination).glob("*.json"):
            if path.name.endswith(_REPORT):
                continue
            transaction = _read(Transaction, path)
            if transaction is None or transaction.parcel == parcel:
                path.with_name(path.stem + _REPORT).unlink(missing_ok=True)
                path.unlink(missing_ok=True)

    def sweep(self, destination: str, seconds: float) -> None:
        """Remove transactions that were opened longer ago and whose parcel waits no more."""
        queue = self._outbox.queue(destination)
        waiting = set(queue.waiting())
        for path in queue.commitments.glob("*.json"):
            transaction = _read(Transaction, path)
            if _age(path) < time.time() - seconds and (transaction is None or transaction.parcel not in waiting):
                path.unlink(missing_ok=True)

    def handle_event_report(self, event_type: int, transfer_syntax: str, encoded: bytes) -> int:
        """Take an N-EVENT-REPORT of the storage commitment class as it came; returns the status for the peer.

        Parameters
        ----------
        event_type
            1: all committed, 2: failures exist (PS3.4 section J.3.3); what the lists say counts.
        transfer_syntax
            Of the presentation context on which it came.
        encoded
            Event information.
        """
        if len(encoded) > LONGEST_REPORT:
            _log.warning("a storage commitment report is longer than %d bytes", LONGEST_REPORT)
            return RESOURCE_LIMITATION
        try:
            report = read_event_report(encoded, transfer_syntax)
        except ValueError:
            _log.warning("a storage commitment report cannot be read")
            return INVALID_ARGUMENT
        try:
            known = event_type in {1, 2} and self.report(report.transaction_uid, report.committed, report.failed)
        except OSError as error:
            _log.error("a storage commitment report cannot be kept: %s", error.strerror)
            return PROCESSING_FAILURE
        if not known:
            _log.warning("a storage commitment report is of no open transaction")
        return SUCCESS if known else INVALID_ARGUMENT

    def _asked(self, transaction_uid: str) -> str | None:
        name = f"{_digest(transaction_uid)}.json"
        return next((each for each in self._outbox.destinations() if (self._folder(each) / name).exists()), None)

    def _folder(self, destination: str) -> Path:
        return self._outbox.queue(destination).commitments


def encoded_request(transaction_uid: str, references: Iterable[tuple[str, str]], transfer_syntax: str) -> bytes:
    """Action information that asks for commitment to instances (PS3.4 table J.3-1).

    Parameters
    ----------
    references
        SOP class and instance UIDs.
    """
    from pydicom.dataset import Dataset  # noqa: PLC0415 - as above
    from pydicom.filebase import DicomBytesIO  # noqa: PLC0415
    from pydicom.filewriter import write_dataset  # noqa: PLC0415
    from pydicom.sequence import Sequence  # noqa: PLC0415

    items = []
    for sop_class, sop_instance in references:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_instance
        items.append(item)
    request = Dataset()
    request.TransactionUID = transaction_uid
    request.ReferencedSOPSequence = Sequence(items)
    written = DicomBytesIO()
    written.is_implicit_VR, written.is_little_endian = transfer_syntax == _IMPLICIT, transfer_syntax != _BIG_ENDIAN
    write_dataset(written, request)
    return written.getvalue()


def read_event_report(encoded: bytes, transfer_syntax: str) -> EventReport:
    """Read event information (PS3.4 table J.3-2).

    Raises
    ------
    ValueError
        When it is malformed or names no transaction.
    """
    from pydicom.filereader import read_dataset  # noqa: PLC0415 - as above

    try:
        content = read_dataset(BytesIO(encoded), transfer_syntax == _IMPLICIT, transfer_syntax != _BIG_ENDIAN)
        transaction = str(content.get("TransactionUID", "") or "")
        committed = [
            (str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID))
            for item in content.get("ReferencedSOPSequence", None) or []
        ]
        failed = [
            (str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID), int(item.get("FailureReason", 0) or 0))
            for item in content.get("FailedSOPSequence", None) or []
        ]
    # A peer chose these bytes, and a parser has no closed list of ways to fail on them.
    except Exception as error:
        raise ValueError("the report cannot be read") from error
    if not transaction:
        raise ValueError("the report names no transaction")
    return EventReport(transaction, committed, failed)


def _digest(transaction_uid: str) -> str:
    return hashlib.sha256(transaction_uid.encode()).hexdigest()[:32]


def _age(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _read(kind: type[Record], path: Path) -> Record | None:
    with contextlib.suppress(OSError, ValidationError):
        return kind.model_validate_json(path.read_bytes())
    return None
