"""The durable spool: what the node has promised to answer, as files on a local disk.

An instance that a peer was told is stored lies under its final name in ``ready/``, its bytes and its folder entry
forced to disk. From there a rename takes it to ``done/`` (answered) or ``dead/`` (given up, the reason beside it). The
names are digests of SOP Instance UID and data set: they say what was received, carry nobody's identity and cannot
leave the folder. There is no index that could disagree with the files: listing the folders is the state.

::

    incoming/   being written; removed when its writer is gone     ready/  accepted, to be answered, oldest first
    answered/   see `serve.node.answered`
    done/       settled, kept for a while to recognise re-sends     dead/   <name> and <name>.json with the reason
    conflicts/  other bytes under a UID that was taken, with <name>.json; nobody answers them
    filed/      accepted to be kept unread; nobody answers them
    receiving/  what each open association has brought; see `serve.node.open_senders`
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
from datetime import UTC, datetime
from pathlib import Path

from cxr_ray.errors import CxrRayError
from serve.instance_names import instance_names, short_digest
from serve.node.answered import AnsweredInstances
from serve.node.arrival import Arrival
from serve.node.claims import Claims
from serve.node.durable import make_durably, sync_folder
from serve.node.file_meta import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from serve.node.open_senders import OpenSenders
from serve.node.spool_files import beside, letter, move_durably, read_instance, write_through
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
TRAVEL = ("ready", "answered", "done", "dead")
FOLDERS = ("incoming", "receiving", *TRAVEL, "conflicts", "filed", "known")

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
        self.answers = AnsweredInstances(self.root)
        self.senders = OpenSenders(self.root / "receiving")
        self._claims = Claims(self.root / "known", self._travel)
        try:
            for name in FOLDERS:
                make_durably(self.root / name)
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
        try:
            arrival.rename(self._ready / name)
        except OSError:
            self._claims.forget(name)
            raise
        sync_folder(self._ready)
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
        sync_folder(self._filed)
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
        return read_instance(self._ready / name)

    def study_uid(self, name: str) -> str:
        """Return the Study Instance UID of an instance that is to be answered, or was.

        Raises
        ------
        CxrRayError
            When the file is not readable as DICOM.
        FileNotFoundError
            When it is in none of these folders.
        """
        for folder in self._travel:
            with contextlib.suppress(FileNotFoundError):
                return instance_names(folder / name, name).study_instance_uid
        raise FileNotFoundError(name)

    def done(self, name: str) -> None:
        """Move an answered instance from ``ready/`` to ``done/``; does nothing when it is there already."""
        if move_durably(name, self._ready, self._done):
            os.utime(self._done / name)
        with contextlib.suppress(FileNotFoundError):
            self._sidecar(name).unlink()

    def dead(self, name: str, *, reason: str, status: int | None, attempts: int, instance: SpooledInstance | None) -> None:
        """Give a pending instance up: reason first, durably, then the move to ``dead/``."""
        write_through(self._incoming, self._sidecar(name), letter(reason, status, attempts, instance))
        move_durably(name, self._ready, self._dead)

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
        if name not in {path.name for path in self._dead.glob("*.dcm")} or not move_durably(name, self._dead, self._ready):
            raise CxrRayError(f"dead letter {name!r} is not in {self._dead}; list the names with `deadletter list`")
        self._sidecar(name).unlink(missing_ok=True)
        sync_folder(self._dead)

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

    def sweep(
        self, keep_done_seconds: float, keep_done_count: int | None = None, *, needed: frozenset[str] = frozenset()
    ) -> int:
        """Remove answered instances that are older than wanted or more than wanted; return how many.

        Parameters
        ----------
        keep_done_seconds : float
            Seconds since the answer. ``inf`` keeps all.
        keep_done_count : int, optional
            The newest that stay, whatever their age allows; ``None`` sets no limit.
        needed : frozenset of str
            Names that stay in any case.
        """
        newest_first = sorted(
            ((path.stat().st_mtime, path) for path in self._done.glob("*.dcm")), key=lambda aged: aged[0], reverse=True
        )
        oldest_kept = time.time() - keep_done_seconds
        removed = 0
        for rank, (answered, path) in enumerate(newest_first):
            too_many = keep_done_count is not None and rank >= keep_done_count
            if (answered < oldest_kept or too_many) and path.name not in needed:
                path.unlink(missing_ok=True)
                beside(path).unlink(missing_ok=True)
                self._claims.forget(path.name)
                removed += 1
        return removed

    def sweep_aside(self, folder: str, keep_seconds: float) -> int:
        """Remove what a person was to decide about, and did not in time; return how many.

        Parameters
        ----------
        folder : str
            ``dead``, ``conflicts`` or ``filed``.
        keep_seconds : float
            Seconds since the reason was written, or, where there is none, since it came.
        """
        oldest_kept, removed = time.time() - keep_seconds, 0
        for path in (self.root / folder).glob("*.dcm"):
            with contextlib.suppress(FileNotFoundError):
                said = beside(path)
                if (said if said.exists() else path).stat().st_mtime < oldest_kept:
                    path.unlink()
                    said.unlink(missing_ok=True)
                    self._claims.forget(path.name)
                    removed += 1
        return removed

    def _is_kept(self, name: str, folders: tuple[Path, ...]) -> bool:
        for folder in folders:
            if (folder / name).exists():
                # The thread that wrote it may not have come to this yet, and a duplicate is a promise too.
                sync_folder(folder)
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
        write_through(self._incoming, beside(self._conflicts / name), json.dumps(reason).encode())
        arrival.rename(self._conflicts / name)
        sync_folder(self._conflicts)
        _log.warning("%s: other bytes under the UID of %s, from %r; kept in conflicts/", name, first, origin.calling_ae)

    def _conflict(self, name: str) -> Conflict:
        try:
            known = json.loads((self._conflicts / f"{name}.json").read_text(encoding="utf-8"))
            del known["reason"]
            return Conflict(name, **{**known, "when": datetime.fromisoformat(known["when"])})
        except (OSError, ValueError, KeyError, TypeError):
            return Conflict(name, "", datetime.fromtimestamp(0, UTC), None, None, None)

    def _sidecar(self, name: str) -> Path:
        return beside(self._dead / name)

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
