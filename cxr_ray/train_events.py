"""What training tells whoever watches; its own module, because the process that passes it on need not load torch."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class EpochResult:
    """Figures of one epoch, as the run's ``epochs.json`` keeps them.

    Attributes
    ----------
    epoch
        From 1.
    loss
        Mean training loss.
    val_loss, val_auc
        Mean loss and mean AUC on the validation split; NaN where the split cannot tell.
    val_auc_by_finding
        Findings without both classes in the split are left out.
    learning_rate
        Of the backbone, at the epoch's last step.
    images_per_second
        Of training, over all workers; validation and checkpoint left out.
    waiting
        Share of the training time spent waiting for data, 0 to 1.
    seconds
        From the epoch's first step to its checkpoint.
    """

    epoch: int
    loss: float
    val_loss: float
    val_auc: float
    val_auc_by_finding: dict[str, float]
    learning_rate: float
    images_per_second: float
    waiting: float
    seconds: float
    workers: int


@dataclass(frozen=True)
class TrainEvent:
    """What happened in training, for whoever watches.

    Attributes
    ----------
    kind
        "placed" (the cluster has room for the workers, which begin to load), "start" (of a first or renewed attempt), "step",
        "epoch" (validated and checkpointed), "notice" (something to tell), "stopped" (the patience is at its end), or "failed"
        (the loss is not finite; `text` says where).
    epoch
        From 1.
    images, images_total
        Images trained on since the beginning of the run, and at its end.
    rate
        Images a second over all workers since the last event.
    waiting
        Share of that time spent waiting for data, 0 to 1.
    loss
        Mean training loss since the last event, at "epoch" that of the whole epoch.
    learning_rate
        Of the backbone, at the last step.
    auc
        Mean validation AUC of the epoch; NaN before "epoch".
    result
        At "epoch", all its figures; at "start", those of the last epoch that is done, which a lost worker may not have told.
    pids
        Process of each worker, at "start".
    """

    kind: Literal["placed", "start", "step", "epoch", "notice", "stopped", "failed"]
    epoch: int
    images: int = 0
    images_total: int = 0
    rate: float = 0.0
    waiting: float = 0.0
    loss: float = float("nan")
    learning_rate: float = float("nan")
    auc: float = float("nan")
    result: EpochResult | None = None
    pids: tuple[int, ...] = field(default=())
    text: str = ""

    @classmethod
    def of_epoch(cls, result: EpochResult, images: int, images_total: int) -> "TrainEvent":
        """The event of kind "epoch" with these figures."""
        return cls(
            "epoch",
            result.epoch,
            images,
            images_total,
            rate=result.images_per_second,
            waiting=result.waiting,
            loss=result.loss,
            learning_rate=result.learning_rate,
            auc=result.val_auc,
            result=result,
        )
