"""A connection from a peer that is not trusted: PDUs within bounds of size and time, over TCP or TLS.

Every wait ends. A PDU has a deadline from its first byte to its last, so that bytes which drip in do not renew it. What is
received lies in one buffer, which is as large as a PDU may be and no larger, and is handed out as views: nothing is copied
between the network and the file.
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Callable

from serve.node.file_meta import presentation_address
from serve.node.pdu import HEADER

_FIRST_BUFFER = 4 * 1024
_DATA_BUFFER = 512 * 1024
_LINGER_BYTES = 1 << 20


class ConnectionGone(Exception):
    """There is nothing more to come: the peer closed or fell silent."""

    def __init__(self, *, timed_out: bool) -> None:
        super().__init__("the peer fell silent" if timed_out else "the connection ended")
        self.timed_out = timed_out


class WrongTransport(Exception):
    """The peer speaks TLS where plain text is spoken, or the other way round."""


class Connection:
    """One accepted connection; its methods are for one thread, but for `interrupt`.

    Parameters
    ----------
    accepted : socket.socket
        Is closed by `close`.
    address : str
        The peer's address, without port.
    port : int
        The peer's port.
    """

    def __init__(self, accepted: socket.socket, address: str, port: int) -> None:
        self.address, self.port = address, port
        self.received = 0
        self._socket = accepted
        self._interrupted = False
        self._buffer = memoryview(bytearray(_FIRST_BUFFER))
        self._start = self._end = 0
        self._pdu_began = 0.0
        # DCMTK and others send small PDUs and wait: Nagle's algorithm adds 40 ms to each.
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def uri(self) -> str:
        """Where the peer is, as PS3.10 section 7.1 has presentation addresses."""
        return presentation_address("dicom", self.address, self.port)

    def secure(self, context: ssl.SSLContext, seconds: float) -> None:
        """Go over to TLS.

        Raises
        ------
        WrongTransport
            When the peer does not speak it.
        ConnectionGone
            When the handshake fails or takes longer than `seconds`.
        """
        self._socket.settimeout(seconds)
        try:
            # Without its handshake first, so that an interruption from outside reaches the new object.
            secured = context.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
            self._socket = secured
            secured.do_handshake()
        except TimeoutError:
            raise ConnectionGone(timed_out=True) from None
        except ssl.SSLError as error:
            if error.reason in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "UNSUPPORTED_PROTOCOL"}:
                raise WrongTransport from None
            raise ConnectionGone(timed_out=False) from None
        except (OSError, ValueError):
            raise ConnectionGone(timed_out=False) from None

    def expect_data(self, largest_pdu: int) -> None:
        """Make room for many PDUs at once: an association begins."""
        grown = memoryview(bytearray(max(_DATA_BUFFER, 2 * (largest_pdu + HEADER.size))))
        left = self._end - self._start
        grown[:left] = self._buffer[self._start : self._end]
        self._buffer, self._start, self._end = grown, 0, left

    def pdus(self, check: Callable[[int, int], None], *, silence: float, whole: float) -> list[tuple[int, memoryview]]:
        """Return the next PDUs as type and what follows the header, at least one; valid until the next call.

        Parameters
        ----------
        check
            Told type and length of each PDU before anything is reserved for it; raises what it does not like.
        silence, whole
            Seconds until a PDU begins, and from its first byte to its last.

        Raises
        ------
        ConnectionGone
            When nothing more comes.
        """
        found: list[tuple[int, memoryview]] = []
        self._compact()
        deadline = time.monotonic() + silence
        self._take(found, check)
        while not found:
            self._receive(deadline if self._end == self._start else self._pdu_began + whole)
            self._take(found, check)
        return found

    def send(self, data: bytes, seconds: float) -> None:
        """Send all of it.

        Raises
        ------
        ConnectionGone
            When the peer does not take it within `seconds`.
        """
        self._socket.settimeout(seconds)
        try:
            self._socket.sendall(data)
        except TimeoutError:
            raise ConnectionGone(timed_out=True) from None
        except OSError:
            raise ConnectionGone(timed_out=False) from None

    def linger(self, seconds: float) -> None:
        """Let the peer read what was sent: a close with unread bytes would take it from under its hands."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError, ValueError):
            socket.socket.shutdown(self._socket, socket.SHUT_WR)
            room, taken = memoryview(bytearray(_FIRST_BUFFER)), 0
            while taken < _LINGER_BYTES and (left := deadline - time.monotonic()) > 0:
                self._socket.settimeout(left)
                # Past TLS, where there is one: what it says does not matter any more.
                count = socket.socket.recv_into(self._socket, room)
                if not count:
                    return
                taken += count

    def interrupt(self) -> None:
        """Wake whoever waits for the peer, from any thread: it finds the connection ended, and can still send."""
        self._interrupted = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RD)

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def _compact(self) -> None:
        left = self._end - self._start
        if self._start and left:
            self._buffer[:left] = self._buffer[self._start : self._end]
        self._start, self._end = 0, left

    def _take(self, found: list[tuple[int, memoryview]], check: Callable[[int, int], None]) -> None:
        while self._end - self._start >= HEADER.size:
            kind, length = HEADER.unpack_from(self._buffer, self._start)
            check(kind, length)
            stop = self._start + HEADER.size + length
            if stop > self._end:
                self._make_room(HEADER.size + length)
                break
            found.append((kind, self._buffer[self._start + HEADER.size : stop]))
            self._start = stop
        if found:
            self._pdu_began = time.monotonic()

    def _make_room(self, size: int) -> None:
        """Only while a request is awaited: the buffer of an association holds every PDU."""
        if size > len(self._buffer) - self._start and not self._start:
            grown = memoryview(bytearray(size))
            grown[: self._end] = self._buffer[: self._end]
            self._buffer = grown

    def _receive(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if self._interrupted or left <= 0:
            raise ConnectionGone(timed_out=not self._interrupted)
        if self._end == self._start:
            self._pdu_began = 0.0
        self._socket.settimeout(left)
        try:
            count = self._socket.recv_into(self._buffer[self._end :])
        except TimeoutError:
            raise ConnectionGone(timed_out=True) from None
        except (OSError, ValueError):
            raise ConnectionGone(timed_out=False) from None
        if not count:
            raise ConnectionGone(timed_out=False)
        self._pdu_began = self._pdu_began or time.monotonic()
        self.received += count
        self._end += count
