"""The durable spool: what the node has promised to answer, as files on a local disk.

An instance that a peer was told is stored lies under its final name in ``ready/``, its bytes and its folder entry
forced to disk. From there a rename takes it to ``done/`` (answered) or ``dead/`` (given up, the reason beside it). The
names are digests of SOP Instance UID and data set: they say what was received, carry nobody's identity and cannot
leave the folder. There is no index that could disagree with the files: listing the folders is the state.

::

    incoming/   being written; removed when its writer is gone     ready/  accepted, to be answered, oldest first
    done/       answered, kept for a while to recognise re-sends    dead/   <name> and <name>.json with the reason
    conflicts/  other bytes under a UID that was taken, with <name>.json; nobody answers them
    filed/      accepted to be kept unread; nobody answers them
    known/      which content came first under a UID, as links that point to its digest; made anew from the files
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from cxr_ray.errors import CxrRayError
from serve.instance_names import instance_names, short_digest
from serve.node.arrival import Arrival
from serve.node.claims import Claims
from serve.node.file_meta import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, read_meta
from serve.node.spool_records import Conflict, DeadLetter, Origin, SpooledInstance, Stored

__all__ = [
    "FOLDERS",
    "IMPLEMENTATION_CLASS_UID",
    "IMPLEMENTATION_VERSION_NAME",
    "TRAVEL",
    "Conflict",
    "DeadLetter",
    "Origin",
    "Spool",
    "SpooledInstance",
    "Stored",
    "name_of",
]

# Where an instance that is to be answered can be, in the order in which it travels: whoever looks for one looks in this
# order, or misses a file that moves between two looks.
TRAVEL = ("ready", "done", "dead")
FOLDERS = ("incoming", *TRAVEL, "conflicts", "filed", "known")

_log = logging.getLogger(__name__)


class Spool:
    """Durable spool under one folder; safe for several threads and processes of one machine.

    Parameters
    ----------
    root : pathlib.Path
        Folder on a local file system (rename and flock must hold; no network share). Created if absent.

    Raises
    ------
    CxrRayError
        When the folder cannot be created or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._incoming, self._ready, self._done, self._dead, self._conflicts, self._filed = (
            self.root / name for name in ("incoming", "ready", "done", "dead", "conflicts", "filed")
        )
        self._travel = tuple(self.root / name for name in TRAVEL)
        self._claims = Claims(self.root / "known", self._travel)
        try:
            for name in FOLDERS:
                _make_durably(self.root / name)
            self._remove_leftovers()
            self._claims.renew()
        except OSError as error:
            raise CxrRayError(
                f"spool {self.root}: {error.strerror}; name a folder on a local disk that this user can write"
            ) from error

    def receive(self, origin: Origin) -> Arrival:
        """Begin to receive a data set; `keep` or `file_unread` decides what becomes of it.

        Raises
        ------
        OSError
            When no file can be made.
        """
        return Arrival(self._incoming, origin.file_head())

    def keep(self, arrival: Arrival, origin: Origin) -> Stored:
        """Make a received data set durable under its final name; `arrival` has been flushed and is closed by its owner.

        Raises
        ------
        OSError
            When the bytes could not be made durable; nothing is promised then (PS3.4 Annex B: status A7xx).
        """
        name = name_of(origin.sop_instance_uid, arrival.digest())
        if self._is_kept(name, (*self._travel, self._conflicts)):
            _log.info("%s: received again from %r", name, origin.calling_ae)
            return Stored.DUPLICATE
        arrival.sync()
        first = self._claims.take(name)
        if first != name:
            self._keep_aside(arrival, name, first, origin)
            return Stored.CONFLICT
        arrival.rename(self._ready / name)
        _sync_folder(self._ready)
        _log.info("%s: received %d bytes from %r", name, arrival.size, origin.calling_ae)
        return Stored.NEW

    def file_unread(self, arrival: Arrival, origin: Origin) -> Stored:
        """Make a received data set durable in ``filed/``, where nobody answers it.

        Raises
        ------
        OSError
            As `keep`.
        """
        name = name_of(origin.sop_instance_uid, arrival.digest())
        if self._is_kept(name, (self._filed,)):
            return Stored.DUPLICATE
        arrival.sync()
        arrival.rename(self._filed / name)
        _sync_folder(self._filed)
        _log.info("%s: filed %d bytes from %r unread", name, arrival.size, origin.calling_ae)
        return Stored.NEW

    def store(self, data: bytes | memoryview, origin: Origin) -> Stored:
        """Make a data set that is in memory durable under its final name.

        Parameters
        ----------
        data : bytes or memoryview
            Bytes of the encoded data set exactly as received, without file meta information.
        origin : Origin
            What the file meta group will say; none of its UIDs may be empty.

        Returns
        -------
        Stored
            `Stored.DUPLICATE` when the same bytes under the same SOP Instance UID are kept already: nothing is queued.

        Raises
        ------
        OSError
            As `keep`.
        """
        name = name_of(origin.sop_instance_uid, short_digest(data))
        if self._is_kept(name, (*self._travel, self._conflicts)):
            _log.info("%s: received again from %r", name, origin.calling_ae)
            return Stored.DUPLICATE
        with self.receive(origin) as arrival:
            arrival.add(data)
            arrival.flush()
            return self.keep(arrival, origin)

    def pending(self) -> list[str]:
        """Return the names in ``ready/``, oldest first (time of receipt, then name)."""
        found = []
        with os.scandir(self._ready) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.name.endswith(".dcm"):
                        found.append((entry.stat().st_mtime_ns, entry.name))
        return [name for _, name in sorted(found)]

    def path(self, name: str) -> Path:
        """Return where a pending instance lies."""
        return self._ready / name

    def read(self, name: str) -> SpooledInstance:
        """Read a pending instance's identifiers, without its pixels.

        Raises
        ------
        CxrRayError
            When the file is no DICOM Part 10 file or names no study, series or instance.
        OSError
            When it is not in ``ready/`` any more, or the disk fails.
        """
        path = self._ready / name
        received = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        names = instance_names(path, name)
        return SpooledInstance(
            path=path,
            name=name,
            content_digest=name.removesuffix(".dcm").rpartition("-")[2],
            received_at=received,
            peer_address=_address_in(path),
            **vars(names),
        )

    def done(self, name: str) -> None:
        """Move an answered instance from ``ready/`` to ``done/``; does nothing when it is there already."""
        if self._move(name, self._ready, self._done):
            os.utime(self._done / name)
        with contextlib.suppress(FileNotFoundError):
            self._sidecar(name).unlink()

    def dead(self, name: str, *, reason: str, status: int | None, attempts: int, instance: SpooledInstance | None) -> None:
        """Give a pending instance up: reason first, durably, then the move to ``dead/``."""
        letter = {
            "reason": reason,
            "status": status,
            "when": datetime.now(UTC).isoformat(),
            "attempts": attempts,
            "sop_instance_uid": instance.sop_instance_uid if instance else None,
            "study_instance_uid": instance.study_instance_uid if instance else None,
        }
        self._write_durably(letter, self._sidecar(name))
        _sync_folder(self._dead)
        self._move(name, self._ready, self._dead)

    def dead_letters(self) -> list[DeadLetter]:
        """Return what was given up, oldest decision first."""
        letters = [self._letter(path.name) for path in self._dead.glob("*.dcm")]
        return sorted(letters, key=lambda letter: (letter.when, letter.name))

    def replay(self, name: str) -> None:
        """Queue a dead letter again and forget its reason.

        Raises
        ------
        CxrRayError
            When there is no such dead letter.
        """
        # The name comes from a command line: it has to be one of ours, and never a path.
        if name not in {path.name for path in self._dead.glob("*.dcm")} or not self._move(name, self._dead, self._ready):
            raise CxrRayError(f"dead letter {name!r} is not in {self._dead}; list the names with `deadletter list`")
        self._sidecar(name).unlink(missing_ok=True)
        _sync_folder(self._dead)

    def conflicts(self) -> list[Conflict]:
        """Return what came under a UID that was taken, oldest first."""
        found = [self._conflict(path.name) for path in self._conflicts.glob("*.dcm")]
        return sorted(found, key=lambda conflict: (conflict.when, conflict.name))

    def count(self, folder: str) -> int:
        """Count the instances in one of the spool's folders."""
        with os.scandir(self.root / folder) as entries:
            return sum(entry.name.endswith(".dcm") for entry in entries)

    def free_bytes(self) -> int:
        """Tell what is left on the spool's file system."""
        return shutil.disk_usage(self.root).free

    def has_room(self, min_free_bytes: int) -> bool:
        """Tell whether the spool's file system has `min_free_bytes` left."""
        return self.free_bytes() >= min_free_bytes

    def sweep(self, keep_done_seconds: float, keep_done_count: int | None = None) -> int:
        """Remove answered instances that are older than wanted or more than wanted; return how many.

        Parameters
        ----------
        keep_done_seconds : float
            Seconds since the answer. ``inf`` keeps all.
        keep_done_count : int, optional
            The newest that stay, whatever their age allows; ``None`` sets no limit.
        """
        newest_first = sorted(
            ((path.stat().st_mtime, path) for path in self._done.glob("*.dcm")), key=lambda aged: aged[0], reverse=True
        )
        oldest_kept = time.time() - keep_done_seconds
        removed = 0
        for rank, (answered, path) in enumerate(newest_first):
            if answered < oldest_kept or (keep_done_count is not None and rank >= keep_done_count):
                path.unlink(missing_ok=True)
                self._claims.forget(path.name)
                removed += 1
        return removed

    def _is_kept(self, name: str, folders: tuple[Path, ...]) -> bool:
        for folder in folders:
            if (folder / name).exists():
                # The thread that wrote it may not have come to this yet, and a duplicate is a promise too.
                _sync_folder(folder)
                return True
        return False

    def _keep_aside(self, arrival: Arrival, name: str, first: str, origin: Origin) -> None:
        """Reason first, durably, then the bytes."""
        reason = {
            "reason": "another data set came under a SOP Instance UID that was taken",
            "first": first,
            "when": datetime.now(UTC).isoformat(),
            "sop_instance_uid": origin.sop_instance_uid,
            "calling_ae": origin.calling_ae or None,
            "peer_address": origin.peer_address or None,
        }
        self._write_durably(reason, self._conflicts / f"{name}.json")
        arrival.rename(self._conflicts / name)
        _sync_folder(self._conflicts)
        _log.warning("%s: other bytes under the UID of %s, from %r; kept in conflicts/", name, first, origin.calling_ae)

    def _conflict(self, name: str) -> Conflict:
        try:
            known = json.loads((self._conflicts / f"{name}.json").read_text(encoding="utf-8"))
            del known["reason"]
            return Conflict(name, **{**known, "when": datetime.fromisoformat(known["when"])})
        except (OSError, ValueError, KeyError, TypeError):
            return Conflict(name, "", datetime.fromtimestamp(0, UTC), None, None, None)

    def _write_durably(self, content: Mapping[str, object], path: Path) -> None:
        with Arrival(self._incoming, json.dumps(content).encode()) as file:
            file.flush()
            file.sync()
            file.rename(path)

    def _move(self, name: str, source: Path, target: Path) -> bool:
        moved = True
        try:
            (source / name).rename(target / name)
        except FileNotFoundError:
            # Moved before a crash, perhaps: then only the trace on disk is missing.
            moved = False
        # The new entry first: a crash between the two leaves two names, never none.
        _sync_folder(target)
        _sync_folder(source)
        return moved

    def _sidecar(self, name: str) -> Path:
        return self._dead / f"{name}.json"

    def _letter(self, name: str) -> DeadLetter:
        try:
            known = json.loads(self._sidecar(name).read_text(encoding="utf-8"))
            return DeadLetter(name, **{**known, "when": datetime.fromisoformat(known["when"])})
        except (OSError, ValueError, KeyError, TypeError):
            return DeadLetter(name, "the reason was lost", None, datetime.fromtimestamp(0, UTC), 0, None, None)

    def _remove_leftovers(self) -> None:
        for path in self._incoming.iterdir():
            if path.is_symlink():
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(descriptor)


def name_of(sop_instance_uid: str, content_digest: str) -> str:
    """Return the spool's name of an instance: digest of its UID, digest of its data set."""
    return f"{hashlib.sha256(sop_instance_uid.encode()).hexdigest()[:32]}-{content_digest}.dcm"


def _address_in(path: Path) -> str | None:
    try:
        return urlsplit(read_meta(path).source_address).hostname
    except ValueError:
        return None


def _make_durably(folder: Path) -> None:
    if not folder.is_dir():
        if folder.parent != folder:
            _make_durably(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
