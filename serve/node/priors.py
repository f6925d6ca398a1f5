"""Asks an archive for a patient's earlier studies before a new film is answered, and tells the service what they showed.

The network reads what earlier films of the patient showed. What never came to this service, the archive may have: this
software's own earlier results, and earlier films that can still be answered. Whether it helps or not, the new film waits for
it no longer than its budget, and its answer says what came of it. A study is asked about once, for its first film; the
others wait for the same outcome. An archive that fails time after time is left alone for a while.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cxr_ray.errors import CxrRayError, UsageError
from serve.logs import fields
from serve.node.bounded import Breaker, Remembered
from serve.node.deadline import Aside, Deadline, DeadlineError
from serve.node.prior_dimse import DimseArchive
from serve.node.prior_query import Archive, NotAskedError, Question, question_of
from serve.node.prior_retrieval import FetchedStudy, Retrieval
from serve.node.prior_service import PriorService, ServiceAwayError
from serve.node.prior_web import WebArchive
from serve.node.priors_settings import PriorsSettings
from serve.node.spool import SpooledInstance
from serve.priors_outcome import Outcome, PriorsOutcome
from serve.tls import client_context

# Of the budget, what the archive may have: fetched films that nobody has time to answer are of no use.
_ARCHIVES_SHARE = 0.7
_MOST_REMEMBERED = 10_000

_log = logging.getLogger(__name__)


@dataclass
class _Progress:
    """How far it has come, for who waits for it no longer."""

    asked: bool = False
    studies: int = 0
    used: int = 0


class Priors:
    """Asks one archive; safe for threads.

    Parameters
    ----------
    settings
        Of a kind other than off.
    service_url
        Root of the service that answers.
    token
        Its bearer token of role write; None sends none.

    Raises
    ------
    UsageError
        When the settings are off, or name a file that cannot be used.
    """

    def __init__(self, settings: PriorsSettings, service_url: str, token: str | None = None) -> None:
        if settings.kind == "off":
            raise UsageError("priors.kind is off; set dicom or dicomweb to ask an archive")
        self._settings = settings
        self._archive = _opener(settings)
        self._service = PriorService(service_url, token)
        self._breaker = Breaker(settings.failures, settings.pause_seconds)
        self._slots = threading.Semaphore(settings.concurrency)
        self._remembered: Remembered[PriorsOutcome] = Remembered(settings.remember_seconds, _MOST_REMEMBERED)
        self._under_way: dict[Question, _Shared] = {}
        self._guard = threading.Lock()
        self._unused_told = False

    def before(self, instance: SpooledInstance) -> PriorsOutcome | None:
        """Ask for the earlier studies of an instance's patient, and wait no longer than the budget.

        Returns
        -------
        PriorsOutcome, or None
            What the service is told with the instance; None where there is nothing to tell: the instance is no frontal chest
            film, or the service, which the instance itself has to wait for, does not answer.
        """
        try:
            question = question_of(instance.path)
        except NotAskedError as why:
            return PriorsOutcome(asked=False, outcome="off", reason=str(why))
        except CxrRayError:
            # The service refuses it, and says why.
            return None
        known = self._remembered.get(_patient(question)) or self._remembered.get(question)
        if known is not None:
            return known
        with self._guard:
            shared = self._under_way.get(question)
            first = shared is None
            if shared is None:
                shared = self._under_way[question] = _Shared(Deadline(self._settings.budget_seconds))
        if not first:
            over = shared.over.wait(shared.deadline.left())
            return shared.outcome if over else self._too_late(shared.progress, shared.deadline)
        try:
            shared.outcome = self._outcome(question, shared)
        finally:
            shared.over.set()
            with self._guard:
                self._under_way.pop(question, None)
        return shared.outcome

    def close(self) -> None:
        """Close the connections to the service; what is under way ends by itself."""
        self._service.close()

    def _outcome(self, question: Question, shared: "_Shared") -> PriorsOutcome | None:
        deadline, progress = shared.deadline, shared.progress
        if not self._breaker.may_try():
            return self._off("it failed several times in a row and is left alone for a while", deadline)
        if not self._slots.acquire(timeout=deadline.left()):
            return self._off("too many questions are under way", deadline)
        try:
            aside = Aside(lambda: self._asked(question, progress, deadline), "priors")
        except RuntimeError:
            self._slots.release()
            return self._off("this machine starts no more threads", deadline)
        try:
            outcome = aside.result(deadline)
        except DeadlineError:
            outcome = self._too_late(progress, deadline)
        except ServiceAwayError:
            return None
        # Nothing about priors may keep a film from being answered.
        except Exception as error:  # noqa: BLE001
            outcome = self._failed(progress, deadline, type(error).__name__)
        if outcome.asked:
            self._judge(outcome)
        complete = outcome.outcome in {"found", "none"}
        self._remembered.put(_patient(question) if complete else question, outcome)
        return outcome

    def _asked(self, question: Question, progress: _Progress, deadline: Deadline) -> PriorsOutcome:
        try:
            known = self._service.known(question, deadline)
            if not known.uses_predictions:
                return self._unused(known.history_source, deadline)
            progress.asked = True
            retrieval = Retrieval(self._settings, question, known.studies)
            retrieval.run(self._archive(deadline.earlier(_ARCHIVES_SHARE)))
            progress.studies = len(retrieval.found)
            progress.used = sum(study.study_uid in known.studies for study in retrieval.found)
            # The oldest first, so that each is answered with those before it.
            for fetched in reversed(retrieval.fetched):
                progress.used += self._told(question, fetched, deadline)
            if isinstance(retrieval.failure, DeadlineError):
                return self._timed_out(progress, deadline)
            if retrieval.failure is not None:
                return self._failed(progress, deadline, str(retrieval.failure))
            return self._said(progress, deadline, "found" if progress.studies else "none")
        finally:
            self._slots.release()

    def _told(self, question: Question, fetched: FetchedStudy, deadline: Deadline) -> bool:
        if fetched.result is not None:
            return self._service.tell_result(question, fetched.study, fetched.result, deadline)
        brought = [self._service.bring_image(image, deadline) for image in fetched.images]
        return any(brought)

    def _judge(self, outcome: PriorsOutcome) -> None:
        said = fields(outcome=outcome.outcome, studies=outcome.studies, used=outcome.used, seconds=outcome.seconds)
        if outcome.outcome in {"timeout", "failed"}:
            _log.warning("priors: the archive was asked; %s", outcome.reason or outcome.outcome, extra=said)
            if self._breaker.failed():
                _log.warning("priors: the archive is left alone for %g s", self._settings.pause_seconds)
        else:
            self._breaker.worked()
            _log.info("priors: the archive was asked", extra=said)

    def _unused(self, source: str, deadline: Deadline) -> PriorsOutcome:
        if not self._unused_told:
            self._unused_told = True
            _log.warning(
                "priors: nothing is asked, for the service's history_source is %s; start it with predicted or both", source
            )
        return self._off(f"the service's history_source is {source}, which uses no earlier answers", deadline)

    def _off(self, reason: str, deadline: Deadline) -> PriorsOutcome:
        return self._said(_Progress(), deadline, "off", reason)

    def _failed(self, progress: _Progress, deadline: Deadline, reason: str) -> PriorsOutcome:
        return self._said(progress, deadline, "failed", reason[:120])

    def _too_late(self, progress: _Progress, deadline: Deadline) -> PriorsOutcome:
        if not progress.asked:
            return self._off("the service did not say in time what it knows", deadline)
        return self._timed_out(progress, deadline)

    def _timed_out(self, progress: _Progress, deadline: Deadline) -> PriorsOutcome:
        return self._said(progress, deadline, "timeout")

    def _said(self, progress: _Progress, deadline: Deadline, outcome: Outcome, reason: str = "") -> PriorsOutcome:
        return PriorsOutcome(
            asked=progress.asked,
            outcome=outcome,
            studies=progress.studies,
            used=min(progress.used, progress.studies),
            seconds=round(deadline.spent(), 2),
            budget_seconds=self._settings.budget_seconds,
            reason=reason,
        )


class _Shared:
    """A question under way: who asks it fills it in, the others wait for it."""

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline
        self.progress = _Progress()
        self.over = threading.Event()
        self.outcome: PriorsOutcome | None = None


def _patient(question: Question) -> tuple[object, ...]:
    """What all studies of a patient's day have in common: their earlier studies."""
    return (question.patient_id, question.issuer, question.birth_date, question.before)


def _opener(settings: PriorsSettings) -> Callable[[Deadline], Archive]:
    """What opens the archive for one study; its files are read once, at the start."""
    tls = client_context(settings.tls_ca, settings.tls_certificate, settings.tls_key)
    if settings.kind == "dicom":
        return lambda deadline: DimseArchive(settings, tls if settings.tls else None, deadline)
    token = _token(settings.token_file)
    return lambda deadline: WebArchive(settings, tls, token, deadline)


def _token(file: Path | None) -> str | None:
    try:
        return file.read_text().strip() if file else None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"priors.token_file {file} cannot be used ({error}); name a text file that this user can read"
        ) from error
