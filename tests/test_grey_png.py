"""The fast way through greyscale PNGs: the same pixels as the general decoder, and nothing that is not whole."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxr_ray.grey_png import decode_grey_png

MAX = 10**8


def png(picture: Image.Image, **options: object) -> bytes:
    content = io.BytesIO()
    picture.save(content, format="PNG", **options)
    return content.getvalue()


def film(bits: int, height: int = 37, width: int = 41) -> np.ndarray:
    values = np.random.default_rng(bits).integers(0, 2**bits, (height, width))
    # Smooth in part, so that every filter type is chosen somewhere.
    values[5:20] = np.add.outer(np.arange(15), np.arange(width)) * 2**bits // 64
    return values.astype(np.uint8 if bits == 8 else np.uint16)


def chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4])
        found.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def joined(parts: list[tuple[bytes, bytes]]) -> bytes:
    body = (struct.pack(">I", len(data)) + kind + data + zlib.crc32(kind + data).to_bytes(4) for kind, data in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("shape", [(37, 41), (1, 1), (300, 500)])
def test_pixels_are_those_of_pillow(bits, level, shape):
    content = png(
        Image.fromarray(film(bits, *shape)) if shape == (37, 41) else Image.fromarray(noise(bits, shape)), compress_level=level
    )
    decoded = decode_grey_png(content, MAX)
    assert decoded.dtype == (np.uint8 if bits == 8 else np.uint16)
    np.testing.assert_array_equal(decoded, np.asarray(Image.open(io.BytesIO(content))))


def noise(bits: int, shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**bits, shape).astype(np.uint8 if bits == 8 else np.uint16)


def test_real_radiographs(real_data: Path):
    for path in sorted((real_data / "nih-1024").glob("*.png")):
        decoded = decode_grey_png(path.read_bytes(), MAX)
        np.testing.assert_array_equal(decoded, np.asarray(Image.open(path)))


def test_chunks_that_say_nothing_of_pixels_change_nothing():
    parts = chunks(png(Image.fromarray(film(8))))
    extra = [(b"tEXt", b"Author\0nobody"), (b"gAMA", (45455).to_bytes(4)), (b"pHYs", struct.pack(">IIB", 1, 2, 0))]
    split = [(b"IDAT", parts[1][1][:50]), (b"IDAT", b""), (b"IDAT", parts[1][1][50:])]
    decoded = decode_grey_png(joined([parts[0], *extra, *split, *parts[2:]]), MAX)
    np.testing.assert_array_equal(decoded, film(8))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1"])
def test_other_kinds_are_left_to_others(mode):
    assert decode_grey_png(png(Image.fromarray(film(8)).convert(mode)), MAX) is None


def test_transparent_interlaced_animated_and_huge_ones_are_left_to_others():
    content = png(Image.fromarray(film(8)))
    head, *rest = chunks(content)
    interlaced = (head[0], head[1][:-1] + b"\1")
    assert decode_grey_png(joined([head, (b"tRNS", b"\0\7"), *rest]), MAX) is None
    assert decode_grey_png(joined([interlaced, *rest]), MAX) is None
    assert decode_grey_png(joined([head, (b"acTL", bytes(8)), *rest]), MAX) is None
    assert decode_grey_png(content, 37 * 41) is not None
    assert decode_grey_png(content, 37 * 41 - 1) is None
    for other in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", content[:-1], content[:40]):
        assert decode_grey_png(other, MAX) is None


def test_a_stream_of_another_length_or_filter_is_left_to_others():
    head, *rest = chunks(png(Image.fromarray(film(8))))
    stream = zlib.decompress(rest[0][1])
    for wrong in (stream[:-1], stream + b"\0", b"\5" + stream[1:], b""):
        assert decode_grey_png(joined([head, (b"IDAT", zlib.compress(wrong)), *rest[1:]]), MAX) is None
    assert decode_grey_png(joined([head, (b"IDAT", zlib.compress(stream) + b"\0"), *rest[1:]]), MAX) is None


def test_a_bomb_is_inflated_no_further_than_its_picture():
    import tracemalloc

    head, *rest = chunks(png(Image.fromarray(film(8))))
    bomb = joined([head, (b"IDAT", zlib.compress(bytes(200_000_000), 9)), *rest[1:]])
    tracemalloc.start()
    assert decode_grey_png(bomb, MAX) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_damaged_is_never_decoded_to_something_else(data):
    content = bytearray(png(Image.fromarray(film(8))))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    decoded = decode_grey_png(bytes(content), MAX)
    if decoded is not None:
        np.testing.assert_array_equal(decoded, film(8))
