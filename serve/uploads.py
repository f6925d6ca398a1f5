"""An uploaded file as the network reads it: its type told by content, its pixels the stored square, its header's word.

Who answers over HTTP and who reads folders decode by these functions, so that a file is answered alike on both ways.
"""

from dataclasses import dataclass
from datetime import date
from typing import Literal, NamedTuple, Protocol

import numpy as np

from cxr_ray.dicom_header import RadiographHeader, looks_like_dicom, radiograph_header, read_dicom
from cxr_ray.dicom_pixels import decode_dicom
from cxr_ray.pixels import Greyscale, decode_picture, stored_square


class Header(Protocol):
    """What a file's header says of the patient; None where it does not say."""

    @property
    def age_years(self) -> float | None:
        """0 to 120."""

    @property
    def sex(self) -> str | None:
        """Either "M" or "F"."""

    @property
    def view(self) -> str | None:
        """Either "PA" or "AP"."""


class Stated(NamedTuple):
    """What a client says of the patient; None where it says nothing, and a DICOM header or the store may."""

    age: float | None = None
    sex: Literal["M", "F"] | None = None
    view: Literal["PA", "AP"] | None = None
    history: list[str] | None = None
    patient_id: str | None = None
    study_date: date | None = None

    def filled(self, header: Header) -> "Stated":
        """The same, with what the image's header knows beside it."""
        age = header.age_years if self.age is None else self.age
        sex, view = self.sex or header.sex, self.view or header.view
        return self._replace(age=age, sex=sex, view=view)  # type: ignore[arg-type]


@dataclass(frozen=True)
class DicomIdentity:
    """Which instance a DICOM file is, and whose; empty strings and None where it does not say."""

    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    patient_id: str
    accession_number: str
    study_date: date | None


@dataclass(frozen=True)
class UploadHeader:
    """What a file says besides its pixels; a picture says nothing."""

    age_years: float | None = None
    sex: Literal["M", "F"] | None = None
    view: Literal["PA", "AP"] | None = None
    warnings: tuple[str, ...] = ()
    identity: DicomIdentity | None = None


NOTHING_STATED = Stated(None, None, None, None)


@dataclass(frozen=True)
class DecodedImage:
    """An upload as the network reads it: pixels uint8 (size, size), and what a DICOM header says of the patient."""

    pixels: np.ndarray
    age_years: float | None = None
    sex: Literal["M", "F"] | None = None
    view: Literal["PA", "AP"] | None = None
    warnings: tuple[str, ...] = ()
    identity: DicomIdentity | None = None


def read_upload(data: bytes, name: str) -> tuple[Greyscale, UploadHeader]:
    """Decode a PNG, JPEG or DICOM file.

    Raises
    ------
    ImageError
        If it is none of these, damaged, too large, or no frontal chest radiograph.
    """
    if not looks_like_dicom(data):
        return decode_picture(data, name), UploadHeader()
    dataset = read_dicom(data, name)
    header = radiograph_header(dataset, name)
    return decode_dicom(dataset, name), _said(header)


def decode_upload(data: bytes, name: str, size: int) -> DecodedImage:
    """Decode a PNG, JPEG or DICOM file to a stored square; errors as `read_upload` and `stored_square`."""
    grey, header = read_upload(data, name)
    return DecodedImage(stored_square(grey, size, name), **vars(header))


def _said(header: RadiographHeader) -> UploadHeader:
    identity = DicomIdentity(
        sop_instance_uid=header.sop_instance_uid,
        study_instance_uid=header.study_instance_uid,
        series_instance_uid=header.series_instance_uid,
        patient_id=header.patient_id,
        accession_number=header.accession_number,
        study_date=header.acquired.date() if header.acquired else None,
    )
    return UploadHeader(header.age_years, header.sex, header.view, header.warnings, identity)  # type: ignore[arg-type]
