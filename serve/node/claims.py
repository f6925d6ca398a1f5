"""Which content came first under a SOP Instance UID, told at once and to one writer, in whatever process it is.

A claim is a symbolic link named by the digest of the UID, which points to the digest of the content: to make one is atomic,
fails where there is one, and needs no block on the disk. Claims are made of the spool's files and follow them; all can be lost
without harm, and a claim whose file is gone binds nobody.
"""

import contextlib
import errno
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

# A claim without a file is one that is about to get it, or one that a crash left; nothing in between takes this long.
_CLAIM_SECONDS = 10.0
_LOOK_SECONDS = 0.05
# That an honest writer needs between its claim and its name; a peer waits for its answer meanwhile.
_PATIENCE_SECONDS = 2.0

_log = logging.getLogger(__name__)


class Claims:
    """Claims of the names in some folders.

    Parameters
    ----------
    folder : pathlib.Path
        Where the links are; on one file system.
    holding : sequence of pathlib.Path
        Folders whose files have their UIDs, in the order in which a file travels.
    """

    def __init__(self, folder: Path, holding: Sequence[Path]) -> None:
        self._folder = folder
        self._lock = folder.with_name("claims.lock")
        self._holding = tuple(holding)

    def take(self, name: str) -> str:
        """Claim the UID for `name`, and return the name that has it: `name` where nobody was before it.

        Raises
        ------
        OSError
            When the link cannot be made; BlockingIOError when another content has claimed the UID and is not there: its writer
            is at work, or was killed. Which of the two, time tells: the same again a little later finds out.
        """
        subject, content = _parts(name)
        link = self._folder / subject
        patience = time.monotonic() + _PATIENCE_SECONDS
        while True:
            with contextlib.suppress(FileExistsError):
                link.symlink_to(content)
                return name
            try:
                first, claimed = f"{subject}-{link.readlink()}.dcm", link.lstat().st_mtime
            except FileNotFoundError:
                continue
            if first == name or self._is_held(first):
                return first
            if abs(time.time() - claimed) >= _CLAIM_SECONDS:
                if self._replace(link, first, content):
                    _log.info("%s: takes the place of %s, which is gone", name, first)
                    return name
            elif time.monotonic() > patience:
                raise BlockingIOError(errno.EAGAIN, "another data set of this instance is being written")
            time.sleep(_LOOK_SECONDS)

    def forget(self, name: str) -> None:
        """Give the UID free that `name` has."""
        subject, content = _parts(name)
        with contextlib.suppress(OSError):
            if str((self._folder / subject).readlink()) == content:
                (self._folder / subject).unlink()

    def _is_held(self, name: str) -> bool:
        return any((folder / name).exists() for folder in self._holding)

    def _replace(self, link: Path, first: str, content: str) -> bool:
        """Take a claim over that binds nobody; one at a time, so that of two who find it only one has it."""
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if f"{link.name}-{link.readlink()}.dcm" == first and not self._is_held(first):
                    temporary = self._folder / f".{uuid.uuid4().hex}"
                    temporary.symlink_to(content)
                    temporary.replace(link)
                    return True
            return False
        finally:
            os.close(descriptor)

    def renew(self) -> None:
        """Bring the claims in line with the files.

        Raises
        ------
        OSError
            When the disk fails.
        """
        held = {_parts(path.name)[0]: path.name for folder in self._holding for path in folder.glob("*-*.dcm")}
        claims = {path.name for path in self._folder.iterdir()}
        for subject in held.keys() - claims:
            with contextlib.suppress(FileExistsError):
                (self._folder / subject).symlink_to(_parts(held[subject])[1])
        now = time.time()
        for subject in claims - held.keys():
            with contextlib.suppress(FileNotFoundError):
                if abs(now - (self._folder / subject).lstat().st_mtime) >= _CLAIM_SECONDS:
                    (self._folder / subject).unlink()


def _parts(name: str) -> tuple[str, str]:
    """Of a name: the digests of its UID and of its content."""
    subject, _, content = name.removesuffix(".dcm").partition("-")
    return subject, content
