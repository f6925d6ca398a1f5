"""A DICOM file as a radiograph: what it says of the patient, whether it is a frontal chest film, and its pixels.

Real files lie in every direction: chest films arrive as Secondary Capture, ages without a unit, views and body parts
empty. What is unknown is allowed and noted as a warning; what contradicts a frontal chest radiograph is refused with
the reason.
"""

import io
import math
import re
import struct
from dataclasses import dataclass
from datetime import date, datetime
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.pixels import pixel_array
from pydicom.tag import BaseTag
from pydicom.uid import (
    JPEG2000,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from cxr_ray.lossless_jpeg import decode_lossless_jpeg
from cxr_ray.pixels import (
    DamagedImage,
    Greyscale,
    ImageError,
    UnsupportedImage,
    UnusableImage,
    check_megapixels,
    colour_to_grey,
    full_range,
)

RADIOGRAPH_MODALITIES = ("CR", "DX", "DR")
_CHEST = ("CHEST", "THORAX", "LUNG")
_LATERAL = ("LL", "RL", "LAT", "LATERAL", "LLO", "RLO", "LPO", "RPO", "LAO", "RAO")
_YEARS_PER_UNIT = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
MAX_AGE_YEARS = 120

# pydicom's warnings quote the values that they complain of, and so would carry patient data into logs.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

# pydicom would try GDCM first everywhere, which ends the process on some damaged images.
_DECODERS = {
    RLELossless: "pydicom",
    JPEGBaseline8Bit: "pillow",
    JPEGExtended12Bit: "pillow",
    JPEGLossless: "gdcm",
    JPEGLosslessSV1: "gdcm",
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    JPEG2000: "pylibjpeg",
    JPEG2000Lossless: "pylibjpeg",
}
_JPEG_START, _JPEG2000_START = b"\xff\xd8", b"\xff\x4f\xff\x51"
# Start of frame of each process of JPEG (ITU-T T.81 table B.1) and of JPEG-LS (T.87).
_FRAME_MARKERS = (*range(0xFFC0, 0xFFC4), *range(0xFFC5, 0xFFC8), *range(0xFFC9, 0xFFCC), *range(0xFFCD, 0xFFD0), 0xFFF7)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
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
        "PA", "AP" or None (0018,5101).
    acquired
        Acquisition, content, series or study date and time, the first that is there.
    warnings
        What is unknown or odd, one sentence each.
    """

    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    patient_id: str
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
    """
    return _parse(io.BytesIO(data), name, stop_before_pixels=False)


def read_dicom_header(stream: BinaryIO, name: str) -> Dataset:
    """Parse a DICOM file up to its pixels; errors as `read_dicom`."""
    return _parse(stream, name, stop_before_pixels=True)


def _parse(stream: BinaryIO, name: str, *, stop_before_pixels: bool) -> Dataset:
    try:
        dataset = pydicom.dcmread(stream, stop_before_pixels=stop_before_pixels)
        broken_off = _broken_off(dataset)
        dataset.decode()
    except InvalidDicomError:
        raise UnsupportedImage(f"{name}: not a DICOM file (no DICM prefix); send DICOM Part 10") from None
    except Exception as error:  # noqa: BLE001 - a hostile file makes the parser raise nearly anything
        raise DamagedImage(
            f"{name}: damaged DICOM ({type(error).__name__}: {_first_line(error)}); send the file again"
        ) from None
    if len(dataset) == 0:  # pydicom forgets everything where an element of undefined length has no end
        raise DamagedImage(f"{name}: breaks off inside its header or pixels; send the file again")
    if broken_off is not None:
        attribute = keyword_for_tag(broken_off) or broken_off
        raise DamagedImage(f"{name}: breaks off inside {attribute}; send the file again")
    return dataset


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


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _text(dataset: Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    return "" if value is None else _CONTROL.sub(" ", str(value)).strip()


def _count(dataset: Dataset, keyword: str, name: str) -> int:
    value = dataset.get(keyword)
    try:
        return int(value or 0)
    except (TypeError, ValueError):
        raise DamagedImage(f"{name}: {keyword} is {value}, no whole number; send the file again") from None


def check_frontal_chest(dataset: Dataset, name: str) -> list[str]:
    """Refuse what contradicts a frontal chest radiograph; return a warning for each thing the file leaves open.

    Raises
    ------
    UnusableImage
        Naming the attribute, its value and what is accepted.
    """
    modality = _text(dataset, "Modality").upper()
    body_part = _text(dataset, "BodyPartExamined").upper()
    view = _text(dataset, "ViewPosition").upper()
    if modality not in RADIOGRAPH_MODALITIES:
        accepted = ", ".join(RADIOGRAPH_MODALITIES)
        raise UnusableImage(f"{name}: Modality is {modality or 'absent'}; only radiographs ({accepted}) are read")
    if body_part and not any(part in body_part for part in _CHEST):
        raise UnusableImage(f"{name}: BodyPartExamined is {body_part}; only chest radiographs are read")
    if view in _LATERAL:
        raise UnusableImage(f"{name}: ViewPosition is {view}; only frontal views (PA, AP) are read")
    _check_single_frame(dataset, name)
    warnings = []
    if not body_part:
        warnings.append("BodyPartExamined is empty: taken as a chest radiograph")
    if view not in ("PA", "AP"):
        warnings.append(f"ViewPosition is {view or 'empty'}: view unknown")
    return warnings


def _check_single_frame(dataset: Dataset, name: str) -> None:
    frames = _count(dataset, "NumberOfFrames", name)
    if frames > 1:
        raise UnusableImage(f"{name}: NumberOfFrames is {frames}; only single images are read")


def _date(dataset: Dataset, *keywords: str) -> date | None:
    for keyword in keywords:
        try:
            return datetime.strptime(_text(dataset, keyword)[:8], "%Y%m%d").date()
        except ValueError:
            continue
    return None


def _acquired(dataset: Dataset) -> datetime | None:
    for stem in ("Acquisition", "Content", "Series", "Study"):
        day = _date(dataset, f"{stem}Date")
        if day is not None:
            clock = re.match(r"\d{6}", _text(dataset, f"{stem}Time"))
            try:
                moment = datetime.strptime(clock.group(), "%H%M%S").time() if clock else datetime.min.time()
            except ValueError:
                moment = datetime.min.time()
            return datetime.combine(day, moment)
    return None


def age_in_years(dataset: Dataset) -> float | None:
    """Age at the study: Patient's Age with or without its unit, else study date minus birth date; else None."""
    stated = re.fullmatch(r"(\d{1,3})([YMWD]?)", _text(dataset, "PatientAge").upper())
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
        If a UID is absent, as where the file breaks off before its UIDs.
    """
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        if not _text(dataset, keyword):
            raise DamagedImage(f"{name}: {keyword} is absent; send a complete DICOM instance")
    warnings = check_frontal_chest(dataset, name)
    sex = _text(dataset, "PatientSex").upper()
    view = _text(dataset, "ViewPosition").upper()
    return RadiographHeader(
        sop_instance_uid=_text(dataset, "SOPInstanceUID"),
        study_instance_uid=_text(dataset, "StudyInstanceUID"),
        series_instance_uid=_text(dataset, "SeriesInstanceUID"),
        patient_id=_text(dataset, "PatientID"),
        age_years=age_in_years(dataset),
        sex=sex if sex in ("M", "F") else None,
        view=view if view in ("PA", "AP") else None,
        acquired=_acquired(dataset),
        warnings=tuple(warnings),
    )


def decode_dicom(dataset: Dataset, name: str) -> Greyscale:
    """Decode pixels as a display would show them: Modality LUT, VOI LUT or window, MONOCHROME1 inverted (PS3.3 C.11).

    Raises
    ------
    UnusableImage
        If this is no image, a coloured one, or several.
    OversizedImage, DamagedImage, UnsupportedImage
        If the pixels are too many, do not decode or are absent, or no decoder knows the transfer syntax.
    """
    if "PixelData" not in dataset and "Rows" in dataset:
        rows = _text(dataset, "Rows")
        raise DamagedImage(f"{name}: holds no PixelData for its {rows} rows; send the file again")
    if "PixelData" not in dataset:
        raise UnusableImage(f"{name}: holds no PixelData; send an image instance")
    _check_single_frame(dataset, name)
    check_megapixels(name, _count(dataset, "Rows", name), _count(dataset, "Columns", name))
    stored = _stored_values(dataset, name)
    if stored.ndim == 3:
        return full_range(colour_to_grey(name, stored))
    try:
        return _display_values(dataset, stored)
    except (ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError) as error:
        reason = _first_line(error)
        raise DamagedImage(f"{name}: its LUT or window cannot be applied ({reason}); correct the header") from None


def _stored_values(dataset: Dataset, name: str) -> np.ndarray:
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if not syntax:
        raise DamagedImage(f"{name}: TransferSyntaxUID is absent; send DICOM Part 10 with its file meta information")
    known = _CONTROL.sub(" ", syntax.name)
    if syntax == JPEGExtended12Bit and _count(dataset, "BitsStored", name) > 8:
        raise UnsupportedImage(f"{name}: transfer syntax {known} is decoded up to 8 bits only; transcode it")
    try:
        if syntax in _DECODERS:
            _check_frame_size(get_frame(dataset.PixelData, 0, number_of_frames=1), dataset)
        if _DECODERS.get(syntax) == "gdcm":
            stored = decode_lossless_jpeg(dataset)
        else:
            stored = pixel_array(dataset, decoding_plugin=_DECODERS.get(syntax, ""))
    except NotImplementedError:
        raise UnsupportedImage(f"{name}: transfer syntax {known} is not decoded; transcode it") from None
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 - each codec raises its own kinds
        reason = _first_line(error)
        raise DamagedImage(f"{name}: pixels do not decode as {known} ({reason}); send the file again") from None
    photometric = _text(dataset, "PhotometricInterpretation")
    grey = stored.ndim == 2 and photometric in ("MONOCHROME1", "MONOCHROME2")
    colour = stored.ndim == 3 and stored.shape[-1] == 3 and stored.dtype == np.uint8
    if not (grey or colour):
        raise UnusableImage(
            f"{name}: {photometric} pixels of shape {stored.shape} and type {stored.dtype}; send a single grey image"
        )
    return stored


def _check_frame_size(frame: bytes, dataset: Dataset) -> None:
    """Raise ValueError or struct.error if the encoded image is not of the size that the dataset announces.

    Decoders reserve what the code stream asks for, so that a few damaged bytes could cost gigabytes and minutes.
    """
    if frame[:4] == _JPEG2000_START:
        right, lower, left, upper = struct.unpack_from(">4I", frame, 8)
        rows, columns = lower - upper, right - left
    elif frame[:2] == _JPEG_START:
        position, marker, length = 2, 0, 0
        while marker not in _FRAME_MARKERS:
            position += length
            marker, length = struct.unpack_from(">HH", frame, position)
            position += 2
        rows, columns = struct.unpack_from(">HH", frame, position + 3)
    else:
        return
    if (rows, columns) != (dataset.Rows, dataset.Columns):
        raise ValueError(f"its code stream is {columns}x{rows}, the header says {dataset.Columns}x{dataset.Rows}")


def _display_values(dataset: Dataset, stored: np.ndarray) -> Greyscale:
    padding = _padding_mask(dataset, stored)
    little_endian = dataset.file_meta.TransferSyntaxUID.is_little_endian
    values = _modality_values(dataset, stored, little_endian)
    voi_lut = dataset.get("VOILUTSequence")
    window = _window(dataset)
    if voi_lut:
        bits = int(voi_lut[0].LUTDescriptor[2])
        shown = Greyscale(_through_lut(voi_lut[0], values, little_endian), 0.0, float(2**bits - 1))
    elif window is not None:
        shown = Greyscale(values, *window)
    else:
        kept = values if padding is None else values[~padding]
        black_and_white = full_range(kept if kept.size else values)
        shown = Greyscale(values, black_and_white.black, black_and_white.white)
    inverted = _text(dataset, "PhotometricInterpretation") == "MONOCHROME1"
    return _with_air_dark(shown, inverted, padding)


def _modality_values(dataset: Dataset, stored: np.ndarray, little_endian: bool) -> np.ndarray:
    """Stored values through the Modality LUT or the rescale (PS3.3 C.11.1); an identity rescale keeps their type."""
    lut = dataset.get("ModalityLUTSequence")
    if lut:
        return _through_lut(lut[0], stored, little_endian)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None or intercept is None or (slope, intercept) == (1, 0):
        return stored
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise ValueError(f"RescaleSlope {slope}, RescaleIntercept {intercept}")
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _through_lut(lut: Dataset, values: np.ndarray, little_endian: bool) -> np.ndarray:
    """Values through a Modality or VOI LUT, whose first and last entries hold beyond its ends (PS3.3 C.11.1.1).

    pydicom's functions wrap values that exceed the type of the entries, and know no Modality LUT of 10 to 15 bits.
    """
    entries, first = int(lut.LUTDescriptor[0]) or 2**16, int(lut.LUTDescriptor[1])
    data = lut.LUTData
    if isinstance(data, bytes):
        words = "<u2" if little_endian else ">u2"
        data = np.frombuffer(data, dtype=words if len(data) >= 2 * entries else np.uint8)
    table = np.atleast_1d(np.asarray(data, dtype=np.int64)).astype(np.uint16)[:entries]
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)]


def _padding_mask(dataset: Dataset, stored: np.ndarray) -> np.ndarray | None:
    padding = dataset.get("PixelPaddingValue")
    if padding is None:
        return None
    limit = dataset.get("PixelPaddingRangeLimit", padding)
    low, high = sorted((int(padding), int(limit)))
    return (stored >= low) & (stored <= high)


def _window(dataset: Dataset) -> tuple[float, float] | None:
    """The first window as (black, white), by the function that the file names (PS3.3 C.11.2.1.2 and C.11.2.1.3).

    None where there is no window, or one without width, as some archives write it for "none".
    """
    center, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if center in (None, "") or width in (None, ""):
        return None
    center, width = (float(value[0] if hasattr(value, "__len__") else value) for value in (center, width))
    if _text(dataset, "VOILUTFunction").upper() not in ("LINEAR_EXACT", "SIGMOID"):
        center, width = center - 0.5, width - 1
    if not (math.isfinite(center) and math.isfinite(width) and width > 0):
        return None
    return center - width / 2, center + width / 2


def _with_air_dark(shown: Greyscale, inverted: bool, padding: np.ndarray | None) -> Greyscale:
    values, black, white = shown.values, shown.black, shown.white
    if padding is not None and padding.any():
        values = values.copy()
        values[padding] = np.clip(white if inverted else black, *_limits(values.dtype))
    if not inverted:
        return Greyscale(values, black, white)
    if values.dtype == np.uint8 and (black, white) == (0.0, 255.0):
        return Greyscale(255 - values, black, white)
    return Greyscale(-values.astype(np.float32), -white, -black)


def _limits(dtype: np.dtype) -> tuple[float, float]:
    return (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.kind in "iu" else (-np.inf, np.inf)
