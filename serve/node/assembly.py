"""From answered instances to results on their way: studies are gathered, their results made and handed to the outbox.

A study is due when its associations have ended, it has been quiet for a while and none of its instances waits for an answer;
or, whatever goes on, after a longest wait. Images that come later make a revision, which holds the whole study and names its
predecessor. The order plan, make, hand over, record, settle makes a crash at any point harmless: what was planned is made
again, under the same UIDs, and the outbox takes a result once.
"""

import contextlib
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cxr_ray.errors import CxrRayError
from serve.node.durable import alone
from serve.node.spool import Spool
from serve.node.study_ledger import Issue, Plan, Reference, StudyLedger, study_digest

_JOIN_SECONDS = 5.0
_WORKERS = 2

_log = logging.getLogger(__name__)


class AssemblySettings(BaseModel):
    """When a study is taken for complete."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quiet_seconds: float = Field(5, ge=0, description="Seconds without a new image, and without its association; 0: none.")
    longest_wait_seconds: float = Field(
        300, gt=0, description="Seconds after which results are made of the images that are answered; cannot be off."
    )
    first_retry_seconds: float = Field(1, gt=0, description="Pause after results could not be made; doubles with each time.")
    max_retry_seconds: float = Field(60, gt=0, description="Longest such pause.")
    attempts: int = Field(5, ge=1, description="Times that results fail to be made before a study's new images are given up.")


class ServiceAwayError(Exception):
    """What is needed for the results cannot be had now; waiting helps."""


class ResultMaker(Protocol):
    """Makes a revision's results and hands them to every destination."""

    def hand_over(self, study: str, plan: Plan, predecessors: dict[str, Reference]) -> dict[str, Reference]:
        """Make the results of a plan and put them into the outbox, durably and once; returns them by kind.

        Raises
        ------
        ServiceAwayError
            When the service does not give what is needed.
        OSError
            When the outbox cannot be written.
        """
        ...


@dataclass
class _Study:
    """What is known of a study that has answered instances; times are monotonic."""

    first: float
    latest: float
    names: set[str] = field(default_factory=set)
    waits: int = 0
    failures: int = 0
    not_before: float = 0.0
    state: str = ""


class Assembler:
    """Makes the results of one spool's studies, in threads of its own.

    Any number may be started on a spool: one holds its lock and works, the others wait to take over.

    Parameters
    ----------
    settings : AssemblySettings
        When a study is complete.
    spool : Spool
        Where answered instances lie.
    maker : ResultMaker
        Makes and hands over what is sent.
    """

    def __init__(self, settings: AssemblySettings, spool: Spool, maker: ResultMaker) -> None:
        self._settings, self._spool, self._maker = settings, spool, maker
        self._ledger = StudyLedger(spool.root)
        self._studies: dict[str, _Study] = {}
        self._study_of: dict[str, str] = {}
        self._busy: set[str] = set()
        self._held: set[str | None] = set()
        self._guard = threading.Lock()
        self._stopping, self._wake = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to work, or to wait for the spool's lock; returns at once."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="assembler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing new and return when what is under way has ended, or after a few seconds without it."""
        self._stopping.set()
        self._wake.set()
        if self._thread:
            self._thread.join(_JOIN_SECONDS)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def notify(self) -> None:
        """Say that something was answered, or an association has ended; returns at once."""
        self._wake.set()

    def _run(self) -> None:
        with alone(self._spool.root / "assembler.lock", self._stopping) as mine, ThreadPoolExecutor(_WORKERS) as workers:
            while mine and not self._stopping.is_set():
                self._wake.clear()
                try:
                    due = self._due()
                except OSError as error:
                    _log.error("answered instances cannot be listed: %s", error.strerror)
                    due = []
                # Whatever else it is must not end the thread unseen: peers go on being told that all is well.
                except Exception as error:  # noqa: BLE001
                    _log.error("answered instances cannot be looked through (%s)", type(error).__name__, exc_info=error)
                    due = []
                for study in due:
                    workers.submit(self._work, study)
                self._wake.wait(self._pause())

    def _due(self) -> list[str]:
        """Take what may be made now; each study is busy from here until `_work` has ended."""
        now = time.monotonic()
        planned = self._ledger.planned()
        self._look(now)
        pending, receiving = self._spool.pending(), self._spool.senders.names()
        waiting = {self._study(name) for name in pending}
        arriving = {self._study(name) for name in receiving}
        with self._guard:
            looked_at = {*pending, *receiving}.union(*(known.names for known in self._studies.values()))
            self._study_of = {name: study for name, study in self._study_of.items() if name in looked_at}
            for study in self._studies.keys() & arriving:
                self._studies[study].latest = now
            # Somebody says when they go on; until then there is nothing to look for.
            self._held = waiting | arriving
            due = [
                study
                for study, known in self._studies.items()
                if study not in self._busy
                and now >= known.not_before
                and (study in planned or self._complete(known, now, asked=study in waiting))
            ]
            self._busy |= set(due)
        return due

    def _complete(self, known: _Study, now: float, *, asked: bool) -> bool:
        quiet = not asked and now - known.latest >= self._settings.quiet_seconds
        return quiet or now - known.first >= self._settings.longest_wait_seconds

    def _look(self, now: float) -> None:
        """Note what was answered since the last look."""
        names = set(self._spool.answers.awaiting())
        with self._guard:
            known = set().union(*(study.names for study in self._studies.values())) if self._studies else set()
        for name in sorted(names - known):
            study = self._study(name)
            if study is None:
                continue
            # Clocks are set: an age from the file's date is believed as far as it matters.
            with contextlib.suppress(FileNotFoundError):
                age = time.time() - self._spool.answers.file(name).stat().st_mtime
                came = now - min(max(age, 0.0), self._settings.quiet_seconds)
                with self._guard:
                    seen = self._studies.setdefault(study, _Study(came, came))
                    seen.names.add(name)
                    seen.latest = max(seen.latest, came)

    def _study(self, name: str) -> str | None:
        """The study of an instance, read once; None where it is no longer there, or names none."""
        if name not in self._study_of:
            try:
                self._study_of[name] = study_digest(self._spool.study_uid(name))
            except (OSError, CxrRayError):
                return None
        return self._study_of[name]

    def _pause(self) -> float:
        now = time.monotonic()
        with self._guard:
            moments = [
                max(known.not_before, known.latest + self._settings.quiet_seconds)
                for study, known in self._studies.items()
                if study not in self._busy and study not in self._held
            ]
        return min(max(min(moments, default=now + 0.5) - now, 0.02), 0.5)

    def _work(self, study: str) -> None:
        try:
            self._issue(study)
        except ServiceAwayError as away:
            self._wait(study, str(away))
        except FileNotFoundError as error:
            self._fail(study, error)
        except OSError as error:
            self._wait(study, f"disk: {error.strerror}")
        # Whatever else it is must not end the thread unseen, nor lose the study.
        except Exception as error:  # noqa: BLE001
            self._fail(study, error)
        finally:
            with self._guard:
                self._busy.discard(study)
            self._wake.set()

    def _issue(self, study: str) -> None:
        last = self._ledger.last(study)
        plan = self._ledger.under_way(study)
        issued = set(last.instances) if last else set()
        if plan is not None and last is not None and plan.revision <= last.revision:
            # Killed between the record of an issue and the end of its plan.
            self._ledger.abandon(study)
            plan = None
        with self._guard:
            new = self._studies[study].names - issued
        if plan is None and new:
            earlier = [name for name in sorted(issued) if self._there(name)]
            plan = Plan(revision=last.revision + 1 if last else 1, instances=(*earlier, *sorted(new)))
            self._ledger.plan(study, plan)
        if plan is not None:
            # A document names as predecessor what it takes over: after a film was swept, that is not the whole any more.
            predecessors = last.results if last and issued <= set(plan.instances) else {}
            results = self._maker.hand_over(study, plan, predecessors)
            self._ledger.issue(study, Issue(revision=plan.revision, instances=plan.instances, results=results))
            issued |= set(plan.instances)
            _log.info("study %s: results of %d images handed over, revision %d", study, len(plan.instances), plan.revision)
        self._settle(study, issued)

    def _settle(self, study: str, issued: set[str]) -> None:
        with self._guard:
            settled = self._studies[study].names & issued
        for name in settled:
            self._spool.answers.settle(name)
        with self._guard:
            known = self._studies[study]
            known.names -= settled
            known.waits, known.failures, known.state = 0, 0, ""
            known.first = known.latest
            if not known.names:
                del self._studies[study]

    def _there(self, name: str) -> bool:
        # What was swept after its time is missing from a late revision, as it would be for anybody who looks now.
        try:
            self._spool.answers.file(name)
            self._spool.answers.answer(name)
        except FileNotFoundError:
            return False
        return True

    def _wait(self, study: str, state: str) -> None:
        with self._guard:
            known = self._studies[study]
            known.waits += 1
            pause = self._settings.first_retry_seconds * 2.0 ** min(known.waits - 1, 32)
            known.not_before = time.monotonic() + min(pause, self._settings.max_retry_seconds)
            changed, known.state = known.state != state, state
        if changed:
            _log.warning("study %s: no results yet; %s", study, state)

    def _fail(self, study: str, error: Exception) -> None:
        """What no waiting mends: after some attempts the images of the plan that were not sent before are dead letters."""
        kind = type(error).__name__
        with self._guard:
            self._studies[study].failures += 1
            failures = self._studies[study].failures
        if failures < self._settings.attempts:
            _log.error("study %s: results cannot be made (%s)", study, kind, exc_info=error)
            self._wait(study, f"{kind} while making the results")
            return
        # What is told of the study may be what cannot be read.
        last = None
        with contextlib.suppress(OSError, ValidationError):
            last = self._ledger.last(study)
        with self._guard:
            given_up = sorted(self._studies.pop(study).names - set(last.instances if last else ()))
        self._ledger.abandon(study)
        for name in given_up:
            self._spool.answers.give_up(name, reason=f"its study's results cannot be made ({kind})")
        _log.error("study %s: given up, %d dead letters (%s)", study, len(given_up), kind)
