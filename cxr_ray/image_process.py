"""Reading images where a bad file does no harm: in a child process, with a limit of time and of memory an image.

Codecs are native code. A damaged or hostile file can end the process that decodes it, make it hang or make it reserve all
the memory there is; whoever decodes a million files must expect each of these. Here the child pays: it is killed and
replaced, and the file that was being decoded gets its reason.

What the child makes of a file is its reader's business: a function that the child finds by name, from bytes to bytes.

Two files in memory, shared with the child, carry the images in turns, so that one is read while the one before is decoded.
The child is asked by a line with the file's number and the length, and answers by a kind, a length and so many bytes: what
the reader returned, or what is wrong with the image.
"""

import contextlib
import importlib
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
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import IO, BinaryIO

from cxr_ray.child_process import answers_apart, start_child
from cxr_ray.pixels import DamagedImage, ImageError, OversizedImage, UnsupportedImage, UnusableImage, reason

MAX_SECONDS = 60.0
MAX_BYTES = 2 * 1024**3

_ERRORS: dict[str, type[ImageError]] = {
    kind.__name__: kind for kind in (DamagedImage, OversizedImage, UnsupportedImage, UnusableImage)
}
_HEAD = struct.Struct(">cI")
_CONTENT, _ERROR = b"C", b"E"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the kernel's file system in memory; the files there have no name
_MAX_WRITE = 2**30

Reader = Callable[[bytes, str], bytes]


class ImageProcess:
    """A child process that reads images.

    Parameters
    ----------
    reader
        ``module:function``. The child calls the function once with `arguments` (strings). What it returns is called with the
        bytes of each file and what is wished of it, answers with bytes, and raises an `ImageError` where there is something
        wrong with the image.
    max_seconds
        Wall-clock time that an image may take.
    max_bytes
        Memory that an image may take beyond what the libraries take.
    """

    def __init__(self, reader: str, *arguments: str, max_seconds: float = MAX_SECONDS, max_bytes: int = MAX_BYTES) -> None:
        self._reader, self._arguments = reader, arguments
        self._max_seconds, self._max_bytes = max_seconds, max_bytes
        self._child: subprocess.Popen[bytes] | None = None
        folder = str(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None
        self._files: list[IO[bytes]] = [tempfile.TemporaryFile(dir=folder, buffering=0) for _ in range(2)]  # noqa: SIM115 - `close` closes them

    def __enter__(self) -> "ImageProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child and free its memory."""
        self._end()
        for file in self._files:
            file.close()

    def start(self) -> None:
        """Start the child now, so that the first image need not wait for it."""
        if self._child is None:
            files = [file.fileno() for file in self._files]
            self._child = start_child(
                "cxr_ray.image_process", self._reader, self._max_bytes, *files, "--", *self._arguments, files=files
            )

    def read(self, content: bytes, wish: str = "") -> bytes:
        """What the reader makes of one file.

        Parameters
        ----------
        wish
            A line for the reader.

        Raises
        ------
        ImageError
            What is wrong with the image, without a name.
        """
        ((_, answer),) = self.answers([(0, content)], wish)
        if isinstance(answer, ImageError):
            raise answer
        return answer

    def answers(
        self, images: Iterable[tuple[int, bytes | ImageError]], wish: str = ""
    ) -> Generator[tuple[int, bytes | ImageError], None, None]:
        """Read numbered files, each while the next one is fetched.

        Parameters
        ----------
        images
            Numbers, each with the file's bytes or the reason why it could not be read, which is passed on.
        wish
            A line for the reader, the same for all of them.

        Yields
        ------
        int, bytes or ImageError
            Each number once, in no particular order, with the reader's answer or what is wrong with the image, without a name.
        """
        asked: list[tuple[int, str]] = []
        slot = 0
        try:
            for number, content in images:
                if isinstance(content, ImageError):
                    yield number, content
                    continue
                question = f"{slot} {len(content)} {wish}\n"
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
        self.start()
        # That a child has ended is noticed where its answer is awaited.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._child.stdin.fileno(), question.encode())  # type: ignore[union-attr]

    def _receive(self, asked: list[tuple[int, str]]) -> tuple[int, bytes | ImageError]:
        """The answer to the first question; where the child fails, it is replaced and asked the others again."""
        number, _ = asked.pop(0)
        try:
            return number, self._answer()
        except ImageError as error:
            self._end()
            for _, question in asked:
                self._ask(question)
            return number, error

    def _answer(self) -> bytes | ImageError:
        """Raises DamagedImage where the child says nothing in time, or has ended."""
        until = time.monotonic() + self._max_seconds
        kind, length = _HEAD.unpack(self._read(_HEAD.size, until))
        body = self._read(length, until)
        if kind == _CONTENT:
            return body
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


def _answer_of(read: Reader, data: bytes, wish: str) -> tuple[bytes, bytes]:
    try:
        return _CONTENT, read(data, wish)
    except ImageError as error:
        name, why = type(error).__name__, reason(error, "")
    except MemoryError:
        name, why = OversizedImage.__name__, "needs too much memory to decode; send a smaller image"
    except Exception as error:  # noqa: BLE001 - whatever a file provokes is the file's fault, and its text may quote the file
        name, why = DamagedImage.__name__, f"cannot be decoded ({type(error).__name__}); send the file again"
    return _ERROR, json.dumps([name, why]).encode()


def _serve(read: Reader, max_bytes: int, files: list[int], questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the parent closes its end, or is gone."""
    _limit_memory(read, max_bytes)
    for question in questions:
        slot, length, wish = question.decode().rstrip("\n").split(" ", 2)
        if int(length):
            with mmap.mmap(files[int(slot)], int(length), access=mmap.ACCESS_READ) as content:
                answer, body = _answer_of(read, content[:], wish)
        else:
            answer, body = _answer_of(read, b"", wish)
        answers.write(_HEAD.pack(answer, len(body)) + body)
        answers.flush()


def _limit_memory(read: Reader, max_bytes: int) -> None:
    """Limit the address space to what is taken once the libraries are loaded, and `max_bytes` more."""
    _answer_of(read, b"", "")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is not None:
        limit = pages * resource.getpagesize() + max_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _main(reader: str, max_bytes: str, *rest: str) -> None:
    import cv2  # noqa: PLC0415 - only the child sets its threads

    cv2.setNumThreads(1)
    apart = rest.index("--")
    module, _, function = reader.partition(":")
    read = getattr(importlib.import_module(module), function)(*rest[apart + 1 :])
    _serve(read, int(max_bytes), [int(file) for file in rest[:apart]], sys.stdin.buffer, answers_apart())


if __name__ == "__main__":
    _main(*sys.argv[1:])
