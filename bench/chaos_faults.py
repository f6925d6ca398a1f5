"""What goes wrong in a campaign, and when: kills and outages at moments that a seed draws, each mended after a while.

A moment is a number of studies that were begun, and some fraction of a second more: so the same seed hurts the same studies
on a fast machine and on a slow one, as far as threads and networks can be held to anything.
"""

import os
import queue
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from chaos_destination import Mode
from chaos_proc import holds_open
from chaos_processes import CampaignError, Child, until
from chaos_site import Site
from measuring import say

_FIRST, _LAST = 0.02, 0.9
_LONGEST_DELAY = 1.5
_LONGEST_SECONDS = 8.0
_CLOCK_STEPS = (3600, -3600, 86400, -86400)
_STARTS = 20
_LONGEST_WAIT = 20


class Kind(Enum):
    """A class of faults."""

    LISTENER = "kill -9: a listener that receives"
    DISPATCHER = "kill -9: the listener that dispatches"
    ASSEMBLER = "kill -9: the listener that assembles"
    DELIVERY = "kill -9: the listener that delivers"
    REPLICA = "kill -9: a Serve replica"
    RAY = "kill -9: the whole Ray"
    DISK = "spool full to the last byte"
    STORE = "results store away"
    CLOCK = "clock stepped"
    ARCHIVE_STOPPED = "archive (Orthanc) stopped"
    SECOND_STOPPED = "second destination: port closed"
    SECOND_TRANSIENT = "second destination: rejects, transient"
    SECOND_PERMANENT = "second destination: rejects, permanent"
    SECOND_FULL = "second destination: accepts, then 0xA700"
    SECOND_HANGING = "second destination: hangs"
    SECOND_CUTTING = "second destination: cuts before answering"


_KILLS = (
    Kind.LISTENER,
    Kind.DISPATCHER,
    Kind.REPLICA,
    Kind.RAY,
    Kind.ASSEMBLER,
    Kind.DELIVERY,
    Kind.LISTENER,
    Kind.DISPATCHER,
    Kind.REPLICA,
    Kind.DISPATCHER,
)
KILLS = frozenset(_KILLS)
_MODES = {
    Kind.SECOND_TRANSIENT: Mode.TRANSIENT,
    Kind.SECOND_PERMANENT: Mode.PERMANENT,
    Kind.SECOND_FULL: Mode.FULL,
    Kind.SECOND_HANGING: Mode.HANGING,
    Kind.SECOND_CUTTING: Mode.CUTTING,
}
_LOCKS = {Kind.DISPATCHER: "dispatcher.lock", Kind.ASSEMBLER: "assembler.lock", Kind.DELIVERY: "outbox/delivery.lock"}
# Faults of one subject come one after the other, those of different ones at once.
_SUBJECTS = {
    **dict.fromkeys((Kind.LISTENER, *_LOCKS), "listeners"),
    **dict.fromkeys((Kind.REPLICA, Kind.RAY), "service"),
    Kind.DISK: "disk",
    Kind.STORE: "store",
    Kind.CLOCK: "clock",
    Kind.ARCHIVE_STOPPED: "archive",
}
_SECOND = "second"
# The listeners' clocks follow within a second.
_SHORTEST_SECONDS = {Kind.CLOCK: 2.5}


@dataclass(frozen=True)
class Planned:
    """A fault: after so many studies were begun and `delay` seconds more, for so many seconds."""

    after: int
    kind: Kind
    delay: float
    seconds: float


def schedule(studies: int, kills: int, rounds: int, seed: int) -> list[Planned]:
    """The faults of a campaign in their order: `kills` of them kill, each other kind comes `rounds` times."""
    longest = min(_LONGEST_SECONDS, 2 + studies / 50)
    chance = random.Random(f"faults {seed}")
    kinds = [_KILLS[number % len(_KILLS)] for number in range(kills)]
    kinds += [kind for kind in Kind if kind not in KILLS for _ in range(rounds)]
    first, last = int(studies * _FIRST), int(studies * _LAST)
    return sorted(
        (
            Planned(
                after=chance.randint(first, last),
                kind=kind,
                delay=chance.uniform(0, _LONGEST_DELAY),
                seconds=chance.uniform(0.2, 3)
                if kind in KILLS
                else chance.uniform(_SHORTEST_SECONDS.get(kind, 1), longest + 1),
            )
            for kind in kinds
        ),
        key=lambda planned: planned.after,
    )


class Faults:
    """Makes what is planned happen, in threads of its own, one for each subject.

    Attributes
    ----------
    counts
        How often each kind happened.
    skipped
        Kinds that cannot be made to happen here, and why.
    notes
        What else was counted on the way.
    ended
        What ended that nobody had killed.
    """

    def __init__(self, site: Site, planned: list[Planned], seed: int) -> None:
        self._site, self._planned, self._chance = site, planned, random.Random(f"victims {seed}")
        self.counts: Counter[Kind] = Counter()
        self.notes: Counter[str] = Counter()
        self.ended: list[str] = []
        self.skipped: dict[Kind, str] = {}
        if site.disk.reason:
            self.skipped[Kind.DISK] = site.disk.reason
        if site.faketime is None:
            self.skipped[Kind.CLOCK] = "libfaketime is not installed"
        self.failures: list[Exception] = []
        self._began = time.monotonic()
        self._stopping = threading.Event()
        self._due: dict[str, queue.SimpleQueue[Planned | None]] = {}
        self._threads: list[threading.Thread] = []
        self._guard = threading.Lock()

    def begun(self, number: int) -> None:
        """Say that so many studies were begun; returns at once."""
        with self._guard:
            due = [planned for planned in self._planned if planned.after <= number]
            self._planned = self._planned[len(due) :]
        for planned in due:
            self._queue(_SUBJECTS.get(planned.kind, _SECOND)).put(planned)

    def finish(self) -> None:
        """Return when all that was planned has happened and is mended.

        Raises
        ------
        CampaignError
            If something could not be mended.
        """
        with self._guard:
            left, self._planned = self._planned, []
        for planned in left:
            self._queue(_SUBJECTS.get(planned.kind, _SECOND)).put(planned)
        for waiting in self._due.values():
            waiting.put(None)
        for thread in self._threads:
            thread.join()
        if self.failures:
            raise self.failures[0]

    def stop(self) -> None:
        """Begin nothing more, and mend what is broken."""
        self._stopping.set()

    def _queue(self, subject: str) -> "queue.SimpleQueue[Planned | None]":
        with self._guard:
            if subject not in self._due:
                self._due[subject] = queue.SimpleQueue()
                thread = threading.Thread(target=self._work, args=(self._due[subject],), daemon=True)
                self._threads.append(thread)
                thread.start()
            return self._due[subject]

    def _work(self, due: "queue.SimpleQueue[Planned | None]") -> None:
        while (planned := due.get()) is not None:
            if self._stopping.is_set() or planned.kind in self.skipped:
                continue
            try:
                self._stopping.wait(planned.delay)
                self._happen(planned)
            # Told by `finish`; what else is planned goes on.
            except Exception as failure:  # noqa: BLE001
                self.failures.append(failure)
                say(f"{self._time()}  {planned.kind.value}: could not be mended: {failure}")

    def _happen(self, planned: Planned) -> None:
        site, kind = self._site, planned.kind
        if kind in KILLS:
            done = self._kill(planned)
            if done is None:
                self.notes["kills that met nobody"] += 1
                return
        elif kind in _MODES:
            done = self._announce(planned, "")
            self._during(planned, lambda: site.set_mode(_MODES[kind]), lambda: site.set_mode(Mode.WELL))
        elif kind is Kind.SECOND_STOPPED:
            self._announce(planned, "")
            self._during(planned, site.second.kill, lambda: self._revive(site.second))
        elif kind is Kind.ARCHIVE_STOPPED:
            self._announce(planned, "")
            self._during(planned, site.archive.stop, lambda: self._revive(site.archive))
        elif kind is Kind.DISK:
            self._announce(planned, "")
            site.disk.fill(planned.seconds, self._stopping)
        elif kind is Kind.STORE:
            self._announce(planned, site.store.outage)
            site.store.fail(planned.seconds)
        else:
            step = self._chance.choice(_CLOCK_STEPS)
            self._announce(planned, f"by {step:+d} s")
            self._during(planned, lambda: site.set_clock(step), lambda: site.set_clock(0))
        self.counts[kind] += 1

    def _fail_second(self, planned: Planned, mode: Mode) -> None:
        """Fail until somebody has met it: while nothing is to be delivered, a failure is none."""
        met = self._site.met()[mode]
        self._site.set_mode(mode)
        try:
            self._stopping.wait(planned.seconds)
            until_then = time.monotonic() + _LONGEST_WAIT
            while self._site.met()[mode] == met and time.monotonic() < until_then and not self._stopping.is_set():
                time.sleep(0.1)
        finally:
            self._site.set_mode(Mode.WELL)

    def _during(self, planned: Planned, begin: Callable[[], None], mend: Callable[[], None]) -> None:
        try:
            begin()
            self._stopping.wait(planned.seconds)
        finally:
            mend()

    def _kill(self, planned: Planned) -> str | None:
        """Kill somebody and start it again; says whom, None where there was nobody."""
        site = self._site
        if planned.kind is Kind.RAY:
            if not site.service.up:
                self.ended.append(f"the service had ended by itself: {site.service.said()}")
            said = self._announce(planned, f"{len(site.replicas())} replicas among it")
            self._during(planned, site.service.kill, lambda: self._revive(site.service))
            return said
        if planned.kind is Kind.REPLICA:
            return self._kill_replica(planned)
        victim = self._victim(planned.kind)
        if victim is None:
            return None
        if not victim.up:
            self.ended.append(f"{victim.name} had ended by itself: {victim.said()}")
        said = self._announce(planned, victim.name)
        self._during(planned, victim.kill, lambda: self._revive(victim))
        return said

    def _kill_replica(self, planned: Planned) -> str | None:
        replicas = self._site.replicas()
        if not replicas:
            return None
        pid, title = self._chance.choice(replicas)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return self._announce(planned, title.partition("ServeReplica:")[2])

    def _victim(self, kind: Kind) -> Child | None:
        if kind is Kind.LISTENER:
            return self._receiving() or self._chance.choice(self._site.listeners)
        # A lock passes on within half a second when its holder is killed.
        until_then = time.monotonic() + 5
        while time.monotonic() < until_then and not self._stopping.is_set():
            if holder := self._site.holder(_LOCKS[kind]):
                return holder
            time.sleep(0.05)
        return None

    def _receiving(self) -> Child | None:
        """A listener that is writing what it receives, caught in the act; None where none does for some seconds."""
        until_then = time.monotonic() + 5
        while time.monotonic() < until_then and not self._stopping.is_set():
            for child in self._site.listeners:
                if child.up and holds_open(child.pid, self._site.spool / "incoming"):
                    self.notes["listeners killed with an instance half written"] += 1
                    return child
        return None

    def _revive(self, child: Child) -> None:
        """Start it, and again where it cannot: as whoever supervises services does."""
        for _ in range(_STARTS):
            try:
                return child.start()
            except CampaignError as error:
                self.notes[f"starts of {child.name} that failed"] += 1
                say(f"{self._time()}  {error}")
                child.kill()
                time.sleep(1)
        raise CampaignError(f"{child.name} does not start any more")

    def _announce(self, planned: Planned, what: str) -> str:
        about = f"{planned.kind.value}{', ' if what else ''}{what}"
        say(f"{self._time()}  {about}, {planned.seconds:.1f} s (after study {planned.after})")
        return about

    def _time(self) -> str:
        passed = int(time.monotonic() - self._began)
        return f"{passed // 60:3d}:{passed % 60:02d}"


def healthy(site: Site) -> None:
    """Wait until everything runs that should.

    Raises
    ------
    CampaignError
        If something does not.
    """
    for child in site.children:
        until(lambda child=child: child.up and child.wanted, f"{child.name} to run: {child.said()}", 5)
    until(site.service.ready, "the service to be ready", 240)
