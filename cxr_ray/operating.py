"""What a threshold does: chosen on validation, judged on the split that is scored."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold of one finding and what it does; NaN where nothing is there to be a share of.

    Attributes
    ----------
    precision
        Share of positives among the images at or above the threshold (positive predictive value).
    negative_predictive_value
        Share of negatives among those below it.
    """

    threshold: float
    sensitivity: float
    specificity: float
    precision: float
    negative_predictive_value: float


def judge(probabilities: np.ndarray, labels: np.ndarray, threshold: float) -> OperatingPoint:
    """Judge a threshold; shapes (N,), labels NaN where unknown."""
    known = np.isfinite(labels)
    called, positive = probabilities[known] >= threshold, labels[known] == 1
    return OperatingPoint(
        threshold=threshold,
        sensitivity=_share(called[positive]),
        specificity=_share(~called[~positive]),
        precision=_share(positive[called]),
        negative_predictive_value=_share(~positive[~called]),
    )


def _share(chosen: np.ndarray) -> float:
    return float(chosen.mean()) if chosen.size else float("nan")
