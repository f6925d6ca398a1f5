"""What results take over from a source image's header, whatever state it is in.

A result has to be filed beside its images, under the same patient, study and order. So identifiers are taken over as they
are, even where their form is wrong: a PACS that keeps the image under them would not find a corrected one. What programs
compute with (dates, times, age, sex) is repaired where its meaning is plain and left empty otherwise. Nothing here raises.
"""

import re
from collections.abc import Iterator
from datetime import date, time
from io import BytesIO

import pydicom.config
from pydicom import dcmread
from pydicom.charset import python_encoding
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.uid import SecondaryCaptureImageStorage

from cxr_ray.dicom_values import text

_UTF_8 = "ISO_IR 192"
_TEXTS = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})
# Three component groups of a person's name have 194 characters (PS3.5 section 6.2); what is longer names nobody.
_LONGEST = 256
_SEXES = ("M", "F", "O")
_AGE = re.compile(r"(\d{1,3})([DWMY]?)")
_DATE = re.compile(r"(\d{4})[.-]?(\d{2})[.-]?(\d{2})")
_TIME = re.compile(r"(\d{2})(?::?(\d{2})(?::?(\d{2})(\.\d{1,6})?)?)?")
_OFFSET = re.compile(r"[+-](0\d|1[0-4])[0-5]\d")

# Patient, General Study and Patient Study Modules (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2): those of type 1 and 2, which stand in
# every result, and those without which a patient, order or age would be less certain.
_IDENTIFIERS = ("PatientName", "PatientID", "StudyInstanceUID", "AccessionNumber", "StudyID", "ReferringPhysicianName")
_WHERE_KNOWN = ("IssuerOfPatientID", "StudyDescription")


def source_text(header: Dataset, keyword: str) -> str:
    """A value as one line of text; "" where it is absent, empty or cannot be read."""
    try:
        return text(header, keyword)
    # pydicom converts when a value is read, and a hostile one makes it raise nearly anything.
    except Exception:  # noqa: BLE001
        return ""


def identifier(header: Dataset, keyword: str) -> str:
    """A value as it stands, whatever its form; "" where it is too long to name anybody."""
    value = source_text(header, keyword)
    return value if len(value) <= _LONGEST else ""


def first_item(header: Dataset, keyword: str) -> Dataset:
    """The first item of a sequence; an empty one where there is none."""
    try:
        items = header.get(keyword)
    except Exception:  # noqa: BLE001 - as `source_text`
        return Dataset()
    return items[0] if isinstance(items, Sequence) and len(items) else Dataset()


def source_class(header: Dataset) -> str:
    """SOP Class UID of the image, from the data set or else from the file meta information.

    One that says neither is taken for Secondary Capture, which makes no claim about the device.
    """
    meta = getattr(header, "file_meta", None) or Dataset()
    return (
        source_text(header, "SOPClassUID") or source_text(meta, "MediaStorageSOPClassUID") or str(SecondaryCaptureImageStorage)
    )


def put(dataset: Dataset, keyword: str, value: object) -> None:
    """Set an attribute without judging its form, and without the warning that would quote it."""
    dataset.add(DataElement(keyword, dictionary_VR(keyword), value, validation_mode=pydicom.config.IGNORE))


def copy_patient_and_study(header: Dataset, result: Dataset) -> None:
    """Take over whose study this is and which."""
    for keyword in _IDENTIFIERS:
        put(result, keyword, identifier(header, keyword))
    for keyword in _WHERE_KNOWN:
        if value := identifier(header, keyword):
            put(result, keyword, value)
    put(result, "PatientBirthDate", source_date(header, "PatientBirthDate"))
    put(result, "StudyDate", source_date(header, "StudyDate"))
    put(result, "StudyTime", source_time(header, "StudyTime"))
    sex = source_text(header, "PatientSex").upper()
    put(result, "PatientSex", sex if sex in _SEXES else "")
    if age := _age(header):
        put(result, "PatientAge", age)
    if offset := utc_offset(header):
        put(result, "TimezoneOffsetFromUTC", offset)


def utc_offset(header: Dataset) -> str:
    """Timezone Offset From UTC (0008,0201) as ``+0100``; "" where it is not said."""
    value = source_text(header, "TimezoneOffsetFromUTC")
    return value if _OFFSET.fullmatch(value) else ""


def source_date(header: Dataset, keyword: str) -> str:
    """A date as DA (PS3.5 section 6.2); "" where it is none."""
    found = _DATE.fullmatch(source_text(header, keyword))
    try:
        return f"{date(*map(int, found.groups())):%Y%m%d}" if found else ""
    except ValueError:
        return ""


def source_time(header: Dataset, keyword: str) -> str:
    """A time as TM (PS3.5 section 6.2); "" where it is none."""
    found = _TIME.fullmatch(source_text(header, keyword))
    if found is None:
        return ""
    hour, minute, second, fraction = (part or "" for part in found.groups())
    try:
        time(int(hour), int(minute or 0), int(second or 0))
    except ValueError:
        return ""
    return hour + minute + second + fraction


def orientation(header: Dataset) -> tuple[str, str] | None:
    """Patient Orientation (0020,0020) of a frontal film: where rows and columns run to; None where that is not said."""
    rows, _, columns = source_text(header, "PatientOrientation").upper().partition("\\")
    sides, length = {"L", "R"}, {"H", "F"}
    known = (rows in sides and columns in length) or (rows in length and columns in sides)
    return (rows, columns) if known else None


def choose_character_set(result: Dataset, header: Dataset) -> None:
    """Declare how the result's texts are encoded: as the source's are, or in UTF-8 where that cannot be done.

    A PACS reads the encoding that it was sent before. Where the source declares none and yet has letters outside ASCII, the
    result repeats the same bytes.
    """
    texts = set(_texts(result))
    if all(value.isascii() for _, value in texts):
        return
    declared = _declared(header)
    own = [value for _, value in texts - set(_texts(_only(result, (*_IDENTIFIERS, *_WHERE_KNOWN))))]
    if not declared and all(value.isascii() for value in own):
        return
    if not declared or not all(name in python_encoding for name in declared) or not _holds(declared, texts):
        declared = [_UTF_8]
    put(result, "SpecificCharacterSet", declared)


def _declared(header: Dataset) -> list[str]:
    names = source_text(header, "SpecificCharacterSet").split("\\")
    return names if any(names) else []


def _holds(character_set: list[str], texts: set[tuple[str, str]]) -> bool:
    """Whether all texts come back as they were."""
    for representation, value in texts:
        probe, content = Dataset(), BytesIO()
        put(probe, "SpecificCharacterSet", character_set)
        keyword = "PatientName" if representation == "PN" else "TextValue"
        put(probe, keyword, value)
        try:
            probe.save_as(content, implicit_vr=True, little_endian=True)
            back = dcmread(BytesIO(content.getvalue()), force=True)
        except Exception:  # noqa: BLE001 - codecs have no closed list of ways to fail
            return False
        if source_text(back, keyword) != value:
            return False
    return True


def _texts(dataset: Dataset) -> Iterator[tuple[str, str]]:
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _texts(item)
        elif element.VR in _TEXTS and element.value:
            value = element.value
            yield element.VR, "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value)


def _only(dataset: Dataset, keywords: tuple[str, ...]) -> Dataset:
    part = Dataset()
    for keyword in keywords:
        if keyword in dataset:
            part.add(dataset[keyword])
    return part


def _age(header: Dataset) -> str:
    found = _AGE.fullmatch(source_text(header, "PatientAge").upper())
    return f"{int(found.group(1)):03d}{found.group(2) or 'Y'}" if found else ""
