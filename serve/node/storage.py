"""Storage: what may come into the spool, by C-STORE or as a DICOM file over HTTP, and what its sender is told.

Success is answered when the spool has the bytes durably, and never before. A data set is written while it is received; what
is wrong with it is answered with its own status, and leaves nothing behind. Bytes are written as they came.

References: PS3.4 table B.2-1 (statuses of C-STORE).
"""

import logging
import re
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from cxr_ray.errors import CxrRayError
from cxr_ray.inflating import inflated_parts
from cxr_ray.transfer_syntaxes import DEFLATED, TRANSFER_SYNTAXES
from serve.node.arrival import Arrival
from serve.node.data_set_head import class_and_instance
from serve.node.dimse import Answer, Command, CommandField, Tag
from serve.node.file_meta import split_part10
from serve.node.pdu import RoleSelection
from serve.node.quiet_log import QuietLog
from serve.node.receiving_metrics import ReceivingMetrics
from serve.node.services import Context, IncomingMessage, Peer
from serve.node.sop_classes import STORAGE_CLASSES, is_storage
from serve.node.spool import Origin, Spool, Stored, name_of

SUCCESS = 0x0000
# Of a defect of ours: not one of Cxxx, which archives take for a verdict on the instance.
PROCESSING_FAILURE = 0x0110
OUT_OF_RESOURCES = 0xA700
NOT_THE_SOP_CLASS = 0xA900
CANNOT_UNDERSTAND = 0xC000
TOO_LARGE = 0xC101
NO_INSTANCE_UID = 0xC102
INFLATES_TOO_FAR = 0xC103

_UID = re.compile(r"[0-9.]{1,64}")
_LOW_DISK = "disk is low; send it again later"
_NOT_WRITTEN = "cannot be written now; send it again"
_FAILED = "failed here; send it again"

_log = logging.getLogger(__name__)


class StoreRefused(CxrRayError):
    """An instance is not taken; nothing of it stays.

    Attributes
    ----------
    status : int
        Of C-STORE (PS3.4 table B.2-1).
    comment : str
        Why, in words that quote nothing received; at most 64 characters.
    """

    def __init__(self, status: int, comment: str) -> None:
        super().__init__(f"0x{status:04X}: {comment}")
        self.status, self.comment = status, comment


@dataclass(frozen=True)
class StorageRules:
    """What is taken.

    Attributes
    ----------
    max_object_bytes
        Longest data set, as it is sent and as it is read.
    min_free_bytes
        Free disk below which nothing is taken; 0: off.
    accept_all
        Whether other classes and syntaxes are filed unread.
    """

    max_object_bytes: int
    min_free_bytes: int
    accept_all: bool = False


class Storage:
    """The storage service class as its provider.

    Parameters
    ----------
    rules : StorageRules
        What is taken.
    spool : Spool
        Where it goes.
    metrics : ReceivingMetrics
        Where it is counted.
    on_stored : callable, optional
        Called without arguments after each new instance that is to be answered.
    """

    def __init__(
        self, rules: StorageRules, spool: Spool, metrics: ReceivingMetrics, on_stored: Callable[[], None] | None = None
    ) -> None:
        self.rules = rules
        self.spool = spool
        self.metrics = metrics
        self.on_stored = on_stored
        self.warnings = QuietLog(_log)

    def transfer_syntaxes(self, abstract_syntax: str, proposed: tuple[str, ...]) -> tuple[str, ...] | None:
        """See `serve.node.services.Service`."""
        if abstract_syntax in STORAGE_CLASSES:
            return (*TRANSFER_SYNTAXES, *proposed) if self.rules.accept_all else TRANSFER_SYNTAXES
        return proposed if self.rules.accept_all and abstract_syntax and is_storage(abstract_syntax) else None

    def role(self, proposed: RoleSelection) -> RoleSelection | None:
        """See `serve.node.services.Service`: who sends is the SCU."""
        if self.transfer_syntaxes(proposed.sop_class, ()) is None:
            return None
        return RoleSelection(proposed.sop_class, proposed.scu, scp=False)

    def begin(self, command: Command, context: Context, peer: Peer) -> IncomingMessage | None:
        """See `serve.node.services.Service`."""
        return _Instance(self, command, context, peer) if command.field == CommandField.C_STORE else None

    def has_room(self, size: int = 0) -> bool:
        """Whether the disk may take `size` bytes."""
        wanted = self.rules.min_free_bytes
        return wanted == 0 or self.spool.has_room(wanted + size)

    def check_named(self, sop_class: str, sop_instance: str) -> None:
        """Refuse what is not properly named, or finds no room.

        Raises
        ------
        StoreRefused
            With its status.
        """
        if not _UID.fullmatch(sop_instance):
            raise StoreRefused(NO_INSTANCE_UID, "Affected SOP Instance UID is missing or no UID")
        if not sop_class:
            raise StoreRefused(NOT_THE_SOP_CLASS, "Affected SOP Class UID is missing or no UID")
        if not self.has_room():
            raise StoreRefused(OUT_OF_RESOURCES, _LOW_DISK)

    def keep(self, arrival: Arrival, origin: Origin) -> Stored:
        """Check a data set that has arrived whole, and make it durable.

        Raises
        ------
        StoreRefused
            When it is not what it is said to be.
        OSError
            When it could not be made durable.
        """
        if not self.has_room():
            raise StoreRefused(OUT_OF_RESOURCES, _LOW_DISK)
        if origin.sop_class_uid not in STORAGE_CLASSES or origin.transfer_syntax_uid not in TRANSFER_SYNTAXES:
            if not arrival.size:
                raise StoreRefused(CANNOT_UNDERSTAND, "there is no data set")
            stored = self.spool.file_unread(arrival, origin)
        else:
            _check_identity(arrival.head, origin)
            if origin.transfer_syntax_uid == DEFLATED:
                _check_inflated(arrival, self.rules.max_object_bytes)
            stored = self.spool.keep(arrival, origin)
            if stored is Stored.NEW and self.on_stored:
                self.on_stored()
        self.metrics.stored(stored, arrival.size, arrival.sync_seconds)
        return stored

    def refusal(self, error: Exception, address: str) -> StoreRefused:
        """What the sender is told of an error, which is logged unless it is a refusal already.

        Whatever is wrong with an instance or here, its sender is owed a status which says that nothing was promised.
        """
        if isinstance(error, StoreRefused):
            return error
        if isinstance(error, OSError):
            self.warnings.error(address, "instance not stored: %s", error.strerror)
            return StoreRefused(OUT_OF_RESOURCES, _NOT_WRITTEN)
        self.warnings.error(address, "instance not stored: %s", type(error).__name__)
        return StoreRefused(PROCESSING_FAILURE, _FAILED)


def store_part10(storage: Storage, file: bytes, *, sender: str = "", address: str = "") -> tuple[Stored, str]:
    """Store a DICOM file as a C-STORE of it would be stored: same checks, same spool, same durability.

    Parameters
    ----------
    storage : Storage
        As the listener's, or one of its own over the same spool.
    file : bytes
        DICOM Part 10: preamble, file meta information, data set. What the meta information says of a sender is left out.
    sender, address : str
        Who sent it, in words of an AE title, and from where, as a URI.

    Returns
    -------
    Stored
        What the spool found; each kind is durable.
    str
        The spool's name of it.

    Raises
    ------
    StoreRefused
        When it is no DICOM file, of another class or syntax, too large, not what its meta information says, the disk is low
        or fails, or anything else goes wrong here; `status` is that of C-STORE.
    """
    try:
        meta, data_set = split_part10(memoryview(file))
    except ValueError as error:
        raise StoreRefused(CANNOT_UNDERSTAND, str(error)[:64]) from None
    storage.check_named(meta.sop_class_uid, meta.sop_instance_uid)
    offered = storage.transfer_syntaxes(meta.sop_class_uid, (meta.transfer_syntax_uid,))
    if offered is None:
        raise StoreRefused(0x0122, "SOP class is not supported")
    if meta.transfer_syntax_uid not in offered or not meta.transfer_syntax_uid:
        raise StoreRefused(CANNOT_UNDERSTAND, "transfer syntax is not supported")
    if len(data_set) > storage.rules.max_object_bytes:
        raise StoreRefused(TOO_LARGE, f"data set exceeds {storage.rules.max_object_bytes} bytes")
    origin = Origin(meta.sop_class_uid, meta.sop_instance_uid, meta.transfer_syntax_uid, sender, address)
    try:
        with storage.spool.receive(origin) as arrival:
            arrival.add(data_set)
            arrival.flush()
            return storage.keep(arrival, origin), name_of(origin.sop_instance_uid, arrival.digest())
    except Exception as error:  # noqa: BLE001 - as for C-STORE
        raise storage.refusal(error, address) from None


class _Instance:
    """A C-STORE while its data set arrives."""

    def __init__(self, storage: Storage, command: Command, context: Context, peer: Peer) -> None:
        self._storage = storage
        self._peer = peer
        self._began = time.perf_counter()
        self._size = 0
        self._refused: StoreRefused | None = None
        self._arrival: Arrival | None = None
        self._origin = Origin(
            command.uid(Tag.AFFECTED_SOP_CLASS_UID),
            command.uid(Tag.AFFECTED_SOP_INSTANCE_UID),
            context.transfer_syntax,
            peer.calling_ae,
            peer.uri,
            peer.called_ae,
        )
        try:
            storage.check_named(self._origin.sop_class_uid, self._origin.sop_instance_uid)
            if self._origin.sop_class_uid != context.abstract_syntax:
                raise StoreRefused(NOT_THE_SOP_CLASS, "SOP class differs from the presentation context")
            self._arrival = storage.spool.receive(self._origin)
        except Exception as error:  # noqa: BLE001
            self._refuse(error)

    def add(self, fragment: memoryview) -> None:
        self._size += len(fragment)
        if self._arrival is None:
            return
        try:
            if self._size > self._storage.rules.max_object_bytes:
                raise StoreRefused(TOO_LARGE, f"data set exceeds {self._storage.rules.max_object_bytes} bytes")
            self._arrival.add(fragment)
        except Exception as error:  # noqa: BLE001
            self._refuse(error)

    def flush(self) -> None:
        if self._arrival is not None:
            try:
                self._arrival.flush()
            except Exception as error:  # noqa: BLE001
                self._refuse(error)

    def finish(self) -> Answer:
        try:
            if self._arrival is not None:
                stored = self._storage.keep(self._arrival, self._origin)
                if stored is Stored.NEW:
                    self._peer.has_stored(name_of(self._origin.sop_instance_uid, self._arrival.digest()))
        except Exception as error:  # noqa: BLE001
            self._refuse(error)
        answer = Answer(self._refused.status, self._refused.comment) if self._refused else Answer(SUCCESS)
        if self._refused:
            words = f"C-STORE refused with {self._refused}; from %r"
            self._storage.warnings.warning(self._peer.address, words, self._peer.calling_ae)
        self._storage.metrics.answered(answer.status, time.perf_counter() - self._began)
        return answer

    def close(self) -> None:
        if self._arrival is not None:
            self._arrival.close()
            self._arrival = None

    def _refuse(self, error: Exception) -> None:
        self._refused = self._storage.refusal(error, self._peer.address)
        self.close()


def _check_identity(head: bytes, origin: Origin) -> None:
    try:
        sop_class, sop_instance = class_and_instance(head, origin.transfer_syntax_uid)
    except ValueError:
        raise StoreRefused(CANNOT_UNDERSTAND, "data set cannot be read") from None
    if not sop_instance:
        raise StoreRefused(NO_INSTANCE_UID, "SOP Instance UID is missing in the data set")
    if (sop_class, sop_instance) != (origin.sop_class_uid, origin.sop_instance_uid):
        raise StoreRefused(NOT_THE_SOP_CLASS, "SOP class or instance UID differs from the data set")


def _check_inflated(arrival: Arrival, most_bytes: int) -> None:
    """Inflate what has arrived once and keep nothing of it: whoever reads it later may have to hold it whole."""
    inflated = 0
    try:
        with arrival.written() as data_set:
            for part in inflated_parts(data_set):
                inflated += len(part)
                if inflated > most_bytes:
                    raise StoreRefused(INFLATES_TOO_FAR, f"data set inflates to more than {most_bytes} bytes")
    except zlib.error:
        raise StoreRefused(CANNOT_UNDERSTAND, "data set cannot be inflated") from None
