"""Where a run is: what an unfinished epoch already has, and how that is told."""

import math

import pytest

from cxr_ray.epoch_order import Segment
from cxr_ray.train_events import TrainEvent
from cxr_ray.train_state import RunPosition
from cxr_ray.training_view import TrainingView


class Lines:
    """A report that only collects."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def set_total(self, total: int) -> None:
        """Not of interest here."""

    def move_to(self, done: int, note: str = "", rate: float | None = None) -> None:
        """Not of interest here."""

    def say(self, line: str) -> None:
        self.said.append(line)


def test_the_loss_of_an_interrupted_epoch_covers_all_of_it():
    position = RunPosition(epoch=3)
    assert position.epoch_loss(0.25, 100) == 0.25
    position = position.within(Segment(workers=2, batch=5, steps=3), 0.5).within(Segment(workers=1, batch=10, steps=6), 0.2)
    assert position.images == 90
    assert position.epoch_loss(0.1, 10) == pytest.approx((0.5 * 30 + 0.2 * 60 + 0.1 * 10) / 100)


def test_a_checkpoint_at_the_last_step_leaves_no_loss_to_add():
    position = RunPosition().within(Segment(workers=2, batch=5, steps=3), 0.5)
    assert position.epoch_loss(math.nan, 0) == 0.5


@pytest.mark.parametrize(
    ("epoch", "images", "said"),
    [
        (1, 0, "training, 2 workers (processes 7, 8)"),
        (3, 200, "going on from the checkpoint after epoch 2, 2 workers (processes 7, 8)"),
        (1, 40, "going on from the checkpoint after 40 images of epoch 1, 2 workers (processes 7, 8)"),
        (3, 240, "going on from the checkpoint after 40 images of epoch 3, 2 workers (processes 7, 8)"),
    ],
)
def test_a_run_says_where_it_goes_on(epoch, images, said):
    lines = Lines()
    TrainingView(lines, epochs=5)(TrainEvent("start", epoch, images, 500, pids=(7, 8)))
    assert lines.said == [said]
