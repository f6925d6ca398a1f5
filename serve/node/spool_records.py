"""What the spool is told of an instance and what it tells: plain data."""

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path

from serve.node.file_meta import FileMeta, encode_head


class Stored(Enum):
    """What `Spool.store` found; each means that the bytes are safe.

    A conflict is another data set under a SOP Instance UID that was taken: it is kept aside and answered by nobody.
    """

    NEW = "new"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"


@dataclass(frozen=True)
class Origin:
    """What the file meta group says about received bytes (PS3.10 section 7.1).

    Parameters
    ----------
    sop_class_uid, sop_instance_uid : str
        As in the C-STORE command set.
    transfer_syntax_uid : str
        The syntax in which the data set is encoded.
    calling_ae : str
        Title of the sender; anything outside printable ASCII is dropped.
    peer_address : str
        From where it came, as a URI: ``dicom://192.0.2.7:40112``, or ``http://192.0.2.7`` where it came over HTTP.
    called_ae : str
        Title under which it was received.
    """

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae: str = ""
    peer_address: str = ""
    called_ae: str = ""

    def file_head(self) -> bytes:
        """What stands in a file before the data set."""
        return encode_head(
            FileMeta(
                self.sop_class_uid,
                self.sop_instance_uid,
                self.transfer_syntax_uid,
                source_title=self.calling_ae,
                receiving_title=self.called_ae,
                source_address=self.peer_address,
            )
        )


@dataclass(frozen=True)
class SpooledInstance:
    """An accepted instance: where it lies, the identifiers under which its answer is filed, and who sent it from where.

    `peer_scheme` says how it came, ``dicom`` or ``http``; `peer_address` is an address or a name, without port.
    """

    path: Path
    name: str
    content_digest: str
    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    patient_id: str | None
    accession_number: str | None
    study_date: str | None
    calling_ae: str | None
    received_at: datetime
    peer_scheme: str | None = None
    peer_address: str | None = None


@dataclass(frozen=True)
class DeadLetter:
    """An instance that was given up. `status` is the HTTP status that decided it; identifiers may be unknown."""

    name: str
    reason: str
    status: int | None
    when: datetime
    attempts: int
    sop_instance_uid: str | None
    study_instance_uid: str | None


@dataclass(frozen=True)
class Conflict:
    """Bytes that came under a SOP Instance UID which `first`, another name of the spool, had taken."""

    name: str
    first: str
    when: datetime
    sop_instance_uid: str | None
    calling_ae: str | None
    peer_address: str | None
