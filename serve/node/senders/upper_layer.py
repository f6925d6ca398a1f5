"""The DICOM upper layer as a requestor speaks it (PS3.8): one connection, one association, and a limit for every wait.

Synchronous, in the caller's thread: what the peer does not do in time ends in `PeerGoneError`, and the connection is closed.
"""

import contextlib
import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from serve.node.destinations import DicomTimeouts
from serve.node.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

APPLICATION_CONTEXT = b"1.2.840.10008.3.1.1.1"
_OUR_LARGEST_PDU = 65536
_LARGEST_RECEIVED = 1024 * 1024
_LARGEST_MESSAGE = 16 * 1024 * 1024
# Of a PDU that the peer does not limit; more only costs memory.
_LARGEST_SENT = 128 * 1024
# Everything is confirmed by then: who does not answer this keeps nothing from us.
_RELEASE_SECONDS = 5.0
_ASSOCIATE_RQ, _ASSOCIATE_AC, _ASSOCIATE_RJ, _DATA, _RELEASE_RQ, _RELEASE_RP, _ABORT = range(1, 8)
_COMMAND, _LAST = 1, 2
# Result of an A-ASSOCIATE-RJ (PS3.8 table 9-21).
_TRANSIENT = 2


class PeerGoneError(Exception):
    """The connection is of no more use; `str(error)` says in our words what the peer did, or did not do."""


class NotAssociatedError(Exception):
    """The peer took no association, or could not be reached."""


class RejectedError(Exception):
    """The peer rejected the association (PS3.8 section 9.3.4)."""

    def __init__(self, result: int, source: int, reason: int) -> None:
        super().__init__(_rejection_words(result, source, reason))
        self.result, self.source, self.reason = result, source, reason

    @property
    def lasting(self) -> bool:
        """Whether it is permanent and names a cause that waiting does not mend: a title, application context or protocol.

        "No reason given" is said by peers that shut down or are full, too, with the result "permanent".
        """
        return self.result != _TRANSIENT and (self.source, self.reason) in {(1, 2), (1, 3), (1, 7), (2, 2)}


@dataclass(frozen=True)
class Peer:
    """Whom to call and as whom."""

    host: str
    port: int
    called_ae: str
    calling_ae: str
    tls: ssl.SSLContext | None = None
    server_name: str | None = None


@dataclass(frozen=True, order=True)
class Context:
    """A presentation context that is proposed: one abstract and one transfer syntax."""

    abstract_syntax: str
    transfer_syntax: str


class UpperLayer:
    """A connection, and the association that is requested on it.

    Raises
    ------
    NotAssociatedError
        When the peer cannot be reached, or shows no certificate that we trust.
    """

    def __init__(self, peer: Peer, timeouts: DicomTimeouts) -> None:
        self._timeouts = timeouts
        self.accepted: dict[Context, int] = {}
        self._largest = _LARGEST_SENT
        self._peer, self._socket = peer, _connected(peer, timeouts.connect_seconds)

    def negotiate(self, contexts: Sequence[Context]) -> None:
        """Request the association.

        Parameters
        ----------
        contexts
            What is proposed, 128 at most.

        Raises
        ------
        NotAssociatedError
            When the peer does not answer.
        RejectedError
            When it rejects the association.
        """
        try:
            self._send(_associate_rq(self._peer, contexts))
            self._negotiated(contexts, *self._receive_pdu(time.monotonic() + self._timeouts.negotiation_seconds))
        except PeerGoneError as error:
            self.close()
            raise NotAssociatedError(str(error)) from error
        except BaseException:
            self.close()
            raise

    def send_message(self, context_id: int, command: bytes, data: BinaryIO | None) -> None:
        """Send a command set and the data set that goes with it, from where `data` stands to its end."""
        pieces = [_pdv(context_id, _COMMAND | _LAST, command)]
        if data is not None:
            size = (self._largest - 6) & ~1
            piece = data.read(size)
            while True:
                following = data.read(size)
                pieces.append(_pdv(context_id, 0 if following else _LAST, piece))
                self._send(b"".join(pieces))
                pieces.clear()
                if not following:
                    return
                piece = following
        self._send(b"".join(pieces))

    def receive_message(self, seconds: float) -> tuple[int, bytes, bytes]:
        """The peer's next message: presentation context, command set, data set (empty where there is none).

        Raises
        ------
        PeerGoneError
            When none comes within `seconds`, or the association ends.
        """
        deadline = time.monotonic() + seconds
        command, data = bytearray(), bytearray()
        has_data: bool | None = None
        while True:
            kind, body = self._receive_pdu(deadline)
            self._expect_data(kind)
            for context_id, header, fragment in _pdvs(body):
                target = command if header & _COMMAND else data
                target += fragment
                if len(command) + len(data) > _LARGEST_MESSAGE:
                    self._fail("it sent a message without end")
                if header & _LAST and header & _COMMAND:
                    has_data = _announces_data(command)
                if header & _LAST and (not header & _COMMAND or not has_data):
                    return context_id, bytes(command), bytes(data)

    def has_message(self, seconds: float) -> bool:
        """Wait for the peer to say something; True also when it has ended the connection."""
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        try:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            return bool(poll.poll(1000 * seconds))
        except (OSError, ValueError):
            return True

    def release(self) -> None:
        """End the association in order, or at least the connection."""
        with contextlib.suppress(PeerGoneError):
            self._send(struct.pack(">BxLL", _RELEASE_RQ, 4, 0))
            deadline = time.monotonic() + min(self._timeouts.negotiation_seconds, _RELEASE_SECONDS)
            while self._receive_pdu(deadline)[0] not in {_RELEASE_RP, _ABORT}:
                pass
        self.close()

    def abort(self) -> None:
        """End the association at once, with an A-ABORT where the peer still listens."""
        with contextlib.suppress(OSError):
            self._socket.settimeout(0.5)
            self._socket.sendall(struct.pack(">BxLL", _ABORT, 4, 0))
        self.close()

    def interrupt(self) -> None:
        """Make whatever waits for the peer fail now; from any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _negotiated(self, contexts: Sequence[Context], kind: int, body: bytes) -> None:
        if kind == _ASSOCIATE_RJ and len(body) >= 4:
            raise RejectedError(body[1], body[2], body[3])
        if kind == _ABORT:
            self._fail("it aborted the negotiation")
        if kind != _ASSOCIATE_AC or len(body) < 68:
            self._fail("it answered the association request with something else")
        largest = 0
        try:
            for item, content in _items(body[68:]):
                if item == 0x21 and content[2] == 0:
                    proposed = contexts[(content[0] - 1) // 2]
                    (_, syntax), *_ = _items(content[4:])
                    if syntax.rstrip(b"\x00 ").decode("ascii") == proposed.transfer_syntax:
                        self.accepted[proposed] = content[0]
                elif item == 0x50:
                    lengths = [int.from_bytes(value) for sub, value in _items(content) if sub == 0x51]
                    largest = lengths[0] if lengths else 0
        except (IndexError, ValueError, struct.error):
            self._fail("its answer to the association request is malformed")
        if largest:
            # Less than this no implementation offers; what is smaller would not hold a header.
            self._largest = max(min(largest, _LARGEST_SENT), 128)

    def _expect_data(self, kind: int) -> None:
        if kind == _DATA:
            return
        if kind == _RELEASE_RQ:
            with contextlib.suppress(PeerGoneError):
                self._send(struct.pack(">BxLL", _RELEASE_RP, 4, 0))
            self._fail("it released the association")
        self._fail("it aborted the association" if kind == _ABORT else "it sent a PDU that has no place here")

    def _send(self, data: bytes) -> None:
        try:
            # The limit counts for the whole of it, not for each step.
            self._socket.settimeout(self._timeouts.send_seconds)
            self._socket.sendall(data)
        except TimeoutError:
            self._fail("it did not take what was sent in time")
        except OSError as error:
            self._fail(f"the connection broke while sending ({_words(error)})")

    def _receive_pdu(self, deadline: float) -> tuple[int, bytes]:
        head = self._receive(6, deadline)
        kind, length = struct.unpack(">BxL", head)
        if length > _LARGEST_RECEIVED:
            self._fail("it announced a PDU that is too long")
        return kind, self._receive(length, deadline)

    def _receive(self, size: int, deadline: float) -> bytes:
        received = bytearray()
        try:
            while len(received) < size:
                self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
                step = self._socket.recv(size - len(received))
                if not step:
                    self._fail("it closed the connection")
                received += step
        except TimeoutError:
            self._fail("it did not answer in time")
        except OSError as error:
            self._fail(f"the connection broke ({_words(error)})")
        return bytes(received)

    def _fail(self, words: str) -> NoReturn:
        self.close()
        raise PeerGoneError(words)


def _connected(peer: Peer, seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    try:
        connection = socket.create_connection((peer.host, peer.port), seconds)
    except OSError as error:
        raise NotAssociatedError(f"it cannot be reached ({_words(error)})") from error
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if peer.tls is not None:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            connection = peer.tls.wrap_socket(connection, server_hostname=peer.server_name or peer.host)
    except OSError as error:
        connection.close()
        raise NotAssociatedError(f"no TLS with it ({_words(error)})") from error
    return connection


def _words(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or type(error).__name__).lower().replace("_", " ")
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return error.strerror or type(error).__name__


def _associate_rq(peer: Peer, contexts: Sequence[Context]) -> bytes:
    if not 0 < len(contexts) <= 128:
        raise ValueError(f"{len(contexts)} presentation contexts; an association has 1 to 128")
    items = [_item(0x10, APPLICATION_CONTEXT)]
    for number, context in enumerate(contexts):
        syntaxes = _item(0x30, context.abstract_syntax.encode()) + _item(0x40, context.transfer_syntax.encode())
        items.append(_item(0x20, bytes((2 * number + 1, 0, 0, 0)) + syntaxes))
    user = _item(0x51, struct.pack(">L", _OUR_LARGEST_PDU)) + _item(0x52, IMPLEMENTATION_CLASS_UID.encode())
    items.append(_item(0x50, user + _item(0x55, IMPLEMENTATION_VERSION_NAME.encode())))
    head = struct.pack(">HH16s16s32x", 1, 0, peer.called_ae.encode().ljust(16), peer.calling_ae.encode().ljust(16))
    body = head + b"".join(items)
    return struct.pack(">BxL", _ASSOCIATE_RQ, len(body)) + body


def _item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(content)) + content


def _items(data: bytes) -> list[tuple[int, bytes]]:
    items, offset = [], 0
    while offset < len(data):
        kind, length = struct.unpack_from(">BxH", data, offset)
        if offset + 4 + length > len(data):
            raise ValueError("an item is longer than what holds it")
        items.append((kind, data[offset + 4 : offset + 4 + length]))
        offset += 4 + length
    return items


def _pdv(context_id: int, header: int, fragment: bytes) -> bytes:
    length = len(fragment) + 2
    return struct.pack(">BxLLBB", _DATA, length + 4, length, context_id, header) + fragment


def _pdvs(body: bytes) -> list[tuple[int, int, bytes]]:
    found, offset = [], 0
    while offset < len(body):
        if offset + 6 > len(body):
            raise PeerGoneError("it sent a malformed PDU")
        length, context_id, header = struct.unpack_from(">LBB", body, offset)
        if length < 2 or offset + 4 + length > len(body):
            raise PeerGoneError("it sent a malformed PDU")
        found.append((context_id, header, body[offset + 6 : offset + 4 + length]))
        offset += 4 + length
    return found


def _announces_data(command: bytes | bytearray) -> bool:
    # Command Data Set Type (0000,0800); the command set is implicit VR little endian (PS3.7 section 6.3.1).
    offset = 0
    while offset + 8 <= len(command):
        group, element, length = struct.unpack_from("<HHL", command, offset)
        if (group, element) == (0, 0x0800) and offset + 10 <= len(command):
            return bool(struct.unpack_from("<H", command, offset + 8)[0] != 0x0101)
        offset += 8 + length
    return False


def _rejection_words(result: int, source: int, reason: int) -> str:
    named = {
        (1, 2): "application context not supported",
        (1, 3): "calling AE title not recognised",
        (1, 7): "called AE title not recognised",
        (2, 2): "protocol version not supported",
        (3, 1): "temporary congestion",
        (3, 2): "local limit exceeded",
    }
    kind = {1: "permanently", 2: "for now"}.get(result, "with an unknown result")
    return f"association rejected {kind}: {named.get((source, reason), 'no reason given')}"
