"""The listener: a storage SCP that promises only what lies on disk.

A C-STORE is answered with success when the spool has the instance durably, and with the proper failure otherwise; no
request waits for the model and no pixel is decoded here. Peers are not trusted: an address outside the allowed networks
is dropped before a byte of it is parsed, the memory of an association is bounded, a peer that stops in the middle of a
PDU loses its place, and a path never comes from what was received. Bytes are written as they came.

References: PS3.4 Annex B (storage and its statuses), PS3.8 section 9.3.4 (association rejection).
"""

import ipaddress
import logging
import re
import socket
import socketserver
import threading
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Annotated, Self, cast

import pydicom.config
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import UID
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_STORE_RQ, DIMSEMessage
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.presentation import PresentationContextTuple
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from cxr_ray.errors import CxrRayError
from serve.node.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, Origin, Spool, Stored

VERIFICATION = "1.2.840.10008.1.1"
STORAGE_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.1",  # Computed Radiography
    "1.2.840.10008.5.1.4.1.1.1.1",  # Digital X-Ray, for presentation
    "1.2.840.10008.5.1.4.1.1.1.1.1",  # Digital X-Ray, for processing
    "1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture: real chest files arrive as it
)
# Most wanted first: where a peer offers several in one context, the first of ours that it offers is taken.
TRANSFER_SYNTAXES = (
    "1.2.840.10008.1.2.1",  # explicit VR little endian
    "1.2.840.10008.1.2",  # implicit VR little endian
    "1.2.840.10008.1.2.2",  # explicit VR big endian
    "1.2.840.10008.1.2.1.99",  # deflated
    "1.2.840.10008.1.2.5",  # RLE
    "1.2.840.10008.1.2.4.70",  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.57",  # JPEG lossless, process 14
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.201",  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202",  # HTJ2K lossless RPCL
    "1.2.840.10008.1.2.4.81",  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.203",  # HTJ2K
    "1.2.840.10008.1.2.4.50",  # JPEG baseline, 8 bits
    "1.2.840.10008.1.2.4.51",  # JPEG extended, 12 bits
)

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
NOT_THE_SOP_CLASS = 0xA900
CANNOT_UNDERSTAND = 0xC000
TOO_LARGE = 0xC101
NO_INSTANCE_UID = 0xC102

_SOP_CLASS_UID, _SOP_INSTANCE_UID = BaseTag(0x00080016), BaseTag(0x00080018)
_NO_UID = "0.0"
_LARGEST_COMMAND = 64 * 1024
_LARGEST_NEGOTIATION = 1024 * 1024
_HEADER_BYTES = 1024 * 1024
_AETitle = Annotated[str, StringConstraints(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]

_log = logging.getLogger(__name__)


class ListenerSettings(BaseModel):
    """What the listener accepts, from whom and how much."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ae_title: _AETitle = Field("CXRRAY", description="Called AE title, 1 to 16 characters; peers must use it.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 or :: for every interface.")
    port: int = Field(11112, ge=0, le=65535, description="TCP port; 0 picks a free one.")
    allowed_calling: tuple[_AETitle, ...] = Field((), description="Calling AE titles let in; empty: any.")
    allowed_networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = Field(
        (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")),
        description="Networks let in, CIDR; 0.0.0.0/0 and ::/0: any.",
    )
    max_associations: int = Field(10, ge=1, description="Associations at once; each may hold max_object_bytes.")
    max_pdu: int = Field(131072, ge=4096, le=1048576, description="Largest PDU to receive, bytes; cannot be off.")
    max_object_bytes: int = Field(
        134217728, ge=1024, description="Largest data set, bytes; held in memory while it arrives, cannot be off."
    )
    min_free_bytes: int = Field(
        2147483648, ge=0, description="Free bytes on the spool's disk below which nothing is accepted; 0: off."
    )
    acse_timeout_seconds: float = Field(30, gt=0, description="Patience for association messages; cannot be off.")
    dimse_timeout_seconds: float = Field(30, gt=0, description="Patience for DIMSE messages; cannot be off.")
    network_timeout_seconds: float = Field(
        60, gt=0, description="Patience with a silent peer, and with one PDU from start to end; cannot be off."
    )
    drain_seconds: float = Field(
        10, ge=0, description="On stop, time for running associations to end before they are aborted; 0: at once."
    )


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
    """

    def __init__(self, settings: ListenerSettings, spool: Spool, on_stored: Callable[[], None] | None = None) -> None:
        self._settings = settings
        self._spool = spool
        self._on_stored = on_stored
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """TCP port; the one that was picked when the settings say 0."""
        return int(self._server.server_address[1]) if self._server else self._settings.port

    def start(self) -> None:
        """Listen, in threads of its own.

        Raises
        ------
        CxrRayError
            When the address cannot be taken.
        """
        _keep_identities_out_of_logs()
        settings = self._settings
        ae = AE(settings.ae_title)
        ae.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
        ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        ae.require_called_aet = True
        ae.require_calling_aet = list(settings.allowed_calling)
        ae.maximum_associations = settings.max_associations
        ae.maximum_pdu_size = settings.max_pdu
        ae.acse_timeout = settings.acse_timeout_seconds
        ae.dimse_timeout = settings.dimse_timeout_seconds
        ae.network_timeout = settings.network_timeout_seconds
        ae.add_supported_context(VERIFICATION, list(TRANSFER_SYNTAXES[:3]))
        for sop_class in STORAGE_CLASSES:
            ae.add_supported_context(sop_class, list(TRANSFER_SYNTAXES))
        try:
            self._server = ae.make_server(
                (settings.host, settings.port),
                evt_handlers=[
                    (evt.EVT_REQUESTED, self._requested),
                    (evt.EVT_REJECTED, _log_rejection),
                    (evt.EVT_DIMSE_RECV, _mark_missing_uid),
                    (evt.EVT_C_STORE, self._store),
                ],
                server_class=_Server,
                settings=settings,
            )
        except (OSError, OverflowError) as error:
            raise CxrRayError(
                f"listener {settings.host}:{settings.port}: {error}; name a free port on an address of this machine"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="listener", daemon=True)
        self._thread.start()
        _log.info("listening as %s on %s port %d", settings.ae_title, settings.host, self.port)

    def stop(self) -> None:
        """Take no new associations, let the running ones end, abort what is left; does nothing when stopped."""
        if not self._server:
            return
        server, self._server = self._server, None
        server.shutdown()
        patience = time.monotonic() + self._settings.drain_seconds
        while server.active_associations and time.monotonic() < patience:
            time.sleep(0.02)
        for association in server.active_associations:
            association.abort()
        if self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _requested(self, event: evt.Event) -> None:
        if not self._room_for(0):
            _log.warning("the spool's disk is below %d free bytes", self._settings.min_free_bytes)
            # Rejected-transient, provider (presentation related), temporary congestion: PS3.8 table 9-21.
            event.assoc.acse.send_reject(0x02, 0x03, 0x01)
            _log_rejection(event)
            # Waits until the peer has its answer; the connection would be closed on it otherwise.
            event.assoc.kill()

    def _store(self, event: evt.Event) -> Dataset:
        answer = Dataset()
        try:
            self._keep(cast(C_STORE, event.request), event.context, event.assoc.requestor.ae_title)
            answer.Status = SUCCESS
        except _RefusedError as refusal:
            answer.Status, answer.ErrorComment = refusal.status, refusal.comment
        except OSError as error:
            _log.error("instance not stored: %s", error.strerror)
            answer.Status, answer.ErrorComment = OUT_OF_RESOURCES, "cannot be written now; send it again"
        # Whatever is wrong with it or with us, the peer is owed a status that says that nothing was promised.
        except Exception as error:  # noqa: BLE001
            _log.error("instance not stored: %s", type(error).__name__)
            answer.Status, answer.ErrorComment = CANNOT_UNDERSTAND, "cannot be processed"
        if answer.Status != SUCCESS:
            _log.warning("C-STORE refused with 0x%04X: %s", answer.Status, answer.ErrorComment)
        if event.request.AffectedSOPInstanceUID == _NO_UID:
            answer.AffectedSOPInstanceUID = None
        return answer

    def _keep(self, request: C_STORE, context: PresentationContextTuple, calling_ae: str) -> None:
        received = cast(_BoundedBytes, request.DataSet)
        if received.announced > self._settings.max_object_bytes:
            raise _RefusedError(TOO_LARGE, f"data set exceeds {self._settings.max_object_bytes} bytes")
        if not self._room_for(received.announced):
            raise _RefusedError(OUT_OF_RESOURCES, "disk is low; send it again later")
        sop_class, sop_instance = str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID)
        if sop_instance == _NO_UID or not re.fullmatch(r"[0-9.]{1,64}", sop_instance):
            raise _RefusedError(NO_INSTANCE_UID, "Affected SOP Instance UID is missing or no UID")
        syntax = UID(context.transfer_syntax)
        inside_class, inside_instance = _identity(received, syntax)
        if not inside_instance:
            raise _RefusedError(NO_INSTANCE_UID, "SOP Instance UID is missing in the data set")
        if inside_instance != sop_instance or not inside_class == sop_class == context.abstract_syntax:
            raise _RefusedError(NOT_THE_SOP_CLASS, "SOP class or instance UID differs from the data set")
        stored = self._spool.store(received.getbuffer(), Origin(sop_class, sop_instance, str(syntax), calling_ae))
        if self._on_stored and stored is Stored.NEW:
            self._on_stored()

    def _room_for(self, size: int) -> bool:
        wanted = self._settings.min_free_bytes
        return wanted == 0 or self._spool.has_room(wanted + size)


class _RefusedError(Exception):
    def __init__(self, status: int, comment: str) -> None:
        super().__init__(comment)
        self.status, self.comment = status, comment


def _identity(received: "_BoundedBytes", syntax: UID) -> tuple[str, str]:
    head: BytesIO = received
    head.seek(0)
    try:
        if syntax.is_deflated:
            head = BytesIO(zlib.decompressobj(-zlib.MAX_WBITS).decompress(received.getbuffer(), _HEADER_BYTES))
        data_set = read_dataset(
            head,
            syntax.is_implicit_VR,
            syntax.is_little_endian,
            stop_when=lambda tag, _representation, _length: tag > _SOP_INSTANCE_UID,
        )
        uids = [data_set.get_item(tag).value if tag in data_set else b"" for tag in (_SOP_CLASS_UID, _SOP_INSTANCE_UID)]
        sop_class, sop_instance = (uid.decode("ascii").rstrip("\x00 ") for uid in uids)
    # A peer chose these bytes, and a parser has no closed list of ways to fail on them.
    except Exception as error:
        raise _RefusedError(CANNOT_UNDERSTAND, "data set cannot be read") from error
    return sop_class, sop_instance


def _mark_missing_uid(event: evt.Event) -> None:
    # The library drops a request without this UID and answers nothing; marked, it reaches `_store` and is refused.
    command = event.message.command_set
    if isinstance(event.message, C_STORE_RQ) and not command.get("AffectedSOPInstanceUID"):
        command.AffectedSOPInstanceUID = _NO_UID


def _log_rejection(event: evt.Event) -> None:
    asked = event.assoc.requestor.primitive
    _log.warning("association rejected: calling %r, called %r", asked.calling_ae_title, asked.called_ae_title)


class _BoundedBytes(BytesIO):
    """Takes any number of bytes, counts them and keeps none once they are more than the limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self.announced = 0

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.announced += len(data)
        if self.announced <= self._limit:
            return super().write(data)
        self.seek(0)
        self.truncate()
        return len(data)


class _BoundedDIMSE(DIMSEServiceProvider):
    """Assembles messages in bounded buffers."""

    def __init__(self, assoc: Association, limit: int) -> None:
        super().__init__(assoc)
        self._limit = limit
        self.message: DIMSEMessage | None = None

    def receive_primitive(self, primitive: P_DATA) -> None:
        if self.msg_queue.qsize() > 1:
            # One operation at a time was negotiated; a peer that does not wait could fill the memory.
            self.dul.event_queue.put("Evt19")
            return
        if self.message is None:
            message = DIMSEMessage()
            message.encoded_command_set = _BoundedBytes(_LARGEST_COMMAND)
            message.data_set = _BoundedBytes(self._limit)
            self.message = message
        super().receive_primitive(primitive)


class _BoundedReceive:
    """Reads a PDU of at most a known size within a known time; takes the place of `AssociationSocket.recv`."""

    def __init__(self, connection: socket.socket, largest: int, patience: float) -> None:
        self._connection = connection
        self._largest = largest
        self._patience = patience

    def __call__(self, size: int) -> bytearray:
        if size > self._largest:
            raise OSError(f"the peer announces a PDU of {size} bytes")
        deadline = time.monotonic() + self._patience
        received, count = bytearray(size), 0
        with memoryview(received) as view:
            while count < size:
                self._connection.settimeout(max(deadline - time.monotonic(), 0.001))
                step = self._connection.recv_into(view[count:])
                if not step:
                    break
                count += step
        self._connection.settimeout(self._patience)
        del received[count:]
        return received


class _Handler(RequestHandler):
    server: "_Server"

    def _create_association(self) -> Association:
        settings = self.server.settings
        association = super()._create_association()
        association.dimse = _BoundedDIMSE(association, settings.max_object_bytes)
        association.dul.socket.recv = _BoundedReceive(
            self.request, max(settings.max_pdu, _LARGEST_NEGOTIATION), settings.network_timeout_seconds
        )
        return association


class _Server(ThreadedAssociationServer):
    request_queue_size = 64

    def __init__(self, *arguments: object, settings: ListenerSettings, **options: object) -> None:
        self.settings = settings
        super().__init__(*arguments, request_handler=_Handler, **options)

    def verify_request(self, request: socket.socket, client_address: tuple[str, int]) -> bool:
        address = ipaddress.ip_address(client_address[0].partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        if not any(address in network for network in self.settings.allowed_networks):
            _log.warning("connection dropped: %s is in no allowed network", address)
            return False
        # The library counts associations when they are requested; a connection that stays silent costs as much.
        if len(self.active_associations) >= 2 * self.settings.max_associations + 2:
            _log.warning("connection dropped: too many at once")
            return False
        # DCMTK and others send small PDUs and wait: Nagle's algorithm adds 40 ms to each.
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return True

    def shutdown(self) -> None:
        # The library's version takes itself off a list that only its own start adds to.
        socketserver.BaseServer.shutdown(self)
        self.server_close()


def _keep_identities_out_of_logs() -> None:
    _config.LOG_HANDLER_LEVEL = "none"
    _config.LOG_REQUEST_IDENTIFIERS = False
    _config.LOG_RESPONSE_IDENTIFIERS = False
    # A value that is not checked on reading is not quoted in a warning.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    # Its messages and tracebacks quote what a peer sent; what an operator needs of them is logged here.
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
