"""Answered instances: those whose study's results are not on the way yet, and, for later revisions, those that are settled.

::

    answered/  <name> and <name>.json, the answer            done/  the same, once the results are in the outbox

An answer travels ahead of its instance, so that whoever finds an instance finds its answer.
"""

import contextlib
import os
from datetime import UTC, datetime
from pathlib import Path

from serve.node.spool_files import beside, letter, move_durably, read_instance, write_through
from serve.node.spool_records import SpooledInstance


class AnsweredInstances:
    """The answered instances of the spool under `root`; its folders are there."""

    def __init__(self, root: Path) -> None:
        self._incoming, self._ready, self._answered, self._done, self._dead = (
            root / name for name in ("incoming", "ready", "answered", "done", "dead")
        )

    def keep(self, name: str, answer: bytes) -> None:
        """Keep a pending instance's answer, durably, and move the instance from ``ready/`` to ``answered/``.

        Parameters
        ----------
        answer : bytes
            A JSON object.
        """
        write_through(self._incoming, beside(self._answered / name), answer)
        if not move_durably(name, self._ready, self._answered) and not (self._answered / name).exists():
            # Settled before, by another process: the answer belongs to nothing here.
            beside(self._answered / name).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            beside(self._dead / name).unlink()

    def awaiting(self) -> list[str]:
        """Return the names whose results are not on the way yet."""
        return sorted(path.name for path in self._answered.glob("*.dcm"))

    def file(self, name: str) -> Path:
        """Return where an answered instance lies.

        Raises
        ------
        FileNotFoundError
            When it was swept, or never answered.
        """
        for folder in (self._answered, self._done):
            if (folder / name).exists():
                return folder / name
        raise FileNotFoundError(name)

    def instance(self, name: str) -> SpooledInstance:
        """Read an answered instance's identifiers, without its pixels.

        Raises
        ------
        FileNotFoundError
            When it was swept, or never answered.
        """
        return read_instance(self.file(name))

    def answer(self, name: str) -> bytes:
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

    def settle(self, name: str) -> None:
        """Move an answered instance and its answer to ``done/``: its results are on the way."""
        with contextlib.suppress(FileNotFoundError):
            beside(self._answered / name).rename(beside(self._done / name))
        if move_durably(name, self._answered, self._done):
            os.utime(self._done / name)

    def give_up(self, name: str, *, reason: str) -> None:
        """Make an answered instance a dead letter, as its results cannot be made; replayed, it is answered anew."""
        write_through(self._incoming, beside(self._dead / name), letter(reason, None, 0, self.instance(name)))
        move_durably(name, self._answered, self._dead)
        beside(self._answered / name).unlink(missing_ok=True)

    def _answer_file(self, name: str) -> Path:
        for folder in (self._answered, self._done):
            if beside(folder / name).exists():
                return beside(folder / name)
        raise FileNotFoundError(name)
