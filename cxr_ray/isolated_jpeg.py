"""The JPEG processes that only GDCM decodes, where a crash of it does no harm.

GDCM is the only decoder of lossless JPEG and of JPEG of 12 bits under a permissive licence, and it ends its process on some
damaged images. So it runs in a child process, which is started for the first image, kept for the next ones and replaced
when it has ended. It is asked and answers by a line of JSON and the bytes that belong to it.
"""

import json
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from cxr_ray.child_process import answers_apart, start_child

MAX_SECONDS = 60.0

_lock = threading.Lock()
_children: list["subprocess.Popen[bytes]"] = []


@dataclass(frozen=True)
class JpegFrame:
    """What GDCM must know of a code stream, whose own precision counts and not what the header says of bits."""

    transfer_syntax: str
    rows: int
    columns: int
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int


def decode_isolated(frame: JpegFrame, code_stream: bytes) -> bytes:
    """The decoded frame: pixel after pixel, samples of one pixel together, words little-endian.

    Raises
    ------
    ValueError
        If it does not decode within `MAX_SECONDS`.
    """
    with _lock:
        child = _running_child()
        limit = threading.Timer(MAX_SECONDS, child.kill)
        limit.start()
        try:
            _write(child.stdin, asdict(frame), code_stream)  # type: ignore[arg-type]
            answer, values = _read(child.stdout)  # type: ignore[arg-type]
        except (OSError, ValueError):
            child.kill()
            child.wait()
            raise ValueError("the decoder ended over it") from None
        finally:
            limit.cancel()
    if "error" in answer:
        raise ValueError(answer["error"])
    return values


def _running_child() -> "subprocess.Popen[bytes]":
    if not _children or _children[0].poll() is not None:
        _children[:] = [start_child("cxr_ray.isolated_jpeg")]
    return _children[0]


def _write(stream: BinaryIO, head: dict[str, Any], body: bytes) -> None:
    stream.write(json.dumps(head | {"length": len(body)}).encode() + b"\n")
    stream.write(body)
    stream.flush()


def _read(stream: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """Raises ValueError where the other side has ended."""
    head = json.loads(stream.readline())
    body = stream.read(head.pop("length"))
    return head, body


def _decode(frame: JpegFrame, code_stream: bytes) -> bytes:
    """With GDCM, in this process."""
    import gdcm  # type: ignore[import-untyped]  # noqa: PLC0415 - only the child may load what can end it

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(code_stream)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())

    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((frame.columns, frame.rows, 1))
    image.SetDataElement(element)
    kind = gdcm.PhotometricInterpretation.GetPIType(frame.photometric)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(frame.transfer_syntax)))
    # Signs are restored from the stored bits afterwards, as for every other syntax.
    bits = (frame.bits_allocated, frame.bits_stored, frame.bits_stored - 1)
    image.SetPixelFormat(gdcm.PixelFormat(frame.samples, *bits, 0))
    return bytes(image.GetBuffer().encode("utf-8", "surrogateescape"))


def _answer(question: dict[str, Any], code_stream: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        values = _decode(JpegFrame(**question), code_stream)
    except Exception as error:  # noqa: BLE001 - the codec raises its own kinds
        return {"error": type(error).__name__}, b""
    return {}, values


def _serve() -> None:
    """Answer until the parent closes its end, or is gone."""
    answers = answers_apart()
    while True:
        try:
            question, code_stream = _read(sys.stdin.buffer)
        except ValueError:
            return
        _write(answers, *_answer(question, code_stream))


if __name__ == "__main__":
    _serve()
