"""Pixels: the same picture in every PNG mode gives the same square, and no bytes raise anything but an ImageError."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cxr_ray.pixels import (
    DamagedImage,
    Greyscale,
    ImageError,
    OversizedImage,
    UnsupportedImage,
    UnusableImage,
    decode_picture,
    stored_square,
)


def encoded(picture, format_name="PNG", **options):
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, format_name, **options)
    return buffer.getvalue()


def square_of(data, size=32, name="film.png"):
    return stored_square(decode_picture(data, name), size, name)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def announcing(width, height, bits=1, colour=0):
    """A PNG of a few bytes whose header announces any size."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def grey():
    """A grey picture with detail that touches black and white; uint8, shape (90, 70)."""
    values = np.random.default_rng(3).integers(0, 256, (90, 70)).astype(np.uint8)
    values = cv2.GaussianBlur(values, (0, 0), 2)
    return cv2.normalize(values, None, 0, 255, cv2.NORM_MINMAX)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colour_modes_give_the_square_of_the_grey_picture(grey, mode):
    data = encoded(Image.fromarray(grey).convert(mode))
    assert Image.open(io.BytesIO(data)).mode == mode
    np.testing.assert_array_equal(square_of(data), square_of(encoded(grey)))


def test_a_palette_in_any_order_gives_the_square_of_the_grey_picture(grey):
    order = np.random.default_rng(4).permutation(256).astype(np.uint8)
    place = np.argsort(order).astype(np.uint8)
    picture = Image.fromarray(place[grey], mode="P")
    picture.putpalette(np.repeat(order, 3).tobytes())
    np.testing.assert_array_equal(square_of(encoded(picture)), square_of(encoded(grey)))


def test_a_palette_with_transparency_gives_the_same_square(grey):
    picture = Image.fromarray(grey, mode="P")
    picture.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes())
    np.testing.assert_array_equal(square_of(encoded(picture, transparency=7)), square_of(encoded(grey)))


def test_sixteen_bits_give_the_same_square(grey):
    sixteen = grey.astype(np.uint16) * 257
    data = encoded(sixteen)
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    # Eight bits are averaged as integers, sixteen as floats: a half may round either way.
    np.testing.assert_allclose(square_of(data).astype(int), square_of(encoded(grey)), atol=1)


def test_sixteen_bits_that_use_part_of_the_range_are_stretched(grey):
    full, part = grey.astype(np.uint16) * 257, grey.astype(np.uint16) * 4 + 1000
    np.testing.assert_allclose(square_of(encoded(part)).astype(int), square_of(encoded(full)), atol=1)


def test_one_bit_gives_the_square_of_its_grey_copy(grey):
    black_and_white = (grey > 127).astype(np.uint8) * 255
    data = encoded(Image.fromarray(black_and_white).convert("1", dither=Image.Dither.NONE))
    assert Image.open(io.BytesIO(data)).mode == "1"
    np.testing.assert_array_equal(square_of(data), square_of(encoded(black_and_white)))


def test_a_jpeg_is_read(grey):
    smooth = cv2.GaussianBlur(grey, (0, 0), 4)
    np.testing.assert_allclose(square_of(encoded(smooth, "JPEG", quality=95)).astype(int), square_of(encoded(smooth)), atol=4)


def test_a_faint_tint_is_a_radiograph_and_a_screenshot_is_not(grey):
    tinted = np.stack([grey, grey, np.clip(grey.astype(int) + 6, 0, 255).astype(np.uint8)], axis=-1)
    np.testing.assert_allclose(square_of(encoded(tinted)).astype(int), square_of(encoded(grey)), atol=1)
    screenshot = np.stack([grey, 255 - grey, grey], axis=-1)
    with pytest.raises(UnusableImage, match=r"^film.png: a colour picture \(channels differ by \d+ on average\); send"):
        square_of(encoded(screenshot))


def test_shrinking_averages_areas():
    values = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    np.testing.assert_array_equal(stored_square(Greyscale(values, 0, 255), 2), [[25, 45], [105, 125]])


def test_enlarging_stays_within_the_values_and_keeps_their_order():
    square = stored_square(Greyscale(np.array([[50, 100], [150, 200]], dtype=np.uint8), 0, 255), 16)
    assert square.shape == (16, 16)
    assert (square.min(), square.max()) == (50, 200)
    # OpenCV rounds its 8-bit weights, by which neighbours may fall back by one.
    assert (np.diff(square.astype(int), axis=0) >= -1).all()
    assert (np.diff(square.astype(int), axis=1) >= -1).all()


def test_an_oblong_image_is_scaled_whole():
    values = np.zeros((40, 80), dtype=np.uint8)
    values[:20, :40] = 200
    square = stored_square(Greyscale(values, 0, 255), 20)
    assert (square[:10, :10] == 200).all()
    assert square[10:].max() == square[:, 10:].max() == 0


def test_black_and_white_clip_what_lies_beyond():
    values = np.array([[-500, 0], [50, 4000]], dtype=np.int16)
    np.testing.assert_array_equal(stored_square(Greyscale(values, 0, 100), 2), [[0, 0], [128, 255]])


def test_decoding_leaves_its_input_alone():
    values = np.array([[0, 1000], [2000, 3000]], dtype=np.float32)
    before = values.copy()
    stored_square(Greyscale(values, 0, 3000), 2)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_constant_image_is_unusable(dtype):
    with pytest.raises(UnusableImage, match=r"^film.png: every pixel has the value 77; send an exposed radiograph$"):
        square_of(encoded(np.full((20, 20), 77, dtype=dtype)))


def test_a_window_that_misses_the_values_is_unusable():
    values = np.arange(400, dtype=np.int16).reshape(20, 20)
    with pytest.raises(UnusableImage, match=r"showing 1000 to 2000 leaves a single grey \(0\); correct its window"):
        stored_square(Greyscale(values, 1000, 2000), 8, "film.dcm")


REFUSED = {
    "text": (b"dear colleague", UnsupportedImage, r"neither PNG, JPEG nor DICOM \(14 bytes\); convert"),
    "empty": (b"", UnsupportedImage, r"\(0 bytes\); convert"),
    "gif": (encoded(np.eye(20, dtype=np.uint8), "GIF"), UnsupportedImage, "neither PNG, JPEG nor DICOM"),
    "bitmap": (encoded(np.eye(20, dtype=np.uint8), "BMP"), UnsupportedImage, "neither PNG, JPEG nor DICOM"),
    "65 megapixels": (announcing(8125, 8000), OversizedImage, "8125x8000 is 65 megapixels; send at most 64 megapixels"),
    "200 megapixels": (announcing(20000, 10000), OversizedImage, r"200000000 pixels.*; send at most 64 megapixels"),
    "no rows": (announcing(100, 100), DamagedImage, "damaged or truncated .*; send the file again"),
}


@pytest.mark.parametrize(("data", "kind", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_refused_is_said_in_one_line(data, kind, message):
    with pytest.raises(kind, match=rf"^film\.png: .*{message}") as caught:
        decode_picture(data, "film.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format_name", ["PNG", "JPEG"])
def test_a_truncated_picture_is_damaged(grey, format_name):
    data = encoded(grey, format_name)
    with pytest.raises(DamagedImage, match=r"^film\.png: damaged or truncated \(.+\); send the file again$"):
        decode_picture(data[: len(data) // 2], "film.png")


def test_an_animated_png_is_unusable(grey):
    data = encoded(Image.fromarray(grey), save_all=True, append_images=[Image.fromarray(255 - grey)])
    with pytest.raises(UnusableImage, match=r"^film\.png: 2 frames; send one image a file$"):
        decode_picture(data, "film.png")


def only_image_errors(data):
    try:
        square = square_of(data)
    except ImageError as error:
        assert "\n" not in str(error)
        assert str(error).startswith("film.png: ")
    else:
        assert square.shape == (32, 32)
        assert square.dtype == np.uint8


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"]), st.binary(max_size=300))
def test_random_bytes_raise_only_image_errors(prefix, data):
    only_image_errors(prefix + data)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_mutated_pictures_raise_only_image_errors(grey, data):
    film = Image.fromarray(grey)
    whole = data.draw(
        st.sampled_from(
            [encoded(film), encoded(film.convert("RGBA")), encoded(film.convert("P")), encoded(film, "JPEG")],
        )
    )
    only_image_errors(mutated(whole, data))


CHUNKS = [b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"IDAT"]


@settings(max_examples=300, deadline=None)
@given(
    bits=st.sampled_from([0, 1, 2, 4, 8, 16]),
    colour=st.sampled_from([0, 1, 2, 3, 4, 6]),
    chunks=st.lists(st.tuples(st.sampled_from(CHUNKS), st.binary(max_size=40)), max_size=3),
    rows=st.binary(max_size=200),
)
def test_pngs_of_odd_chunks_raise_only_image_errors(bits, colour, chunks, rows):
    start = announcing(4, 4, bits, colour)[:33]
    odd = b"".join(chunk(kind, content) for kind, content in chunks)
    only_image_errors(start + odd + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def mutated(whole, data):
    """`whole` with some bytes replaced, most of them in its header, and perhaps cut."""
    changed = bytearray(whole)
    places = st.one_of(st.integers(0, min(len(whole), 200) - 1), st.integers(0, len(whole) - 1))
    for place in data.draw(st.lists(places, max_size=6)):
        changed[place] = data.draw(st.integers(0, 255))
    return bytes(changed[: data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))])


def test_real_release_images_of_every_mode_are_read(real_data):
    paths = sorted((real_data / "nih").glob("images_*/images/*.png"))
    modes = {}
    for path in paths:
        modes.setdefault(Image.open(path).mode, path)
    assert {"RGB", "RGBA"} <= set(modes)
    for path in modes.values():
        data = path.read_bytes()
        expected = np.asarray(Image.open(path).convert("RGB"))[..., 0]
        np.testing.assert_array_equal(square_of(data, 64, path.name), expected)


def test_real_full_size_images_keep_their_grey(real_data):
    for path in sorted((real_data / "nih-1024").glob("*.png")):
        square = square_of(path.read_bytes(), 256, path.name)
        assert square.std() > 20
        assert abs(float(square.mean()) - float(np.asarray(Image.open(path).convert("L")).mean())) < 0.5
