"""Delivery: brings what lies in the outbox to its destinations, each in threads of its own.

Any number of processes may run it on one outbox: one holds the lock and works, the others wait to take over. What is sent when
the process dies is sent again under the same UIDs; what is confirmed is not.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from cxr_ray.errors import CxrRayError
from serve.node.destination_loop import DestinationLoop
from serve.node.destinations import DeliverySettings, Destination
from serve.node.durable import alone
from serve.node.outbox import Outbox
from serve.node.senders import sender_for
from serve.node.senders.sender import Sender
from serve.node.storage_commitment import CommitmentRegistry

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_DAY = 24 * 3600.0
_SWEEP_SECONDS = 3600.0
# For what is being sent to end by itself, and then for it to be cut off.
_END_SECONDS, _ABORT_SECONDS = 4.0, 2.0

_log = logging.getLogger(__name__)


class Delivery:
    """Sends the parcels of one outbox.

    Parameters
    ----------
    settings
        The destinations and the patience with them.
    outbox
        Where parcels lie. Those that are added here are noticed at once, those of other processes within `poll_seconds`.
    commitments
        Where reports on storage commitment arrive; give the listener the same one. None: one of its own.
    metrics
        Where to show what waits and what was delivered; None: nowhere.

    Raises
    ------
    UsageError
        When a certificate that the settings name cannot be read.
    CxrRayError
        When the outbox cannot be written.
    """

    def __init__(
        self,
        settings: DeliverySettings,
        outbox: Outbox,
        commitments: CommitmentRegistry | None = None,
        metrics: "CollectorRegistry | None" = None,
    ) -> None:
        self._settings, self._outbox, self._metrics = settings, outbox, metrics
        self._commitments = commitments or CommitmentRegistry(outbox)
        self.counts: dict[str, Counter[str]] = {destination.name: Counter() for destination in settings.destinations}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._collector: object = None
        # What is wrong with the settings is told before anything runs.
        self._loops = self._made_loops()

    def start(self) -> None:
        """Begin to send, or to wait for the outbox's lock; returns at once."""
        self._stopping.clear()
        self._loops = self._loops or self._made_loops()
        self._outbox.watch(self.notify)
        self._commitments.on_report = self.notify
        if self._metrics is not None:
            from serve.node.delivery_metrics import DeliveryCollector  # noqa: PLC0415 - most commands show none

            self._collector = DeliveryCollector(self._outbox, self.counts)
            self._metrics.register(self._collector)
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take nothing new and return when what is being sent has ended, or after a few seconds without it."""
        if self._thread is None:
            return
        self._stopping.set()
        self._outbox.unwatch(self.notify)
        if self._metrics is not None and self._collector is not None:
            self._metrics.unregister(self._collector)  # type: ignore[arg-type]
            self._collector = None
        self._thread.join(_END_SECONDS + 2 * _ABORT_SECONDS)
        self._thread, self._loops = None, {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def notify(self, destination: str | None = None) -> None:
        """Say that there is something new for a destination, or for some; returns at once."""
        for name, loop in self._loops.items():
            if destination in {None, name}:
                loop.notify()

    def _made_loops(self) -> dict[str, DestinationLoop]:
        try:
            return {destination.name: self._loop(destination) for destination in self._settings.destinations}
        except OSError as error:
            root = self._outbox.root
            raise CxrRayError(f"outbox {root}: {error.strerror}; name a folder on a local disk of this user") from error

    def _loop(self, destination: Destination) -> DestinationLoop:
        def sender(loop: DestinationLoop) -> Sender:
            return sender_for(destination, self._commitments.handle_event_report, loop.outstanding)

        return DestinationLoop(
            destination,
            self._outbox.queue(destination.name),
            sender,
            self._commitments,
            self._settings.patience,
            self._settings.poll_seconds,
            self.counts[destination.name],
        )

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with alone(self._outbox.root / "delivery.lock", self._stopping) as mine:
                    if mine:
                        self._deliver()
            except OSError as error:
                _log.error("the outbox cannot be used: %s", error.strerror)
                self._stopping.wait(self._settings.poll_seconds)

    def _deliver(self) -> None:
        threads = {
            name: threading.Thread(target=loop.run, name=f"delivery-{name}", daemon=True) for name, loop in self._loops.items()
        }
        for thread in threads.values():
            thread.start()
        try:
            self._tell_orphans()
            while not self._stopping.is_set():
                self._sweep()
                self._stopping.wait(_SWEEP_SECONDS)
        finally:
            for loop in self._loops.values():
                loop.stop()
            _join(threads.values(), _END_SECONDS)
            for name, loop in self._loops.items():
                if threads[name].is_alive():
                    loop.abort()
            _join(threads.values(), _ABORT_SECONDS)

    def _tell_orphans(self) -> None:
        try:
            self._outbox.keep_current(self._loops)
            for name in self._outbox.orphaned():
                waiting = len(self._outbox.queue(name).waiting())
                _log.warning("destination %s is not in the settings: %d parcels are kept for it", name, waiting)
        except OSError as error:
            _log.error("the outbox cannot be read: %s", error.strerror)

    def _sweep(self) -> None:
        settings = self._settings
        try:
            for name in self._outbox.destinations():
                queue = self._outbox.queue(name)
                queue.sweep(
                    delivered_seconds=_seconds(settings.keep_delivered_days), dead_seconds=_seconds(settings.keep_dead_days)
                )
                if name not in self._loops and (removed := queue.sweep_waiting(_seconds(settings.keep_orphaned_days))):
                    _log.warning("destination %s is not in the settings: %d old parcels removed", name, removed)
                self._commitments.sweep(name, _DAY)
        except OSError as error:
            _log.error("the outbox cannot be swept: %s", error.strerror)


def _seconds(days: float) -> float | None:
    return days * _DAY if days else None


def _join(threads: Iterable[threading.Thread], seconds: float) -> None:
    until = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0.0))
