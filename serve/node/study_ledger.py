"""What was sent of each study: its revisions, in files beside the spool's folders.

A plan fixes what a revision is made of before anything of it is made: whatever is killed on the way, the same revision comes
out, and images that arrive meanwhile belong to the next. An issue is a plan that was handed to the outbox; the next revision
names its results as predecessors.

::

    studies/<digest>.plan.json   under way                 studies/<digest>.json   the last revision that was issued
"""

import contextlib
import hashlib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

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
        self._root, self._incoming = root / "studies", root / "incoming"
        make_durably(self._root)

    def planned(self) -> dict[str, Plan]:
        """Return the plans that are under way, by study."""
        return {path.name.removesuffix(".plan.json"): _read(Plan, path) for path in self._root.glob("*.plan.json")}

    def last(self, study: str) -> Issue | None:
        """Return the last issue of a study."""
        with contextlib.suppress(FileNotFoundError):
            return _read(Issue, self._root / f"{study}.json")
        return None

    def plan(self, study: str, plan: Plan) -> None:
        """Fix what the next revision is made of, durably."""
        self._write(self._root / f"{study}.plan.json", plan)

    def issue(self, study: str, issue: Issue) -> None:
        """Record that a plan's results are in the outbox, durably, and end the plan."""
        self._write(self._root / f"{study}.json", issue)
        self.abandon(study)

    def abandon(self, study: str) -> None:
        """End a plan that came to nothing."""
        (self._root / f"{study}.plan.json").unlink(missing_ok=True)
        sync_folder(self._root)

    def _write(self, path: Path, record: _Record) -> None:
        write_through(self._incoming, path, record.model_dump_json().encode())


def _read(kind: type[Read], path: Path) -> Read:
    return kind.model_validate_json(path.read_bytes())
