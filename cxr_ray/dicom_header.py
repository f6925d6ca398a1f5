"""A DICOM file's header: what it says of the patient and the study.

Real files lie in every direction: ages come without a unit, dates without a time, identifiers not at all. What is
unknown stays None. No message repeats the text of an error of pydicom, because it may quote a value of the patient's.
"""

import io
import re
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import BinaryIO

import pydicom
from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from cxr_ray.dicom_values import text
from cxr_ray.frontal_chest import check_frontal_chest, frontal_view
from cxr_ray.inflating import inflated_parts
from cxr_ray.pixels import MAX_MEGAPIXELS, DamagedImage, OversizedImage, UnsupportedImage

_YEARS_PER_UNIT = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
MAX_AGE_YEARS = 120

# Grey of 32 bits, the widest that is read, and as much again for a header.
_MAX_INFLATED_BYTES = 2 * 4 * MAX_MEGAPIXELS * 10**6
_PREFIX_BYTES = 132
_META_GROUP = 0x0002
_PIXEL_DATA = 0x7FE00010
_UNDEFINED_LENGTH = 0xFFFFFFFF


@dataclass(frozen=True)
class RadiographHeader:
    """What a DICOM file says besides its pixels; None where it does not say.

    Attributes
    ----------
    age_years
        From Patient's Age (0010,1010), else from the birth date and the study date.
    sex
        "M", "F" or None (0010,0040).
    view
        "PA", "AP" or None, as `frontal_chest.frontal_view` finds it.
    acquired
        Acquisition, content, series or study date and time, the first that is there.
    warnings
        What is unknown or odd, one sentence each.
    """

    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    patient_id: str
    accession_number: str
    age_years: float | None
    sex: str | None
    view: str | None
    acquired: datetime | None
    warnings: tuple[str, ...]


def looks_like_dicom(data: bytes) -> bool:
    """Whether the bytes carry the DICOM File Format's prefix (PS3.10 section 7.1)."""
    return data[128:132] == b"DICM"


def read_dicom(data: bytes, name: str) -> Dataset:
    """Parse a DICOM file.

    Raises
    ------
    UnsupportedImage
        If the bytes are no DICOM file.
    DamagedImage
        If the file breaks off inside its header.
    OversizedImage
        If it is deflated, and inflates to more than an image of `MAX_MEGAPIXELS` can need.
    """
    return _parse(io.BytesIO(data), name, stop_before_pixels=False)


def read_dicom_header(stream: BinaryIO, name: str) -> Dataset:
    """Parse a DICOM file up to its pixels; errors as `read_dicom`."""
    return _parse(stream, name, stop_before_pixels=True)


def _parse(stream: BinaryIO, name: str, *, stop_before_pixels: bool) -> Dataset:
    try:
        _check_inflated_size(stream, name)
        dataset = pydicom.dcmread(stream, stop_before_pixels=stop_before_pixels)
        broken_off = _broken_off(dataset)
        dataset.decode()
    except InvalidDicomError:
        raise UnsupportedImage(f"{name}: not a DICOM file (no DICM prefix); send DICOM Part 10") from None
    except OversizedImage:
        raise
    except Exception as error:  # noqa: BLE001 - a hostile file makes the parser raise nearly anything
        raise DamagedImage(f"{name}: damaged DICOM ({type(error).__name__}); send the file again") from None
    if len(dataset) == 0:  # pydicom forgets everything where an element of undefined length has no end
        raise DamagedImage(f"{name}: breaks off inside its header or pixels; send the file again")
    if broken_off is not None:
        attribute = keyword_for_tag(broken_off) or broken_off
        raise DamagedImage(f"{name}: breaks off inside {attribute}; send the file again")
    return dataset


def _check_inflated_size(stream: BinaryIO, name: str) -> None:
    """Count what a deflated file becomes, because pydicom inflates it in one step."""
    if stream.read(_PREFIX_BYTES)[-4:] == b"DICM":
        # Where pydicom stops too, or the two would differ on what is deflated.
        meta = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag >> 16 != _META_GROUP)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            inflated = 0
            for part in inflated_parts(stream):
                inflated += len(part)
                if inflated > _MAX_INFLATED_BYTES:
                    limit = f"{_MAX_INFLATED_BYTES >> 20} MiB"
                    raise OversizedImage(f"{name}: inflates to more than {limit}; send at most {MAX_MEGAPIXELS} megapixels")
    stream.seek(0)


def _broken_off(dataset: Dataset) -> BaseTag | None:
    """The attribute whose value is shorter than announced, which pydicom lets pass; pixels are checked when decoded."""
    for tag in dataset.keys():  # noqa: SIM118 - a Dataset iterates over its elements, and would convert them
        element = dataset.get_item(tag)
        if (
            isinstance(element, RawDataElement)
            and element.value is not None
            and element.tag != _PIXEL_DATA
            and len(element.value) < element.length != _UNDEFINED_LENGTH
        ):
            return element.tag
    return None


def _date(dataset: Dataset, *keywords: str) -> date | None:
    for keyword in keywords:
        try:
            return datetime.strptime(text(dataset, keyword)[:8], "%Y%m%d").date()
        except ValueError:
            continue
    return None


def _acquired(dataset: Dataset) -> datetime | None:
    for stem in ("Acquisition", "Content", "Series", "Study"):
        day = _date(dataset, f"{stem}Date")
        if day is not None:
            return datetime.combine(day, _clock(text(dataset, f"{stem}Time")))
    return None


def _clock(value: str) -> time:
    """A time as TM (PS3.5 section 6.2) writes it, all but the hour optional; 00:00 where it is none."""
    found = re.match(r"(\d{2})(?::?(\d{2}))?(?::?(\d{2}))?", value)
    hour, minute, second = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    try:
        return time(hour, minute, second)
    except ValueError:
        return time.min


def age_in_years(dataset: Dataset) -> float | None:
    """Age at the study: Patient's Age with or without its unit, else study date minus birth date; else None."""
    stated = re.fullmatch(r"(\d{1,3})([YMWD]?)", text(dataset, "PatientAge").upper())
    if stated:
        age = int(stated.group(1)) * _YEARS_PER_UNIT[stated.group(2) or "Y"]
    else:
        born = _date(dataset, "PatientBirthDate")
        studied = _date(dataset, "StudyDate", "AcquisitionDate", "SeriesDate", "ContentDate")
        if born is None or studied is None:
            return None
        age = studied.year - born.year - ((studied.month, studied.day) < (born.month, born.day))
    return float(age) if 0 <= age <= MAX_AGE_YEARS else None


def radiograph_header(dataset: Dataset, name: str) -> RadiographHeader:
    """Everything but the pixels, after the check that this is a frontal chest radiograph.

    Raises
    ------
    UnusableImage
        As `check_frontal_chest`.
    DamagedImage
        As `check_frontal_chest`, or if a UID is absent, as where the file breaks off before its UIDs.
    """
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        if not text(dataset, keyword):
            raise DamagedImage(f"{name}: {keyword} is absent; send a complete DICOM instance")
    warnings = check_frontal_chest(dataset, name)
    sex = text(dataset, "PatientSex").upper()
    return RadiographHeader(
        sop_instance_uid=text(dataset, "SOPInstanceUID"),
        study_instance_uid=text(dataset, "StudyInstanceUID"),
        series_instance_uid=text(dataset, "SeriesInstanceUID"),
        patient_id=text(dataset, "PatientID"),
        accession_number=text(dataset, "AccessionNumber"),
        age_years=age_in_years(dataset),
        sex=sex if sex in ("M", "F") else None,
        view=frontal_view(dataset).position,
        acquired=_acquired(dataset),
        warnings=tuple(warnings),
    )
