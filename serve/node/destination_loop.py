"""Brings the parcels of one destination there, in threads of its own: whatever this one does, the others go on.

A destination is one peer and has one thread. Where results go back to whoever sent the study there are many, and a few threads
which take one peer each for a while: one that is away or hangs holds up what goes there, and nothing else. In which order the
parcels of a peer are tried, and after which pause, is a matter of `serve.node.route`.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from datetime import UTC, datetime, timedelta
from functools import partial

from cxr_ray.errors import CxrRayError
from serve.logs import fields
from serve.node.destinations import Destination, DicomDestination, PatienceSettings, SenderDestination
from serve.node.outbox import DestinationQueue
from serve.node.parcels import Letter, Parcel, Receipt
from serve.node.route import Entry, Route
from serve.node.senders.sender import CommittingSender, Delivered, Permanent, Sender, Transient
from serve.node.storage_commitment import CommitmentRegistry, Report

# Of a destination of kind `sender`: a peer that hangs takes a thread for some minutes, and is then left alone for longer.
_PEERS_AT_ONCE = 8
_NEVER_COMMITTED = frozenset({0x0118, 0x0119, 0x0122})

_log = logging.getLogger(__name__)


class DestinationLoop:
    """The work of one destination.

    Parameters
    ----------
    destination
        Its settings.
    sender_of
        Makes a sender, which one thread uses.
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
        self._routes: dict[Hashable, Route] = {}
        self._looked_ns = -1
        # The first for each look at the queue as a whole; the second for a moment, where routes and counts are touched.
        self._looking, self._guard = threading.Lock(), threading.Lock()
        self._bell, self._rung = threading.Condition(), 0
        self._stopping = threading.Event()
        self._commitment = destination.commitment if isinstance(destination, DicomDestination) else None
        at_once = _PEERS_AT_ONCE if isinstance(destination, SenderDestination) else 1
        self._senders = [sender_of(self) for _ in range(at_once)]

    def notify(self) -> None:
        """Say that there is something new; returns at once."""
        with self._bell:
            self._rung += 1
            self._bell.notify_all()

    def stop(self) -> None:
        """Begin nothing new; returns at once."""
        self._stopping.set()
        self.notify()

    def abort(self) -> None:
        """End what is being sent; returns at once."""
        for sender in self._senders:
            sender.abort()

    def outstanding(self) -> bool:
        """Whether a report on storage commitment may come on the association that is open."""
        if self._commitment is None:
            return False
        since = time.monotonic() - self._commitment.linger_seconds
        return any(entry.asked is not None and entry.asked > since for entry in self._entries())

    def run(self) -> None:
        """Work until stopped."""
        name = threading.current_thread().name
        others = [
            threading.Thread(target=self._serve, args=(sender,), name=f"{name}-{number}", daemon=True)
            for number, sender in enumerate(self._senders[1:], 2)
        ]
        for thread in others:
            thread.start()
        self._serve(self._senders[0])
        for thread in others:
            thread.join()

    def _serve(self, sender: Sender) -> None:
        """The work of one thread: what is due for one peer after the other."""
        while not self._stopping.is_set():
            # Before the look, or what is said meanwhile would be missed.
            heard = self._rung
            try:
                self._look(sender)
                if (route := self._take()) is not None:
                    self._work(route, sender)
                    continue
            except OSError as error:
                _log.error("destination %s: its outbox cannot be read: %s", self._destination.name, error.strerror)
                self._stopping.wait(self._poll)
            # Whatever else it is must not end the thread unseen.
            except Exception as error:  # noqa: BLE001
                name = self._destination.name
                _log.error("destination %s: %s in its loop", name, type(error).__name__, exc_info=error)
                self._stopping.wait(self._poll)
            news = partial(self._heard_since, heard)
            sender.rest(news)
            with self._bell:
                self._bell.wait_for(news, self._pause())
        sender.rest(lambda: True)
        sender.abort()

    def _heard_since(self, rung: int) -> bool:
        return self._rung != rung

    def _look(self, sender: Sender) -> None:
        """Take in what was added and what was reported since the last look."""
        with self._looking:
            changed = self._queue.waiting_changed_ns()
            # Clocks of file systems are coarse: what changed just now may change again without a trace.
            if changed != self._looked_ns or time.time_ns() - changed < 1e9:
                self._looked_ns = changed
                names, known = set(self._queue.waiting()), {entry.parcel.id for entry in self._entries()}
                self._forget(known - names)
                for name in names - known:
                    try:
                        self._take_in(name)
                    except OSError as error:
                        self._looked_ns = -1
                        _log.error("destination %s: %s: cannot be taken in: %s", self._destination.name, name, error.strerror)
        if self._commitment is not None and (awaited := [entry for entry in self._entries() if entry.awaited]):
            reports = self._commitments.reports(self._destination.name)
            for entry in awaited:
                if said := reports.get(entry.parcel.id):
                    self._guarded(entry, partial(self._reported, entry, said, sender))

    def _entries(self) -> list[Entry]:
        with self._guard:
            return [entry for route in self._routes.values() for entry in route.entries.values()]

    def _forget(self, names: set[str]) -> None:
        with self._guard:
            for route in self._routes.values():
                for name in names & route.entries.keys():
                    del route.entries[name]
            self._routes = {key: route for key, route in self._routes.items() if route.entries or route.taken}

    def _take_in(self, name: str) -> None:
        if self._queue.is_delivered(name):
            # A crash between the receipt and the end of the parcel.
            self._queue.let_go(name)
            return
        state = self._queue.state(name)
        try:
            parcel = self._queue.read(name)
        except CxrRayError as error:
            self._queue.dead(name, Letter(reason=str(error), detail="", when=datetime.now(UTC), attempts=state.attempts))
            self._count("dead")
            _log.error("destination %s: %s: dead letter (unreadable)", self._destination.name, name)
            return
        except FileNotFoundError:
            return
        due = 0.0
        if state.asked_at is not None and self._commitment is not None:
            left = self._commitment.timeout_seconds - (datetime.now(UTC) - state.asked_at).total_seconds()
            due = time.monotonic() + min(max(left, 0.0), self._commitment.timeout_seconds)
        elif state.asked_at is not None:
            state = state.model_copy(update={"asked_at": None})
        with self._guard:
            route = self._routes.setdefault(self._where(parcel), Route(self._patience))
            route.entries[name] = Entry(parcel, state, route, due=due)

    def _where(self, parcel: Parcel) -> Hashable:
        """Where a parcel goes: what goes there keeps its order, and fails together."""
        destination, origin = self._destination, parcel.origin
        if not isinstance(destination, SenderDestination) or origin is None:
            return None
        return origin.calling_ae, destination.port_of(origin.calling_ae, origin.address)

    def _take(self) -> Route | None:
        """The peer for whom something is due and whose turn it is; it is this thread's until `_work` has ended."""
        with self._guard:
            now = time.monotonic()
            due = [route for route in self._routes.values() if not route.taken and route.next_due(now) <= now]
            route = min(due, key=lambda route: route.taken_at, default=None)
            if route is not None:
                route.taken, route.taken_at = True, now
            return route

    def _work(self, route: Route, sender: Sender) -> None:
        """Send what is due for a peer, until it is time to look again."""
        try:
            with self._guard:
                entries = route.in_order()
            began = time.monotonic()
            worked = False
            for entry in entries:
                now = time.monotonic()
                if self._stopping.is_set() or (worked and now > began + self._poll):
                    break
                if route.due(entry) <= now:
                    worked = True
                    self._guarded(entry, partial(self._attempt, entry, sender))
        finally:
            self._leave(route, sender)

    def _leave(self, route: Route, sender: Sender) -> None:
        shared = len(self._senders) > 1
        try:
            if shared:
                # Before another thread calls the same peer.
                sender.rest(lambda: True)
        finally:
            with self._guard:
                route.taken = False
                now = time.monotonic()
                due = route.next_due(now) <= now
        if shared and due:
            self.notify()

    def _pause(self) -> float:
        with self._guard:
            now = time.monotonic()
            nearest = min((route.next_due(now) for route in self._routes.values() if not route.taken), default=float("inf"))
        # What is due and cannot be begun must not make this spin.
        return max(min(nearest - now, self._poll), 0.01)

    def _guarded(self, entry: Entry, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            if self._queue.is_waiting(entry.parcel.id):
                self._wait(entry, Transient(f"disk: {error.strerror}"))
            else:
                # Somebody took it away by hand.
                self._drop(entry)
        # Whatever else it is must not end the thread, nor keep the other parcels.
        except Exception as error:  # noqa: BLE001
            _log.error("parcel %s: %s while sending", entry.parcel.id, type(error).__name__, exc_info=error)
            self._wait(entry, Transient(f"{type(error).__name__} while sending"))

    def _attempt(self, entry: Entry, sender: Sender) -> None:
        parcel = entry.parcel
        if not entry.awaited:
            confirmed = set(entry.state.confirmed)

            def confirm(name: str) -> None:
                confirmed.add(name)
                self._note(entry, confirmed=tuple(sorted(confirmed)))

            outcome = sender.send(parcel, frozenset(confirmed), confirm)
            if not isinstance(outcome, Delivered):
                self._settle(entry, outcome)
                return
            self._recovered(entry)
            if self._commitment is None:
                self._finish(entry, outcome.status, committed=False)
                return
        self._ask(entry, sender)

    def _ask(self, entry: Entry, sender: Sender) -> None:
        assert self._commitment is not None and isinstance(sender, CommittingSender)  # noqa: S101
        transaction = self._commitments.open(self._destination.name, entry.parcel.id)
        outcome = sender.request_commitment(entry.parcel, transaction)
        if not isinstance(outcome, Delivered):
            self._settle(entry, outcome)
            return
        self._recovered(entry)
        entry.asked = time.monotonic()
        entry.due = entry.asked + self._commitment.timeout_seconds
        entry.failures = 0
        self._note(entry, asked_at=datetime.now(UTC), attempts=entry.state.attempts + 1)

    def _reported(self, entry: Entry, reports: list[Report], sender: Sender) -> None:
        assert self._commitment is not None and isinstance(sender, CommittingSender)  # noqa: S101
        kept = {instance for report in reports for _, instance in report.committed}
        failed = {instance: reason for report in reports for _, instance, reason in report.failed}
        instances = sender.instances(entry.parcel)
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

    def _settle(self, entry: Entry, outcome: Transient | Permanent) -> None:
        if isinstance(outcome, Permanent):
            entry.state = entry.state.model_copy(update={"attempts": entry.state.attempts + 1})
            self._bury(entry, outcome)
            return
        self._wait(entry, outcome)
        # What one parcel finds out about its peer counts for all.
        same = [entry]
        if outcome.whole_destination:
            with self._guard:
                same = list(entry.route.entries.values())
        for old in filter(self._too_old, same):
            words = f"given up after {self._patience.give_up_days:g} days: {outcome.reason}"
            self._bury(old, Permanent(words, outcome.detail))

    def _too_old(self, entry: Entry) -> bool:
        if not self._patience.give_up_days:
            return False
        since = max(entry.parcel.created_at, entry.state.replayed_at or entry.parcel.created_at)
        return datetime.now(UTC) - since > timedelta(days=self._patience.give_up_days)

    def _wait(self, entry: Entry, outcome: Transient) -> None:
        self._count("failed")
        with self._guard:
            new = entry.route.failed(entry, outcome, time.monotonic())
        if new:
            self._say(logging.WARNING, entry, f"waiting; {outcome.reason}")
        now = datetime.now(UTC)
        self._note(entry, attempts=entry.state.attempts + 1, last_error=outcome.reason, last_attempt_at=now)

    def _recovered(self, entry: Entry) -> None:
        with self._guard:
            was_away = entry.route.recovered()
        if was_away:
            _log.info("destination %s: takes results again", self._destination.name)

    def _finish(self, entry: Entry, status: str, *, committed: bool) -> None:
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
        self._drop(entry)
        self._count("delivered")
        if self._commitment is not None:
            self._commitments.close(self._destination.name, parcel.id)
        seconds = round((now - parcel.created_at).total_seconds(), 1)
        self._say(logging.INFO, entry, "delivered", attempts=attempts, seconds=seconds)

    def _bury(self, entry: Entry, outcome: Permanent) -> None:
        attempts = max(entry.state.attempts, 1)
        letter = Letter(reason=outcome.reason, detail=outcome.detail, when=datetime.now(UTC), attempts=attempts)
        self._queue.dead(entry.parcel.id, letter)
        self._drop(entry)
        self._count("dead")
        if self._commitment is not None:
            self._commitments.close(self._destination.name, entry.parcel.id)
        self._say(logging.WARNING, entry, f"dead letter; {outcome.reason}", attempts=attempts)

    def _note(self, entry: Entry, **changes: object) -> None:
        """Keep how far a parcel has come; what cannot be written now is known here, and written with the next change."""
        entry.state = entry.state.model_copy(update=changes)
        try:
            self._queue.keep_state(entry.parcel.id, entry.state)
        except OSError as error:
            _log.error("parcel %s: its state cannot be written: %s", entry.parcel.id, error.strerror)

    def _drop(self, entry: Entry) -> None:
        with self._guard:
            entry.route.entries.pop(entry.parcel.id, None)

    def _count(self, what: str) -> None:
        with self._guard:
            self._counts[what] += 1

    def _say(self, level: int, entry: Entry, words: str, **said: object) -> None:
        name, parcel = self._destination.name, entry.parcel
        extra = fields(destination=name, parcel=parcel.id, study=parcel.study_key, **said)
        _log.log(level, "destination %s: parcel %s: %s", name, parcel.id, words, extra=extra)
