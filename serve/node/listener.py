"""The listener: a storage SCP that promises only what lies on disk.

A C-STORE is answered with success when the spool has the instance durably, and with the proper failure otherwise; no
request waits for the model and no pixel is decoded here. Peers are not trusted: an address outside the allowed networks
is dropped before a byte of it is parsed, every wait and every length has a limit, and a path never comes from what was
received. One thread accepts connections and does nothing else; each connection has a thread, TLS handshake included.

References: PS3.4 Annex B (storage and its statuses), PS3.8 section 9 (upper layer).
"""

import errno
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Self

import pydicom.config
from prometheus_client import CollectorRegistry

from cxr_ray.errors import CxrRayError
from serve.logs import raised_at
from serve.node.association import Admission, Association, Outcome
from serve.node.commitment_report import CommitmentReports, Commitments
from serve.node.connection import Connection, ConnectionGone, WrongTransport
from serve.node.connections import Connections
from serve.node.listener_settings import ListenerSettings
from serve.node.quiet_log import QuietLog
from serve.node.receiving_metrics import MetricsServer, ReceivingMetrics
from serve.node.services import Services, Verification
from serve.node.spool import Spool
from serve.node.storage import Storage, StorageRules
from serve.tls import server_context

__all__ = ["Listener", "ListenerSettings"]

_BACKLOG = 512
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_CLOSING_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Listener:
    """Verification and storage SCP that writes into a spool.

    Parameters
    ----------
    settings : ListenerSettings
        Whom and what to accept.
    spool : Spool
        Where instances go.
    on_stored : callable, optional
        Called without arguments after each newly stored instance, e.g. ``Dispatcher.notify``; must return at once.
    on_association_end : callable, optional
        Called when an association ends, however it does, with the calling AE title, the peer's address, and the spool's
        names of the instances that it newly stored; must return soon.
    commitments : Commitments, optional
        Told what an archive reports of storage commitment; without it, the service class is not accepted.
    registry : prometheus_client.CollectorRegistry, optional
        Where to count; served on `metrics_port`.
    """

    def __init__(
        self,
        settings: ListenerSettings,
        spool: Spool,
        on_stored: Callable[[], None] | None = None,
        on_association_end: Callable[[str, str, list[str]], None] | None = None,
        commitments: Commitments | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._settings = settings
        self._on_association_end = on_association_end
        self._registry = registry or CollectorRegistry()
        self._metrics = ReceivingMetrics(self._registry)
        rules = StorageRules(settings.max_object_bytes, settings.min_free_bytes, settings.accept_all)
        self._storage = Storage(rules, spool, self._metrics, on_stored)
        reports = [CommitmentReports(commitments)] if commitments else []
        self._services = Services(Verification(), self._storage, *reports)
        self._connections = Connections(settings.max_connections, settings.max_associations)
        self._metrics.watch(spool, lambda: self._connections.associations, lambda: self._connections.pending)
        self._senders = spool.senders
        self._warnings = QuietLog(_log)
        self._tls: ssl.SSLContext | None = None
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._metrics_server: MetricsServer | None = None
        self._stopping = threading.Event()

    @property
    def port(self) -> int:
        """TCP port; the one that was picked when the settings say 0."""
        return int(self._socket.getsockname()[1]) if self._socket else self._settings.port

    @property
    def metrics_port(self) -> int | None:
        """TCP port of the metrics; None where they are not shown."""
        return self._metrics_server.port if self._metrics_server else None

    @property
    def storage(self) -> Storage:
        """What stores, for who receives by other ways too."""
        return self._storage

    def start(self) -> None:
        """Listen, in threads of its own.

        Raises
        ------
        UsageError
            When the files for TLS are not what they should be.
        CxrRayError
            When an address cannot be taken.
        """
        settings = self._settings
        # A value that is not checked on reading is not quoted in a warning.
        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
        if settings.tls_certificate:
            self._tls = server_context(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
        self._stopping.clear()
        try:
            self._socket = _listening_socket(settings)
        except (OSError, OverflowError) as error:
            raise CxrRayError(
                f"listener {settings.host}:{settings.port}: {error}; name a free port on an address of this machine"
            ) from error
        if settings.metrics_port is not None:
            try:
                self._metrics_server = MetricsServer(self._registry, settings.metrics_host, settings.metrics_port)
            except CxrRayError:
                self._socket.close()
                self._socket = None
                raise
        self._thread = threading.Thread(target=self._accept, args=(self._socket,), name="listener", daemon=True)
        self._thread.start()
        how = "TLS" if self._tls else "plain text"
        _log.info("listening as %s on %s port %d, %s", settings.ae_title, settings.host, self.port, how)

    def stop(self) -> None:
        """Take no new associations, let the running ones end, abort what is left; does nothing when stopped."""
        if not self._socket:
            return
        self._stopping.set()
        listening, self._socket = self._socket, None
        # Wakes the thread that accepts.
        listening.shutdown(socket.SHUT_RDWR)
        if self._thread:
            self._thread.join()
        listening.close()
        self._connections.interrupt_pending()
        _wait_until(lambda: not self._connections.associations, self._settings.drain_seconds)
        self._connections.interrupt_associations()
        _wait_until(lambda: not self._connections.associations, _CLOSING_SECONDS)
        self._connections.interrupt_pending()
        _wait_until(lambda: not self._connections.pending, _CLOSING_SECONDS)
        if self._metrics_server:
            self._metrics_server.stop()
            self._metrics_server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _accept(self, listening: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                accepted, address = listening.accept()
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._warnings.warning("listener", "no connection can be accepted: %s", error.strerror)
                    self._stopping.wait(0.1)
                continue
            try:
                self._admit(accepted, address)
            except (OSError, RuntimeError) as error:
                # A peer that is gone already, or no thread for it.
                self._warnings.warning("listener", "connection dropped: %s", type(error).__name__)
                accepted.close()

    def _admit(self, accepted: socket.socket, peer: tuple[str, int]) -> None:
        address = ipaddress.ip_address(peer[0].partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        if not any(address in network for network in self._settings.allowed_networks):
            self._warnings.warning(str(address), "connection dropped: is in no allowed network")
            self._metrics.ended(Outcome.ADDRESS)
            accepted.close()
            return
        connection = Connection(accepted, str(address), peer[1])
        if displaced := self._connections.admit(connection):
            self._warnings.warning(displaced.address, "connection dropped: too many at once, and the oldest")
        try:
            threading.Thread(target=self._attend, args=(connection,), name=f"peer-{peer[1]}", daemon=True).start()
        except RuntimeError:
            self._connections.leave(connection)
            raise

    def _attend(self, connection: Connection) -> None:
        outcome = Outcome.FAILED
        try:
            outcome = self._associate(connection)
        except WrongTransport:
            outcome = Outcome.WRONG_TRANSPORT
            spoken, wanted = ("plain text", "TLS") if self._tls else ("TLS", "plain text")
            self._warnings.warning(connection.address, f"connection dropped: it speaks {spoken}, this port {wanted}")
        except ConnectionGone:
            outcome = Outcome.NEVER_ASKED
        except Exception as error:  # noqa: BLE001 - one peer's association, whatever ended it, is nobody else's
            self._warnings.warning(
                connection.address, "association failed: %s at %s", type(error).__name__, raised_at(error)[-1:]
            )
        finally:
            self._connections.leave(connection)
            connection.close()
            self._metrics.ended(outcome)

    def _associate(self, connection: Connection) -> Outcome:
        if self._tls:
            connection.secure(self._tls, self._settings.acse_timeout_seconds)
        admission = Admission(
            has_room=self._storage.has_room,
            establish=lambda: self._connections.establish(connection),
            stopping=self._stopping.is_set,
        )
        sender = self._senders.begin()
        association = Association(connection, self._settings, self._services, admission, sender.add)
        try:
            outcome = association.run()
        finally:
            sender.close()
            self._connections.retire(connection)
            if association.established and self._on_association_end:
                peer = association.peer
                self._on_association_end(peer.calling_ae, peer.address, list(peer.names))
        self._tell(outcome, association)
        association.linger()
        return outcome

    def _tell(self, outcome: Outcome, association: Association) -> None:
        peer = association.peer
        if outcome in (Outcome.REJECTED, Outcome.REJECTED_BUSY, Outcome.REJECTED_DISK):
            words = f"association {outcome}: calling %r, called %r"
            self._warnings.warning(peer.address, words, peer.calling_ae, peer.called_ae)
        elif outcome is Outcome.PROTOCOL_ERROR:
            self._warnings.warning(peer.address, f"association aborted: {association.broken}")
        elif outcome is Outcome.TIMED_OUT:
            self._warnings.warning(peer.address, "association aborted: the peer fell silent; calling %r", peer.calling_ae)


def _listening_socket(settings: ListenerSettings) -> socket.socket:
    family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if settings.share_port:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6 and settings.host == "::":
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def _wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    patience = time.monotonic() + seconds
    while not is_so() and time.monotonic() < patience:
        time.sleep(0.02)
