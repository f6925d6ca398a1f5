"""Protocol data units of the upper layer, as an acceptor meets and makes them (PS3.8 section 9.3).

What a peer sends is decoded without trust: every length is checked against what encloses it, nothing is read twice, and
no number of items costs more than the bytes that carry them. What does not fit raises `ProtocolError` with the reason that
an A-ABORT gives.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

HEADER = struct.Struct(">BxL")
APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
MOST_CONTEXTS = 128
_DEFAULT_SYNTAX = b"1.2.840.10008.1.2"
_ITEM = struct.Struct(">BxH")
_FIXED = struct.Struct(">H2x16s16s32s")
_PDV = struct.Struct(">LBB")
_PDV_OVERHEAD = _PDV.size
_CONTEXT_HEAD = struct.Struct(">BxBx")
_COMMAND, _LAST = 0x01, 0x02
_MOST_SUB_ITEMS = 4096
_UID = re.compile(r"[0-9.]{1,64}")


class PduType(IntEnum):
    """First byte of a PDU (PS3.8 section 9.3.1)."""

    ASSOCIATE_RQ = 1
    ASSOCIATE_AC = 2
    ASSOCIATE_RJ = 3
    P_DATA = 4
    RELEASE_RQ = 5
    RELEASE_RP = 6
    ABORT = 7


class AbortReason(IntEnum):
    """Reason of an A-ABORT that the service provider starts (PS3.8 table 9-26)."""

    NOT_SPECIFIED = 0
    UNRECOGNIZED_PDU = 1
    UNEXPECTED_PDU = 2
    UNRECOGNIZED_PARAMETER = 4
    UNEXPECTED_PARAMETER = 5
    INVALID_PARAMETER = 6


class Rejection(NamedTuple):
    """Result, source and reason of an A-ASSOCIATE-RJ (PS3.8 table 9-21)."""

    result: int
    source: int
    reason: int


APPLICATION_CONTEXT_UNKNOWN = Rejection(1, 1, 2)
CALLING_AE_UNKNOWN = Rejection(1, 1, 3)
CALLED_AE_UNKNOWN = Rejection(1, 1, 7)
PROTOCOL_VERSION_UNKNOWN = Rejection(1, 2, 2)
TEMPORARY_CONGESTION = Rejection(2, 3, 1)
LIMIT_EXCEEDED = Rejection(2, 3, 2)


class ContextResult(IntEnum):
    """Answer to a proposed presentation context (PS3.8 table 9-18)."""

    ACCEPTED = 0
    ABSTRACT_SYNTAX_UNKNOWN = 3
    TRANSFER_SYNTAXES_UNKNOWN = 4


class ProtocolError(Exception):
    """A peer broke the protocol; `reason` goes into the A-ABORT. The text is ours and quotes nothing received."""

    def __init__(self, text: str, reason: AbortReason = AbortReason.INVALID_PARAMETER) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class ProposedContext:
    """A presentation context as a requestor proposes it; what is no UID is an empty string."""

    identifier: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]


@dataclass(frozen=True)
class RoleSelection:
    """Which roles the requestor has for a SOP class (PS3.7 section D.3.3.4)."""

    sop_class: str
    scu: bool
    scp: bool


@dataclass(frozen=True)
class AssociateRequest:
    """An A-ASSOCIATE-RQ. `echoed` are the bytes that an answer repeats; `max_pdu` is 0 for no limit."""

    protocol_version: int
    called_ae: str
    calling_ae: str
    application_context: str
    contexts: tuple[ProposedContext, ...]
    roles: tuple[RoleSelection, ...]
    max_pdu: int
    echoed: bytes


@dataclass(frozen=True)
class ContextAnswer:
    """The answer to a proposed context; `transfer_syntax` means something where it is accepted."""

    identifier: int
    result: ContextResult
    transfer_syntax: str = ""


class PresentationData(NamedTuple):
    """A fragment of a message: a presentation data value (PS3.8 section 9.3.5.1)."""

    context: int
    is_command: bool
    is_last: bool
    data: memoryview


def decode_associate_request(body: memoryview) -> AssociateRequest:
    """Read what follows the header of an A-ASSOCIATE-RQ (PS3.8 table 9-11).

    Raises
    ------
    ProtocolError
        When lengths or identifiers of contexts are not those of such a PDU.
    """
    if len(body) < _FIXED.size:
        raise ProtocolError("an association request is too short")
    version, called, calling, _ = _FIXED.unpack_from(body)
    application_context = ""
    contexts: dict[int, ProposedContext] = {}
    max_pdu, roles = 0, list[RoleSelection]()
    for kind, item in _items(body[_FIXED.size :]):
        if kind == 0x10:
            application_context = _uid(item)
        elif kind == 0x20:
            context = _proposed_context(item)
            if context.identifier in contexts:
                raise ProtocolError("a presentation context is proposed twice")
            contexts[context.identifier] = context
        elif kind == 0x50:
            max_pdu, roles = _user_information(item)
    return AssociateRequest(
        protocol_version=version,
        called_ae=_title(called),
        calling_ae=_title(calling),
        application_context=application_context,
        contexts=tuple(contexts.values()),
        roles=tuple(roles),
        max_pdu=max_pdu,
        echoed=bytes(body[4 : _FIXED.size]),
    )


def encode_associate_accept(
    request: AssociateRequest,
    answers: Sequence[ContextAnswer],
    roles: Sequence[RoleSelection],
    *,
    max_pdu: int,
    implementation: tuple[str, str],
) -> bytes:
    """Make an A-ASSOCIATE-AC (PS3.8 table 9-17).

    Parameters
    ----------
    max_pdu
        Longest P-DATA-TF that is received, in bytes behind its header.
    implementation
        Class UID and version name.
    """
    class_uid, version_name = (text.encode("ascii") for text in implementation)
    user = [_item(0x51, struct.pack(">L", max_pdu)), _item(0x52, class_uid)]
    for role in roles:
        name = role.sop_class.encode("ascii")
        user.append(_item(0x54, struct.pack(">H", len(name)) + name + bytes((role.scu, role.scp))))
    user.append(_item(0x55, version_name))
    body = [struct.pack(">H2x", 1), request.echoed, _item(0x10, APPLICATION_CONTEXT.encode("ascii"))]
    for answer in answers:
        syntax = answer.transfer_syntax.encode("ascii") or _DEFAULT_SYNTAX
        body.append(_item(0x21, bytes((answer.identifier, 0, answer.result, 0)) + _item(0x40, syntax)))
    return _pdu(PduType.ASSOCIATE_AC, b"".join([*body, _item(0x50, b"".join(user))]))


def encode_reject(rejection: Rejection) -> bytes:
    """Make an A-ASSOCIATE-RJ."""
    return _pdu(PduType.ASSOCIATE_RJ, bytes((0, *rejection)))


def encode_abort(reason: AbortReason) -> bytes:
    """Make an A-ABORT of the service provider."""
    return _pdu(PduType.ABORT, bytes((0, 0, 2, reason)))


def encode_release_response() -> bytes:
    """Make an A-RELEASE-RP."""
    return _pdu(PduType.RELEASE_RP, bytes(4))


def encode_command(context: int, command: bytes, max_pdu: int) -> bytes:
    """Make the P-DATA-TF PDUs of a message without data set; `max_pdu` is what the peer receives, 0: any length."""
    room = max(max_pdu - _PDV_OVERHEAD, 1) if max_pdu else len(command)
    pdus = []
    for start in range(0, len(command), room):
        part = command[start : start + room]
        control = _COMMAND | (_LAST if start + room >= len(command) else 0)
        pdus.append(_pdu(PduType.P_DATA, _PDV.pack(len(part) + 2, context, control) + part))
    return b"".join(pdus)


def presentation_data(body: memoryview) -> Iterator[PresentationData]:
    """Yield the fragments of a P-DATA-TF; they are views of `body`.

    Raises
    ------
    ProtocolError
        When a length is not possible.
    """
    position, end = 0, len(body)
    if not end:
        raise ProtocolError("a P-DATA-TF is empty")
    while position < end:
        if end - position < _PDV_OVERHEAD:
            raise ProtocolError("a presentation data value is cut off")
        length, context, control = _PDV.unpack_from(body, position)
        stop = position + 4 + length
        if length < 2 or stop > end:
            raise ProtocolError("the length of a presentation data value is impossible")
        yield PresentationData(context, bool(control & _COMMAND), bool(control & _LAST), body[position + _PDV_OVERHEAD : stop])
        position = stop


def _pdu(kind: PduType, body: bytes) -> bytes:
    return HEADER.pack(kind, len(body)) + body


def _item(kind: int, content: bytes) -> bytes:
    return _ITEM.pack(kind, len(content)) + content


def _items(body: memoryview) -> Iterator[tuple[int, memoryview]]:
    position = count = 0
    while position < len(body):
        count += 1
        if len(body) - position < _ITEM.size or count > _MOST_SUB_ITEMS:
            raise ProtocolError("an item is cut off, or there are too many")
        kind, length = _ITEM.unpack_from(body, position)
        position += _ITEM.size
        if position + length > len(body):
            raise ProtocolError("an item is longer than what encloses it")
        yield kind, body[position : position + length]
        position += length


def _proposed_context(item: memoryview) -> ProposedContext:
    if len(item) < _CONTEXT_HEAD.size or item[0] % 2 == 0:
        raise ProtocolError("a presentation context has no proper identifier")
    abstract_syntax, transfer_syntaxes = "", list[str]()
    for kind, content in _items(item[_CONTEXT_HEAD.size :]):
        if kind == 0x30:
            abstract_syntax = _uid(content)
        elif kind == 0x40:
            transfer_syntaxes.append(_uid(content))
    return ProposedContext(item[0], abstract_syntax, tuple(transfer_syntaxes))


def _user_information(item: memoryview) -> tuple[int, list[RoleSelection]]:
    max_pdu, roles = 0, list[RoleSelection]()
    for kind, content in _items(item):
        if kind == 0x51 and len(content) == 4:
            max_pdu = int.from_bytes(content, "big")
        elif kind == 0x54:
            roles.append(_role(content))
    return max_pdu, roles


def _role(content: memoryview) -> RoleSelection:
    length = int.from_bytes(content[:2], "big")
    if len(content) != 2 + length + 2:
        raise ProtocolError("the length of a role selection is impossible")
    return RoleSelection(_uid(content[2 : 2 + length]), bool(content[-2]), bool(content[-1]))


def _uid(content: memoryview) -> str:
    text = bytes(content[:80]).decode("latin-1").rstrip("\x00 ")
    return text if _UID.fullmatch(text) and len(content) <= 80 else ""


def _title(content: bytes) -> str:
    """An AE title without its padding; what is outside printable ASCII is shown as a question mark."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in content.decode("latin-1").strip(" \x00"))
