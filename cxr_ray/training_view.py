"""How training looks on a terminal or in a log: a bar with its figures, and a line an epoch that stays."""

import math

from cxr_ray.progress import ProgressReport
from cxr_ray.train_events import EpochResult, TrainEvent


class TrainingView:
    """Shows the events of a run of so many epochs."""

    def __init__(self, progress: ProgressReport, epochs: int) -> None:
        self._progress, self._epochs = progress, epochs
        self._auc = math.nan

    def __call__(self, event: TrainEvent) -> None:
        """Show an event."""
        if event.kind == "start":
            self._progress.set_total(event.images_total)
            self._progress.say(_beginning(event, self._epochs))
            self._progress.move_to(event.images)
        elif event.kind == "step":
            self._progress.move_to(event.images, self._note(event), rate=event.rate)
        elif event.kind == "epoch" and event.result is not None:
            self._auc = event.auc
            self._progress.move_to(event.images)
            self._progress.say(_epoch_line(event.result, self._epochs))
        else:
            self._progress.say(event.text)

    def _note(self, event: TrainEvent) -> str:
        auc = "" if math.isnan(self._auc) else f", AUC {self._auc:.3f}"
        return f"epoch {event.epoch}/{self._epochs}, loss {event.loss:.4f}{auc}, {event.waiting:.0%} waiting"


def _beginning(event: TrainEvent, epochs: int) -> str:
    workers = f"{len(event.pids)} workers (processes {', '.join(map(str, event.pids))})"
    if event.images == 0:
        return f"training, {workers}"
    return f"going on from the checkpoint after {_place(event, epochs)}, {workers}"


def _place(event: TrainEvent, epochs: int) -> str:
    """Where a run is that has begun: after a whole epoch, or in the middle of one."""
    within = event.images - (event.epoch - 1) * (event.images_total // epochs)
    return f"{within} images of epoch {event.epoch}" if within else f"epoch {event.epoch - 1}"


def _epoch_line(result: EpochResult, epochs: int) -> str:
    return (
        f"epoch {result.epoch}/{epochs}: loss {result.loss:.4f}, validation {result.val_loss:.4f}, AUC {result.val_auc:.3f}, "
        f"{result.images_per_second:.0f} images/s, {result.waiting:.0%} waiting, {result.seconds:.0f} s"
    )
