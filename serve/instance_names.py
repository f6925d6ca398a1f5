"""The names that a DICOM instance goes by: its UIDs, its patient, and a digest that tells its bytes from others.

Read without pixels and without trust: a peer chose these bytes.
"""

from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from pydicom.dataset import Dataset

from cxr_ray.bounded_header import read_bounded_header
from cxr_ray.errors import CxrRayError

_LONGEST_UID = 64
# 128 bits: nobody makes two data sets that this takes for one.
CONTENT_DIGITS = 32
_PREFIX_BYTES = 132
_UIDS = ("sop_instance_uid", "study_instance_uid", "series_instance_uid")


@dataclass(frozen=True)
class InstanceNames:
    """Under which names an instance is filed; None where it does not say."""

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    patient_id: str | None
    accession_number: str | None
    study_date: str | None
    calling_ae: str | None


def instance_names(file: bytes | Path, name: str = "instance") -> InstanceNames:
    """Read a DICOM file's names (PS3.10).

    Raises
    ------
    CxrRayError
        When it is no DICOM Part 10 file, its header does not end within bounds, or it names no study, series or instance.
    OSError
        When it cannot be read.
    """
    data_set = read_bounded_header(file, name)
    try:
        meta = data_set.file_meta
        names = InstanceNames(
            sop_class_uid=_plain(meta, "MediaStorageSOPClassUID") or "",
            sop_instance_uid=_plain(meta, "MediaStorageSOPInstanceUID") or "",
            study_instance_uid=_plain(data_set, "StudyInstanceUID") or "",
            series_instance_uid=_plain(data_set, "SeriesInstanceUID") or "",
            patient_id=_decoded(data_set, "PatientID"),
            accession_number=_decoded(data_set, "AccessionNumber"),
            study_date=_plain(data_set, "StudyDate"),
            calling_ae=_plain(meta, "SourceApplicationEntityTitle"),
        )
    # A peer chose these bytes, and a parser has no closed list of ways to fail on them.
    except Exception as error:
        raise CxrRayError(f"{name}: not readable as DICOM ({type(error).__name__}); send the instance again") from error
    for field in _UIDS:
        if not 1 <= len(getattr(names, field)) <= _LONGEST_UID:
            raise CxrRayError(f"{name}: {field} is empty or longer than {_LONGEST_UID} characters; mend the sender")
    return names


def content_digest(file: bytes) -> str:
    """What tells an instance's bytes from others under the same UID, to 128 bits: BLAKE3 of the data set.

    Without the file meta information (PS3.10 section 7.1), which each sender writes anew.
    """
    start = _PREFIX_BYTES
    # The group length (0002,0000) UL comes first, explicit VR little endian, and counts what follows it.
    if file[start : start + 8] == b"\x02\x00\x00\x00UL\x04\x00":
        start += 12 + int.from_bytes(file[start + 8 : start + 12], "little")
    return short_digest(memoryview(file)[start:])


def short_digest(data_set: bytes | memoryview) -> str:
    """BLAKE3 of a data set, to 128 bits, in hexadecimal digits.

    Every received byte passes it before its sender is answered, and SHA-256 takes as long as the disk.
    """
    return blake3(data_set).hexdigest()[:CONTENT_DIGITS]


def _plain(data_set: Dataset, keyword: str) -> str | None:
    # Raw bytes: pydicom's conversion warns about odd values and quotes them.
    if keyword not in data_set:
        return None
    value = data_set.get_item(keyword).value
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")
    return text.replace("\x00", "").strip() or None


def _decoded(data_set: Dataset, keyword: str) -> str | None:
    return str(data_set.get(keyword) or "").replace("\x00", "").strip() or None
