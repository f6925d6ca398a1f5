"""Areas under ROC curves with their covariance, without resampling: DeLong, DeLong & Clarke-Pearson, Biometrics 44 (1988).

Where images come in clusters (patients), the covariance is Obuchowski's, Biometrics 53 (1997), which is DeLong's when every
image is a cluster of its own. Several scores of the same images are treated together, so that two networks can be compared.
"""

import math
from dataclasses import dataclass

import numpy as np

from cxr_ray.resampling import Interval

_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Areas:
    """Areas of M scores of the same images: shape (M,), and their covariance: shape (M, M); float64."""

    aurocs: np.ndarray
    covariance: np.ndarray

    def interval(self, number: int) -> Interval:
        """One area with its normal 95 % interval, cut off at 0 and 1."""
        value, spread = float(self.aurocs[number]), _NORMAL_95 * math.sqrt(max(self.covariance[number, number], 0.0))
        return Interval(value, max(0.0, value - spread), min(1.0, value + spread))

    def difference(self, first: int, second: int) -> "Difference":
        """The first area less the second."""
        covariance = self.covariance
        variance = covariance[first, first] + covariance[second, second] - 2 * covariance[first, second]
        value, deviation = float(self.aurocs[first] - self.aurocs[second]), math.sqrt(max(float(variance), 0.0))
        # A variance of NaN (positives of a single patient) makes z and p NaN as well.
        z = value / deviation if deviation != 0 else math.copysign(math.inf, value) if value else 0.0
        spread = _NORMAL_95 * deviation
        return Difference(Interval(value, value - spread, value + spread), z, math.erfc(abs(z) / math.sqrt(2)))


@dataclass(frozen=True)
class Difference:
    """A difference of two areas with its normal 95 % interval, its z statistic and two-sided p value."""

    interval: Interval
    z: float
    p_value: float


def areas(scores: np.ndarray, labels: np.ndarray, clusters: np.ndarray | None = None) -> Areas:
    """Areas under the ROC curves of several scores of the same images.

    Parameters
    ----------
    scores
        Shape (M, N).
    labels
        0 or 1, NaN where unknown; shape (N,). Images without a label are left out.
    clusters
        Key of the patient of each image, shape (N,); None where all images are independent.

    Returns
    -------
    Areas
        All NaN where the labels have only one class.
    """
    known = np.isfinite(labels)
    scores, positive = scores[:, known], labels[known] == 1
    keys = np.arange(len(positive)) if clusters is None else np.unique(clusters[known], return_inverse=True)[1]
    m, n = int(positive.sum()), int((~positive).sum())
    if m == 0 or n == 0:
        return Areas(np.full(len(scores), np.nan), np.full((len(scores), len(scores)), np.nan))
    over_negatives, over_positives = _placements(scores, positive)
    aurocs = over_negatives.mean(axis=1)
    count = int(keys.max()) + 1
    by_positive = _sums(over_negatives - aurocs[:, None], keys[positive], count)
    by_negative = _sums(over_positives - aurocs[:, None], keys[~positive], count)
    with_positive, with_negative = len(np.unique(keys[positive])), len(np.unique(keys[~positive]))
    covariance = _scatter(by_positive, by_positive, with_positive) / m**2
    covariance += _scatter(by_negative, by_negative, with_negative) / n**2
    if clusters is not None:
        both = _scatter(by_positive, by_negative, count) / (m * n)
        covariance += both + both.T
    return Areas(aurocs, covariance)


def _placements(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives below it, for each negative that of positives above it, ties counted half."""
    m, n = int(positive.sum()), int((~positive).sum())
    over_negatives, over_positives = np.empty((len(scores), m)), np.empty((len(scores), n))
    for number, row in enumerate(scores):
        together = _midranks(row)
        over_negatives[number] = (together[positive] - _midranks(row[positive])) / n
        over_positives[number] = 1 - (together[~positive] - _midranks(row[~positive])) / m
    return over_negatives, over_positives


def _midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _sums(values: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Sum of each row over each cluster; shape (M, clusters)."""
    return np.stack([np.bincount(keys, weights=row, minlength=count) for row in values])


def _scatter(one: np.ndarray, other: np.ndarray, clusters: int) -> np.ndarray:
    """Products of the clusters' sums, summed, with the correction for so many clusters; NaN of a single one."""
    return one @ other.T * (clusters / (clusters - 1) if clusters > 1 else math.nan)
