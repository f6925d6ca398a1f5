"""Decoding uploads beside the event loop: a few child processes, each of which a bad file may end without harm.

A film of 10 MB is not copied through an object store to be decoded: the children share the upload's memory with the replica
that received it, and what leaves the machine is the network's small square.
"""

import asyncio
import json
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date

import numpy as np

from cxr_ray.image_process import ImageProcess, Reader
from cxr_ray.pixels import ImageError, film, stored_square
from serve.uploads import DicomIdentity, UploadHeader, read_upload

# The longer edge of the film that people look at, in pixels.
FILM_EDGE = 1024
_HEAD = struct.Struct(">I")


class PoolFullError(Exception):
    """As many images wait for a decoder as may wait."""


@dataclass(frozen=True)
class DecodedUpload:
    """An upload decoded: what its header says, a stored square a size (uint8), and the film for people where it was wished."""

    header: UploadHeader
    squares: dict[int, np.ndarray]
    film: np.ndarray | None


class DecoderPool:
    """So many decoders, and so many images that may wait for one.

    Parameters
    ----------
    processes
        Child processes; each holds one image at a time.
    max_waiting
        Images that may wait beyond those that are being decoded.
    max_seconds
        Wall-clock time that an image may take.
    """

    def __init__(self, processes: int, max_waiting: int, *, max_seconds: float = 60.0) -> None:
        self._processes = [ImageProcess(f"{__name__}:upload_reader", max_seconds=max_seconds) for _ in range(processes)]
        self._idle = list(self._processes)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="decoder")
        self._slots = asyncio.Semaphore(processes)
        self._room = processes + max_waiting
        self._taken = 0

    def start(self) -> None:
        """Start the children now, so that the first image need not wait for one."""
        for process in self._processes:
            process.start()

    def close(self) -> None:
        """End the children."""
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.close()

    @property
    def queued(self) -> int:
        """Images that wait for a decoder."""
        return max(self._taken - len(self._processes), 0)

    async def decode(self, data: bytes, name: str, sizes: Sequence[int], *, with_film: bool = False) -> DecodedUpload:
        """Decode one upload to stored squares of these sizes.

        Raises
        ------
        PoolFullError
            If too many wait already.
        ImageError
            What is wrong with the image, `name` first.
        """
        if self._taken >= self._room:
            raise PoolFullError
        self._taken += 1
        wish = json.dumps([sorted(set(sizes)), FILM_EDGE if with_film else 0])
        try:
            async with self._slots:
                process = self._idle.pop()
                work = asyncio.get_running_loop().run_in_executor(self._threads, process.read, data, wish)
                try:
                    # Whoever asked may be gone: the child is free again only when it has answered.
                    answer = await asyncio.shield(work)
                except asyncio.CancelledError:
                    await asyncio.wait([work])
                    raise
                finally:
                    self._idle.append(process)
        except ImageError as error:
            raise type(error)(f"{name}: {error}") from None
        finally:
            self._taken -= 1
        return _unpacked(answer)


def upload_reader() -> Reader:
    """What the child does with an upload; it is wished ``[sizes, longest edge of the film or 0]``, in JSON."""
    return _read


def _read(data: bytes, wish: str) -> bytes:
    sizes, edge = json.loads(wish or "[[], 0]")
    grey, header = read_upload(data, "")
    squares = [stored_square(grey, size, "") for size in sizes]
    shown = [film(grey, edge, "")] if edge else []
    said = {**asdict(header), "sizes": sizes, "film": shown[0].shape if shown else None}
    head = json.dumps(said, default=date.isoformat).encode()
    return b"".join([_HEAD.pack(len(head)), head, *(image.tobytes() for image in squares + shown)])


def _unpacked(answer: bytes) -> DecodedUpload:
    (length,) = _HEAD.unpack_from(answer)
    start = _HEAD.size + length
    said = json.loads(answer[_HEAD.size : start])
    sizes, shape = said.pop("sizes"), said.pop("film")
    images = []
    for height, width in [(size, size) for size in sizes] + ([shape] if shape else []):
        images.append(np.frombuffer(answer, np.uint8, height * width, start).reshape(height, width))
        start += height * width
    squares = dict(zip(sizes, images, strict=False))
    return DecodedUpload(_header(said), squares, images[-1] if shape else None)


def _header(said: dict) -> UploadHeader:
    identity = said.pop("identity")
    if identity is not None:
        acquired = identity.pop("study_date")
        identity = DicomIdentity(**identity, study_date=date.fromisoformat(acquired) if acquired else None)
    return UploadHeader(**{**said, "warnings": tuple(said["warnings"])}, identity=identity)
