"""Results to a storage SCP: one association for as long as there is something to send, resumed where it broke.

What lies in the outbox in explicit VR little endian is sent as its bytes are; to a peer that takes implicit VR alone it is
encoded anew. Each instance that the peer takes is confirmed at once: after a break the rest is sent, no more.
"""

import ssl
import struct
from collections.abc import Callable, Set
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast

from serve.node.destinations import DicomDestination, DicomTls, SenderDestination
from serve.node.parcels import DICOM, Item, Parcel
from serve.node.senders.association import Association, EventReport
from serve.node.senders.sender import Delivered, Outcome, Permanent, Transient
from serve.node.senders.statuses import storage_outcome
from serve.node.senders.tls import client_context
from serve.node.senders.upper_layer import Context, NotAssociatedError, Peer, PeerGoneError, RejectedError

STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"
STORAGE_COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"
_EXPLICIT, _IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
_MOST_CONTEXTS = 128


@dataclass(frozen=True)
class Instance:
    """A DICOM file as far as sending needs it; `offset` is where its data set begins."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    offset: int

    def contexts(self) -> list[Context]:
        """Presentation contexts that can carry it, the best first (PS3.5 section 10.1 wants implicit VR offered)."""
        syntaxes = [self.transfer_syntax_uid, *([_IMPLICIT] if self.transfer_syntax_uid == _EXPLICIT else [])]
        return [Context(self.sop_class_uid, syntax) for syntax in syntaxes]


class DicomSender:
    """Sends the DICOM items of parcels by C-STORE, and asks for storage commitment.

    Parameters
    ----------
    destination
        A storage SCP, or whoever sent the study.
    event_report
        Takes reports on storage commitment that come on our association.
    outstanding
        Whether such reports are waited for.

    Raises
    ------
    UsageError
        When a certificate that the settings name cannot be read.
    """

    def __init__(
        self,
        destination: DicomDestination | SenderDestination,
        event_report: EventReport | None = None,
        outstanding: Callable[[], bool] = lambda: False,
    ) -> None:
        self._destination = destination
        self._event_report, self._outstanding = event_report, outstanding
        self._tls = _tls_context(destination.name, destination.tls)
        self._commitment = destination.commitment if isinstance(destination, DicomDestination) else None
        self._contexts: set[Context] = set()
        if self._commitment is not None:
            self._contexts |= {Context(STORAGE_COMMITMENT, syntax) for syntax in (_EXPLICIT, _IMPLICIT)}
        self._association: Association | None = None
        self._aborted = False

    def send(self, parcel: Parcel, confirmed: Set[str], confirm: Callable[[str], None]) -> Outcome:
        """See `Sender`."""
        items = parcel.of_type(DICOM)
        if not items:
            return Permanent("it holds nothing that a DICOM destination takes")
        try:
            instances = {item.name: read_instance(item) for item in items if item.name not in confirmed}
        except ValueError as error:
            return Permanent(str(error))
        if not instances:
            return Delivered("0x0000")
        return self._tried(parcel, list(instances.values()), lambda association: _store_all(association, instances, confirm))

    def request_commitment(self, parcel: Parcel, transaction_uid: str) -> Outcome:
        """See `CommittingSender`."""
        references = list(self.instances(parcel).values())
        return self._tried(parcel, [], lambda association: _ask(association, transaction_uid, references))

    def instances(self, parcel: Parcel) -> dict[str, tuple[str, str]]:
        """See `CommittingSender`."""
        read = {item.name: read_instance(item) for item in parcel.of_type(DICOM)}
        return {name: (instance.sop_class_uid, instance.sop_instance_uid) for name, instance in read.items()}

    def rest(self, interrupted: Callable[[], bool]) -> None:
        """See `Sender`; with storage commitment, a report that is due may still come on the open association."""
        association = self._association
        if association is None:
            return
        try:
            if self._commitment is not None:
                association.linger(self._commitment.linger_seconds, lambda: interrupted() or not self._outstanding())
                if interrupted() and self._outstanding() and not self._aborted:
                    # There is something to do meanwhile; the report may come on this association still.
                    return
            association.release()
        except PeerGoneError:
            association.abort()
        self._association = None

    def abort(self) -> None:
        """See `Sender`."""
        self._aborted = True
        if association := self._association:
            association.interrupt()

    def _tried(self, parcel: Parcel, instances: list[Instance], work: Callable[[Association], Outcome]) -> Outcome:
        try:
            association = self._associated(parcel, instances)
            if isinstance(association, Permanent):
                return association
        except RejectedError as error:
            return Permanent(str(error)) if error.lasting else Transient(str(error), whole_destination=True)
        except NotAssociatedError as error:
            return Transient(f"no association: {error}", whole_destination=True)
        try:
            return work(association)
        except PeerGoneError as error:
            self._drop()
            return Transient(f"association lost: {error}")
        except BaseException:
            self._drop()
            raise

    def _associated(self, parcel: Parcel, instances: list[Instance]) -> Association | Permanent:
        peer = self._peer(parcel)
        if isinstance(peer, Permanent):
            return peer
        wanted = {context for instance in instances for context in instance.contexts()}
        open_now = self._association
        if open_now is not None and open_now.peer == peer and wanted <= open_now.proposed:
            return open_now
        if open_now is not None:
            self._association = None
            open_now.release()
        if len(self._contexts | wanted) > _MOST_CONTEXTS:
            self._contexts = {context for context in self._contexts if context.abstract_syntax == STORAGE_COMMITMENT}
        self._contexts |= wanted
        self._association = made = Association(peer, self._contexts, self._destination.timeouts, self._event_report)
        if self._aborted:
            made.interrupt()
        try:
            made.request()
        except BaseException:
            self._association = None
            raise
        return made

    def _peer(self, parcel: Parcel) -> Peer | Permanent:
        destination, title = self._destination, self._destination.calling_ae
        name = destination.tls.server_name if destination.tls else None
        if isinstance(destination, DicomDestination):
            return Peer(destination.host, destination.port, destination.called_ae, title, self._tls, name)
        if parcel.origin is None or not parcel.origin.calling_ae:
            return Permanent("who sent the study is not known")
        found = destination.port_of(parcel.origin.calling_ae, parcel.origin.address)
        if found is None:
            return Permanent(f"the settings name no port for {parcel.origin.calling_ae!r}, which sent the study")
        return Peer(*found, parcel.origin.calling_ae, title, self._tls, name)

    def _drop(self) -> None:
        association, self._association = self._association, None
        if association is not None:
            association.abort()


def read_instance(item: Item) -> Instance:
    """Read what a DICOM file says of itself.

    Raises
    ------
    ValueError
        When it is no DICOM file with class, instance and transfer syntax.
    OSError
        When it cannot be read.
    """
    from pydicom.filereader import read_file_meta_info  # noqa: PLC0415 - commands that list need not wait

    path = cast(Path, item.content)
    with path.open("rb") as file:
        head = file.read(144)
    # PS3.10 section 7.1: the group length comes first and says where the data set begins.
    if len(head) < 144 or head[128:132] != b"DICM" or head[132:140] != b"\x02\x00\x00\x00UL\x04\x00":
        raise ValueError(f"{item.name} is no DICOM file")
    offset = 144 + int(struct.unpack_from("<L", head, 140)[0])
    try:
        meta = read_file_meta_info(path)
        uids = [str(meta[tag].value) for tag in (0x00020002, 0x00020003, 0x00020010)]
    except OSError:
        raise
    # It was written by us; whatever a parser finds wrong with it, it cannot be sent.
    except Exception as error:
        raise ValueError(f"{item.name} is no DICOM file") from error
    if not all(uids):
        raise ValueError(f"{item.name} does not say what it is")
    return Instance(path, uids[0], uids[1], uids[2], offset)


def _store_all(association: Association, instances: dict[str, Instance], confirm: Callable[[str], None]) -> Outcome:
    """Send what can be sent; what is refused for good does not keep the rest from the reader."""
    refused: Permanent | None = None
    last: Outcome = Delivered()
    for name, instance in instances.items():
        last = _store(association, instance)
        if isinstance(last, Transient):
            return Transient(f"{name}: {last.reason}", last.detail)
        if isinstance(last, Permanent):
            refused = refused or Permanent(f"{name}: {last.reason}", last.detail)
        else:
            confirm(name)
    return refused or last


def _store(association: Association, instance: Instance) -> Outcome:
    context = next((context for context in instance.contexts() if context in association.accepted), None)
    if context is None:
        return Permanent(f"presentation context refused: SOP class {instance.sop_class_uid}")
    with instance.path.open("rb") as file:
        file.seek(instance.offset)
        data: BinaryIO = file
        if context.transfer_syntax != instance.transfer_syntax_uid:
            data = _in_implicit_vr(instance)
        return storage_outcome(*association.c_store(context, instance.sop_instance_uid, data))


def _in_implicit_vr(instance: Instance) -> BytesIO:
    from pydicom import dcmread  # noqa: PLC0415 - as above
    from pydicom.filebase import DicomBytesIO  # noqa: PLC0415
    from pydicom.filewriter import write_dataset  # noqa: PLC0415

    written = DicomBytesIO()
    written.is_implicit_VR, written.is_little_endian = True, True
    write_dataset(written, dcmread(instance.path))
    return BytesIO(written.getvalue())


def _ask(association: Association, transaction_uid: str, references: list[tuple[str, str]]) -> Outcome:
    from serve.node.storage_commitment import encoded_request  # noqa: PLC0415 - as above

    contexts = [context for context in association.accepted if context.abstract_syntax == STORAGE_COMMITMENT]
    if not contexts:
        return Permanent("presentation context refused: storage commitment")
    context = max(contexts)
    data = BytesIO(encoded_request(transaction_uid, references, context.transfer_syntax))
    status, comment = association.n_action(context, STORAGE_COMMITMENT_INSTANCE, 1, data)
    outcome = storage_outcome(status, comment)
    if isinstance(outcome, Delivered):
        return outcome
    return type(outcome)(f"storage commitment {outcome.reason}", outcome.detail)


def _tls_context(name: str, tls: DicomTls | None) -> ssl.SSLContext | None:
    if tls is None:
        return None
    return client_context(f"destination {name}: tls", tls.ca, tls.certificate, tls.key, check_name=tls.check_name)
