"""The dispatcher: takes instances from the spool and brings them to the service, which answers them and keeps the answers.

Each instance ends in one of two ways. Answered: the service has committed the result, then the instance is handed on, or
moves to ``done/`` where nobody waits for it. Given up: the service says that no repetition will help (400, 409, 413, 415,
422); the file moves to ``dead/`` with the reason. Everything else is weather: the instance waits in ``ready/`` and is tried
again, later and later, for ever. The order commit, then move makes a crash at any point harmless: an instance that was
answered is answered alike when it comes again, and nothing is kept twice.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Self

import httpx
from pydantic import BaseModel, Field, ValidationError

from cxr_ray.errors import CxrRayError
from serve.logs import fields
from serve.node.durable import alone
from serve.node.service_client import DispatchSettings, service_client
from serve.node.spool import Spool, SpooledInstance

if TYPE_CHECKING:
    from serve.node.priors import Priors

_PERMANENT = frozenset({400, 409, 413, 415, 422})
_LONGEST_RETRY_AFTER = 3600.0
_LONGEST_REASON = 500
_JOIN_SECONDS = 5.0

_log = logging.getLogger(__name__)


@dataclass
class _Waiting:
    attempts: int = 0
    due: float = 0.0
    state: str = ""


class _TransientError(Exception):
    def __init__(self, state: str, retry_after: float = 0.0) -> None:
        super().__init__(state)
        self.state, self.retry_after = state, retry_after


class _RefusedError(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class _Model(BaseModel):
    name: str
    version: str
    digest: str = Field(min_length=1)


class _FindingAnswer(BaseModel):
    name: str
    probability: float = Field(ge=0, le=1)
    threshold: float = Field(ge=0, le=1)
    positive: bool


class _Prediction(BaseModel):
    model: _Model
    findings: list[_FindingAnswer] = Field(min_length=1)


class Dispatcher:
    """Answers the instances of one spool, in threads of its own.

    Any number may be started on a spool: one holds its lock and works, the others wait to take over.

    Parameters
    ----------
    settings : DispatchSettings
        The service and the patience with it.
    spool : Spool
        Where instances lie.
    on_answered : callable, optional
        Called with an instance and the service's answer as JSON; takes the instance out of ``ready/``, durably. By default
        it moves to ``done/``.
    priors : Priors, optional
        Who asks an archive for the patient's earlier studies before an instance is brought; None asks nobody.
    """

    def __init__(
        self,
        settings: DispatchSettings,
        spool: Spool,
        on_answered: Callable[[SpooledInstance, bytes], None] | None = None,
        priors: "Priors | None" = None,
    ) -> None:
        self._settings = settings
        self._spool = spool
        self._on_answered = on_answered or (lambda instance, _answer: spool.done(instance.name))
        self._priors = priors
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._slots = threading.Semaphore(settings.concurrency)
        self._busy: set[str] = set()
        self._waiting: dict[str, _Waiting] = {}
        self._guard = threading.Lock()

    def start(self) -> None:
        """Begin to work, or to wait for the spool's lock; returns at once.

        Raises
        ------
        UsageError
            When `service_url` is no URL.
        """
        self._stopping.clear()
        client = service_client(self._settings)
        self._thread = threading.Thread(target=self._run, args=(client,), name="dispatcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take nothing new and return when the requests under way are answered, or after a few seconds without them.

        What is abandoned stays in the spool.
        """
        self._stopping.set()
        self._wake.set()
        if self._thread:
            self._thread.join(_JOIN_SECONDS)

    def notify(self) -> None:
        """Say that there is something new in the spool; returns at once."""
        self._wake.set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _run(self, client: httpx.Client) -> None:
        with alone(self._spool.root / "dispatcher.lock", self._stopping) as mine, client:
            workers: list[threading.Thread] = []
            while mine and not self._stopping.is_set():
                self._wake.clear()
                # Taken before the spool is listed: what is finished after the listing still stands in it.
                with self._guard:
                    busy = set(self._busy)
                try:
                    names = self._spool.pending()
                except OSError as error:
                    _log.error("the spool cannot be listed: %s", error.strerror)
                    names = []
                for name in self._due(names, busy):
                    worker = threading.Thread(target=self._work, args=(client, name), daemon=True)
                    try:
                        worker.start()
                    except RuntimeError:
                        self._wait(name, "no thread can be started")
                        self._finish(name)
                        break
                    workers = [*(thread for thread in workers if thread.is_alive()), worker]
                self._wake.wait(self._pause())
            # The lock is not given up, and the client not closed, under a request that is still under way.
            for worker in workers:
                worker.join()

    def _due(self, names: list[str], busy: set[str]) -> Iterator[str]:
        """Yield what may be tried now, each with a free slot taken for it; `busy` are subjects under way at the listing."""
        seen = set(busy)
        now = time.monotonic()
        with self._guard:
            self._waiting = {name: self._waiting[name] for name in names if name in self._waiting}
        for name in names:
            # One UID, several contents: the first that came has to be settled before the next is looked at.
            subject = name.partition("-")[0]
            with self._guard:
                waits = subject in seen or subject in self._busy or self._waiting.get(name, _Waiting()).due > now
            seen.add(subject)
            if waits:
                continue
            self._slots.acquire()
            if self._stopping.is_set():
                self._slots.release()
                return
            with self._guard:
                self._busy.add(subject)
            yield name

    def _pause(self) -> float:
        with self._guard:
            nearest = min((waiting.due for waiting in self._waiting.values()), default=float("inf"))
        # A retry that is due while its slot is taken must not make this spin.
        return max(min(nearest - time.monotonic(), self._settings.poll_seconds), 0.01)

    def _work(self, client: httpx.Client, name: str) -> None:
        try:
            self._settle(client, name)
        except _TransientError as weather:
            self._wait(name, weather.state, weather.retry_after)
        except FileNotFoundError:
            _log.info("%s: no longer in the spool", name)
        except OSError as error:
            self._wait(name, f"disk: {error.strerror}")
        # Whatever else it is must not end the thread unseen, nor lose the instance.
        except Exception as error:  # noqa: BLE001
            self._wait(name, f"{type(error).__name__} in the dispatcher")
        finally:
            self._finish(name)
            self._wake.set()

    def _finish(self, name: str) -> None:
        with self._guard:
            self._busy.discard(name.partition("-")[0])
        self._slots.release()

    def _settle(self, client: httpx.Client, name: str) -> None:
        try:
            instance = self._spool.read(name)
        except CxrRayError as error:
            self._give_up(name, None, str(error), None)
            return
        try:
            answer = self._bring(client, instance, self._request_id(name))
        except _RefusedError as error:
            self._give_up(name, instance, error.reason, error.status)
        else:
            said = fields(request_id=self._request_id(name))
            self._on_answered(instance, answer)
            self._forget(name)
            _log.info("%s: answered", name, extra=said)

    def _request_id(self, name: str) -> str:
        """By which the service logs this attempt: the beginnings of the name's two parts, and which attempt it is."""
        subject, _, content = name.partition("-")
        with self._guard:
            attempts = self._waiting.get(name, _Waiting()).attempts
        return f"{subject[:16]}-{content[:8]}-{attempts + 1}"

    def _bring(self, client: httpx.Client, instance: SpooledInstance, request_id: str) -> bytes:
        arrival = {"received_at": instance.received_at.isoformat()}
        if instance.calling_ae:
            arrival["calling_ae"] = instance.calling_ae
        if self._priors and (outcome := self._priors.before(instance)):
            arrival["priors"] = outcome.model_dump_json()
        with instance.path.open("rb") as file:
            image = {"image": (instance.name, file, "application/dicom")}
            try:
                response = client.post("/v1/instances", files=image, data=arrival, headers={"X-Request-ID": request_id})
            except httpx.HTTPError as error:
                raise _TransientError(f"the service cannot be reached ({type(error).__name__})") from error
        if response.status_code in _PERMANENT:
            raise _RefusedError(response.status_code, _detail(response))
        if response.status_code != HTTPStatus.OK:
            raise _TransientError(f"the service answers {response.status_code}", _retry_after(response))
        try:
            _Prediction.model_validate_json(response.content)
        except ValidationError as error:
            raise _TransientError("the service's answer is malformed") from error
        return response.content

    def _give_up(self, name: str, instance: SpooledInstance | None, reason: str, status: int | None) -> None:
        with self._guard:
            attempts = self._waiting.get(name, _Waiting()).attempts + 1
        said = fields(request_id=self._request_id(name)) if instance else None
        self._spool.dead(name, reason=reason, status=status, attempts=attempts, instance=instance)
        self._forget(name)
        _log.warning("%s: dead letter (%s)", name, status or "unreadable", extra=said)

    def _forget(self, name: str) -> None:
        with self._guard:
            self._waiting.pop(name, None)

    def _wait(self, name: str, state: str, retry_after: float = 0.0) -> None:
        settings = self._settings
        said = fields(request_id=self._request_id(name))
        with self._guard:
            waiting = self._waiting.setdefault(name, _Waiting())
            waiting.attempts += 1
            # The exponent is bounded, or a long outage overflows it.
            pause = min(settings.first_retry_seconds * 2.0 ** min(waiting.attempts - 1, 32), settings.max_retry_seconds)
            pause *= 1 + settings.jitter * random.random()  # noqa: S311
            waiting.due = time.monotonic() + max(pause, retry_after)
            changed, waiting.state = waiting.state != state, state
        if changed:
            _log.warning("%s: waiting; %s", name, state, extra=said)


def _detail(response: httpx.Response) -> str:
    # RFC 9457; a proxy in between may answer in its own way.
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = None
    return detail[:_LONGEST_REASON] if isinstance(detail, str) and detail else f"refused with {response.status_code}"


def _retry_after(response: httpx.Response) -> float:
    # RFC 9110 section 10.2.3: seconds or a date.
    value = response.headers.get("Retry-After", "")
    try:
        wanted = float(value) if value.isdigit() else (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
    return min(max(wanted, 0.0), _LONGEST_RETRY_AFTER)
