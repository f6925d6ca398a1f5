"""A data set on its way into the spool: written, counted and hashed while it is received.

The bytes go straight from the receiver's buffer into a file of ``incoming/``; memory does not grow with the image. The file
is locked while it is written: another process that opens the spool removes only what nobody holds.
"""

import ctypes
import os
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from blake3 import blake3

from serve.instance_names import CONTENT_DIGITS
from serve.node.data_set_head import HEAD_BYTES
from serve.node.durable import new_locked_file

_MOST_FRAGMENTS = 256
_WRITE_BACK_BYTES = 512 * 1024
_SYNC_FILE_RANGE_WRITE = 2
_start_write_back = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)


class Arrival:
    """One data set that arrives; a context, which leaves nothing behind unless `rename` was called.

    Parameters
    ----------
    incoming : pathlib.Path
        Folder for the file.
    file_head : bytes
        What stands in the file before the data set; neither counted nor hashed.

    Raises
    ------
    OSError
        When the file cannot be made.
    """

    def __init__(self, incoming: Path, file_head: bytes) -> None:
        self.size = 0
        self.sync_seconds = 0.0
        self.head = b""
        self._hash = blake3()
        self._fragments: list[bytes | memoryview] = [file_head]
        self._start = len(file_head)
        self._written = self._written_back = 0
        self._descriptor, self._path = new_locked_file(incoming)

    def add(self, fragment: memoryview | bytes) -> None:
        """Take the next bytes of the data set, which must stay as they are until `flush`."""
        self.size += len(fragment)
        self._fragments.append(fragment)
        if len(self._fragments) >= _MOST_FRAGMENTS:
            self.flush()

    def flush(self) -> None:
        """Hash and write what was taken.

        Raises
        ------
        OSError
            When it cannot be written.
        """
        fragments, self._fragments = self._fragments, []
        has_file_head = not self._written
        self._write(list(fragments))
        # After the writing: the disk is at work while this is computed.
        for fragment in fragments[has_file_head:]:
            self._hash.update(fragment)
            if len(self.head) < HEAD_BYTES:
                self.head += bytes(fragment[: HEAD_BYTES - len(self.head)])

    def digest(self) -> str:
        """BLAKE3 of what was flushed, to 128 bits, as `serve.instance_names.short_digest`."""
        return self._hash.hexdigest()[:CONTENT_DIGITS]

    def written(self) -> BinaryIO:
        """What was flushed of the data set, to be read back; closed by the caller.

        Raises
        ------
        OSError
            When the file cannot be opened.
        """
        stream = self._path.open("rb")
        stream.seek(self._start)
        return stream

    def sync(self) -> None:
        """Force the file to disk.

        Raises
        ------
        OSError
            When the disk fails.
        """
        started = time.perf_counter()
        os.fsync(self._descriptor)
        self.sync_seconds = time.perf_counter() - started

    def rename(self, target: Path) -> None:
        """Give the file its final name; whoever is to find it there after a crash forces the folder to disk too."""
        self._path.rename(target)

    def close(self) -> None:
        """Let go of the file; without a final name it is removed. May be repeated."""
        if self._descriptor < 0:
            return
        try:
            self._path.unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    def _write(self, fragments: list[bytes | memoryview]) -> None:
        while fragments:
            count = os.writev(self._descriptor, fragments)
            self._written += count
            done = 0
            while done < len(fragments) and count >= len(fragments[done]):
                count -= len(fragments[done])
                done += 1
            fragments = fragments[done:]
            if count and fragments:
                fragments[0] = memoryview(fragments[0])[count:]
        if _start_write_back and self._written - self._written_back >= _WRITE_BACK_BYTES:
            # The disk works while the rest is received, which leaves little for fsync to wait for; only a hint.
            length = self._written - self._written_back
            _start_write_back(
                self._descriptor, ctypes.c_int64(self._written_back), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE
            )
            self._written_back = self._written
