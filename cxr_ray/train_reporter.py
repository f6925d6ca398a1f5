"""What the first worker tells the process that started the run."""

import os
import time
from dataclasses import dataclass

import torch
from ray.util.queue import Queue

from cxr_ray.train_events import EpochResult, TrainEvent

_SECONDS_BETWEEN_EVENTS = 1.0


@dataclass(frozen=True)
class TrainedSoFar:
    """Of an epoch: images of all workers, mean loss (NaN before the first), images a second, share of time spent waiting."""

    images: int
    loss: float
    images_per_second: float
    waiting: float


class Reporter:
    """Counts images, time and losses, and sends an event now and then; all but the first worker count in silence.

    Parameters
    ----------
    images_total
        Images of the whole run.
    """

    def __init__(self, events: Queue, *, rank: int, workers: int, images_total: int) -> None:
        self._events, self._rank, self._workers = events, rank, workers
        self._images_total = images_total
        self._images = self._images_sent = 0
        self._started = self._sent = time.monotonic()
        self._waited = self._waited_sent = 0.0
        self._trained_images = 0
        self._losses: list[torch.Tensor] = []
        self._epoch_losses: list[torch.Tensor] = []

    def begin_run(self, epoch: int, images: int, last: EpochResult | None) -> None:
        """Tell that a first or renewed attempt begins, in this epoch, after so many images and this last whole epoch."""
        self._images = self._images_sent = images
        pids: list[int] = [os.getpid()]
        if self._workers > 1:
            pids = [0] * self._workers
            torch.distributed.all_gather_object(pids, os.getpid())
        self._send(TrainEvent("start", epoch + 1, images, self._images_total, result=last, pids=tuple(pids)))

    def begin_epoch(self) -> None:
        """Start the epoch's clock: validation, checkpoint and a start of the data lie before it."""
        self._started = self._sent = time.monotonic()
        self._waited = self._waited_sent = 0.0
        self._trained_images = 0
        self._images_sent = self._images
        self._losses, self._epoch_losses = [], []

    def waited(self, seconds: float) -> None:
        """Add time that was spent waiting for data."""
        self._waited += seconds

    def stepped(self, epoch: int, images: int, loss: torch.Tensor, learning_rate: float) -> None:
        """Count a step of `images` images on this worker; `loss` may still be on its way on the device."""
        self._images += images * self._workers
        self._trained_images += images * self._workers
        self._losses.append(loss)
        self._epoch_losses.append(loss)
        now = time.monotonic()
        if now - self._sent < _SECONDS_BETWEEN_EVENTS:
            return
        if self._rank == 0:
            elapsed = now - self._sent
            self._send(
                TrainEvent(
                    "step",
                    epoch + 1,
                    self._images,
                    self._images_total,
                    rate=(self._images - self._images_sent) / elapsed,
                    waiting=min(1.0, (self._waited - self._waited_sent) / elapsed),
                    loss=float(torch.stack(self._losses).mean()),
                    learning_rate=learning_rate,
                )
            )
        self._sent, self._images_sent, self._waited_sent, self._losses = now, self._images, self._waited, []

    def trained(self) -> "TrainedSoFar":
        """The epoch's figures since its clock was started."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        return TrainedSoFar(
            images=self._trained_images,
            loss=float(torch.stack(self._epoch_losses).mean()) if self._epoch_losses else float("nan"),
            images_per_second=self._trained_images / seconds,
            waiting=min(1.0, self._waited / seconds),
        )

    def seconds(self) -> float:
        """Seconds since the epoch's clock was started."""
        return time.monotonic() - self._started

    def end_epoch(self, result: EpochResult, images: int) -> None:
        """Tell the figures of an epoch; `images` is where the run is now."""
        self._images = images
        self._send(TrainEvent.of_epoch(result, images, self._images_total))

    def notice(self, epoch: int, text: str) -> None:
        """Tell something worth a line."""
        self._send(TrainEvent("notice", epoch + 1, self._images, self._images_total, text=text))

    def stopped(self, epoch: int, text: str) -> None:
        """Tell that the run ends before its last epoch, and why."""
        self._send(TrainEvent("stopped", epoch + 1, self._images, self._images_total, text=text))

    def failed(self, epoch: int, text: str) -> None:
        """Tell why the run cannot go on."""
        self._send(TrainEvent("failed", epoch + 1, self._images, self._images_total, text=text))

    def _send(self, event: TrainEvent) -> None:
        if self._rank != 0:
            return
        if event.kind == "step":
            # Nobody waits for it: the next one says the same again, and what is put later arrives later.
            self._events.actor.put.remote(event)
        else:
            self._events.put(event)
