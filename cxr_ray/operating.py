"""Thresholds: chosen on validation by a rule, judged on the split that is scored."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cxr_ray.scoring import roc_curve

_NO_CHOICE = 0.5


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


def choose(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Thresholds of each finding by each rule: shape (K,), 0.5 where only one class occurs.

    - ``youden``: the largest sensitivity + specificity (Youden 1950).
    - ``sensitivity_90``: the highest that finds at least nine of ten positives.
    - ``prevalence``: the highest that calls at least as many images positive as are.

    Parameters
    ----------
    probabilities, labels
        Of the validation split, shape (N, K); labels NaN where unknown.
    """
    chosen = {rule: np.full(labels.shape[1], _NO_CHOICE) for rule in _RULES}
    for k in range(labels.shape[1]):
        known = np.isfinite(labels[:, k])
        scores, truth = probabilities[known, k], labels[known, k]
        if 0 < truth.sum() < truth.size:
            for rule, best in _RULES.items():
                chosen[rule][k] = best(scores, truth)
    return chosen


def _youden(scores: np.ndarray, truth: np.ndarray) -> float:
    false, true, cuts = roc_curve(scores, truth)
    best = cuts[np.argmax(true - false)]
    return float(best) if np.isfinite(best) else _NO_CHOICE


def _finds_nine_of_ten(scores: np.ndarray, truth: np.ndarray) -> float:
    positive = np.sort(scores[truth == 1])
    return float(positive[positive.size // 10])


def _calls_as_many(scores: np.ndarray, truth: np.ndarray) -> float:
    return float(np.sort(scores)[-int(truth.sum())])


_RULES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "youden": _youden,
    "sensitivity_90": _finds_nine_of_ten,
    "prevalence": _calls_as_many,
}


def _share(chosen: np.ndarray) -> float:
    return float(chosen.mean()) if chosen.size else float("nan")
