"""A DICOM file's header, read within bounds that the file has no say in: for files that a peer chose.

pydicom inflates a deflated data set whole before it looks at it, and makes an object of some 700 bytes out of each item of a
sequence, which takes 8 bytes in the file. Here it reads from a stream that inflates no further than it is read, hands out so
many bytes in so many steps and then ends; values that are long for a header are passed over.
"""

from dataclasses import dataclass
from io import SEEK_CUR, SEEK_SET, BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset, read_partial

from cxr_ray.errors import CxrRayError
from cxr_ray.inflating import inflated_parts

# Behind preamble and prefix.
_META_AT, _META_GROUP = 132, 0x0002
# Pixel Data, and its Float and Double Float kinds.
_PIXELS = frozenset((0x7FE00010, 0x7FE00009, 0x7FE00008))
_ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")


@dataclass(frozen=True)
class Bounds:
    """How much of a file is read.

    Attributes
    ----------
    most_bytes
        That are handed to the parser; of a deflated data set, that are inflated.
    most_steps
        In which they are handed out: one to three an element, as many an item. Items of sequences that the parser leaves for
        later count too.
    longest_value
        What is longer is passed over, and absent from what was read.
    """

    most_bytes: int
    most_steps: int
    longest_value: int


# Headers of chest films have some hundred elements, and nothing that is wanted of them is longer than a short VR can be.
HEADER = Bounds(most_bytes=16 * 1024**2, most_steps=30_000, longest_value=64 * 1024)


class BoundsError(CxrRayError):
    """A file's header is longer, or has more parts, than is read."""


class _IsDeflatedError(Exception):
    """The parser asks for the rest of the file, which it does only to inflate it."""


def read_bounded_header(file: bytes | Path, name: str, bounds: Bounds = HEADER) -> Dataset:
    """Read a DICOM file up to its pixels, with its `file_meta`.

    Parameters
    ----------
    file
        Its bytes, or where it lies.
    name
        As errors name it.

    Raises
    ------
    BoundsError
        When the header does not end within its bounds.
    CxrRayError
        When it cannot be read as DICOM Part 10.
    OSError
        When the file cannot be read.
    """
    if isinstance(file, bytes):
        return _read(BytesIO(file), name, bounds)
    with file.open("rb") as stream:
        return _read(stream, name, bounds)


def _read(source: BinaryIO, name: str, bounds: Bounds) -> Dataset:
    stream = _BoundedStream(source, bounds)
    try:
        return _header(stream, bounds)
    # A peer chose these bytes, and a parser has no closed list of ways to fail on them.
    except Exception as error:
        # The parser hides some of what a stream raises behind an error of its own.
        if isinstance(stream.failure, OSError):
            raise stream.failure from None
        if isinstance(stream.failure, BoundsError):
            raise BoundsError(f"{name}: {stream.failure}") from None
        raise CxrRayError(f"{name}: not readable as DICOM ({type(error).__name__}); send the instance again") from error


def _header(stream: "_BoundedStream", bounds: Bounds) -> Dataset:
    try:
        read = read_partial(cast(BinaryIO, stream), _at_pixels, defer_size=bounds.longest_value)
    except _IsDeflatedError:
        read = _deflated(stream, stream.tell(), bounds)
    stream.check()
    elements = [read.get_item(tag, keep_deferred=True) for tag in read.keys()]  # noqa: SIM118 - iterating converts them
    kept = [element for element in elements if not _is_passed_over(element)]
    stream.count(sum(map(_items, kept)))
    # Not the parser's own data set, which holds on to the stream.
    header = Dataset({element.tag: element for element in kept})
    header.file_meta = read.file_meta
    header.set_original_encoding(*read.original_encoding, read.original_character_set)
    return header


def _deflated(stream: "_BoundedStream", start: int, bounds: Bounds) -> Dataset:
    stream.seek(_META_AT)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag >> 16 != _META_GROUP)
    stream.seek(start)
    stream.inflate()
    read = read_dataset(stream, False, True, stop_when=_at_pixels, defer_size=bounds.longest_value)
    read.file_meta = FileMetaDataset(meta)
    return read


def _at_pixels(tag: int, _vr: str | None, _length: int) -> bool:
    return tag in _PIXELS


def _is_passed_over(element: Any) -> bool:
    return isinstance(element, RawDataElement) and element.value is None and element.length != 0


def _items(element: Any) -> int:
    value = element.value if isinstance(element, RawDataElement) else None
    return sum(value.count(item) for item in _ITEMS) if isinstance(value, bytes) else 0


class _BoundedStream:
    """A file of which a parser gets so many bytes in so many steps; `failure` is why it got no more."""

    def __init__(self, source: BinaryIO, bounds: Bounds) -> None:
        self._source: BinaryIO | _Inflated = source
        self._bounds = bounds
        self._bytes_left, self._steps_left = bounds.most_bytes, bounds.most_steps
        self.failure: Exception | None = None

    def inflate(self) -> None:
        """Read on in what the rest of the file inflates to."""
        self._source = _Inflated(cast(BinaryIO, self._source), self._bounds.most_bytes)

    def read(self, size: int = -1) -> bytes:
        self.count(1)
        if size < 0:
            raise _IsDeflatedError
        try:
            content = self._source.read(min(size, self._bytes_left + 1))
            self._bytes_left -= len(content)
            if self._bytes_left < 0:
                raise _too_long(self._bounds.most_bytes)
        except (OSError, BoundsError) as error:
            self.failure = error
            raise
        return content

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        return self._source.seek(offset, whence)

    def tell(self) -> int:
        return self._source.tell()

    def count(self, steps: int) -> None:
        """Count steps, and end where they are too many."""
        self._steps_left -= steps
        if self._steps_left < 0:
            self.failure = BoundsError("its header has too many elements and items; mend the sender")
            raise self.failure

    def check(self) -> None:
        """Fail now where the parser went on after a failure."""
        if self.failure is not None:
            raise self.failure


class _Inflated:
    """What a deflated data set becomes, as far as it was read, and at most so many bytes of it."""

    def __init__(self, compressed: BinaryIO, most_bytes: int) -> None:
        self._parts, self._most_bytes = inflated_parts(compressed), most_bytes
        self._content = bytearray()
        self._position = 0

    def read(self, size: int) -> bytes:
        end = self._position + size
        while len(self._content) < end and (part := next(self._parts, None)) is not None:
            self._content += part
            if len(self._content) > self._most_bytes:
                raise _too_long(self._most_bytes)
        content = bytes(self._content[self._position : end])
        self._position += len(content)
        return content

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        self._position = self._position + offset if whence == SEEK_CUR else offset
        return self._position

    def tell(self) -> int:
        return self._position


def _too_long(most_bytes: int) -> BoundsError:
    return BoundsError(f"its header does not end within {most_bytes} bytes; mend the sender")
