"""A fast way through the PNG that radiographs come as: greyscale of 8 or 16 bits, not interlaced.

A third of the time that such a file takes goes to zlib's inflate, which ISA-L does three times as fast. So the stream is
inflated and verified here, and handed to OpenCV as an equal PNG whose stream is stored and not compressed. Whatever is damaged,
unusual or of another kind is left to the general decoder, which also knows what to say of it.
"""

import struct

import cv2
import numpy as np
from isal import isal_zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">IIBBBBB")
_GREY = 0
_TRANSPARENT, _ANIMATED = b"tRNS", b"acTL"
_FILTERS = 5
_END = b"\0\0\0\0IEND\xaeB`\x82"
_ZLIB_START = b"\x78\x01"
_BLOCK_BYTES = 0xFFFF


def decode_grey_png(data: bytes, max_pixels: int) -> np.ndarray | None:
    """The pixels of an undamaged greyscale PNG.

    Returns
    -------
    numpy.ndarray or None
        uint8 or uint16, shape (height, width); None where the file is anything else, or has more than `max_pixels`.
    """
    parts = _header_and_stream(memoryview(data))
    if parts is None:
        return None
    header, packed = parts
    width, height, depth, colour, *methods = _HEADER.unpack(header)
    if colour != _GREY or depth not in (8, 16) or any(methods) or not 0 < width * height <= max_pixels:
        return None
    line = 1 + width * depth // 8
    stream = _inflated(packed, height * line)
    if stream is None or np.frombuffer(stream, np.uint8)[::line].max() >= _FILTERS:
        return None
    stored = b"".join([_SIGNATURE, *_chunk(b"IHDR", [header]), *_chunk(b"IDAT", _stored(stream)), _END])
    return cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_UNCHANGED)


def _header_and_stream(data: memoryview) -> tuple[memoryview, bytes] | None:
    """The content of IHDR and the joined contents of IDAT, up to IEND."""
    position = len(_SIGNATURE)
    if data[:position] != _SIGNATURE:
        return None
    header, packed = None, []
    while position + 12 <= len(data):
        kind, end = bytes(data[position + 4 : position + 8]), position + 12 + int.from_bytes(data[position : position + 4])
        content = data[position + 8 : end - 4]
        if end > len(data) or kind in (_TRANSPARENT, _ANIMATED):
            return None
        if kind == b"IEND":
            return None if header is None else (header, b"".join(packed))
        if kind == b"IHDR":
            if len(content) != _HEADER.size or isal_zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(
                data[end - 4 : end]
            ):
                return None
            header = content
        if kind == b"IDAT":
            packed.append(content)
        position = end
    return None


def _inflated(packed: bytes, expected: int) -> bytes | None:
    """The stream, if it has the expected length and its checksum is right."""
    inflater = isal_zlib.decompressobj()
    try:
        stream = inflater.decompress(packed, expected + 1)
    except isal_zlib.error:  # type: ignore[misc] # its type is told to nobody
        return None
    return stream if len(stream) == expected and inflater.eof and not inflater.unused_data else None


def _stored(stream: bytes) -> list[bytes | memoryview]:
    """The stream in stored blocks (RFC 1950, RFC 1951 section 3.2.4)."""
    view = memoryview(stream)
    parts: list[bytes | memoryview] = [_ZLIB_START]
    for start in range(0, len(view), _BLOCK_BYTES):
        block = view[start : start + _BLOCK_BYTES]
        last = start + _BLOCK_BYTES >= len(view)
        parts += [struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF), block]
    return [*parts, isal_zlib.adler32(stream).to_bytes(4)]


def _chunk(kind: bytes, parts: list[bytes | memoryview]) -> list[bytes | memoryview]:
    checksum = isal_zlib.crc32(kind)
    for part in parts:
        checksum = isal_zlib.crc32(part, checksum)
    return [sum(map(len, parts)).to_bytes(4), kind, *parts, checksum.to_bytes(4)]
