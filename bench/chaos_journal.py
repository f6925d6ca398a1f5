"""Lines of JSON, each forced to disk before it counts: what a sender was told, what a destination took."""

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any


class Journal:
    """A file that is only added to; safe for several threads."""

    def __init__(self, path: Path) -> None:
        self._guard = threading.Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        # Whoever wrote before was killed, perhaps in the middle of a line.
        if (size := os.fstat(self._descriptor).st_size) and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")

    def write(self, **entry: Any) -> None:
        """Add a line; it is on disk when this returns."""
        line = json.dumps(entry).encode() + b"\n"
        with self._guard:
            os.write(self._descriptor, line)
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; those that a kill has cut are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
