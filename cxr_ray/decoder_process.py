"""Decoding where a bad file does no harm: in a child process, with a limit of time and of memory an image.

Codecs are native code. A damaged or hostile file can end the process that decodes it, make it hang or make it reserve all
the memory there is; whoever decodes a million files must expect each of these. Here the child pays: it is killed and
replaced, and the file that was being decoded gets its reason.

Two files in memory, shared with the child, carry the images in turns, so that one is read while the one before is decoded.
The child is asked by a line with the file's number and the length, and answers by a kind, a length and so many bytes: the
stored square, or what is wrong with the image.
"""

import contextlib
import json
import mmap
import os
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from cxr_ray.child_process import answers_apart, start_child
from cxr_ray.decoding import Format, decode
from cxr_ray.pixels import DamagedImage, ImageError, OversizedImage, UnsupportedImage, UnusableImage, reason, stored_square

MAX_SECONDS = 60.0
MAX_BYTES = 2 * 1024**3

_ERRORS: dict[str, type[ImageError]] = {
    kind.__name__: kind for kind in (DamagedImage, OversizedImage, UnsupportedImage, UnusableImage)
}
_HEAD = struct.Struct(">cI")
_SQUARE, _ERROR = b"S", b"E"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the kernel's file system in memory; the files there have no name
_MAX_WRITE = 2**30


class DecoderProcess:
    """A child process that turns files into stored squares.

    Parameters
    ----------
    kind
        What the files are.
    size
        Edge of the stored square in pixels.
    max_seconds
        Wall-clock time that an image may take.
    max_bytes
        Memory that decoding may take beyond what the libraries take.
    """

    def __init__(self, kind: Format, size: int, *, max_seconds: float = MAX_SECONDS, max_bytes: int = MAX_BYTES) -> None:
        self._kind, self._size = kind, size
        self._max_seconds, self._max_bytes = max_seconds, max_bytes
        self._child: subprocess.Popen[bytes] | None = None
        folder = str(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None
        self._files: list[IO[bytes]] = [tempfile.TemporaryFile(dir=folder, buffering=0) for _ in range(2)]  # noqa: SIM115 - `close` closes them

    def __enter__(self) -> "DecoderProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child and free its memory."""
        self._end()
        for file in self._files:
            file.close()

    def squares(self, images: Iterable[tuple[int, bytes | ImageError]]) -> Iterator[tuple[int, np.ndarray | ImageError]]:
        """Decode numbered files, each while the next one is read.

        Parameters
        ----------
        images
            Numbers, each with the file's bytes or the reason why it could not be read, which is passed on.

        Yields
        ------
        int, numpy.ndarray or ImageError
            Each number once, in no particular order, with the stored square (uint8, shape (size, size)) or what is wrong with
            the image, without a name.
        """
        asked: list[tuple[int, str]] = []
        slot = 0
        try:
            for number, content in images:
                if isinstance(content, ImageError):
                    yield number, content
                    continue
                question = f"{slot} {len(content)}\n"
                _replace(self._files[slot], content)
                asked.append((number, question))
                self._ask(question)
                slot = 1 - slot
                if len(asked) == 2:
                    yield self._receive(asked)
            while asked:
                yield self._receive(asked)
        finally:
            # Whoever stops in between must not leave answers to the next one.
            if asked:
                self._end()

    def _ask(self, question: str) -> None:
        if self._child is None:
            files = [file.fileno() for file in self._files]
            arguments = (self._kind.value, self._size, self._max_bytes, *files)
            self._child = start_child("cxr_ray.decoder_process", *arguments, files=files)
        # That a child has ended is noticed where its answer is awaited.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._child.stdin.fileno(), question.encode())  # type: ignore[union-attr]

    def _receive(self, asked: list[tuple[int, str]]) -> tuple[int, np.ndarray | ImageError]:
        """The answer to the first question; where the child fails, it is replaced and asked the others again."""
        number, _ = asked.pop(0)
        try:
            return number, self._answer()
        except ImageError as error:
            self._end()
            for _, question in asked:
                self._ask(question)
            return number, error

    def _answer(self) -> np.ndarray | ImageError:
        """Raises DamagedImage where the child says nothing in time, or has ended."""
        until = time.monotonic() + self._max_seconds
        kind, length = _HEAD.unpack(self._read(_HEAD.size, until))
        body = self._read(length, until)
        if kind == _SQUARE:
            return np.frombuffer(body, dtype=np.uint8).reshape(self._size, self._size)
        name, why = json.loads(body)
        return _ERRORS[name](why)

    def _read(self, length: int, until: float) -> bytes:
        child = self._child
        stream = child.stdout.fileno()  # type: ignore[union-attr]
        parts = bytearray()
        while len(parts) < length:
            if not select.select([stream], [], [], max(0.0, until - time.monotonic()))[0]:
                raise DamagedImage(f"takes more than {self._max_seconds:g} s to decode; send the file again")
            part = os.read(stream, length - len(parts))
            if not part:
                code = child.wait()  # type: ignore[union-attr]
                how = f"signal {-code}" if code < 0 else f"exit status {code}"
                raise DamagedImage(f"ends the decoder ({how}); send the file again")
            parts += part
        return bytes(parts)

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _replace(file: IO[bytes], content: bytes) -> None:
    file.truncate(0)
    view = memoryview(content)
    # One call writes less than 2 GiB.
    for start in range(0, len(view), _MAX_WRITE):
        os.pwrite(file.fileno(), view[start : start + _MAX_WRITE], start)


def _square(kind: Format, size: int, data: bytes) -> tuple[bytes, bytes]:
    try:
        return _SQUARE, stored_square(decode(kind, data, ""), size, "").tobytes()
    except ImageError as error:
        name, why = type(error).__name__, reason(error, "")
    except MemoryError:
        name, why = OversizedImage.__name__, "needs too much memory to decode; send a smaller image"
    except Exception as error:  # noqa: BLE001 - whatever a file provokes is the file's fault, and its text may quote the file
        name, why = DamagedImage.__name__, f"cannot be decoded ({type(error).__name__}); send the file again"
    return _ERROR, json.dumps([name, why]).encode()


def _serve(kind: Format, size: int, max_bytes: int, files: list[int], questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the parent closes its end, or is gone."""
    _limit_memory(kind, max_bytes)
    for question in questions:
        slot, length = map(int, question.split())
        if length:
            with mmap.mmap(files[slot], length, access=mmap.ACCESS_READ) as content:
                answer, body = _square(kind, size, content[:])
        else:
            answer, body = _square(kind, size, b"")
        answers.write(_HEAD.pack(answer, len(body)) + body)
        answers.flush()


def _limit_memory(kind: Format, max_bytes: int) -> None:
    """Limit the address space to what is taken once the libraries are loaded, and `max_bytes` more."""
    with contextlib.suppress(ImageError):
        decode(kind, b"", "")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is not None:
        limit = pages * resource.getpagesize() + max_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _main(kind: str, size: str, max_bytes: str, *files: str) -> None:
    import cv2  # noqa: PLC0415 - only the child sets its threads

    cv2.setNumThreads(1)
    shared = [int(file) for file in files]
    _serve(Format(kind), int(size), int(max_bytes), shared, sys.stdin.buffer, answers_apart())


if __name__ == "__main__":
    _main(*sys.argv[1:])
