"""Whether probabilities mean what they say: calibration measures, and recalibration on a validation split.

Sources: Platt 1999 (slope and intercept on the log-odds, and what is known of a class from so many images of it), Guo et al.
2017 (temperature).
"""

from dataclasses import dataclass

import numpy as np

from cxr_ray.evaluate_settings import Calibration

BINS = 10
_CLOSEST = 1e-7
_NEWTON_STEPS = 50


@dataclass(frozen=True)
class Reliability:
    """Bins of equally many images, from the lowest probabilities to the highest; three arrays of equal length.

    Attributes
    ----------
    predicted
        Mean probability of the bin.
    observed
        Share of positives in it.
    images
        How many it has.
    """

    predicted: np.ndarray
    observed: np.ndarray
    images: np.ndarray

    @property
    def expected_error(self) -> float:
        """Expected calibration error: the mean distance of the two, over the images."""
        if not len(self.images):
            return float("nan")
        return float(np.average(np.abs(self.predicted - self.observed), weights=self.images))


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
    """Bins of one finding; shapes (N,), labels NaN where unknown. Equal probabilities share a bin.

    With bins of equal width nearly all images of a rare finding lie in the first one.
    """
    known = np.isfinite(labels)
    values, truth = probabilities[known].astype(np.float64), labels[known].astype(np.float64)
    if not len(values):
        return Reliability(np.empty(0), np.empty(0), np.empty(0, dtype=np.int64))
    edges = np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1], method="higher")
    where = np.searchsorted(edges, values, side="right")
    images = np.bincount(where, minlength=bins)
    held = images > 0
    predicted, observed = (np.bincount(where, weights=each, minlength=bins)[held] / images[held] for each in (values, truth))
    return Reliability(predicted, observed, images[held])


def brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of probability and label of one finding; NaN if no label is known."""
    known = np.isfinite(labels)
    return float(np.mean((probabilities[known] - labels[known]) ** 2)) if known.any() else float("nan")


@dataclass(frozen=True)
class Calibrator:
    """New log-odds of a finding: slope times the old ones, and an intercept."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        """Recalibrated probabilities, float64."""
        return _sigmoid(self.slope * _log_odds(probabilities) + self.intercept)


def fit(probabilities: np.ndarray, labels: np.ndarray, method: Calibration) -> Calibrator:
    """The calibrator with the highest likelihood on one finding of a validation split.

    Labels are those of Platt's section 2.2: of p positives and n negatives, (p + 1) / (p + 2) and 1 / (n + 2) instead of 1 and
    0. Of a rare finding whose few positives are all told apart, the likelihood of 1 and 0 would grow with the slope for ever,
    and probabilities of exactly 0 and 1 be the result.

    Parameters
    ----------
    probabilities, labels
        Shape (N,); labels NaN where unknown. Where only one class occurs nothing is changed.
    method
        "temperature" has no intercept.
    """
    known = np.isfinite(labels)
    truth = labels[known].astype(np.float64)
    if method == "none" or not 0 < truth.sum() < truth.size:
        return Calibrator()
    positives = truth.sum()
    aims = np.where(truth > 0, (positives + 1) / (positives + 2), 1 / (truth.size - positives + 2))
    odds = _log_odds(probabilities[known])
    design = odds[:, None] if method == "temperature" else np.stack([odds, np.ones_like(odds)], axis=1)
    weights = np.array([1.0, 0.0])[: design.shape[1]]
    for _ in range(_NEWTON_STEPS):
        predicted = _sigmoid(design @ weights)
        gradient = design.T @ (predicted - aims)
        hessian = (design * (predicted * (1 - predicted))[:, None]).T @ design
        # A ridge so small that it only matters where all probabilities are the same.
        step = np.linalg.solve(hessian + 1e-6 * np.eye(len(weights)), gradient + 1e-6 * weights)
        weights = weights - np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-10:
            break
    return Calibrator(float(weights[0]), float(weights[1]) if method == "platt" else 0.0)


def for_prevalence(calibrator: Calibrator, fitted: float, expected: float) -> Calibrator:
    """The calibrator where the finding is more or less common than in the split that it was fitted on (Elkan 2001).

    Parameters
    ----------
    fitted, expected
        Share of positives there and here, between 0 and 1; where either is 0 or 1 nothing is changed.
    """
    if not (0 < fitted < 1 and 0 < expected < 1):
        return calibrator
    shift = np.log(expected / (1 - expected)) - np.log(fitted / (1 - fitted))
    return Calibrator(calibrator.slope, calibrator.intercept + float(shift))


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    held = np.clip(probabilities.astype(np.float64), _CLOSEST, 1 - _CLOSEST)
    return np.log(held) - np.log1p(-held)


def _sigmoid(log_odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-log_odds))
