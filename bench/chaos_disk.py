"""The spool's disk: a file system of its own that can be filled to the last byte."""

import contextlib
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Self

_LARGEST = 1 << 20
_LOOK_SECONDS = 0.02


class SpoolDisk:
    """A tmpfs, mounted while inside; where that is not permitted a plain folder, and `reason` says why.

    Parameters
    ----------
    root
        Where it is mounted; made.
    """

    def __init__(self, root: Path, megabytes: int) -> None:
        self.root, self._megabytes = root, megabytes
        self.reason = ""

    def __enter__(self) -> Self:
        self.root.mkdir()
        try:
            ran = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={self._megabytes}m,mode=700", "tmpfs", self.root],
                capture_output=True,
                text=True,
                check=False,
            )
            self.reason = ran.stderr.strip() if ran.returncode else ""
        except OSError as error:
            self.reason = f"mount: {error.strerror}"
        return self

    def __exit__(self, *_exception: object) -> None:
        if not self.reason:
            # Whoever was killed may take a moment to let go.
            for _ in range(50):
                if subprocess.run(["umount", self.root], capture_output=True, check=False).returncode == 0:
                    break
                time.sleep(0.1)

    def fill(self, seconds: float, stopping: threading.Event) -> None:
        """Keep it full to the last byte for some seconds; what others free meanwhile is taken too."""
        filler = self.root / "filler"
        until = time.monotonic() + seconds
        descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            while time.monotonic() < until and not stopping.is_set():
                _fill(descriptor)
                time.sleep(_LOOK_SECONDS)
        finally:
            os.close(descriptor)
            filler.unlink()


def _fill(descriptor: int) -> None:
    size = _LARGEST
    while size:
        try:
            os.write(descriptor, b"\0" * size)
        except OSError:
            size //= 2
            continue
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
