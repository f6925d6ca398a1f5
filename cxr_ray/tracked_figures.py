"""What trackers tell of a run: the names of its figures, why something could not be told."""

import math
import sys
from collections.abc import Callable

from cxr_ray.train_events import TrainEvent

Say = Callable[[str], None]


def say_on_stderr(line: str) -> None:
    """Print a line where it does not mix with a command's result."""
    sys.stderr.write(f"{line}\n")


def step_figures(event: TrainEvent) -> dict[str, float]:
    """Figures of an event of kind "step", those that are finite."""
    figures = {"loss": event.loss, "learning_rate": event.learning_rate, "images_per_second": event.rate}
    return _finite(figures | {"waiting": event.waiting})


def epoch_figures(event: TrainEvent) -> dict[str, float]:
    """Figures of an event of kind "epoch", those that are finite; a finding's AUC is ``val_auc/Edema``."""
    result = event.result
    if result is None:
        return {}
    figures = {"epoch_loss": result.loss, "val_loss": result.val_loss, "val_auc": result.val_auc}
    by_finding = {f"val_auc/{name}": auc for name, auc in result.val_auc_by_finding.items()}
    return _finite(figures | {"learning_rate": result.learning_rate} | by_finding)


def final_figures(metrics: dict[str, float]) -> dict[str, float]:
    """Figures of the whole run, those that are finite, under names that no curve has."""
    return _finite({f"final/{name}": value for name, value in metrics.items()})


def _finite(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def reason(error: BaseException) -> str:
    """The innermost cause in one line: what a client wraps around it is long and may repeat the address and its password."""
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = inner
    return " ".join(str(error).split())[:300] or type(error).__name__
