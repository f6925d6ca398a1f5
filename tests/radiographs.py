"""Small DICOM radiographs, made as tests need them."""

import io
import struct

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from cxr_ray.dicom_header import read_dicom
from cxr_ray.dicom_pixels import decode_dicom
from cxr_ray.pixels import stored_square

NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
FILM = np.random.default_rng(1).permutation(np.repeat(np.arange(256, dtype=np.uint8), 6)).reshape(48, 32)


def radiograph(pixels=FILM, syntax=ExplicitVRLittleEndian, **attributes):
    """A chest film of `pixels`; attributes that are None are removed."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.SOPInstanceUID, dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3.1", "1.2.3.2", "1.2.3.3"
    dataset.PatientID, dataset.PatientSex, dataset.PatientAge = "P1", "F", "062Y"
    dataset.StudyDate, dataset.StudyTime = "20200131", "101112"
    dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition = "CR", "CHEST", "PA"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    order = "<" if syntax.is_little_endian else ">"
    content = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    dataset.PixelData = content + b"\0" * (len(content) % 2)
    dataset["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 and not syntax.is_implicit_VR else "OW"
    for name, value in attributes.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    if "HighBit" not in attributes:
        dataset.HighBit = dataset.BitsStored - 1
    return dataset


def compressed(dataset, syntax, code_stream):
    """The dataset with a code stream that another encoder made, in place of its pixels."""
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([code_stream])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return dataset


def rle_frame(cells):
    """Cells (rows, columns) or (rows, columns, samples) as PS3.5 annex G writes them, by runs of 128 literal bytes."""
    samples = cells.reshape(cells.shape[0] * cells.shape[1], -1)
    planes = samples.astype(samples.dtype.newbyteorder(">")).view(np.uint8).T
    segments = [b"".join(bytes([len(run) - 1]) + run for run in _runs(plane.tobytes())) for plane in planes]
    segments = [segment + b"\x80" * (len(segment) % 2) for segment in segments]
    starts = np.cumsum([64, *map(len, segments)])[:-1]
    return struct.pack("<16L", len(segments), *starts, *[0] * (15 - len(segments))) + b"".join(segments)


def _runs(content):
    return [content[start : start + 128] for start in range(0, len(content), 128)]


def file_of(dataset):
    """The bytes of a DICOM file."""
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def decoded(data, name="film.dcm"):
    """What `decode_dicom` makes of a file's bytes."""
    return decode_dicom(read_dicom(data, name), name)


def as_greys(grey):
    """What a display of 256 greys shows; uint8."""
    share = (grey.values.astype(np.float64) - grey.black) / (grey.white - grey.black)
    return np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)


def shown(dataset):
    """What a display shows of a dataset that was written and read again; uint8."""
    return as_greys(decoded(file_of(dataset)))


def square_of(data, name="film.dcm", size=64):
    """The stored square of a DICOM file's bytes."""
    return stored_square(decoded(data, name), size, name)


def lut(entries, first, bits, representation="US"):
    """A Modality or VOI LUT; `first` is the value that the first entry belongs to."""
    item = Dataset()
    item.add_new("LUTDescriptor", representation, [len(entries) % 65536, first, bits])
    item.add_new("LUTData", "US", [int(entry) for entry in entries])
    return Sequence([item])


def png(values):
    """A PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()
