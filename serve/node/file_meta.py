"""The head of a DICOM file: preamble and file meta information, made and read as bytes (PS3.10 section 7.1).

Files of the spool say who sent them and from where: Source Application Entity Title (0002,0016) and Source Presentation
Address (0002,0026). Values are not judged: real archives hold UIDs with leading zeros, which are kept as they came.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

IMPLEMENTATION_CLASS_UID = "2.25.322980158282305504265312806421250201875"
IMPLEMENTATION_VERSION_NAME = "CXRRAY_1"
_PREAMBLE = b"\x00" * 128 + b"DICM"
_LARGEST = 64 * 1024
_LONG_FORMS = frozenset((b"OB", b"OW", b"UN", b"UR", b"UT", b"SQ", b"UC"))
_CLASS, _INSTANCE, _SYNTAX = 0x0002, 0x0003, 0x0010
_SOURCE_TITLE, _RECEIVING_TITLE, _SOURCE_ADDRESS = 0x0016, 0x0018, 0x0026
_GROUP_LENGTH = struct.Struct("<HH2sHL")


@dataclass(frozen=True)
class FileMeta:
    """What a file's meta information says; empty where it says nothing.

    Attributes
    ----------
    source_address
        Of the sender, as a URI: see `presentation_address`.
    """

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    source_title: str = ""
    receiving_title: str = ""
    source_address: str = ""


def encode_head(meta: FileMeta) -> bytes:
    """Make all that stands before a file's data set."""
    values: tuple[tuple[int, bytes, str], ...] = (
        (_CLASS, b"UI", meta.sop_class_uid),
        (_INSTANCE, b"UI", meta.sop_instance_uid),
        (_SYNTAX, b"UI", meta.transfer_syntax_uid),
        (0x0012, b"UI", IMPLEMENTATION_CLASS_UID),
        (0x0013, b"SH", IMPLEMENTATION_VERSION_NAME),
        (_SOURCE_TITLE, b"AE", title(meta.source_title)),
        (_RECEIVING_TITLE, b"AE", title(meta.receiving_title)),
        (_SOURCE_ADDRESS, b"UR", meta.source_address),
    )
    body = struct.pack("<HH2s2xL", 2, 1, b"OB", 2) + b"\x00\x01"
    body += b"".join(_element(element, kind, value) for element, kind, value in values if value)
    return _PREAMBLE + _GROUP_LENGTH.pack(2, 0, b"UL", 4, len(body)) + body


def split_part10(file: memoryview) -> tuple[FileMeta, memoryview]:
    """Part a DICOM file into what its meta information says and its data set.

    Raises
    ------
    ValueError
        When it has no preamble or its meta information cannot be read.
    """
    start = len(_PREAMBLE)
    if len(file) < start + _GROUP_LENGTH.size or bytes(file[128:start]) != b"DICM":
        raise ValueError("no DICOM Part 10 file")
    group, element, kind, _, length = _GROUP_LENGTH.unpack_from(file, start)
    if (group, element, kind) == (2, 0, b"UL"):
        start += _GROUP_LENGTH.size
    else:
        # Toolkits write files without it, although it is of type 1 (PS3.10 table 7.1-1).
        length = _counted(file, start)
    if not 0 < length <= min(_LARGEST, len(file) - start):
        raise ValueError("its file meta information has no proper length")
    return _decode(bytes(file[start : start + length])), file[start + length :]


def read_meta(path: Path) -> FileMeta:
    """Read a file's meta information.

    Raises
    ------
    ValueError
        As `split_part10`.
    OSError
        When the file cannot be read.
    """
    with path.open("rb") as file:
        return split_part10(memoryview(file.read(_LARGEST + 256)))[0]


def _counted(file: memoryview, start: int) -> int:
    """Bytes of the elements of group 0002 that begin at `start`, explicit VR little endian (PS3.5 section 7.1.2)."""
    place = start
    while place - start <= _LARGEST and len(file) >= place + 12 and bytes(file[place : place + 2]) == b"\x02\x00":
        kind = bytes(file[place + 4 : place + 6])
        if kind in _LONG_FORMS:
            place += 12 + struct.unpack_from("<L", file, place + 8)[0]
        else:
            place += 8 + struct.unpack_from("<H", file, place + 6)[0]
    return place - start


def presentation_address(scheme: str, host: str, port: int | None = None) -> str:
    """Where a peer is, as a URI: an IPv6 address stands in brackets (RFC 3986 section 3.2.2)."""
    name = f"[{host}]" if ":" in host else host
    return f"{scheme}://{name}" if port is None else f"{scheme}://{name}:{port}"


def title(text: str) -> str:
    """An AE title within what AE allows (PS3.5 section 6.2): anything else is dropped."""
    return "".join(letter for letter in text if " " <= letter <= "~" and letter != "\\").strip()[:16]


def _element(element: int, kind: bytes, value: str) -> bytes:
    encoded = value.encode("ascii", "replace")
    if len(encoded) % 2:
        encoded += b"\x00" if kind == b"UI" else b" "
    if kind in _LONG_FORMS:
        return struct.pack("<HH2s2xL", 2, element, kind, len(encoded)) + encoded
    return struct.pack("<HH2sH", 2, element, kind, len(encoded)) + encoded


def _decode(body: bytes) -> FileMeta:
    values: dict[int, str] = {}
    position = 0
    try:
        while position < len(body):
            group, element, kind = struct.unpack_from("<HH2s", body, position)
            if group != 2:
                raise ValueError("its file meta information holds another group")
            if kind in _LONG_FORMS:
                (length,) = struct.unpack_from("<L", body, position + 8)
                position += 12
            else:
                (length,) = struct.unpack_from("<H", body, position + 6)
                position += 8
            values[element] = body[position : position + length].decode("latin-1").strip("\x00 ")
            position += length
    except struct.error:
        raise ValueError("its file meta information is cut off") from None
    return FileMeta(
        sop_class_uid=values.get(_CLASS, ""),
        sop_instance_uid=values.get(_INSTANCE, ""),
        transfer_syntax_uid=values.get(_SYNTAX, ""),
        source_title=values.get(_SOURCE_TITLE, ""),
        receiving_title=values.get(_RECEIVING_TITLE, ""),
        source_address=values.get(_SOURCE_ADDRESS, ""),
    )
