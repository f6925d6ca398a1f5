"""Stored values of a DICOM image, one decoder a transfer syntax.

Native pixels are a view of the file's bytes. RLE is read by Pillow's PackBits, JPEG of 8 bits by Pillow, JPEG-LS by CharLS,
JPEG 2000 and HTJ2K by OpenJPEG; lossless JPEG and JPEG of 12 bits by GDCM in a process of its own. Before a decoder starts,
the size in its code stream must be the one that the header announces: decoders reserve what the code stream asks for, so
that a few damaged bytes could cost gigabytes and minutes. Of how many bits a sample has, the code stream knows more.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import convert_color_space, get_decoder
from pydicom.uid import UID

from cxr_ray.dicom_layout import PixelLayout, stored_bits
from cxr_ray.dicom_values import printable, text
from cxr_ray.isolated_jpeg import JpegFrame, decode_isolated
from cxr_ray.pixels import DamagedImage, UnsupportedImage
from cxr_ray.transfer_syntaxes import DECODERS, TRANSFER_SYNTAXES, Decoder

_JPEG_START, _JPEG2000_START = b"\xff\xd8", b"\xff\x4f\xff\x51"
_MAX_BOXES = 1 << 16
_FILL, _TEMPORARY = 0xFF, (0x01, *range(0xD0, 0xD8))
# Start of frame of each process of JPEG (ITU-T T.81 table B.1) and of JPEG-LS (T.87).
_FRAME_MARKERS = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7)
_RLE_HEADER = struct.Struct("<16L")


class _Undecodable(ValueError):
    """Pixels do not decode; the text is ours and quotes nothing but numbers."""


@dataclass(frozen=True)
class _CodeStream:
    rows: int
    columns: int
    samples: int
    precision: int


def stored_values(dataset: Dataset, layout: PixelLayout, name: str) -> np.ndarray:
    """The stored values of a dataset's only image.

    Returns
    -------
    numpy.ndarray
        Of 1 sample a pixel: integers, shape (rows, columns), unused bits cleared and signs extended. Of 3 samples: RGB,
        unsigned integers, shape (rows, columns, 3).

    Raises
    ------
    DamagedImage
        If the pixels are fewer than announced or do not decode.
    UnsupportedImage
        If no decoder knows the transfer syntax.
    """
    syntax = UID(text(dataset.file_meta, "TransferSyntaxUID"))
    if not syntax:
        raise DamagedImage(f"{name}: TransferSyntaxUID is absent; send DICOM Part 10 with its file meta information")
    known = printable(syntax.name)
    if syntax not in TRANSFER_SYNTAXES:
        raise UnsupportedImage(f"{name}: transfer syntax {known} is not decoded; transcode it to Explicit VR Little Endian")
    try:
        if DECODERS[syntax] is Decoder.NATIVE:
            return _native(dataset, layout, little_endian=syntax.is_little_endian)
        return _encapsulated(dataset, layout, syntax)
    except _Undecodable as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - each codec raises its own kinds, and quotes what it read
        reason = type(error).__name__
    raise DamagedImage(f"{name}: pixels do not decode as {known} ({reason}); send the file again")


def _native(dataset: Dataset, layout: PixelLayout, *, little_endian: bool) -> np.ndarray:
    if layout.samples > 1:
        return _through_pydicom(dataset, "")
    if layout.sample_bytes > 2 and not little_endian:
        raise _Undecodable("readers disagree about the order of big-endian samples of 32 bits")
    data = dataset.PixelData
    needed = layout.pixels * layout.sample_bytes
    if len(data) < needed:
        raise _Undecodable(f"PixelData has {len(data)} bytes, its header asks for {needed}")
    if layout.sample_bytes == 1 and not little_endian and dataset["PixelData"].VR == "OW":
        # The words of OW are turned round, whatever they hold (PS3.5 section 8.1.1); an odd last byte has its padding.
        words = np.frombuffer(data, dtype=">u2", count=len(data) // 2)
        cells = words.astype("<u2").view(np.uint8)[:needed]
    else:
        order = "<" if little_endian else ">"
        cells = np.frombuffer(data, dtype=f"{order}u{layout.sample_bytes}", count=layout.pixels)
        cells = cells.astype(cells.dtype.newbyteorder("="), copy=False)
    return stored_bits(cells.reshape(layout.rows, layout.columns), layout, layout.high_bit)


def _encapsulated(dataset: Dataset, layout: PixelLayout, syntax: UID) -> np.ndarray:
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    decoder = DECODERS[syntax]
    if decoder is Decoder.RLE:
        return _decode_rle(frame, layout)
    stream = _code_stream(frame)
    if (stream.rows, stream.columns) != (layout.rows, layout.columns):
        announced = f"{layout.columns}x{layout.rows}"
        raise _Undecodable(f"its code stream is {stream.columns}x{stream.rows}, the header says {announced}")
    if stream.samples != layout.samples:
        raise _Undecodable(f"its code stream has {stream.samples} samples a pixel, the header says {layout.samples}")
    if decoder is Decoder.ISOLATED:
        cells = _isolated(frame, layout, syntax, stream.precision)
    else:
        # Named, because pydicom would try GDCM first everywhere, which ends the process on some damaged images.
        cells = _through_pydicom(dataset, decoder.value)
    if layout.samples > 1:
        return cells
    # A code stream of fewer bits than the header's highest holds the stored bits alone.
    high_bit = layout.high_bit if stream.precision > layout.high_bit else layout.bits_stored - 1
    return stored_bits(cells, layout, high_bit)


def _through_pydicom(dataset: Dataset, plugin: str) -> np.ndarray:
    values, _ = get_decoder(dataset.file_meta.TransferSyntaxUID).as_array(dataset, index=0, decoding_plugin=plugin)
    return np.asarray(values)


def _isolated(frame: bytes, layout: PixelLayout, syntax: UID, precision: int) -> np.ndarray:
    sample_bytes = 1 if precision <= 8 else 2
    question = JpegFrame(
        transfer_syntax=str(syntax),
        rows=layout.rows,
        columns=layout.columns,
        samples=layout.samples,
        photometric=layout.photometric,
        bits_allocated=8 * sample_bytes,
        bits_stored=precision,
    )
    try:
        values = decode_isolated(question, frame)
    except ValueError as error:
        raise _Undecodable(str(error)) from None
    shape = (layout.rows, layout.columns) if layout.samples == 1 else (layout.rows, layout.columns, layout.samples)
    cells = np.frombuffer(values, dtype=f"<u{sample_bytes}").reshape(shape)
    return _rgb(cells, layout) if layout.samples > 1 else cells


def _decode_rle(frame: bytes, layout: PixelLayout) -> np.ndarray:
    """A frame of PS3.5 annex G: a segment a byte of each sample, the highest byte first."""
    segments, *offsets = _RLE_HEADER.unpack_from(frame)
    planes = layout.samples * layout.sample_bytes
    if segments != planes:
        raise _Undecodable(f"{segments} RLE segments, {planes} needed")
    ends = [*offsets[1:planes], len(frame)]
    cells = np.empty((layout.pixels, layout.samples, layout.sample_bytes), dtype=np.uint8)
    for plane, (start, end) in enumerate(zip(offsets, ends, strict=False)):
        sample, byte = divmod(plane, layout.sample_bytes)
        # As one row, because runs may cross the image's rows; Pillow stops where the row is full.
        row = Image.frombytes("L", (layout.pixels, 1), frame[start:end], "packbits", "L")
        cells[:, sample, layout.sample_bytes - 1 - byte] = np.asarray(row)[0]
    values = cells.reshape(-1).view(f"<u{layout.sample_bytes}").reshape(layout.rows, layout.columns, layout.samples)
    if layout.samples == 1:
        return stored_bits(values[:, :, 0], layout, layout.high_bit)
    return _rgb(values, layout)


def _rgb(values: np.ndarray, layout: PixelLayout) -> np.ndarray:
    is_ybr = layout.photometric in ("YBR_FULL", "YBR_FULL_422")
    return convert_color_space(values, "YBR_FULL", "RGB") if is_ybr else values


def _code_stream(frame: bytes) -> _CodeStream:
    """What a code stream of JPEG, JPEG-LS or JPEG 2000 says of its size."""
    parse: Callable[[bytes], _CodeStream] = _jpeg_frame if frame[:2] == _JPEG_START else _jpeg2000_size
    try:
        return parse(frame)
    except (struct.error, ValueError):
        raise _Undecodable("its code stream has no header") from None


def _jpeg_frame(frame: bytes) -> _CodeStream:
    position = 2
    while True:
        start, marker = struct.unpack_from(">BB", frame, position)
        if start != _FILL:
            raise ValueError("no marker")
        if marker in _FRAME_MARKERS:
            break
        if marker == _FILL:
            position += 1
        elif marker in _TEMPORARY:
            position += 2
        else:
            position += 2 + struct.unpack_from(">H", frame, position + 2)[0]
    precision, rows, columns, samples = struct.unpack_from(">BHHB", frame, position + 4)
    return _CodeStream(rows, columns, samples, precision)


def _jpeg2000_size(frame: bytes) -> _CodeStream:
    """The SIZ segment (ITU-T T.800 A.5.1), also where the boxes of a JP2 file stand before the code stream."""
    start = frame.index(_JPEG2000_START, 0, _MAX_BOXES)
    right, lower, left, upper = struct.unpack_from(">4I", frame, start + 8)
    samples, depth = struct.unpack_from(">HB", frame, start + 40)
    return _CodeStream(lower - upper, right - left, samples, (depth & 0x7F) + 1)
