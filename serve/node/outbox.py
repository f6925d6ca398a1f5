"""The outbox: results that wait to be sent, as files on the spool's disk, a folder for each destination.

A parcel is taken when it lies under its final name, files and folder entries forced to disk. From there it ends in one of two
ways: delivered, and a receipt is kept; or dead, with a reason, to be replayed. There is no index that could disagree with the
files: listing the folders is the state, and whatever is killed between two steps, the next look finishes them.

::

    <destination>/incoming/         being written, or on its way out      waiting/<parcel>/   parcel.json, state.json, items
    <destination>/delivered/*.json  receipts                              dead/<parcel>/      the same, and letter.json
    <destination>/commitments/      see `serve.node.storage_commitment`
"""

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from cxr_ray.errors import CxrRayError
from serve.node.durable import make_durably, sync_folder, write_durably
from serve.node.parcels import Letter, Parcel, ParcelRecord, ParcelState, Receipt

_FOLDERS = ("incoming", "waiting", "delivered", "dead", "commitments")
_RECORD, _STATE, _LETTER = "parcel.json", "state.json", "letter.json"
_CURRENT = "destinations.json"

Record = TypeVar("Record", bound=BaseModel)


@dataclass(frozen=True)
class DeadParcel:
    """A dead letter; `record` is None where it cannot be read."""

    destination: str
    id: str
    letter: Letter
    record: ParcelRecord | None


class DestinationQueue:
    """The parcels of one destination.

    Parameters
    ----------
    root
        Its folder; made if absent.

    Raises
    ------
    OSError
        When the folder cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, root.name
        self._incoming, self._waiting, self._delivered, self._dead, self.commitments = (root / name for name in _FOLDERS)
        for name in _FOLDERS:
            make_durably(root / name)
        self._remove_leftovers()

    def add(self, parcel: Parcel) -> bool:
        """See `Outbox.add`."""
        if self._known(parcel.id):
            return False
        with self._writing() as folder:
            for item in parcel.items:
                _write(folder / item.name, item.read())
            _write(folder / _RECORD, ParcelRecord.of(parcel).model_dump_json().encode())
            sync_folder(folder)
            try:
                folder.rename(self._waiting / parcel.id)
            except OSError:
                # Another thread was faster with the same parcel.
                if not self._known(parcel.id):
                    raise
                return False
        sync_folder(self._waiting)
        return True

    def waiting(self) -> list[str]:
        """Ids of the parcels that wait, in no order."""
        return [name for name in os.listdir(self._waiting) if not name.startswith(".")]  # noqa: PTH208 - a thousand times as fast

    def is_waiting(self, name: str) -> bool:
        """Whether a parcel waits."""
        return (self._waiting / name).exists()

    def waiting_changed_ns(self) -> int:
        """When a parcel was last added or taken away: time of change of the folder."""
        return self._waiting.stat().st_mtime_ns

    def waiting_since(self) -> list[float]:
        """When each parcel that waits was added, seconds since the epoch."""
        added = []
        for name in self.waiting():
            with contextlib.suppress(FileNotFoundError):
                added.append((self._waiting / name / _RECORD).stat().st_mtime)
        return added

    def read(self, name: str) -> Parcel:
        """A parcel that waits; its items are files.

        Raises
        ------
        CxrRayError
            When what lies there is no parcel.
        OSError
            When it cannot be read, or has gone.
        """
        folder = self._waiting / name
        try:
            return ParcelRecord.model_validate_json((folder / _RECORD).read_bytes()).parcel(folder)
        except ValueError as error:
            raise CxrRayError(f"{name}: parcel.json cannot be read; look at the disk") from error

    def state(self, name: str) -> ParcelState:
        """How far a parcel that waits has come; from the beginning where that cannot be read."""
        # Not forced to disk when it was written: the receiver takes an item again under the same UID.
        with contextlib.suppress(OSError, ValidationError):
            return ParcelState.model_validate_json((self._waiting / name / _STATE).read_bytes())
        return ParcelState()

    def keep_state(self, name: str, state: ParcelState) -> None:
        """Note how far a parcel has come; a crash of the machine may forget it.

        Raises
        ------
        OSError
            When it cannot be written.
        """
        written = self._waiting / name / f".{_STATE}"
        written.write_bytes(state.model_dump_json().encode())
        written.rename(written.with_name(_STATE))

    def is_delivered(self, name: str) -> bool:
        """Whether there is a receipt."""
        return (self._delivered / f"{name}.json").exists()

    def delivered(self, receipt: Receipt) -> None:
        """Keep the receipt, durably, then let the parcel go.

        Raises
        ------
        OSError
            When the receipt cannot be written; the parcel waits still.
        """
        write_durably(self._delivered / f"{receipt.id}.json", receipt.model_dump_json().encode())
        self.let_go(receipt.id)

    def let_go(self, name: str) -> None:
        """Remove a parcel that has a receipt."""
        self._remove(self._waiting / name)

    def dead(self, name: str, letter: Letter) -> None:
        """Move a parcel that waits to the dead letters, durably.

        Raises
        ------
        OSError
            When that fails; the parcel waits still.
        """
        write_durably(self._waiting / name / _LETTER, letter.model_dump_json().encode())
        self._move(name, self._waiting, self._dead)

    def dead_letters(self) -> list[DeadParcel]:
        """Dead letters, the oldest first."""
        found = [self.dead_letter(folder.name) for folder in self._dead.iterdir()]
        return sorted(found, key=lambda dead: (dead.letter.when, dead.id))

    def count_dead(self) -> int:
        """How many dead letters there are."""
        return len(os.listdir(self._dead))  # noqa: PTH208 - as above

    def dead_letter(self, name: str) -> DeadParcel:
        """One dead letter; what cannot be read of it is told as lost."""
        folder = self._dead / name
        lost = Letter(reason="the reason was lost", detail="", when=datetime.fromtimestamp(0, UTC), attempts=0)
        return DeadParcel(self.name, name, _read(Letter, folder / _LETTER) or lost, _read(ParcelRecord, folder / _RECORD))

    def replay(self, name: str) -> None:
        """Put a dead letter back: it waits again, as one that was not tried yet; what was taken of it is not sent again.

        Raises
        ------
        CxrRayError
            When there is no such dead letter.
        """
        folder = self._dead / name
        if not name or Path(name).name != name or not folder.is_dir():
            raise CxrRayError(f"{name}: is not among the dead letters of {self.name}; 'deadletter list' names them")
        known = _read(ParcelState, folder / _STATE) or ParcelState()
        state = ParcelState(confirmed=known.confirmed, replayed_at=datetime.now(UTC))
        write_durably(folder / _STATE, state.model_dump_json().encode())
        self._move(name, self._dead, self._waiting)

    def receipt(self, name: str) -> Receipt | None:
        """The receipt of a delivered parcel; None where there is none."""
        return _read(Receipt, self._delivered / f"{name}.json")

    def receipts(self) -> list[str]:
        """Ids of the parcels that were delivered, as far as receipts are kept."""
        return [path.stem for path in self._delivered.glob("*.json")]

    def sweep(self, *, delivered_seconds: float | None, dead_seconds: float | None) -> int:
        """Remove receipts and dead letters that are older; None keeps them forever. Returns how many went."""
        removed = 0
        for folder, seconds in ((self._delivered, delivered_seconds), (self._dead, dead_seconds)):
            if seconds is not None:
                removed += self._sweep(folder, time.time() - seconds)
        return removed

    def sweep_waiting(self, seconds: float | None) -> int:
        """Remove parcels that were added longer ago: for destinations that are no more. Returns how many went."""
        return 0 if seconds is None else self._sweep(self._waiting, time.time() - seconds)

    def _sweep(self, folder: Path, oldest_kept: float) -> int:
        removed = 0
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                dated = next((file for file in (path / _LETTER, path / _RECORD) if file.exists()), path)
                if dated.stat().st_mtime < oldest_kept:
                    self._remove(path)
                    removed += 1
        return removed

    def _known(self, name: str) -> bool:
        # In the order in which a parcel travels, or one that moves between two looks is missed.
        places = (self._waiting / name, self._delivered / f"{name}.json", self._dead / name)
        for place in places:
            if place.exists():
                # Whoever wrote it may not have come to this yet, and known is a promise too.
                sync_folder(place.parent)
                return True
        return False

    def _move(self, name: str, source: Path, target: Path) -> None:
        (source / name).rename(target / name)
        # The new entry first: a crash between the two leaves two names, never none.
        sync_folder(target)
        sync_folder(source)

    def _remove(self, path: Path) -> None:
        """Take away at once, then delete: what a crash leaves lies where leftovers are removed."""
        gone = self._incoming / uuid.uuid4().hex
        with contextlib.suppress(FileNotFoundError):
            path.rename(gone)
        _delete(gone)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Path]:
        # The lock says that the writer lives: another process that opens the outbox removes only what nobody holds.
        while True:
            folder = self._incoming / uuid.uuid4().hex
            folder.mkdir(mode=0o700)
            descriptor = _locked(folder)
            if descriptor is not None:
                break
        try:
            yield folder
        finally:
            os.close(descriptor)
            _delete(folder)

    def _remove_leftovers(self) -> None:
        for path in self._incoming.iterdir():
            descriptor = _locked(path)
            if descriptor is not None:
                _delete(path)
                os.close(descriptor)


class Outbox:
    """Durable outbox under one folder; safe for several threads and processes of one machine.

    Parameters
    ----------
    root
        Folder on a local file system, e.g. ``SPOOL/outbox``. Made if absent.

    Raises
    ------
    CxrRayError
        When the folder cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._queues: dict[str, DestinationQueue] = {}
        self._watchers: list[Callable[[str], None]] = []
        try:
            make_durably(self.root)
        except OSError as error:
            raise CxrRayError(f"outbox {self.root}: {error.strerror}; name a folder on a local disk of this user") from error

    def add(self, parcel: Parcel) -> bool:
        """Take a parcel; durable when this returns.

        Returns
        -------
        bool
            False when a parcel of that id waits already, was delivered or is dead: nothing is done then.

        Raises
        ------
        OSError
            When it cannot be made durable; nothing was taken then.
        """
        new = self.queue(parcel.destination).add(parcel)
        for told in self._watchers:
            told(parcel.destination)
        return new

    def watch(self, told: Callable[[str], None]) -> None:
        """Have `told` called with the destination after each parcel that is added here; it must return at once."""
        self._watchers.append(told)

    def unwatch(self, told: Callable[[str], None]) -> None:
        """Call it no more."""
        self._watchers.remove(told)

    def queue(self, destination: str) -> DestinationQueue:
        """The parcels of a destination.

        Raises
        ------
        OSError
            When its folder cannot be made.
        """
        if destination not in self._queues:
            self._queues[destination] = DestinationQueue(self.root / destination)
        return self._queues[destination]

    def destinations(self) -> list[str]:
        """Names of all that have a folder, whether the settings name them still or not."""
        return sorted(path.name for path in self.root.iterdir() if path.is_dir())

    def keep_current(self, names: Iterable[str]) -> None:
        """Note which destinations the settings name, for whoever only sees the folder."""
        record = _Current(destinations=tuple(sorted(names)))
        write_durably(self.root / _CURRENT, record.model_dump_json().encode())

    def orphaned(self) -> list[str]:
        """Destinations that have parcels waiting and are not named by the settings with which delivery last ran."""
        current = _read(_Current, self.root / _CURRENT)
        if current is None:
            return []
        return [name for name in self.destinations() if name not in current.destinations and self.queue(name).waiting()]


class _Current(BaseModel):
    destinations: tuple[str, ...]


def _read(kind: type[Record], path: Path) -> Record | None:
    with contextlib.suppress(OSError, ValidationError):
        return kind.model_validate_json(path.read_bytes())
    return None


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder; None when another has it, or the path has gone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except OSError:
            pass
        os.close(descriptor)
    return None


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
