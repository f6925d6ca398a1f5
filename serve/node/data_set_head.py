"""What a data set says at its beginning: an image's SOP Class UID and SOP Instance UID, a report's Transaction UID.

Read from the first bytes of what a peer sent, in one pass, without recursion and without building anything: sequences
before them are stepped over, however deeply they are nested.

References: PS3.5 sections 7.1 and 7.5, annex A.
"""

import struct
import zlib

from cxr_ray.transfer_syntaxes import DEFLATED, EXPLICIT_BIG_ENDIAN, IMPLICIT_LITTLE_ENDIAN

HEAD_BYTES = 64 * 1024
_SOP_CLASS_UID, _SOP_INSTANCE_UID, _TRANSACTION_UID = 0x00080016, 0x00080018, 0x00081195
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_LONG_FORMS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))


def class_and_instance(head: bytes, transfer_syntax: str) -> tuple[str, str]:
    """Read SOP Class UID and SOP Instance UID; empty where the data set's head has none.

    Parameters
    ----------
    head
        The first `HEAD_BYTES` of the encoded data set, or all of it.

    Raises
    ------
    ValueError
        When it is not encoded as the transfer syntax says.
    """
    if transfer_syntax == DEFLATED:
        try:
            head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(head, HEAD_BYTES)
        except zlib.error as error:
            raise ValueError("not deflated") from error
    found = _scan(head, transfer_syntax, (_SOP_CLASS_UID, _SOP_INSTANCE_UID))
    return found.get(_SOP_CLASS_UID, ""), found.get(_SOP_INSTANCE_UID, "")


def transaction_uid(report: bytes, transfer_syntax: str) -> str:
    """Read the Transaction UID of a report on storage commitment (PS3.4 table J.3-2); empty where it has none.

    Raises
    ------
    ValueError
        When what stands before it is not encoded as the transfer syntax, which deflates nothing, says.
    """
    return _scan(report, transfer_syntax, (_TRANSACTION_UID,)).get(_TRANSACTION_UID, "")


def _scan(head: bytes, transfer_syntax: str, wanted: tuple[int, ...]) -> dict[int, str]:
    order = ">" if transfer_syntax == EXPLICIT_BIG_ENDIAN else "<"
    explicit = transfer_syntax != IMPLICIT_LITTLE_ENDIAN
    found: dict[int, str] = {}
    position = depth = last = 0
    try:
        while position < len(head):
            tag, representation, length, position = _element(head, position, order, explicit=explicit)
            if tag in (_ITEM_END, _SEQUENCE_END):
                depth -= 1
            elif length == _UNDEFINED:
                if tag != _ITEM and representation not in (b"SQ", b""):
                    raise ValueError("an element of undefined length is no sequence")
                depth += 1
            else:
                if not depth:
                    if tag > wanted[-1]:
                        break
                    if tag <= last:
                        raise ValueError("elements are out of order")
                    last = tag
                    if tag in wanted:
                        found[tag] = head[position : position + length].decode("ascii").rstrip("\x00 ")
                position += length
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError("not encoded as its transfer syntax says") from error
    return found


def _element(head: bytes, position: int, order: str, *, explicit: bool) -> tuple[int, bytes, int, int]:
    group, element = struct.unpack_from(f"{order}HH", head, position)
    tag = group << 16 | element
    position += 4
    if explicit and group != 0xFFFE:
        representation = head[position : position + 2]
        if not (representation.isalpha() and representation.isupper()):
            raise ValueError("an element has no value representation")
        if representation not in _LONG_FORMS:
            return tag, representation, *struct.unpack_from(f"{order}H", head, position + 2), position + 4
        return tag, representation, *struct.unpack_from(f"{order}L", head, position + 4), position + 8
    return tag, b"", *struct.unpack_from(f"{order}L", head, position), position + 4
