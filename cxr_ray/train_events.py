"""What training tells whoever watches; its own module, because the process that passes it on need not load torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainEvent:
    """What happened in training, for whoever watches.

    Attributes
    ----------
    kind
        "start" (of a first or renewed attempt), "step", or "epoch" (validated and checkpointed).
    epoch
        From 1.
    images, images_total
        Images trained on since the beginning of the run, and at its end.
    rate
        Images a second over all workers.
    loss
        Mean training loss since the last event, at "epoch" that of the whole epoch.
    auc
        Mean validation AUC of the epoch; NaN before "epoch".
    pids
        Process of each worker, at "start".
    """

    kind: str
    epoch: int
    images: int = 0
    images_total: int = 0
    rate: float = 0.0
    loss: float = float("nan")
    auc: float = float("nan")
    pids: tuple[int, ...] = ()
