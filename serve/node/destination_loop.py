"""Brings the parcels of one destination there, in a thread of its own: whatever this one does, the others go on.

The oldest first, but what failed after what did not; of a study, a revision only after the one before it is delivered or dead.
What fails in passing waits, longer each time. Where the destination as a whole is not to be had, or three parcels fail in a
row, the destination waits, and one parcel at a time finds out whether it is back; a parcel that fails alone waits alone.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial

from cxr_ray.errors import CxrRayError
from serve.logs import fields
from serve.node.destinations import Destination, DicomDestination, PatienceSettings, SenderDestination
from serve.node.outbox import DestinationQueue
from serve.node.parcels import Letter, Parcel, ParcelState, Receipt
from serve.node.patience import pause_seconds
from serve.node.senders.sender import CommittingSender, Delivered, Permanent, Sender, Transient
from serve.node.storage_commitment import CommitmentRegistry, Report

_FAILING_IN_A_ROW = 3
_NEVER_COMMITTED = frozenset({0x0118, 0x0119, 0x0122})

_log = logging.getLogger(__name__)


@dataclass
class _Entry:
    """A parcel that waits; `due` and `asked` are monotonic. Awaited: commitment was asked for and is not known yet."""

    parcel: Parcel
    state: ParcelState
    failures: int = 0
    due: float = 0.0
    asked: float | None = None

    @property
    def awaited(self) -> bool:
        return self.state.asked_at is not None


@dataclass
class _Outage:
    """Why nothing is sent for now, and until when."""

    failures: int = 0
    until: float = 0.0
    reason: str = ""
    in_a_row: set[str] = field(default_factory=set)


class DestinationLoop:
    """The work of one destination.

    Parameters
    ----------
    destination
        Its settings.
    poll_seconds
        Pause between looks at the queue.
    counts
        Is counted up: ``delivered``, ``dead``, ``failed``.
    """

    def __init__(
        self,
        destination: Destination,
        queue: DestinationQueue,
        sender_of: Callable[["DestinationLoop"], Sender],
        commitments: CommitmentRegistry,
        patience: PatienceSettings,
        poll_seconds: float,
        counts: Counter[str],
    ) -> None:
        self._destination, self._queue, self._commitments = destination, queue, commitments
        self._patience, self._poll, self._counts = patience, poll_seconds, counts
        self._entries: dict[str, _Entry] = {}
        self._outages: dict[str, _Outage] = {}
        self._looked_ns = -1
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._sender = sender_of(self)
        self._commitment = destination.commitment if isinstance(destination, DicomDestination) else None

    def notify(self) -> None:
        """Say that there is something new; returns at once."""
        self._wake.set()

    def stop(self) -> None:
        """Begin nothing new; returns at once."""
        self._stopping.set()
        self._wake.set()

    def abort(self) -> None:
        """End what is being sent; returns at once."""
        self._sender.abort()

    def outstanding(self) -> bool:
        """Whether a report on storage commitment may come on the association that is open."""
        if self._commitment is None:
            return False
        since = time.monotonic() - self._commitment.linger_seconds
        return any(entry.asked is not None and entry.asked > since for entry in list(self._entries.values()))

    def run(self) -> None:
        """Work until stopped."""
        while not self._stopping.is_set():
            self._wake.clear()
            worked = False
            try:
                self._look()
                worked = self._work()
            except OSError as error:
                _log.error("destination %s: its outbox cannot be read: %s", self._destination.name, error.strerror)
            # Whatever else it is must not end the thread unseen.
            except Exception as error:  # noqa: BLE001
                name = self._destination.name
                _log.error("destination %s: %s in its loop", name, type(error).__name__, exc_info=error)
            if not worked:
                self._sender.rest(self._wake.is_set)
                self._wake.wait(self._pause())
        self._sender.rest(lambda: True)
        self._sender.abort()

    def _look(self) -> None:
        """Take in what was added and what was reported since the last look."""
        changed = self._queue.waiting_changed_ns()
        # Clocks of file systems are coarse: what changed just now may change again without a trace.
        if changed != self._looked_ns or time.time_ns() - changed < 1e9:
            self._looked_ns = changed
            names = set(self._queue.waiting())
            for name in self._entries.keys() - names:
                del self._entries[name]
            for name in names - self._entries.keys():
                try:
                    self._take_in(name)
                except OSError as error:
                    self._looked_ns = -1
                    _log.error("destination %s: %s: cannot be taken in: %s", self._destination.name, name, error.strerror)
        if any(entry.awaited for entry in self._entries.values()):
            for name, reports in self._commitments.reports(self._destination.name).items():
                if (entry := self._entries.get(name)) is not None and entry.awaited:
                    self._guarded(entry, partial(self._reported, entry, reports))

    def _take_in(self, name: str) -> None:
        if self._queue.is_delivered(name):
            # A crash between the receipt and the end of the parcel.
            self._queue.let_go(name)
            return
        state = self._queue.state(name)
        try:
            entry = _Entry(self._queue.read(name), state)
        except CxrRayError as error:
            self._queue.dead(name, Letter(reason=str(error), detail="", when=datetime.now(UTC), attempts=state.attempts))
            self._counts["dead"] += 1
            _log.error("destination %s: %s: dead letter (unreadable)", self._destination.name, name)
            return
        except FileNotFoundError:
            return
        if state.asked_at is not None:
            if self._commitment is None:
                entry.state = state.model_copy(update={"asked_at": None})
            else:
                waited = (datetime.now(UTC) - state.asked_at).total_seconds()
                left = self._commitment.timeout_seconds - waited
                entry.due = time.monotonic() + min(max(left, 0.0), self._commitment.timeout_seconds)
        self._entries[name] = entry

    def _work(self) -> bool:
        """Send what is due, until it is time to look again; whether there was something."""
        worked, until = False, time.monotonic() + self._poll
        if self._all_wait_until() > time.monotonic():
            return False
        for entry in self._in_order():
            if self._stopping.is_set() or (worked and time.monotonic() > until):
                break
            outage = self._outages.get(self._route(entry.parcel))
            now = time.monotonic()
            if entry.due > now or (outage is not None and outage.until > now):
                continue
            worked = True
            self._guarded(entry, partial(self._attempt, entry))
        return worked

    def _in_order(self) -> Iterator[_Entry]:
        """The first revision of each study, by age; those that failed come last, or the same few would be tried for ever."""
        heads: dict[str, _Entry] = {}
        for entry in self._entries.values():
            head = heads.get(entry.parcel.study_key)
            if head is None or _rank(entry) < _rank(head):
                heads[entry.parcel.study_key] = entry
        return iter(sorted(heads.values(), key=lambda entry: (entry.failures, entry.parcel.created_at, entry.parcel.id)))

    def _all_wait_until(self) -> float:
        """Until when the destination is left alone, whatever waits: thousands need not be looked through meanwhile."""
        outage = None if isinstance(self._destination, SenderDestination) else self._outages.get("")
        return outage.until if outage else 0.0

    def _pause(self) -> float:
        now = time.monotonic()
        nearest = now + self._poll
        if (all_wait := self._all_wait_until()) > now:
            return min(nearest, all_wait) - now
        for entry in self._in_order():
            outage = self._outages.get(self._route(entry.parcel))
            nearest = min(nearest, max(entry.due, outage.until if outage else 0.0))
        # What is due and cannot be begun must not make this spin.
        return max(nearest - time.monotonic(), 0.01)

    def _guarded(self, entry: _Entry, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            if self._queue.is_waiting(entry.parcel.id):
                self._wait(entry, Transient(f"disk: {error.strerror}"))
            else:
                # Somebody took it away by hand.
                self._entries.pop(entry.parcel.id, None)
        # Whatever else it is must not end the thread, nor keep the other parcels.
        except Exception as error:  # noqa: BLE001
            _log.error("parcel %s: %s while sending", entry.parcel.id, type(error).__name__, exc_info=error)
            self._wait(entry, Transient(f"{type(error).__name__} while sending"))

    def _attempt(self, entry: _Entry) -> None:
        parcel = entry.parcel
        if not entry.awaited:
            confirmed = set(entry.state.confirmed)

            def confirm(name: str) -> None:
                confirmed.add(name)
                self._note(entry, confirmed=tuple(sorted(confirmed)))

            outcome = self._sender.send(parcel, frozenset(confirmed), confirm)
            if not isinstance(outcome, Delivered):
                self._settle(entry, outcome)
                return
            self._recovered(parcel)
            if self._commitment is None:
                self._finish(entry, outcome.status, committed=False)
                return
        self._ask(entry)

    def _ask(self, entry: _Entry) -> None:
        assert self._commitment is not None and isinstance(self._sender, CommittingSender)  # noqa: S101
        transaction = self._commitments.open(self._destination.name, entry.parcel.id)
        outcome = self._sender.request_commitment(entry.parcel, transaction)
        if not isinstance(outcome, Delivered):
            self._settle(entry, outcome)
            return
        self._recovered(entry.parcel)
        entry.asked = time.monotonic()
        entry.due = entry.asked + self._commitment.timeout_seconds
        entry.failures = 0
        self._note(entry, asked_at=datetime.now(UTC), attempts=entry.state.attempts + 1)

    def _reported(self, entry: _Entry, reports: list[Report]) -> None:
        assert self._commitment is not None and isinstance(self._sender, CommittingSender)  # noqa: S101
        kept = {instance for report in reports for _, instance in report.committed}
        failed = {instance: reason for report in reports for _, instance, reason in report.failed}
        instances = self._sender.instances(entry.parcel)
        lacking = {name: failed.get(instance, 0) for name, (_, instance) in instances.items() if instance not in kept}
        entry.asked = None
        if not lacking:
            self._finish(entry, "0x0000", committed=True)
            return
        codes = ", ".join(sorted({f"0x{reason:04X}" for reason in lacking.values()}))
        if _NEVER_COMMITTED & set(lacking.values()):
            self._settle(entry, Permanent(f"storage commitment refused with {codes}"))
        elif entry.state.resends >= self._commitment.resends:
            self._settle(entry, Permanent(f"not committed to with {codes}, sent {entry.state.resends + 1} times"))
        else:
            # First, or after a crash the old answer would be taken for that to the next question.
            self._commitments.close(self._destination.name, entry.parcel.id)
            confirmed = tuple(name for name in entry.state.confirmed if name not in lacking)
            self._note(entry, confirmed=confirmed, asked_at=None, resends=entry.state.resends + 1)
            self._wait(entry, Transient(f"not committed to with {codes}"))

    def _settle(self, entry: _Entry, outcome: Transient | Permanent) -> None:
        if isinstance(outcome, Permanent):
            entry.state = entry.state.model_copy(update={"attempts": entry.state.attempts + 1})
            self._bury(entry, outcome)
            return
        self._wait(entry, outcome)
        # What one parcel finds out about the destination counts for all.
        same = [entry]
        if outcome.whole_destination:
            same = [other for other in self._entries.values() if self._route(other.parcel) == self._route(entry.parcel)]
        for old in filter(self._too_old, same):
            words = f"given up after {self._patience.give_up_days:g} days: {outcome.reason}"
            self._bury(old, Permanent(words, outcome.detail))

    def _too_old(self, entry: _Entry) -> bool:
        if not self._patience.give_up_days:
            return False
        since = max(entry.parcel.created_at, entry.state.replayed_at or entry.parcel.created_at)
        return datetime.now(UTC) - since > timedelta(days=self._patience.give_up_days)

    def _wait(self, entry: _Entry, outcome: Transient) -> None:
        self._counts["failed"] += 1
        now, reason = time.monotonic(), outcome.reason
        route = self._route(entry.parcel)
        outage = self._outages.setdefault(route, _Outage())
        if outcome.whole_destination:
            told, outage.reason = outage.reason, reason
        else:
            outage.in_a_row.add(entry.parcel.id)
            entry.failures += 1
            entry.due = now + pause_seconds(self._patience, entry.failures, outcome.retry_after)
            told = entry.state.last_error
        if outcome.whole_destination or len(outage.in_a_row) >= _FAILING_IN_A_ROW:
            outage.failures += 1
            outage.until = now + pause_seconds(self._patience, outage.failures, outcome.retry_after)
        if told != reason:
            self._say(logging.WARNING, entry, f"waiting; {reason}")
        self._note(entry, attempts=entry.state.attempts + 1, last_error=reason, last_attempt_at=datetime.now(UTC))

    def _recovered(self, parcel: Parcel) -> None:
        outage = self._outages.pop(self._route(parcel), None)
        if outage is not None and outage.reason:
            _log.info("destination %s: takes results again", self._destination.name)

    def _finish(self, entry: _Entry, status: str, *, committed: bool) -> None:
        parcel, now = entry.parcel, datetime.now(UTC)
        attempts = entry.state.attempts + (0 if committed else 1)
        names = tuple(item.name for item in parcel.items)
        receipt = Receipt(
            id=parcel.id,
            study_key=parcel.study_key,
            sequence=parcel.sequence,
            items=names,
            created_at=parcel.created_at,
            delivered_at=now,
            attempts=attempts,
            remote_status=status,
            committed=committed,
        )
        self._queue.delivered(receipt)
        self._entries.pop(parcel.id, None)
        self._counts["delivered"] += 1
        if self._commitment is not None:
            self._commitments.close(self._destination.name, parcel.id)
        seconds = round((now - parcel.created_at).total_seconds(), 1)
        self._say(logging.INFO, entry, "delivered", attempts=attempts, seconds=seconds)

    def _bury(self, entry: _Entry, outcome: Permanent) -> None:
        attempts = max(entry.state.attempts, 1)
        letter = Letter(reason=outcome.reason, detail=outcome.detail, when=datetime.now(UTC), attempts=attempts)
        self._queue.dead(entry.parcel.id, letter)
        self._entries.pop(entry.parcel.id, None)
        self._counts["dead"] += 1
        if self._commitment is not None:
            self._commitments.close(self._destination.name, entry.parcel.id)
        self._say(logging.WARNING, entry, f"dead letter; {outcome.reason}", attempts=attempts)

    def _note(self, entry: _Entry, **changes: object) -> None:
        """Keep how far a parcel has come; what cannot be written now is known here, and written with the next change."""
        entry.state = entry.state.model_copy(update=changes)
        try:
            self._queue.keep_state(entry.parcel.id, entry.state)
        except OSError as error:
            _log.error("parcel %s: its state cannot be written: %s", entry.parcel.id, error.strerror)

    def _route(self, parcel: Parcel) -> str:
        """What fails together: the destination, or each of the peers that send."""
        if isinstance(self._destination, SenderDestination) and parcel.origin is not None:
            return f"{parcel.origin.calling_ae}@{parcel.origin.address}"
        return ""

    def _say(self, level: int, entry: _Entry, words: str, **said: object) -> None:
        name, parcel = self._destination.name, entry.parcel
        extra = fields(destination=name, parcel=parcel.id, study=parcel.study_key, **said)
        _log.log(level, "destination %s: parcel %s: %s", name, parcel.id, words, extra=extra)


def _rank(entry: _Entry) -> tuple[int, datetime, str]:
    return entry.parcel.sequence, entry.parcel.created_at, entry.parcel.id
