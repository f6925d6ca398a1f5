"""Reports of storage commitment: an archive says on an association of its own what it has taken charge of.

The node is the SCU that asked (N-ACTION, elsewhere); here it receives the N-EVENT-REPORT and hands it on.

References: PS3.4 section J.3.3 and table J.3-2.
"""

import logging
from collections.abc import Callable
from io import BytesIO

from serve.node.dimse import Answer, Command, CommandField, Tag
from serve.node.pdu import RoleSelection
from serve.node.services import PLAIN_SYNTAXES, Context, Dropped, IncomingMessage, Peer
from serve.node.sop_classes import STORAGE_COMMITMENT, STORAGE_COMMITMENT_INSTANCE

NO_SUCH_INSTANCE = 0x0112
NO_SUCH_EVENT = 0x0113
INVALID_ARGUMENT = 0x0115
PROCESSING_FAILURE = 0x0110
_EVENTS = (1, 2)
_LONGEST_REPORT = 4 * 1024 * 1024

CommitmentCallback = Callable[[str, list[tuple[str, str]], list[tuple[str, str, int]]], bool]

_log = logging.getLogger(__name__)


class CommitmentReports:
    """Receives reports for `on_commitment`.

    Parameters
    ----------
    on_commitment : callable
        Told the transaction's UID, what is committed as pairs of SOP class and instance UID, and what is not, with the
        failure reason (0008,1197); returns whether the transaction was known and is settled.
    """

    def __init__(self, on_commitment: CommitmentCallback) -> None:
        self._on_commitment = on_commitment

    def transfer_syntaxes(self, abstract_syntax: str, _proposed: tuple[str, ...]) -> tuple[str, ...] | None:
        """See `serve.node.services.Service`."""
        return PLAIN_SYNTAXES if abstract_syntax == STORAGE_COMMITMENT else None

    def role(self, proposed: RoleSelection) -> RoleSelection | None:
        """See `serve.node.services.Service`: the archive that calls is the SCP."""
        return RoleSelection(STORAGE_COMMITMENT, False, proposed.scp) if proposed.sop_class == STORAGE_COMMITMENT else None

    def begin(self, command: Command, context: Context, _peer: Peer) -> IncomingMessage | None:
        """See `serve.node.services.Service`."""
        if command.field != CommandField.N_EVENT_REPORT:
            return None
        if command.uid(Tag.AFFECTED_SOP_INSTANCE_UID) != STORAGE_COMMITMENT_INSTANCE:
            return Dropped(Answer(NO_SUCH_INSTANCE))
        if command.number(Tag.EVENT_TYPE_ID) not in _EVENTS:
            return Dropped(Answer(NO_SUCH_EVENT))
        return _Report(self._on_commitment, context.transfer_syntax)


class _Report:
    def __init__(self, on_commitment: CommitmentCallback, transfer_syntax: str) -> None:
        self._on_commitment = on_commitment
        self._syntax = transfer_syntax
        self._data = bytearray()
        self._size = 0

    def add(self, fragment: memoryview) -> None:
        self._size += len(fragment)
        if self._size <= _LONGEST_REPORT:
            self._data += fragment

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._data = bytearray()

    def finish(self) -> Answer:
        if self._size > _LONGEST_REPORT:
            return Answer(INVALID_ARGUMENT, "the report is too long")
        try:
            transaction, committed, failed = _read(bytes(self._data), self._syntax)
        # A peer chose these bytes, and a parser has no closed list of ways to fail on them.
        except Exception:  # noqa: BLE001
            return Answer(INVALID_ARGUMENT, "the report cannot be read")
        if not transaction:
            return Answer(INVALID_ARGUMENT, "the report names no transaction")
        try:
            is_settled = self._on_commitment(transaction, committed, failed)
        except Exception as error:  # noqa: BLE001 - the archive reports again what was not taken
            _log.error("a report of storage commitment was not taken: %s", type(error).__name__)
            is_settled = False
        return Answer(0x0000) if is_settled else Answer(PROCESSING_FAILURE, "no such transaction is open")


def _read(data: bytes, syntax: str) -> tuple[str, list[tuple[str, str]], list[tuple[str, str, int]]]:
    from pydicom.filereader import read_dataset  # noqa: PLC0415 - only who is asked for reports needs it
    from pydicom.uid import UID  # noqa: PLC0415

    encoding = UID(syntax)
    report = read_dataset(BytesIO(data), encoding.is_implicit_VR, encoding.is_little_endian)
    committed = [
        (str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID))
        for item in report.get("ReferencedSOPSequence", [])
    ]
    failed = [
        (str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID), int(item.get("FailureReason", 0)))
        for item in report.get("FailedSOPSequence", [])
    ]
    return str(report.get("TransactionUID", "")), committed, failed
