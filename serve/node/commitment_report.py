"""Reports of storage commitment: an archive says on an association of its own what it has taken charge of.

The node is the SCU that asked (N-ACTION, elsewhere); here it receives the N-EVENT-REPORT and hands it on.

References: PS3.4 section J.3.3 and table J.3-2.
"""

import logging
from collections.abc import Iterable
from typing import Protocol

from serve.node.data_set_head import transaction_uid
from serve.node.dimse import Answer, Command, CommandField, Tag
from serve.node.pdu import RoleSelection
from serve.node.services import PLAIN_SYNTAXES, Context, Dropped, IncomingMessage, Peer
from serve.node.sop_classes import STORAGE_COMMITMENT, STORAGE_COMMITMENT_INSTANCE
from serve.node.storage_commitment import (
    INVALID_ARGUMENT,
    LONGEST_REPORT,
    NO_SUCH_OBJECT_INSTANCE,
    PROCESSING_FAILURE,
    RESOURCE_LIMITATION,
    SUCCESS,
    read_event_report,
)

NO_SUCH_EVENT = 0x0113
_EVENTS = (1, 2)

_log = logging.getLogger(__name__)


class Commitments(Protocol):
    """The transactions that wait for a report, e.g. `serve.node.storage_commitment.CommitmentRegistry`."""

    def is_open(self, transaction_uid: str) -> bool:
        """Whether a report of this transaction is waited for; cheap, for anybody may ask."""

    def report(
        self, transaction_uid: str, committed: Iterable[tuple[str, str]], failed: Iterable[tuple[str, str, int]]
    ) -> bool:
        """Take a report: what is committed as pairs of SOP class and instance UID, and what is not, with its failure reason
        (0008,1197); returns whether the transaction was known and is settled.
        """


class CommitmentReports:
    """Receives reports for `commitments`."""

    def __init__(self, commitments: Commitments) -> None:
        self._commitments = commitments

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
            return Dropped(Answer(NO_SUCH_OBJECT_INSTANCE))
        if command.number(Tag.EVENT_TYPE_ID) not in _EVENTS:
            return Dropped(Answer(NO_SUCH_EVENT))
        return _Report(self._commitments, context.transfer_syntax)


class _Report:
    def __init__(self, commitments: Commitments, transfer_syntax: str) -> None:
        self._commitments = commitments
        self._syntax = transfer_syntax
        self._data = bytearray()
        self._is_too_long = False

    def add(self, fragment: memoryview) -> None:
        if len(self._data) + len(fragment) > LONGEST_REPORT:
            self._is_too_long = True
            self._data.clear()
        if not self._is_too_long:
            self._data += fragment

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._data = bytearray()

    def finish(self) -> Answer:
        if self._is_too_long:
            return Answer(RESOURCE_LIMITATION, f"the report is longer than {LONGEST_REPORT} bytes")
        data = bytes(self._data)
        try:
            transaction = transaction_uid(data, self._syntax)
        except ValueError:
            return Answer(INVALID_ARGUMENT, "the report cannot be read")
        if not transaction:
            return Answer(INVALID_ARGUMENT, "the report names no transaction")
        try:
            is_settled = self._commitments.is_open(transaction) and self._settle(transaction, data)
        except ValueError:
            return Answer(INVALID_ARGUMENT, "the report cannot be read")
        except Exception as error:  # noqa: BLE001 - the archive reports again what was not taken
            _log.error("a report of storage commitment was not taken: %s", type(error).__name__)
            is_settled = False
        return Answer(SUCCESS) if is_settled else Answer(PROCESSING_FAILURE, "no such transaction is open")

    def _settle(self, transaction: str, data: bytes) -> bool:
        # Only now, when it is one's own question that is answered: parsing costs what the lists are long.
        said = read_event_report(data, self._syntax)
        return self._commitments.report(transaction, said.committed, said.failed)
