"""Files that survive a power cut, and locks that die with their process."""

import contextlib
import fcntl
import logging
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

_LOOK_SECONDS = 0.5

_log = logging.getLogger(__name__)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk.

    Raises
    ------
    OSError
        When the disk refuses, or the folder is not there.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durably(folder: Path) -> None:
    """Make a folder and what is missing above it, readable by its owner alone.

    Raises
    ------
    OSError
        When it cannot be made.
    """
    if not folder.is_dir():
        if folder.parent != folder:
            make_durably(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(folder.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; it takes the place of what was there.

    Raises
    ------
    OSError
        When the bytes could not be forced to disk; what was there is there still.
    """
    written = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        written.rename(path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def new_locked_file(folder: Path) -> tuple[int, Path]:
    """Make a file of a name of its own, for its owner alone, and lock it; returns its descriptor and its path.

    Whoever looks for what a dead process left takes only what nobody holds.

    Raises
    ------
    OSError
        When it cannot be made.
    """
    while True:
        path = folder / uuid.uuid4().hex
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Between its making and its locking, somebody who looked may have taken it for a leftover.
            if os.fstat(descriptor).st_nlink:
                return descriptor, path
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextlib.contextmanager
def alone(lock: Path, stopping: threading.Event) -> Iterator[bool]:
    """Hold a lock file while inside; waits for it until `stopping`, and yields whether it was got. It dies with its process.

    Raises
    ------
    OSError
        When the lock file cannot be made.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        mine = told = False
        while not mine and not stopping.is_set():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = True
            except BlockingIOError:
                if not told:
                    _log.info("another process holds %s; waiting for it", lock.name)
                    told = True
                stopping.wait(_LOOK_SECONDS)
        yield mine
    finally:
        os.close(descriptor)
