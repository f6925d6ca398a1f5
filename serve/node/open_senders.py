"""Who is sending now, in whatever process of this machine: a study is not complete while an association that brought one of its
images is open.

Each association that stores something has a file with the names of what it stored, locked as long as the association lasts. A
process that dies lets go of its locks: what it left says nothing any more, and is removed by whoever looks next.
"""

import contextlib
import fcntl
import os
from pathlib import Path

from serve.node.durable import new_locked_file


class OpenSender:
    """One association's file; there is none until something is stored. For one thread.

    Parameters
    ----------
    folder : pathlib.Path
        Where it lies.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor = -1
        self._path: Path | None = None

    def add(self, name: str) -> None:
        """Say that an instance was stored, by its name in the spool.

        Where the disk does not take it, the study may be taken for complete too early, and its next image makes a revision.
        """
        with contextlib.suppress(OSError):
            if self._descriptor < 0:
                self._descriptor, self._path = new_locked_file(self._folder)
            os.write(self._descriptor, f"{name}\n".encode())

    def close(self) -> None:
        """Say that the association has ended."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor, self._path = -1, None


class OpenSenders:
    """The open associations of all processes that share a spool.

    Parameters
    ----------
    folder : pathlib.Path
        Where their files lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self) -> OpenSender:
        """Return what an association tells of itself."""
        return OpenSender(self._folder)

    def names(self) -> set[str]:
        """Spool's names of the instances that were newly stored by associations that have not ended.

        Raises
        ------
        OSError
            When the folder cannot be listed.
        """
        found: set[str] = set()
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found |= _stored_by(Path(entry.path))
        return found


def _stored_by(path: Path) -> set[str]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return set(path.read_text(encoding="ascii").split())
    else:
        path.unlink(missing_ok=True)
        return set()
    finally:
        os.close(descriptor)
