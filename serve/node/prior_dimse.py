"""An archive that is asked over DICOM: C-FIND and C-GET at one association, with nothing to listen on.

C-GET brings the instances over the association that asks for them (PS3.4 section C.4.3): the archive need not be told where
to send them, as with C-MOVE. What arrives is counted while it arrives, and the connection is cut when the time or the bytes
are spent: pynetdicom waits for the end of a PDU as long as its peer likes.
"""

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Self

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, _config, build_context, build_role, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext

from cxr_ray.transfer_syntaxes import TRANSFER_SYNTAXES
from serve.node.deadline import Deadline
from serve.node.prior_query import Archive, ArchiveError, FetchedTooMuchError, Question
from serve.node.priors_settings import PriorsSettings
from serve.node.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

_FIND, _GET = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.3"
_IMPLICIT, _EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
IMAGE_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.1",  # Computed Radiography
    "1.2.840.10008.5.1.4.1.1.1.1",  # Digital X-Ray, for presentation
    "1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture
)
REPORT_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.88.34",  # Comprehensive 3D SR
    "1.2.840.10008.5.1.4.1.1.88.33",  # Comprehensive SR
    "1.2.840.10008.5.1.4.1.1.88.22",  # Enhanced SR
)
_PENDING = (0xFF00, 0xFF01)
# PS3.4 table C.4-3: complete, one or more failures among the sub-operations.
_GET_COMPLETE = (0x0000, 0xB000)
_STORED, _OUT_OF_RESOURCES = 0x0000, 0xA700
_MAX_PDU = 131072
_LARGEST_PDU = 1024**2
# Commands, headers of PDUs, and matches, beside the data sets that are counted.
_OVERHEAD_BYTES = 4 * 1024**2

_config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False


class DimseArchive(Archive):
    """One association with the archive, for one study's priors.

    Parameters
    ----------
    settings
        Of kind dicom.
    tls
        For DICOM over TLS; None speaks without.
    deadline
        When the connection is cut.
    """

    def __init__(self, settings: PriorsSettings, tls: ssl.SSLContext | None, deadline: Deadline) -> None:
        self._settings, self._tls, self._deadline = settings, tls, deadline
        self._received: list[bytes] = []
        self._bytes = self._wire_bytes = 0
        self._too_much = False
        self._connection: socket.socket | None = None
        self._cutter = threading.Timer(deadline.left(), self._cut)
        self._cutter.daemon = True

    def __enter__(self) -> Self:
        """Open the association; see `Archive`."""
        self._deadline.check()
        self._cutter.start()
        try:
            self._association = self._associated()
        except BaseException:
            self._cutter.cancel()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Release the association, without waiting for it; cut it where something is under way still."""
        if exception[0] is None:
            threading.Thread(target=self._part, name="priors-release", daemon=True).start()
        else:
            self._cutter.cancel()
            self._cut()

    def studies(self, question: Question) -> list[Dataset]:
        """See `Archive`."""
        wanted = Dataset()
        if not question.patient_id.isascii():
            wanted.SpecificCharacterSet = "ISO_IR 192"
        wanted.QueryRetrieveLevel = "STUDY"
        wanted.PatientID = question.patient_id
        wanted.StudyDate = f"-{question.before - timedelta(days=1):%Y%m%d}"
        for keyword in ("IssuerOfPatientID", "PatientBirthDate", "StudyInstanceUID", "StudyTime", "StudyDescription"):
            setattr(wanted, keyword, "")
        wanted.ModalitiesInStudy = ""
        return self._found(wanted)

    def series(self, study_uid: str) -> list[Dataset]:
        """See `Archive`."""
        wanted = Dataset()
        wanted.QueryRetrieveLevel = "SERIES"
        wanted.StudyInstanceUID = study_uid
        for keyword in ("SeriesInstanceUID", "Modality", "SeriesDescription", "BodyPartExamined"):
            setattr(wanted, keyword, "")
        return self._found(wanted)

    def instances(self, study_uid: str, series_uid: str) -> Iterator[bytes]:
        """See `Archive`; all of them are here when the first is given out."""
        wanted = Dataset()
        wanted.QueryRetrieveLevel = "SERIES"
        wanted.StudyInstanceUID, wanted.SeriesInstanceUID = study_uid, series_uid
        self._received.clear()
        status = self._ended(self._association.send_c_get(wanted, UID(_GET)), "C-GET")
        if self._too_much:
            raise FetchedTooMuchError
        if status not in _GET_COMPLETE:
            raise ArchiveError(f"C-GET answered {status:#06x}")
        yield from list(self._received)

    def _associated(self) -> Association:
        settings, left = self._settings, self._deadline.left()
        entity = AE(ae_title=settings.calling_ae)
        entity.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
        entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        entity.connection_timeout = entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = left
        try:
            association = entity.associate(
                str(settings.host),
                settings.port,
                contexts=_contexts(),
                ae_title=str(settings.called_ae),
                max_pdu=_MAX_PDU,
                ext_neg=[build_role(UID(uid), scp_role=True) for uid in (*IMAGE_CLASSES, *REPORT_CLASSES)],
                tls_args=(self._tls, str(settings.host)) if self._tls else None,
                evt_handlers=[
                    (evt.EVT_CONN_OPEN, self._opened),
                    (evt.EVT_DATA_RECV, self._counted),
                    (evt.EVT_C_STORE, self._taken),
                ],
            )
        except (OSError, RuntimeError, ValueError) as error:
            self._deadline.check()
            raise ArchiveError(f"no connection ({type(error).__name__})") from None
        if not association.is_established:
            self._deadline.check()
            if self._too_much:
                raise FetchedTooMuchError
            raise ArchiveError("the association was rejected" if association.is_rejected else "no association")
        return association

    def _found(self, wanted: Dataset) -> list[Dataset]:
        found: list[Dataset] = []
        responses = self._association.send_c_find(wanted, UID(_FIND))

        def read() -> Iterator[tuple[Dataset, Dataset | None]]:
            for status, match in responses:
                if match is not None and status.get("Status") in _PENDING:
                    found.append(match)
                # Whoever has so many matches did not look for what was asked; the rest is not waited for.
                if len(found) > self._settings.max_matches:
                    raise ArchiveError(f"C-FIND has more than {self._settings.max_matches} matches")
                yield status, match

        status = self._ended(read(), "C-FIND")
        if status != 0x0000:
            raise ArchiveError(f"C-FIND answered {status:#06x}")
        return found

    def _ended(self, responses: Iterator[tuple[Dataset, Dataset | None]], service: str) -> int:
        """The last status of a service; what comes before it was taken elsewhere."""
        last: int | None = None
        try:
            for status, _ in responses:
                self._deadline.check()
                if self._too_much:
                    raise FetchedTooMuchError
                last = status.get("Status")
        except (ValueError, RuntimeError, OSError) as error:
            # pynetdicom's way to say that a context was not accepted, or that the association is gone.
            self._deadline.check()
            raise ArchiveError(f"{service} is not to be had ({type(error).__name__})") from None
        if self._too_much:
            raise FetchedTooMuchError
        self._deadline.check()
        if last is None:
            raise ArchiveError(f"the association ended before {service} was answered")
        return last

    def _opened(self, event: evt.Event) -> None:
        transport = event.assoc.dul.socket
        self._connection, receive = transport.socket, transport.recv

        def receive_bounded(length: int) -> bytearray:
            # The length is what the peer writes into a PDU's header, and would be collected whole before anybody is told.
            if length > _LARGEST_PDU:
                self._too_much = True
                self._cut()
                return bytearray()
            received: bytearray = receive(length)
            return received

        transport.recv = receive_bounded
        if not self._deadline.left():
            self._cut()

    def _counted(self, event: evt.Event) -> None:
        self._wire_bytes += len(event.data)
        if self._wire_bytes > self._settings.max_bytes + _OVERHEAD_BYTES:
            self._too_much = True
            self._cut()

    def _taken(self, event: evt.Event) -> int:
        data = event.encoded_dataset()
        self._bytes += len(data)
        if self._bytes > self._settings.max_bytes:
            self._too_much = True
            return _OUT_OF_RESOURCES
        self._received.append(data)
        return _STORED

    def _cut(self) -> None:
        """End the connection under whoever reads from it."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def _part(self) -> None:
        if self._association.is_established:
            self._association.release()
        self._cutter.cancel()
        self._cut()


def _contexts() -> list[PresentationContext]:
    contexts = [build_context(uid, [_EXPLICIT, _IMPLICIT]) for uid in (_FIND, _GET)]
    # Each in a context of its own: of one context an archive takes one, and what it holds in another it then cannot send.
    contexts += [build_context(uid, syntax) for uid in IMAGE_CLASSES for syntax in TRANSFER_SYNTAXES]
    return contexts + [build_context(uid, syntax) for uid in REPORT_CLASSES for syntax in (_EXPLICIT, _IMPLICIT)]
