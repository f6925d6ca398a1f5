"""What was sent of each study: its revisions, in files beside the spool's folders.

A plan fixes what a revision is made of before anything of it is made: whatever is killed on the way, the same revision comes
out, and images that arrive meanwhile belong to the next. An issue is a plan that was handed to the outbox; the next revision
names its results as predecessors.

::

    plans/<digest>.json   under way                 studies/<digest>.json   the last revision that was issued

Plans are few and looked at all the time; issues are as many as studies, and each is looked for by its name alone.
"""

import contextlib
import hashlib
import time
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from serve.node.durable import make_durably, sync_folder
from serve.node.spool_files import write_through


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Read = TypeVar("Read", bound=_Record)


class Plan(_Record):
    """What a revision is made of: spool names of its instances, all that are known of the study."""

    revision: int
    instances: tuple[str, ...]


class Reference(_Record):
    """A result object, as another refers to it (PS3.3 section C.17.2.1)."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str


class Issue(_Record):
    """A revision whose results were handed to the outbox; `results` by their kind."""

    revision: int
    instances: tuple[str, ...]
    results: dict[str, Reference]


def study_digest(study_instance_uid: str) -> str:
    """The name of a study in the spool: 128 bits of the SHA-256 of its UID."""
    return hashlib.sha256(study_instance_uid.encode()).hexdigest()[:32]


class StudyLedger:
    """Plans and issues of the studies of the spool under `root`. One process writes.

    Raises
    ------
    OSError
        When the folder cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self._plans, self._issues, self._incoming = root / "plans", root / "studies", root / "incoming"
        make_durably(self._plans)
        make_durably(self._issues)

    def planned(self) -> set[str]:
        """Return the studies of which a plan is under way."""
        return {path.stem for path in self._plans.glob("*.json")}

    def under_way(self, study: str) -> Plan | None:
        """Return the plan of a study that is under way.

        Raises
        ------
        pydantic.ValidationError
            When it cannot be read, as one of a later version cannot.
        """
        with contextlib.suppress(FileNotFoundError):
            return _read(Plan, self._plans / f"{study}.json")
        return None

    def last(self, study: str) -> Issue | None:
        """Return the last issue of a study.

        Raises
        ------
        pydantic.ValidationError
            When it cannot be read.
        """
        with contextlib.suppress(FileNotFoundError):
            return _read(Issue, self._issues / f"{study}.json")
        return None

    def plan(self, study: str, plan: Plan) -> None:
        """Fix what the next revision is made of, durably."""
        self._write(self._plans / f"{study}.json", plan)

    def issue(self, study: str, issue: Issue) -> None:
        """Record that a plan's results are in the outbox, durably, and end the plan."""
        self._write(self._issues / f"{study}.json", issue)
        self.abandon(study)

    def abandon(self, study: str) -> None:
        """End a plan that came to nothing."""
        (self._plans / f"{study}.json").unlink(missing_ok=True)
        sync_folder(self._plans)

    def needed(self) -> set[str]:
        """Return the spool's names of the instances that plans name: they have to stay."""
        names: set[str] = set()
        for study in self.planned():
            with contextlib.suppress(ValidationError):
                plan = self.under_way(study)
                names |= set(plan.instances) if plan else set()
        return names

    def forget(self, keep_seconds: float) -> int:
        """Remove issues that are older; return how many. What comes of such a study is a study of its own again."""
        oldest_kept, removed = time.time() - keep_seconds, 0
        for path in self._issues.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest_kept:
                    path.unlink()
                    removed += 1
        return removed

    def _write(self, path: Path, record: _Record) -> None:
        write_through(self._incoming, path, record.model_dump_json().encode())


def _read(kind: type[Read], path: Path) -> Read:
    return kind.model_validate_json(path.read_bytes())
