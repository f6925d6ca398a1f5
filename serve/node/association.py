"""One association, seen from its acceptor: negotiation, messages, release or abort.

The state machine of PS3.8 section 9.2 as a program reads it: a request is awaited and answered, then messages come one by
one, each is brought to the service of its presentation context and answered before the next is looked at, until the peer
releases, aborts, breaks the protocol or falls silent.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from serve.node import pdu
from serve.node.connection import Connection, ConnectionGone, WrongTransport
from serve.node.dimse import Answer, Command, CommandField, decode_command, encode_response
from serve.node.file_meta import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from serve.node.listener_settings import ListenerSettings
from serve.node.pdu import AbortReason, PduType, PresentationData, ProtocolError, Rejection
from serve.node.services import Context, IncomingMessage, Peer, Services

_LONGEST_REQUEST = 256 * 1024
_LONGEST_OTHER = 1024
_LINGER_SECONDS = 2.0
# First byte of a TLS record with a handshake (RFC 8446 section 5.1), which is no type of PDU.
_TLS_HANDSHAKE = 0x16
# Some implementations announce PDUs that exceed what was agreed by their headers.
_SLACK = 64


class Outcome(StrEnum):
    """How a connection ended."""

    RELEASED = "released"
    ABORTED_BY_PEER = "aborted by peer"
    ABORTED_AT_STOP = "aborted at stop"
    PROTOCOL_ERROR = "protocol error"
    LOST = "connection lost"
    TIMED_OUT = "timed out"
    REJECTED = "rejected"
    REJECTED_BUSY = "rejected, too many"
    REJECTED_DISK = "rejected, disk low"
    NEVER_ASKED = "never asked"
    WRONG_TRANSPORT = "wrong transport"
    ADDRESS = "address not allowed"
    FAILED = "failed"


@dataclass(frozen=True)
class Admission:
    """Who decides whether an association may begin, besides its titles.

    Attributes
    ----------
    has_room
        Whether the disk can take more.
    establish
        Takes a place among the associations, if there is one.
    stopping
        Whether the listener ends.
    """

    has_room: Callable[[], bool]
    establish: Callable[[], bool]
    stopping: Callable[[], bool]


@dataclass
class _Message:
    """A message while it is received; `incoming` takes its data set, None while its command comes."""

    context_id: int
    began: float
    command_bytes: bytearray = field(default_factory=bytearray)
    command: Command | None = None
    incoming: IncomingMessage | None = None


class Association:
    """One connection's association.

    Parameters
    ----------
    connection : Connection
        TLS is done. Closed by its owner.
    settings : ListenerSettings
        Limits and titles.
    services : Services
        Who answers messages.
    admission : Admission
        Whether it may begin.
    on_stored : callable, optional
        Called with the spool's name of each instance that the peer newly stored.
    """

    def __init__(
        self,
        connection: Connection,
        settings: ListenerSettings,
        services: Services,
        admission: Admission,
        on_stored: Callable[[str], None] | None = None,
    ) -> None:
        self.peer = Peer("", connection.address, connection.uri)
        self._on_stored = on_stored
        self.established = False
        self.broken = ""
        self._connection = connection
        self._settings = settings
        self._services = services
        self._admission = admission
        self._contexts: dict[int, Context] = {}
        self._peer_max_pdu = 0
        self._message: _Message | None = None

    def run(self) -> Outcome:
        """Accept and serve the association until it ends; returns how."""
        try:
            rejected = self._negotiate()
            return rejected or self._serve()
        except ProtocolError as error:
            self.broken = str(error)
            self._abort(error.reason)
            return Outcome.PROTOCOL_ERROR
        except ConnectionGone as gone:
            if not self.established:
                return Outcome.NEVER_ASKED
            if self._admission.stopping():
                self._abort(AbortReason.NOT_SPECIFIED)
                return Outcome.ABORTED_AT_STOP
            if gone.timed_out:
                self._abort(AbortReason.NOT_SPECIFIED)
                return Outcome.TIMED_OUT
            return Outcome.LOST
        finally:
            self._abandon()

    def linger(self) -> None:
        """Give the peer a moment to read the last word."""
        self._connection.linger(min(_LINGER_SECONDS, self._settings.acse_timeout_seconds))

    def _negotiate(self) -> Outcome | None:
        patience = self._settings.acse_timeout_seconds
        found = self._connection.pdus(_check_first, silence=patience, whole=patience)
        if len(found) > 1:
            raise ProtocolError("more follows an association request", AbortReason.UNEXPECTED_PDU)
        kind, body = found[0]
        if kind == PduType.ABORT:
            return Outcome.NEVER_ASKED
        request = pdu.decode_associate_request(body)
        connection = self._connection
        self.peer = Peer(request.calling_ae, connection.address, connection.uri, request.called_ae, on_stored=self._on_stored)
        if rejection := self._rejection(request):
            self._connection.send(pdu.encode_reject(rejection), self._settings.dimse_timeout_seconds)
            return {
                pdu.TEMPORARY_CONGESTION: Outcome.REJECTED_DISK,
                pdu.LIMIT_EXCEEDED: Outcome.REJECTED_BUSY,
            }.get(rejection, Outcome.REJECTED)
        self.established = True
        self._accept(request)
        return None

    def _rejection(self, request: pdu.AssociateRequest) -> Rejection | None:
        settings = self._settings
        for rejection, holds in (
            (pdu.PROTOCOL_VERSION_UNKNOWN, request.protocol_version & 1),
            (pdu.APPLICATION_CONTEXT_UNKNOWN, request.application_context == pdu.APPLICATION_CONTEXT),
            (pdu.CALLED_AE_UNKNOWN, request.called_ae in (settings.ae_title, *settings.other_titles)),
            (pdu.CALLING_AE_UNKNOWN, not settings.allowed_calling or request.calling_ae in settings.allowed_calling),
        ):
            if not holds:
                return rejection
        if len(request.contexts) > settings.max_contexts:
            raise ProtocolError("too many presentation contexts")
        if not self._admission.has_room():
            return pdu.TEMPORARY_CONGESTION
        # Last, because it takes a place.
        is_admitted = not self._admission.stopping() and self._admission.establish()
        return None if is_admitted else pdu.LIMIT_EXCEEDED

    def _accept(self, request: pdu.AssociateRequest) -> None:
        answers = [self._services.negotiate(proposed) for proposed in request.contexts]
        abstract_syntaxes = {proposed.identifier: proposed.abstract_syntax for proposed in request.contexts}
        self._contexts = {
            answer.identifier: Context(answer.identifier, abstract_syntaxes[answer.identifier], answer.transfer_syntax)
            for answer in answers
            if answer.result is pdu.ContextResult.ACCEPTED
        }
        self._peer_max_pdu = request.max_pdu
        self._connection.expect_data(self._settings.max_pdu + _SLACK)
        answer = pdu.encode_associate_accept(
            request,
            answers,
            [role for role in map(self._services.role, request.roles) if role],
            max_pdu=self._settings.max_pdu,
            implementation=(IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME),
        )
        self._connection.send(answer, self._settings.dimse_timeout_seconds)

    def _serve(self) -> Outcome:
        settings = self._settings
        while True:
            silence = settings.network_timeout_seconds
            if self._message:
                left = self._message.began + settings.message_timeout_seconds - time.monotonic()
                silence = max(min(settings.dimse_timeout_seconds, left), 0.0)
            found = self._connection.pdus(self._check_next, silence=silence, whole=settings.network_timeout_seconds)
            for kind, body in found:
                if kind == PduType.P_DATA:
                    for part in pdu.presentation_data(body):
                        self._take(part)
                elif kind == PduType.RELEASE_RQ:
                    self._connection.send(pdu.encode_release_response(), settings.dimse_timeout_seconds)
                    return Outcome.RELEASED
                else:
                    return Outcome.ABORTED_BY_PEER
            if self._message and self._message.incoming:
                # The buffer that it came in is about to be used again.
                self._message.incoming.flush()

    def _check_next(self, kind: int, length: int) -> None:
        if kind == PduType.P_DATA:
            if length > self._settings.max_pdu + _SLACK:
                raise ProtocolError("a PDU is longer than agreed")
        elif kind not in (PduType.RELEASE_RQ, PduType.ABORT):
            _refuse(kind)
        elif length > _LONGEST_OTHER:
            raise ProtocolError("a PDU is longer than its kind can be")

    def _take(self, part: PresentationData) -> None:
        if part.context not in self._contexts:
            raise ProtocolError("a presentation context was not negotiated")
        message = self._message
        if message is None:
            message = self._message = _Message(part.context, time.monotonic())
        if part.context != message.context_id or part.is_command == (message.incoming is not None):
            raise ProtocolError("fragments of two messages are mixed", AbortReason.UNEXPECTED_PARAMETER)
        if message.incoming is None:
            self._take_command(message, part)
        else:
            message.incoming.add(part.data)
            if part.is_last:
                self._finish(message)

    def _take_command(self, message: _Message, part: PresentationData) -> None:
        message.command_bytes += part.data
        if len(message.command_bytes) > self._settings.max_command_bytes:
            raise ProtocolError("a command set is longer than allowed")
        if not part.is_last:
            return
        message.command = command = decode_command(message.command_bytes)
        if command.field == CommandField.C_CANCEL:
            # Nothing is under way that it could cancel: it comes after the answer.
            self._message = None
            return
        if command.is_response:
            raise ProtocolError("a response came to no request", AbortReason.UNEXPECTED_PARAMETER)
        message.incoming = self._services.begin(command, self._contexts[message.context_id], self.peer)
        if not command.has_data_set:
            self._finish(message)

    def _finish(self, message: _Message) -> None:
        if message.incoming is None or message.command is None:
            raise AssertionError
        message.incoming.flush()
        answer: Answer = message.incoming.finish()
        message.incoming.close()
        self._message = None
        response = pdu.encode_command(message.context_id, encode_response(message.command, answer), self._peer_max_pdu)
        self._connection.send(response, self._settings.dimse_timeout_seconds)

    def _abort(self, reason: AbortReason) -> None:
        try:
            self._connection.send(pdu.encode_abort(reason), min(1.0, self._settings.dimse_timeout_seconds))
        except ConnectionGone:
            return

    def _abandon(self) -> None:
        if self._message and self._message.incoming:
            self._message.incoming.close()
            self._message = None


def _check_first(kind: int, length: int) -> None:
    if kind == _TLS_HANDSHAKE:
        raise WrongTransport
    if kind == PduType.ASSOCIATE_RQ:
        if length > _LONGEST_REQUEST:
            raise ProtocolError("an association request is longer than allowed")
    elif kind != PduType.ABORT or length > _LONGEST_OTHER:
        _refuse(kind)


def _refuse(kind: int) -> None:
    if kind in set(PduType):
        raise ProtocolError("a PDU came at the wrong time", AbortReason.UNEXPECTED_PDU)
    raise ProtocolError("a PDU is of no known type", AbortReason.UNRECOGNIZED_PDU)
