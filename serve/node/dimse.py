"""Command sets of DIMSE messages, as a service provider reads and answers them (PS3.7 section 6.3 and annex E).

A command set is implicit VR little endian and holds elements of group 0000 alone. It is read with its length bounded by
who collected it, and as values that are asked for by tag: nobody's order, and no element that is not needed, can do harm.
"""

import re
import struct
from dataclasses import dataclass
from enum import IntEnum

from serve.node.pdu import AbortReason, ProtocolError

_ELEMENT = struct.Struct("<HHL")
_NO_DATA_SET = 0x0101
_RESPONSE = 0x8000
_LONGEST_COMMENT = 64
_UID = re.compile(r"[0-9.]{1,64}")
_UIDS = (0x0002, 0x0003, 0x1000, 0x1001)


class CommandField(IntEnum):
    """Requests that are looked at (PS3.7 table E.1-1)."""

    C_STORE = 0x0001
    C_ECHO = 0x0030
    C_CANCEL = 0x0FFF
    N_EVENT_REPORT = 0x0100


class Tag(IntEnum):
    """Elements of group 0000 (PS3.7 annex E)."""

    AFFECTED_SOP_CLASS_UID = 0x0002
    REQUESTED_SOP_CLASS_UID = 0x0003
    COMMAND_FIELD = 0x0100
    MESSAGE_ID = 0x0110
    MESSAGE_ID_RESPONDED_TO = 0x0120
    DATA_SET_TYPE = 0x0800
    STATUS = 0x0900
    ERROR_COMMENT = 0x0902
    AFFECTED_SOP_INSTANCE_UID = 0x1000
    REQUESTED_SOP_INSTANCE_UID = 0x1001
    EVENT_TYPE_ID = 0x1002
    ACTION_TYPE_ID = 0x1008


@dataclass(frozen=True)
class Command:
    """A received command set."""

    elements: dict[int, bytes]

    @property
    def field(self) -> int:
        """Which operation is requested, or answered to."""
        return self.number(Tag.COMMAND_FIELD)

    @property
    def is_response(self) -> bool:
        """Whether it answers to a request of ours."""
        return bool(self.field & _RESPONSE)

    @property
    def has_data_set(self) -> bool:
        """Whether a data set follows."""
        return self.number(Tag.DATA_SET_TYPE) != _NO_DATA_SET

    def number(self, tag: Tag) -> int:
        """An unsigned short; 0 where it is absent."""
        return int.from_bytes(self.elements.get(tag, b"")[:2], "little")

    def uid(self, tag: Tag) -> str:
        """A UID; empty where it is absent or none."""
        text = self.elements.get(tag, b"").decode("latin-1").rstrip("\x00 ")
        return text if _UID.fullmatch(text) else ""

    def has(self, tag: Tag) -> bool:
        """Whether there is such an element with a value."""
        return bool(self.elements.get(tag))


@dataclass(frozen=True)
class Answer:
    """How a request ended: its status (PS3.7 annex C) and what goes with it."""

    status: int
    comment: str = ""


def decode_command(data: bytes | bytearray) -> Command:
    """Read a whole command set.

    Raises
    ------
    ProtocolError
        When lengths do not fit, another group is in it, or it names no command or no message.
    """
    elements: dict[int, bytes] = {}
    position, end = 0, len(data)
    while position < end:
        if end - position < _ELEMENT.size:
            raise ProtocolError("a command set is cut off")
        group, element, length = _ELEMENT.unpack_from(data, position)
        position += _ELEMENT.size
        if group or position + length > end:
            raise ProtocolError("a command set has an impossible length or group")
        elements[element] = bytes(data[position : position + length])
        position += length
    if not {Tag.COMMAND_FIELD, Tag.MESSAGE_ID} <= elements.keys() and Tag.MESSAGE_ID_RESPONDED_TO not in elements:
        raise ProtocolError("a command set names no command or no message", AbortReason.UNEXPECTED_PARAMETER)
    return Command(elements)


def encode_response(request: Command, answer: Answer) -> bytes:
    """Make the command set that answers to a request, without a data set; what the request named is named again."""
    is_n_service = request.field in (CommandField.N_EVENT_REPORT, 0x0110, 0x0120, 0x0130, 0x0140, 0x0150)
    values: dict[int, bytes] = {
        Tag.COMMAND_FIELD: _short(request.field | _RESPONSE),
        Tag.MESSAGE_ID_RESPONDED_TO: _short(request.number(Tag.MESSAGE_ID)),
        Tag.DATA_SET_TYPE: _short(_NO_DATA_SET),
        Tag.STATUS: _short(answer.status),
    }
    # The requested ones of an N service are the affected ones of its response (PS3.7 section 10.3).
    for affected, requested in (
        (Tag.AFFECTED_SOP_CLASS_UID, Tag.REQUESTED_SOP_CLASS_UID),
        (Tag.AFFECTED_SOP_INSTANCE_UID, Tag.REQUESTED_SOP_INSTANCE_UID),
    ):
        uid = request.uid(affected) or (request.uid(requested) if is_n_service else "")
        if uid:
            values[affected] = uid.encode("ascii")
    for tag in (Tag.EVENT_TYPE_ID, Tag.ACTION_TYPE_ID):
        if is_n_service and request.has(tag):
            values[tag] = _short(request.number(tag))
    if answer.comment:
        values[Tag.ERROR_COMMENT] = answer.comment.encode("ascii", "replace")[:_LONGEST_COMMENT]
    return encode_elements(values)


def encode_elements(values: dict[int, bytes]) -> bytes:
    """Make a command set of elements of group 0000, padded to even length and preceded by the group's length."""
    body = b"".join(_element(tag, value) for tag, value in sorted(values.items()))
    return _element(0, struct.pack("<L", len(body))) + body


def _element(tag: int, value: bytes) -> bytes:
    padded = value + ((b"\x00" if tag in _UIDS else b" ") if len(value) % 2 else b"")
    return _ELEMENT.pack(0, tag, len(padded)) + padded


def _short(value: int) -> bytes:
    return struct.pack("<H", value & 0xFFFF)
