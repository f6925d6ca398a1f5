"""DIMSE services as a user asks for them: C-ECHO, C-STORE and N-ACTION, one request at a time (PS3.7).

A peer may report on storage commitment whenever it likes, in the middle of our requests too: each wait for an answer takes such
a report in and acknowledges it.
"""

import struct
import time
from collections.abc import Callable, Collection
from typing import BinaryIO

from serve.node.destinations import DicomTimeouts
from serve.node.senders.upper_layer import Context, Peer, PeerGoneError, UpperLayer

VERIFICATION = "1.2.840.10008.1.1"
_AFFECTED_CLASS, _REQUESTED_CLASS, _FIELD, _MESSAGE_ID, _ANSWERED_ID = 0x0002, 0x0003, 0x0100, 0x0110, 0x0120
_PRIORITY, _DATA_SET_TYPE, _STATUS, _COMMENT = 0x0700, 0x0800, 0x0900, 0x0902
_AFFECTED_INSTANCE, _REQUESTED_INSTANCE, _EVENT_TYPE, _ACTION_TYPE = 0x1000, 0x1001, 0x1002, 0x1008
_C_STORE_RQ, _C_ECHO_RQ, _N_EVENT_REPORT_RQ, _N_ACTION_RQ, _RESPONSE = 0x0001, 0x0030, 0x0100, 0x0130, 0x8000
_WITH_DATA, _WITHOUT_DATA = 0x0001, 0x0101
_UNRECOGNISED_OPERATION = 0x0211

EventReport = Callable[[int, str, bytes], int]
"""Takes event type, transfer syntax and encoded event information; returns the status that the peer gets."""

Command = dict[int, bytes]


class Association:
    """An association with a storage SCP: connected when it is made, associated after `request`.

    Parameters
    ----------
    event_report
        Takes N-EVENT-REPORTs; None: they are refused.

    Raises
    ------
    NotAssociatedError
        See `UpperLayer`.
    """

    def __init__(
        self, peer: Peer, contexts: Collection[Context], timeouts: DicomTimeouts, event_report: EventReport | None = None
    ) -> None:
        self.peer, self.proposed = peer, frozenset(contexts)
        self._upper = UpperLayer(peer, timeouts)
        self._patience, self._event_report = timeouts.response_seconds, event_report
        self._syntaxes: dict[int, str] = {}
        self._message_id = 0

    def request(self) -> None:
        """Request the association.

        Raises
        ------
        NotAssociatedError, RejectedError
            See `UpperLayer.negotiate`.
        """
        self._upper.negotiate(sorted(self.proposed))
        self._syntaxes = {number: context.transfer_syntax for context, number in self._upper.accepted.items()}

    @property
    def accepted(self) -> frozenset[Context]:
        """What the peer takes."""
        return frozenset(self._upper.accepted)

    def c_echo(self, context: Context) -> int:
        """Ask whether it is there; returns the status."""
        return self._request(context, {_AFFECTED_CLASS: _uid(context.abstract_syntax), _FIELD: _us(_C_ECHO_RQ)}, None)[0]

    def c_store(self, context: Context, instance_uid: str, data: BinaryIO) -> tuple[int, str]:
        """Send an instance, its data set from where `data` stands; returns status and the peer's comment."""
        command = {
            _AFFECTED_CLASS: _uid(context.abstract_syntax),
            _FIELD: _us(_C_STORE_RQ),
            _PRIORITY: _us(0),
            _AFFECTED_INSTANCE: _uid(instance_uid),
        }
        return self._request(context, command, data)

    def n_action(self, context: Context, instance_uid: str, action_type: int, data: BinaryIO) -> tuple[int, str]:
        """Ask for an action; returns status and the peer's comment."""
        command = {
            _REQUESTED_CLASS: _uid(context.abstract_syntax),
            _FIELD: _us(_N_ACTION_RQ),
            _REQUESTED_INSTANCE: _uid(instance_uid),
            _ACTION_TYPE: _us(action_type),
        }
        return self._request(context, command, data)

    def linger(self, seconds: float, enough: Callable[[], bool]) -> None:
        """Take in reports for so long, or until `enough`."""
        deadline = time.monotonic() + seconds
        while not enough() and (left := deadline - time.monotonic()) > 0:
            if self._upper.has_message(min(left, 0.05)):
                context_id, command, data = self._receive()
                if not self._reported(context_id, command, data):
                    raise PeerGoneError("it sent an answer that nobody waits for")

    def release(self) -> None:
        """End it in order."""
        self._upper.release()

    def abort(self) -> None:
        """End it at once."""
        self._upper.abort()

    def interrupt(self) -> None:
        """Make what waits for the peer fail; from any thread."""
        self._upper.interrupt()

    def _request(self, context: Context, command: Command, data: BinaryIO | None) -> tuple[int, str]:
        # 0 is no message id; the peer has to answer under the one that it got.
        self._message_id = self._message_id % 0xFFFF + 1
        command |= {_MESSAGE_ID: _us(self._message_id), _DATA_SET_TYPE: _us(_WITHOUT_DATA if data is None else _WITH_DATA)}
        self._upper.send_message(self._upper.accepted[context], encode_command(command), data)
        deadline = time.monotonic() + self._patience
        while True:
            context_id, answer, content = self._receive(deadline - time.monotonic())
            if self._reported(context_id, answer, content):
                continue
            if _number(answer, _FIELD) != _number(command, _FIELD) | _RESPONSE:
                raise PeerGoneError("it answered another request")
            if _number(answer, _ANSWERED_ID) != self._message_id or _STATUS not in answer:
                raise PeerGoneError("its answer has no status, or answers another request")
            return _number(answer, _STATUS), answer.get(_COMMENT, b"").decode("latin-1").rstrip("\x00 ")

    def _receive(self, seconds: float | None = None) -> tuple[int, Command, bytes]:
        context_id, command, data = self._upper.receive_message(self._patience if seconds is None else max(seconds, 0.001))
        return context_id, decode_command(command), data

    def _reported(self, context_id: int, command: Command, data: bytes) -> bool:
        if _number(command, _FIELD) != _N_EVENT_REPORT_RQ:
            return False
        status = _UNRECOGNISED_OPERATION
        if self._event_report is not None:
            status = self._event_report(_number(command, _EVENT_TYPE), self._syntaxes.get(context_id, ""), data)
        answer = {
            _AFFECTED_CLASS: command.get(_AFFECTED_CLASS, b""),
            _FIELD: _us(_N_EVENT_REPORT_RQ | _RESPONSE),
            _ANSWERED_ID: command.get(_MESSAGE_ID, _us(0)),
            _DATA_SET_TYPE: _us(_WITHOUT_DATA),
            _STATUS: _us(status),
            _AFFECTED_INSTANCE: command.get(_AFFECTED_INSTANCE, b""),
            _EVENT_TYPE: command.get(_EVENT_TYPE, _us(0)),
        }
        self._upper.send_message(context_id, encode_command(answer), None)
        return True


def encode_command(command: Command) -> bytes:
    """A command set (PS3.7 section 6.3.1) from the values of its elements, group length added."""
    elements = b"".join(struct.pack("<HHL", 0, element, len(value)) + value for element, value in sorted(command.items()))
    return struct.pack("<HHLL", 0, 0, 4, len(elements)) + elements


def decode_command(encoded: bytes) -> Command:
    """The values of a command set's elements.

    Raises
    ------
    PeerGoneError
        When it is malformed.
    """
    command, offset = {}, 0
    while offset < len(encoded):
        if offset + 8 > len(encoded):
            raise PeerGoneError("it sent a malformed command")
        group, element, length = struct.unpack_from("<HHL", encoded, offset)
        offset += 8
        if group != 0 or offset + length > len(encoded):
            raise PeerGoneError("it sent a malformed command")
        command[element] = encoded[offset : offset + length]
        offset += length
    return command


def _us(value: int) -> bytes:
    return struct.pack("<H", value)


def _uid(value: str) -> bytes:
    encoded = value.encode("ascii")
    return encoded + b"\x00" * (len(encoded) % 2)


def _number(command: Command, element: int) -> int:
    return int.from_bytes(command.get(element, b"")[:2], "little")
