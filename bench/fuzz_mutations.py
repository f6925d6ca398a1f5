"""Ways to break the protocol, for `fuzz_node`: each makes what is sent first and, once that is accepted, what is sent then.

All that is drawn comes from the generator that is given, so that a campaign can be repeated. The instance is an honest one.
"""

import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from pydicom.dataset import Dataset

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests")]

from dicom_peers import (  # noqa: E402
    CR,
    DEFLATED,
    ECHO,
    EXPLICIT,
    IMPLICIT,
    RELEASE,
    VERIFICATION,
    data_set,
    deflated,
    instance,
    item,
    p_data,
    pdu,
    pdv,
    request,
    store_command,
    store_pdus,
)

CONTEXTS = ((1, CR, EXPLICIT), (3, VERIFICATION, IMPLICIT))
_UIDS = ("../../../etc/passwd", "1.2/../../x", "1" * 65, "", "1..2", "\x00", "%n%s", "1.2\\1.3", "é", "C:\\x")


def flipped(draw: random.Random, data: bytes) -> bytes:
    """Some bits turned over."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def with_wild_number(draw: random.Random, data: bytes) -> bytes:
    """Two or four bytes somewhere replaced by a number at the edge of what they hold."""
    changed = bytearray(data)
    size = draw.choice((2, 4))
    value = draw.choice((0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF)) & (256**size - 1)
    at = draw.randrange(max(1, len(changed) - size))
    changed[at : at + size] = value.to_bytes(size, draw.choice(("big", "little")))
    return bytes(changed)


def cut(draw: random.Random, data: bytes) -> bytes:
    """An end in the middle."""
    return data[: draw.randrange(len(data))]


def spliced(draw: random.Random, data: bytes) -> bytes:
    """A piece left out, doubled, or put in from elsewhere."""
    start, stop = sorted(draw.randrange(len(data)) for _ in range(2))
    piece = data[start : min(stop, start + 400)]
    return draw.choice((data[:start] + data[stop:], data[:stop] + piece + data[stop:], piece + data))


def _nested(draw: random.Random) -> bytes:
    opened = struct.pack("<HH2s2xL", 8, 6, b"SQ", 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    return opened * draw.choice((1, 10, 1000, 4000))


def _chunks(data: bytes, size: int = 12_000, context: int = 1) -> bytes:
    parts = [data[start : start + size] for start in range(0, len(data), size)] or [b""]
    return b"".join(p_data(pdv(context, 2 if number == len(parts) else 0, part)) for number, part in enumerate(parts, 1))


def _noise(draw: random.Random, _content: Dataset) -> tuple[bytes, bytes]:
    return draw.randbytes(draw.choice((1, 6, 100, 5000))), b""


def _request_bits(draw: random.Random, _content: Dataset) -> tuple[bytes, bytes]:
    return draw.choice((flipped, with_wild_number, cut, spliced))(draw, request(*CONTEXTS)), b""


def _request_items(draw: random.Random, _content: Dataset) -> tuple[bytes, bytes]:
    """Requests made of the right items in wrong numbers, orders and sizes."""
    contexts = [
        (
            draw.randrange(256),
            draw.choice((CR, VERIFICATION, "1.2.3", "", "x" * 300)),
            draw.choice((EXPLICIT, IMPLICIT, "", "9")),
        )
        for _ in range(draw.choice((0, 1, 3, 127, 128, 300)))
    ]
    role = draw.choice(("", CR, "1" * 90)).encode()
    more = draw.choice(
        (
            b"",
            item(0x54, struct.pack(">H", draw.choice((len(role), 0, 0xFFFF))) + role + b"\x01\x01"),
            item(0x58, draw.randbytes(40)),
            item(0x53, b"\xff" * draw.choice((0, 4, 9))),
            item(draw.randrange(256), draw.randbytes(draw.randrange(300))),
        )
    )
    return request(*contexts, called=draw.choice(("CXRRAY", "", "X" * 16)), more=more), p_data(pdv(1, 3, ECHO))


def _pdu_bits(draw: random.Random, content: Dataset) -> tuple[bytes, bytes]:
    stream = b"".join(store_pdus(content))
    # The heads of PDU, fragment and command are where it matters.
    at = draw.choice((180, 600, len(stream)))
    mutate = draw.choice((flipped, with_wild_number, spliced))
    return request(*CONTEXTS), mutate(draw, stream[:at]) + stream[at:]


def _cut_off(draw: random.Random, content: Dataset) -> tuple[bytes, bytes]:
    return request(*CONTEXTS), cut(draw, b"".join(store_pdus(content)))


def _wrong_context(draw: random.Random, content: Dataset) -> tuple[bytes, bytes]:
    return request(*CONTEXTS), b"".join(store_pdus(content, context=draw.randrange(256)))


def _wrong_order(draw: random.Random, content: Dataset) -> tuple[bytes, bytes]:
    pdus = [
        *store_pdus(content, fragment=1500),
        p_data(pdv(3, 3, ECHO)),
        RELEASE,
        request(*CONTEXTS),
        pdu(2, bytes(68)),
        pdu(6, bytes(4)),
    ]
    draw.shuffle(pdus)
    return request(*CONTEXTS), b"".join(pdus)


def _uid(draw: random.Random, _content: Dataset) -> tuple[bytes, bytes]:
    uid = draw.choice(_UIDS)
    return request(*CONTEXTS), p_data(pdv(1, 3, store_command(uid))) + _chunks(data_set(instance(SOPInstanceUID="1.2.3")))


def _command(draw: random.Random, content: Dataset) -> tuple[bytes, bytes]:
    uid = str(content.SOPInstanceUID)
    mutated = draw.choice((flipped, with_wild_number, cut, spliced))(draw, store_command(uid))
    parts = [mutated] if draw.random() < 0.7 else [mutated[: len(mutated) // 2], mutated[len(mutated) // 2 :]]
    heads = b"".join(p_data(pdv(1, 3 if part is parts[-1] else 1, part)) for part in parts)
    return request(*CONTEXTS), heads + _chunks(data_set(content))


def _long_command(draw: random.Random, _content: Dataset) -> tuple[bytes, bytes]:
    part = draw.randbytes(15_000)
    return request(*CONTEXTS), p_data(pdv(1, 1, part)) * draw.choice((2, 5, 9))


def _data_set(draw: random.Random, content: Dataset) -> tuple[bytes, bytes]:
    uid, data = str(content.SOPInstanceUID), data_set(content)
    # Its beginning is what is read here.
    head = draw.choice((flipped, with_wild_number, cut, spliced))(draw, data[:120])
    changed = draw.choice((head + data[120:], _nested(draw) + data, draw.randbytes(3000), b""))
    return request(*CONTEXTS), p_data(pdv(1, 3, store_command(uid))) + _chunks(changed)


def _too_large(draw: random.Random, content: Dataset) -> tuple[bytes, bytes]:
    uid = str(content.SOPInstanceUID)
    return request(*CONTEXTS), p_data(pdv(1, 3, store_command(uid))) + _chunks(
        bytes(draw.choice((999_000, 1_100_000, 3_000_000))), 100_000
    )


def _deflated(draw: random.Random, content: Dataset) -> tuple[bytes, bytes]:
    """Kilobytes that stand for up to a gigabyte, in the pixels, before or behind them."""
    uid, data = str(content.SOPInstanceUID), data_set(content)
    pixels, study = data.index(b"\xe0\x7f\x10\x00") + 12, data.index(b"\x20\x00\x0d\x00")
    bomb = deflated(data[: draw.choice((pixels, study, len(data)))], draw.choice((0, 1, 30, 1000)))
    sent = draw.choice((bomb, bomb, cut(draw, bomb), flipped(draw, bomb)))
    command = p_data(pdv(5, 3, store_command(uid)))
    return request(*CONTEXTS, (5, CR, DEFLATED)), command + _chunks(sent, 100_000, context=5)


def _tiny_fragments(draw: random.Random, content: Dataset) -> tuple[bytes, bytes]:
    return request(*CONTEXTS), b"".join(store_pdus(content, fragment=draw.choice((1, 2, 7))))


def _flood(draw: random.Random, _content: Dataset) -> tuple[bytes, bytes]:
    """Requests without waiting for an answer."""
    return request(*CONTEXTS), p_data(*(pdv(3, 3, ECHO) for _ in range(draw.choice((2, 50, 500)))))


KINDS: dict[str, Callable[[random.Random, Dataset], tuple[bytes, bytes]]] = {
    "noise": _noise,
    "request: bits and lengths": _request_bits,
    "request: items": _request_items,
    "PDUs: bits and lengths": _pdu_bits,
    "cut off": _cut_off,
    "context never negotiated": _wrong_context,
    "PDUs out of order": _wrong_order,
    "UIDs that are paths or none": _uid,
    "command: bits and lengths": _command,
    "command without end": _long_command,
    "data set: bits, lengths, nesting": _data_set,
    "object too large": _too_large,
    "deflated beyond bounds": _deflated,
    "fragments of single bytes": _tiny_fragments,
    "requests without waiting": _flood,
}
