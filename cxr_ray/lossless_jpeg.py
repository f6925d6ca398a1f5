"""Lossless JPEG, decoded where a crash does no harm.

GDCM is the only decoder of lossless JPEG under a permissive licence, and it ends its process on some damaged images. So it
runs in a child process, which is started for the first image, kept for the next ones and replaced when it has ended. It is
asked and answers by a line of JSON and the bytes that belong to it.
"""

import json
import os
import subprocess
import sys
import threading
from typing import Any, BinaryIO

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import as_pixel_options, get_decoder
from pydicom.uid import UID

MAX_SECONDS = 60.0

_lock = threading.Lock()
_children: list["subprocess.Popen[bytes]"] = []


def decode_lossless_jpeg(dataset: Dataset) -> np.ndarray:
    """The stored values of a dataset whose transfer syntax is lossless JPEG.

    Raises
    ------
    ValueError
        If the pixels do not decode within `MAX_SECONDS`.
    """
    options = {name: value for name, value in as_pixel_options(dataset).items() if isinstance(value, int | str)}
    question = {"syntax": str(dataset.file_meta.TransferSyntaxUID), "options": options}
    with _lock:
        child = _running_child()
        limit = threading.Timer(MAX_SECONDS, child.kill)
        limit.start()
        try:
            _write(child.stdin, question, dataset.PixelData)  # type: ignore[arg-type]
            answer, values = _read(child.stdout)  # type: ignore[arg-type]
        except (OSError, ValueError):
            child.kill()
            child.wait()
            raise ValueError("the decoder ended over it") from None
        finally:
            limit.cancel()
    if "error" in answer:
        raise ValueError(answer["error"])
    return np.frombuffer(values, dtype=answer["dtype"]).reshape(answer["shape"])


def _running_child() -> "subprocess.Popen[bytes]":
    if not _children or _children[0].poll() is not None:
        command = [sys.executable, "-m", "cxr_ray.lossless_jpeg"]
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        _children[:] = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=none)]  # noqa: S603 - ourselves
    return _children[0]


def _write(stream: BinaryIO, head: dict[str, Any], body: bytes) -> None:
    stream.write(json.dumps(head | {"length": len(body)}).encode() + b"\n")
    stream.write(body)
    stream.flush()


def _read(stream: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """Raises ValueError where the other side has ended."""
    head = json.loads(stream.readline())
    body = stream.read(head["length"])
    if len(body) < head["length"]:
        raise ValueError("ended early")
    return head, body


def _answer(question: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        decoder = get_decoder(UID(question["syntax"]))
        values, _ = decoder.as_array(data, index=0, decoding_plugin="gdcm", **question["options"])
    except Exception as error:  # noqa: BLE001 - the codec raises its own kinds
        return {"error": str(error) or type(error).__name__}, b""
    return {"dtype": values.dtype.str, "shape": values.shape}, values.tobytes()


def _serve() -> None:
    """Answer until the parent closes its end, or is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    # What GDCM prints must not mix with the answers.
    os.dup2(2, 1)
    while True:
        try:
            question, data = _read(sys.stdin.buffer)
        except ValueError:
            return
        _write(answers, *_answer(question, data))


if __name__ == "__main__":
    _serve()
