"""Decoding to stored squares in a child process, which a bad file may end without harm (`cxr_ray.image_process`)."""

from collections.abc import Iterable, Iterator

import numpy as np

from cxr_ray.decoding import Format, decode
from cxr_ray.image_process import MAX_BYTES, MAX_SECONDS, ImageProcess, Reader
from cxr_ray.pixels import ImageError, stored_square


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
        self._size = size
        self._process = ImageProcess(
            f"{__name__}:square_reader", kind.value, str(size), max_seconds=max_seconds, max_bytes=max_bytes
        )

    def __enter__(self) -> "DecoderProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child and free its memory."""
        self._process.close()

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
        answers = self._process.answers(images)
        try:
            for number, answer in answers:
                if isinstance(answer, ImageError):
                    yield number, answer
                else:
                    yield number, np.frombuffer(answer, dtype=np.uint8).reshape(self._size, self._size)
        finally:
            answers.close()


def square_reader(kind: str, size: str) -> Reader:
    """What the child does with a file: the bytes of its stored square."""
    return lambda data, _wish: stored_square(decode(Format(kind), data, ""), int(size), "").tobytes()


# One decoder a process: Ray runs the next task in the same one.
_decoders: dict[tuple[Format, int], DecoderProcess] = {}


def decoder_of_process(kind: Format, size: int) -> DecoderProcess:
    """The decoder that this process keeps from one task to the next; one for other files or another size is closed."""
    if (kind, size) not in _decoders:
        for decoder in _decoders.values():
            decoder.close()
        _decoders.clear()
        _decoders[kind, size] = DecoderProcess(kind, size)
    return _decoders[kind, size]
