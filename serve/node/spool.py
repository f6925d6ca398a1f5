"""The durable spool: what the node has promised to answer, as files on a local disk.

An instance that a peer was told is stored lies under its final name in ``ready/``, its bytes and its folder entry
forced to disk. From there a rename takes it to ``done/`` (answered) or ``dead/`` (given up, the reason beside it). The
names are digests of SOP Instance UID and data set: they say what was received, carry nobody's identity and cannot
leave the folder. There is no index that could disagree with the files: listing the folders is the state.

::

    incoming/  being written; removed when its writer is gone      ready/  accepted, to be answered, oldest first
    answered/  answered, their study's results not yet on the way; <name>.json beside each is the answer
    done/      settled, kept for a while to recognise re-sends      dead/   <name> and <name>.json with the reason
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from io import BytesIO
from pathlib import Path

import pydicom.config
from pydicom.dataelem import DataElement
from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import write_file_meta_info

from cxr_ray.errors import CxrRayError
from serve.instance_names import instance_names, short_digest
from serve.node.durable import make_durably, sync_folder

IMPLEMENTATION_CLASS_UID = "2.25.322980158282305504265312806421250201875"
IMPLEMENTATION_VERSION_NAME = "CXRRAY_1"
_FOLDERS = ("incoming", "ready", "answered", "done", "dead")

_log = logging.getLogger(__name__)


class Stored(Enum):
    """What `Spool.store` found; both mean that the instance is safe."""

    NEW = "new"
    DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Origin:
    """What the file meta group says about received bytes (PS3.10 section 7.1).

    Parameters
    ----------
    sop_class_uid, sop_instance_uid : str
        As in the C-STORE command set.
    transfer_syntax_uid : str
        The syntax in which the data set is encoded.
    calling_ae : str
        Title of the sender; anything outside printable ASCII is dropped.
    """

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae: str = ""


@dataclass(frozen=True)
class SpooledInstance:
    """An accepted instance: where it lies and the identifiers under which its answer is filed."""

    path: Path
    name: str
    content_digest: str
    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    patient_id: str | None
    accession_number: str | None
    study_date: str | None
    calling_ae: str | None
    received_at: datetime


@dataclass(frozen=True)
class DeadLetter:
    """An instance that was given up. `status` is the HTTP status that decided it; identifiers may be unknown."""

    name: str
    reason: str
    status: int | None
    when: datetime
    attempts: int
    sop_instance_uid: str | None
    study_instance_uid: str | None


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
        self._incoming, self._ready, self._answered, self._done, self._dead = (self.root / name for name in _FOLDERS)
        try:
            for name in _FOLDERS:
                make_durably(self.root / name)
            self._remove_leftovers()
        except OSError as error:
            raise CxrRayError(
                f"spool {self.root}: {error.strerror}; name a folder on a local disk that this user can write"
            ) from error

    def store(self, data: bytes | memoryview, origin: Origin) -> Stored:
        """Make a received data set durable under its final name.

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
            When the bytes could not be made durable; nothing is promised then (PS3.4 Annex B: status A7xx).
        """
        name = name_of(origin.sop_instance_uid, short_digest(data))
        # In the order in which a file travels, or one that moves between two looks is missed.
        for folder in (self._ready, self._answered, self._done, self._dead):
            if (folder / name).exists():
                # The thread that wrote it may not have come to this yet, and a duplicate is a promise too.
                sync_folder(folder)
                _log.info("%s: received again from %r", name, origin.calling_ae)
                return Stored.DUPLICATE
        with self._writing() as (descriptor, path):
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(_file_head(origin))
                file.write(data)
            os.fsync(descriptor)
            path.rename(self._ready / name)
        sync_folder(self._ready)
        _log.info("%s: received %d bytes from %r", name, len(data), origin.calling_ae)
        return Stored.NEW

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
        return _instance(self._ready / name)

    def done(self, name: str) -> None:
        """Move an answered instance from ``ready/`` to ``done/``; does nothing when it is there already."""
        if self._move(name, self._ready, self._done):
            os.utime(self._done / name)
        with contextlib.suppress(FileNotFoundError):
            self._sidecar(name).unlink()

    def answered(self, name: str, answer: bytes) -> None:
        """Keep a pending instance's answer, durably, and move it from ``ready/`` to ``answered/``.

        Parameters
        ----------
        answer : bytes
            A JSON object.
        """
        self._write(_beside(self._answered / name), answer)
        if not self._move(name, self._ready, self._answered) and not (self._answered / name).exists():
            # Settled before, by another process: the answer belongs to nothing here.
            _beside(self._answered / name).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._sidecar(name).unlink()

    def awaiting_results(self) -> list[str]:
        """Return the names in ``answered/`` whose results are not on the way yet."""
        return sorted(path.name for path in self._answered.glob("*.dcm"))

    def answered_file(self, name: str) -> Path:
        """Return where an instance lies that was answered: its results not yet on the way, or settled.

        Raises
        ------
        FileNotFoundError
            When it was swept, or never answered.
        """
        for folder in (self._answered, self._done):
            if (folder / name).exists():
                return folder / name
        raise FileNotFoundError(name)

    def answer_of(self, name: str) -> bytes:
        """Return the answer that was kept with an instance.

        Raises
        ------
        FileNotFoundError
            When none was kept.
        """
        return self._answer_file(name).read_bytes()

    def answered_at(self, name: str) -> datetime:
        """Return when an instance's answer was kept, in UTC.

        Raises
        ------
        FileNotFoundError
            When none was kept.
        """
        return datetime.fromtimestamp(self._answer_file(name).stat().st_mtime, UTC)

    def study_uid(self, name: str) -> str:
        """Return the Study Instance UID of an instance that is to be answered, or was.

        Raises
        ------
        CxrRayError
            When the file is not readable as DICOM.
        FileNotFoundError
            When it is in none of these folders.
        """
        for folder in (self._ready, self._answered, self._done):
            with contextlib.suppress(FileNotFoundError):
                return instance_names(folder / name, name).study_instance_uid
        raise FileNotFoundError(name)

    def settled(self, name: str) -> None:
        """Move an answered instance and its answer to ``done/``: its results are on the way."""
        with contextlib.suppress(FileNotFoundError):
            _beside(self._answered / name).rename(_beside(self._done / name))
        if self._move(name, self._answered, self._done):
            os.utime(self._done / name)

    def unanswerable(self, name: str, *, reason: str) -> None:
        """Give an answered instance up, whose results cannot be made; replayed, it is answered anew."""
        self._write(self._sidecar(name), _letter_json(reason, None, 0, _instance(self._answered / name)))
        self._move(name, self._answered, self._dead)
        _beside(self._answered / name).unlink(missing_ok=True)

    def dead(self, name: str, *, reason: str, status: int | None, attempts: int, instance: SpooledInstance | None) -> None:
        """Give a pending instance up: reason first, durably, then the move to ``dead/``."""
        self._write(self._sidecar(name), _letter_json(reason, status, attempts, instance))
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
        sync_folder(self._dead)

    def has_room(self, min_free_bytes: int) -> bool:
        """Tell whether the spool's file system has `min_free_bytes` left."""
        return shutil.disk_usage(self.root).free >= min_free_bytes

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
                _beside(path).unlink(missing_ok=True)
                removed += 1
        return removed

    def _write(self, target: Path, content: bytes) -> None:
        with self._writing() as (descriptor, path):
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(content)
            os.fsync(descriptor)
            path.rename(target)
        sync_folder(target.parent)

    def _move(self, name: str, source: Path, target: Path) -> bool:
        moved = True
        try:
            (source / name).rename(target / name)
        except FileNotFoundError:
            # Moved before a crash, perhaps: then only the trace on disk is missing.
            moved = False
        # The new entry first: a crash between the two leaves two names, never none.
        sync_folder(target)
        sync_folder(source)
        return moved

    def _answer_file(self, name: str) -> Path:
        # It travels ahead of its instance.
        for folder in (self._answered, self._done):
            if _beside(folder / name).exists():
                return _beside(folder / name)
        raise FileNotFoundError(name)

    def _sidecar(self, name: str) -> Path:
        return _beside(self._dead / name)

    def _letter(self, name: str) -> DeadLetter:
        try:
            known = json.loads(self._sidecar(name).read_text(encoding="utf-8"))
            return DeadLetter(name, **{**known, "when": datetime.fromisoformat(known["when"])})
        except (OSError, ValueError, KeyError, TypeError):
            return DeadLetter(name, "the reason was lost", None, datetime.fromtimestamp(0, UTC), 0, None, None)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[tuple[int, Path]]:
        # The lock says that the writer lives: another process that opens the spool removes only what nobody holds.
        while True:
            path = self._incoming / uuid.uuid4().hex
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                break
            os.close(descriptor)
        try:
            yield descriptor, path
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def _remove_leftovers(self) -> None:
        for path in self._incoming.iterdir():
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


def _instance(path: Path) -> SpooledInstance:
    return SpooledInstance(
        path=path,
        name=path.name,
        content_digest=path.stem.rpartition("-")[2],
        received_at=datetime.fromtimestamp(path.stat().st_mtime, UTC),
        **vars(instance_names(path, path.name)),
    )


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def _letter_json(reason: str, status: int | None, attempts: int, instance: SpooledInstance | None) -> bytes:
    letter = {
        "reason": reason,
        "status": status,
        "when": datetime.now(UTC).isoformat(),
        "attempts": attempts,
        "sop_instance_uid": instance.sop_instance_uid if instance else None,
        "study_instance_uid": instance.study_instance_uid if instance else None,
    }
    return json.dumps(letter).encode()


def _file_head(origin: Origin) -> bytes:
    meta = FileMetaDataset()
    title = "".join(letter for letter in origin.calling_ae if " " <= letter <= "~" and letter != "\\").strip()[:16]
    for keyword, representation, value in (
        ("FileMetaInformationVersion", "OB", b"\x00\x01"),
        ("MediaStorageSOPClassUID", "UI", origin.sop_class_uid),
        ("MediaStorageSOPInstanceUID", "UI", origin.sop_instance_uid),
        ("TransferSyntaxUID", "UI", origin.transfer_syntax_uid),
        ("ImplementationClassUID", "UI", IMPLEMENTATION_CLASS_UID),
        ("ImplementationVersionName", "SH", IMPLEMENTATION_VERSION_NAME),
        ("SourceApplicationEntityTitle", "AE", title),
    ):
        # Unvalidated: real archives hold UIDs with leading zeros, and a warning would print them.
        if value:
            meta.add(DataElement(keyword, representation, value, validation_mode=pydicom.config.IGNORE))
    head = BytesIO(b"\x00" * 128 + b"DICM")
    head.seek(0, os.SEEK_END)
    write_file_meta_info(head, meta, enforce_standard=True)
    return head.getvalue()
