"""Where a training run can be followed: TensorBoard's event files in its folder, and an MLflow server if one is named.

A tracker may refuse to start, because then somebody is still looking. From there on it only tells of the training: what it
cannot write or send is told once and never ends the run. The horizontal axis is the number of images seen, which means the same
whatever the batch size and the number of workers. Settings leave without the credentials that their URIs carry.
"""

from dataclasses import dataclass
from typing import Protocol

from cxr_ray import storage
from cxr_ray.mlflow_tracker import Mlflow
from cxr_ray.tensorboard_tracker import TensorBoard
from cxr_ray.tracked_figures import Say, say_on_stderr
from cxr_ray.train_events import TrainEvent
from cxr_ray.train_settings import TrainSettings

__all__ = ["Mlflow", "TensorBoard", "Tracker", "Trackers", "trackers_for"]


class Tracker(Protocol):
    """What a run is reported to."""

    def start(self, settings: TrainSettings, first_epoch: int) -> None:
        """Begin; once more whenever an attempt begins anew, at the epoch (from 1) that it goes on with.

        Raises
        ------
        CxrRayError
            If nothing can be reported there.
        """

    def step(self, event: TrainEvent) -> None:
        """Report an event of kind "step"."""

    def epoch(self, event: TrainEvent) -> None:
        """Report an event of kind "epoch"."""

    def finish(self, metrics: dict[str, float], bundle_uri: str | None, failure: str | None) -> None:
        """End: the figures of the whole run, where its bundle is, and why it failed, if it did. Raises nothing."""


@dataclass(frozen=True)
class Trackers:
    """Several trackers as one; itself a `Tracker`."""

    members: tuple[Tracker, ...]

    def start(self, settings: TrainSettings, first_epoch: int) -> None:
        """Start all of them, in order."""
        for member in self.members:
            member.start(settings, first_epoch)

    def step(self, event: TrainEvent) -> None:
        """Report to all of them."""
        for member in self.members:
            member.step(event)

    def epoch(self, event: TrainEvent) -> None:
        """Report to all of them."""
        for member in self.members:
            member.epoch(event)

    def finish(self, metrics: dict[str, float], bundle_uri: str | None, failure: str | None) -> None:
        """Finish all of them."""
        for member in self.members:
            member.finish(metrics, bundle_uri, failure)


def trackers_for(settings: TrainSettings, say: Say = say_on_stderr) -> Trackers:
    """What a run with these settings reports to.

    Parameters
    ----------
    say
        Takes the lines about what could not be reported.

    Raises
    ------
    UsageError
        If MLflow is asked for and its client is not installed.
    """
    members: list[Tracker] = []
    if settings.mlflow is not None:
        run_name = storage.resolve(settings.out)[1].rstrip("/").rpartition("/")[2]
        members.append(Mlflow(settings.mlflow, run_name, say))
    # After the server, which may refuse: then nothing was written.
    members.append(TensorBoard(settings.out, say))
    return Trackers(tuple(members))
