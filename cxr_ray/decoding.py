"""Decoding by format, for callers that hold a file's bytes and know what its source delivers."""

from enum import StrEnum

from cxr_ray.pixels import Greyscale, decode_picture


class Format(StrEnum):
    """What the files of a source are; ANY where each file's content tells."""

    PICTURE = "picture"
    DICOM = "dicom"
    ANY = "any"


def decode(kind: Format, data: bytes, name: str) -> Greyscale:
    """Decode a PNG or JPEG, or a DICOM file; errors as `decode_picture`, `read_dicom` and `decode_dicom`."""
    if kind is Format.PICTURE:
        return decode_picture(data, name)
    from cxr_ray.dicom_header import looks_like_dicom, read_dicom  # noqa: PLC0415 - pictures need no pydicom
    from cxr_ray.dicom_pixels import decode_dicom  # noqa: PLC0415

    if kind is Format.ANY and not looks_like_dicom(data):
        return decode_picture(data, name)
    return decode_dicom(read_dicom(data, name), name)
