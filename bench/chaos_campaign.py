"""One campaign against one kind of store, from the first study to the account."""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from chaos_account import Account, Record, balance
from chaos_clients import orthanc_client, pynetdicom_client, storescu
from chaos_evidence import dead_results, letters, record, replay
from chaos_faults import KILLS, Faults, Kind, healthy, schedule
from chaos_journal import Journal, entries
from chaos_plan import PATIENT, Client, Course, Study, studies
from chaos_proc import Holdings, holdings
from chaos_processes import CampaignError, until
from chaos_senders import Senders
from chaos_site import TITLE, Site
from measuring import say

_THREADS = 4
_SETTLE_SECONDS = 600
_QUIET_SECONDS = 3
_HELD_SECONDS = 30
# A connection or a lock file more or less is no leak; one for each study or kill would be hundreds.
_SLACK = 6
_SLACK_MIB = 150


@dataclass(frozen=True)
class Options:
    """What a campaign is asked for."""

    studies: int
    kills: int
    seed: int
    rounds: int
    store: str


@dataclass
class Outcome:
    """What came of it."""

    options: Options
    record: Record
    account: Account
    faults: dict[str, int]
    skipped: dict[str, str]
    notes: dict[str, int]
    held: dict[str, tuple[Holdings, Holdings]]
    seconds: float
    letters: dict[str, int] = field(default_factory=dict)

    @property
    def kills(self) -> int:
        """How many of the faults killed."""
        return sum(self.faults.get(kind.value, 0) for kind in KILLS)


class Campaign:
    """Sends, hurts, waits and counts."""

    def __init__(self, options: Options, site: Site) -> None:
        self._options, self._site = options, site
        self._faults = Faults(site, schedule(options.studies, options.kills, options.rounds, options.seed), options.seed)
        self._begun = 0
        self._guard = threading.Lock()
        self._leftovers: list[str] = []
        self._limit = max(2 * _THREADS, options.studies // 50)

    def run(self) -> Outcome:
        """Run it.

        Raises
        ------
        CampaignError
            If it could not be carried out; that is no verdict on the node.
        """
        began, self._wall = time.monotonic(), datetime.now(UTC)
        site = self._site
        site.start()
        before = {child.name: holdings(child.pid) for child in site.listeners}
        say(f"{'':8}all is up after {time.monotonic() - began:.0f} s")
        self._send()
        self._faults.finish()
        healthy(site)
        say(f"{'':8}all was sent and mended; waiting for {site.backlog()} instances and parcels under way")
        self._settle()
        replayed = list(dead_results(site))
        if replayed:
            say(f"{'':8}{len(replayed)} dead letters of destinations are replayed")
            replay(site)
            self._settle()
        held = {child.name: (before[child.name], self._held(child.pid, before[child.name])) for child in site.listeners}
        self._check_holdings(held)
        self._restart()
        for child in site.listeners:
            child.stop()
        self._leftovers += self._faults.ended
        self._leftovers += [
            f"the log of {child.name} names a patient" for child in site.listeners if _names_somebody(child.log)
        ]
        told = letters(site.spool)
        found = record(site, self._leftovers)
        return Outcome(
            options=self._options,
            record=found,
            account=balance(found),
            faults=self._counted(),
            skipped={kind.value: reason for kind, reason in self._faults.skipped.items()},
            notes={
                **self._faults.notes,
                **{f"second destination {mode.value}: met": count for mode, count in site.met().items()},
                "dead letters of destinations replayed": len(replayed),
                "log lines of listeners with a stepped clock": sum(_stepped(child.log, self._wall) for child in site.listeners),
                "tracebacks in the listeners' logs": sum(_text(child.log).count("Traceback") for child in site.listeners),
            },
            held=held,
            seconds=time.monotonic() - began,
            letters=dict(told),
        )

    def _send(self) -> None:
        site = self._site
        journal = Journal(site.sent)
        clients = {
            Client.STORESCU: storescu(TITLE),
            Client.PYNETDICOM: pynetdicom_client(TITLE),
            Client.ORTHANC: orthanc_client(site.source_http),
        }
        senders = Senders(clients, TITLE, lambda: site.port, journal, self._wait_for_room, self._study_begun)
        try:
            senders.run(studies(self._options.studies, self._options.seed), _THREADS)
        except BaseException:
            senders.stopping.set()
            self._faults.stop()
            raise
        finally:
            journal.close()

    def _wait_for_room(self) -> None:
        # Else all would be sent before the service is hurt for the first time.
        deadline = time.monotonic() + _SETTLE_SECONDS
        while self._backlog() > self._limit:
            if time.monotonic() > deadline:
                raise CampaignError(
                    f"more than {self._limit} instances and parcels have been under way for {_SETTLE_SECONDS} s"
                )
            time.sleep(0.05)

    def _backlog(self) -> int:
        # Folders come and go while they are listed.
        with suppress(OSError):
            return self._site.backlog()
        return self._limit + 1

    def _study_begun(self, _study: Study) -> None:
        with self._guard:
            self._begun += 1
            begun = self._begun
        self._faults.begun(begun)
        if begun % max(self._options.studies // 10, 1) == 0:
            say(f"{'':8}study {begun} of {self._options.studies}, {self._backlog()} instances and parcels under way")

    def _settle(self) -> None:
        """Wait until nothing is under way, and has not been for a while; what is then still there, the account tells."""
        quiet_since = time.monotonic()
        deadline = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < deadline:
            if self._backlog() or self._site.planned():
                quiet_since = time.monotonic()
            if time.monotonic() - quiet_since > _QUIET_SECONDS:
                return
            time.sleep(0.1)
        say(f"{'':8}still under way after {_SETTLE_SECONDS} s: {self._site.backlog()} instances and parcels")

    def _held(self, pid: int, before: Holdings) -> Holdings:
        with suppress(CampaignError):
            until(lambda: not _too_much(before, holdings(pid)), "descriptors to be closed", _HELD_SECONDS)
        return holdings(pid)

    def _check_holdings(self, held: dict[str, tuple[Holdings, Holdings]]) -> None:
        for name, (before, after) in held.items():
            if too_much := _too_much(before, after):
                self._leftovers.append(f"{name} holds {too_much}")

    def _restart(self) -> None:
        """What is all done stays done when everything starts again."""
        site = self._site
        counts: list[Callable[[], int]] = [
            lambda: len(entries(site.taken)),
            lambda: int(site.archive_http.get("/statistics").json()["CountInstances"]),
        ]
        before = [count() for count in counts]
        for child in site.listeners:
            pid = child.pid
            child.stop()
            if child.process is not None and child.process.returncode:
                self._leftovers.append(f"{child.name} (process {pid}) ended with {child.process.returncode} on SIGTERM")
            child.start()
        self._settle()
        if [count() for count in counts] != before:
            self._leftovers.append("results were sent again after all was delivered and the listeners were started again")

    def _counted(self) -> dict[str, int]:
        lines = entries(self._site.sent)
        cut = Counter(line["course"] for line in lines if line["status"] is not None and line["course"] in _CUTS)
        happened = {kind.value: self._faults.counts[kind] for kind in Kind if self._faults.counts[kind]}
        # Persistent senders send afterwards: of each image the first attempt alone was cut.
        images = {line["sop_instance_uid"]: line["course"] for line in lines if line["course"] in _CUTS}
        by_course = Counter(images.values())
        return {**happened, **{_CUTS[name]: by_course[name] for name in cut}}


_CUTS = {Course.CUT.name: "association cut in mid-PDU", Course.UNREAD.name: "sender gone before the answer"}


def _too_much(before: Holdings, after: Holdings) -> str:
    """What a process holds more than it did, in words."""
    found = []
    if after.descriptors > before.descriptors + _SLACK:
        found.append(f"{after.descriptors} descriptors, {before.descriptors} before")
    if after.threads > before.threads + _SLACK:
        found.append(f"{after.threads} threads, {before.threads} before")
    if after.memory_mib > before.memory_mib + _SLACK_MIB:
        found.append(f"{after.memory_mib:.0f} MiB, {before.memory_mib:.0f} before")
    return " and ".join(found)


def _text(log: Path) -> str:
    return log.read_text(errors="replace")


def _stepped(log: Path, began: datetime) -> int:
    """Lines that were logged before the campaign, or after now, as the listener's clock had it."""
    found = 0
    for line in log.read_text(errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            logged = datetime.fromisoformat(json.loads(line)["time"])
            found += not began <= logged <= datetime.now(UTC)
    return found


def _names_somebody(log: Path) -> bool:
    return PATIENT in _text(log)


def strays(site: Site) -> list[str]:
    """What a campaign has left behind once its site was closed: processes, and a mount."""
    found = [f"process {process}" for process in site.strays]
    if os.path.ismount(site.disk.root):
        found.append(f"{site.disk.root} is mounted still")
    return found
