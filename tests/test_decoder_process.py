"""The decoder in its child process: the same squares, and every way in which a child can fail."""

import io
import os
import signal
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_ray.decoder_process import DecoderProcess
from cxr_ray.decoding import Format, decode
from cxr_ray.pixels import DamagedImage, OversizedImage, UnsupportedImage, UnusableImage, stored_square

SIZE = 32


def png(seed: int, height: int = 50, width: int = 40) -> bytes:
    film = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(film).save(content, format="PNG")
    return content.getvalue()


def bomb(edge: int) -> bytes:
    """A PNG that announces edge x edge pixels and holds next to none of them."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", edge, edge, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def square_of(content: bytes) -> np.ndarray:
    return stored_square(decode(Format.PICTURE, content, ""), SIZE)


def child_of(decoder: DecoderProcess) -> int:
    """The child's process, after an image has started it."""
    list(decoder.squares([(0, png(0))]))
    return decoder._process._child.pid


def test_squares_are_those_of_a_direct_decode_whatever_lies_between(tmp_path):
    films = {number: png(number) for number in range(7)}
    unreadable = DamagedImage("cannot be read; check the file")
    images = [(0, films[0]), (100, unreadable), (1, films[1]), (101, b"no image"), (102, b""), (103, films[3][:300])]
    images += [(number, films[number]) for number in range(2, 7)]
    with DecoderProcess(Format.PICTURE, SIZE) as decoder:
        answers = dict(decoder.squares(images))
    assert set(answers) == {number for number, _ in images}
    for number, content in films.items():
        np.testing.assert_array_equal(answers[number], square_of(content))
    assert answers[100] is unreadable
    assert isinstance(answers[101], UnsupportedImage)
    assert str(answers[101]) == "neither PNG, JPEG nor DICOM (8 bytes); convert it to one"
    assert isinstance(answers[102], UnsupportedImage)
    assert isinstance(answers[103], DamagedImage)


def test_a_shorter_file_after_a_longer_one_is_read_alone():
    long, short = png(1, 300, 300), png(2)
    with DecoderProcess(Format.PICTURE, SIZE) as decoder:
        answers = dict(decoder.squares([(0, long), (1, long), (2, short), (3, short)]))
    np.testing.assert_array_equal(answers[2], square_of(short))
    np.testing.assert_array_equal(answers[3], square_of(short))


def test_dicom(real_data: Path):
    from cxr_ray.dicom_header import read_dicom
    from cxr_ray.dicom_pixels import decode_dicom

    for file in sorted((real_data / "dicom").glob("*.dcm")):
        content = file.read_bytes()
        with DecoderProcess(Format.DICOM, SIZE) as decoder:
            ((_, square),) = decoder.squares([(0, content)])
        np.testing.assert_array_equal(square, stored_square(decode_dicom(read_dicom(content, "x"), "x"), SIZE))


def test_an_image_that_ends_the_decoder_costs_itself_only():
    with DecoderProcess(Format.PICTURE, SIZE) as decoder:
        child = child_of(decoder)

        def images():
            os.kill(child, signal.SIGSTOP)
            yield 0, png(0)
            os.kill(child, signal.SIGKILL)
            yield 1, png(1)
            yield 2, png(2)

        answers = dict(decoder.squares(images()))
    assert str(answers[0]) == "ends the decoder (signal 9); send the file again"
    for number in (1, 2):
        np.testing.assert_array_equal(answers[number], square_of(png(number)))


def test_an_image_that_takes_too_long_is_given_up_and_the_next_is_decoded():
    with DecoderProcess(Format.PICTURE, SIZE, max_seconds=1.0) as decoder:
        os.kill(child_of(decoder), signal.SIGSTOP)
        started = time.monotonic()
        answers = dict(decoder.squares([(0, png(0)), (1, png(1))]))
        assert time.monotonic() - started < 10
    assert str(answers[0]) == "takes more than 1 s to decode; send the file again"
    np.testing.assert_array_equal(answers[1], square_of(png(1)))


def test_memory_is_limited():
    large = png(1, 5000, 5000)
    with DecoderProcess(Format.PICTURE, SIZE, max_bytes=48 * 1024**2) as decoder:
        answers = dict(decoder.squares([(0, large), (1, png(1))]))
    assert isinstance(answers[0], OversizedImage | DamagedImage)
    np.testing.assert_array_equal(answers[1], square_of(png(1)))
    with DecoderProcess(Format.PICTURE, SIZE) as decoder:
        ((_, square),) = decoder.squares([(0, large)])
    np.testing.assert_array_equal(square, square_of(large))


def test_a_bomb_is_refused_before_it_takes_memory():
    with DecoderProcess(Format.PICTURE, SIZE) as decoder:
        child = child_of(decoder)
        before = peak_memory(child)
        ((_, answer),) = decoder.squares([(0, bomb(60_000))])
        assert peak_memory(child) - before < 32 * 1024**2
    assert isinstance(answer, OversizedImage)


def peak_memory(process: int) -> int:
    """Bytes of main memory that a process has held at most."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def test_a_single_grey_says_what_is_wrong():
    content = io.BytesIO()
    Image.new("L", (40, 40), 7).save(content, format="PNG")
    with DecoderProcess(Format.PICTURE, SIZE) as decoder:
        ((_, answer),) = decoder.squares([(0, content.getvalue())])
    assert isinstance(answer, UnusableImage)
    assert str(answer).startswith("every pixel has the value 7")


def test_whoever_stops_in_between_leaves_no_answers_to_the_next():
    with DecoderProcess(Format.PICTURE, SIZE) as decoder:
        first = decoder.squares((number, png(number)) for number in range(5))
        next(first)
        first.close()
        ((number, square),) = decoder.squares([(9, png(9))])
    assert number == 9
    np.testing.assert_array_equal(square, square_of(png(9)))


def test_the_child_ends_with_its_decoder():
    decoder = DecoderProcess(Format.PICTURE, SIZE)
    child = child_of(decoder)
    decoder.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_the_child_ends_when_its_parent_is_killed():
    import subprocess
    import sys

    program = (
        "import sys, time; sys.path.insert(0, 'tests')\n"
        "from test_decoder_process import *\n"
        "decoder = DecoderProcess(Format.PICTURE, SIZE)\n"
        "print(child_of(decoder), flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its parent")
