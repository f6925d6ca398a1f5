"""Ranks: how well the probabilities of a finding put positive images above negative ones.

An image may count several times or not at all, as in a resample of patients. A figure of many resamples at once then takes a
single sort: the images are sorted once, and weighted positives and negatives are summed up at each distinct score.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Counts:
    """Weighted positives and negatives at each distinct score, the lowest first; float64, both of shape (B, G)."""

    positive: np.ndarray
    negative: np.ndarray

    def auroc(self) -> np.ndarray:
        """Area under the ROC curve: P(a positive scores more than a negative) + half the ties; shape (B,), NaN of one class."""
        below = np.cumsum(self.negative, axis=1) - self.negative
        won = (self.positive * (below + self.negative / 2)).sum(axis=1)
        return _share(won, self.positive.sum(axis=1) * self.negative.sum(axis=1))

    def average_precision(self) -> np.ndarray:
        """Precision at each distinct threshold, weighted by the positives that it adds; shape (B,), NaN without a positive."""
        true, false = _at_or_above(self.positive), _at_or_above(self.negative)
        called = true + false
        precision = np.divide(true, called, out=np.zeros_like(true), where=called > 0)
        return _share((self.positive * precision).sum(axis=1), true[:, 0])

    def sensitivity_at(self, specificity: float) -> np.ndarray:
        """Largest sensitivity of a threshold with at least this specificity; shape (B,), NaN of one class."""
        negatives = self.negative.sum(axis=1, keepdims=True)
        below = np.cumsum(self.negative, axis=1) - self.negative
        strict_enough = below >= specificity * negatives * (1 - 1e-9)
        first = strict_enough.argmax(axis=1)
        true = np.take_along_axis(_at_or_above(self.positive), first[:, None], axis=1)[:, 0]
        # Where no score is strict enough, only a threshold above all of them is: it finds nothing.
        true = np.where(strict_enough.any(axis=1), true, 0.0)
        sensitivity = _share(true, self.positive.sum(axis=1))
        return np.where(negatives[:, 0] > 0, sensitivity, np.nan)


def _at_or_above(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


@dataclass(frozen=True)
class Ranking:
    """Images of one finding whose label is known, sorted by score, and where each run of equal scores begins."""

    order: np.ndarray
    positive: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray) -> "Ranking | None":
        """Rank the images with a known label; shapes (N,), labels NaN where unknown. None where none is known."""
        known = np.flatnonzero(np.isfinite(labels))
        if known.size == 0:
            return None
        order = known[np.argsort(scores[known], kind="stable")]
        ranked = scores[order]
        starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
        return cls(order, labels[order] == 1, starts)

    def counts(self, weights: np.ndarray) -> Counts:
        """Positives and negatives when each image counts so often; `weights` has shape (B, N)."""
        ranked = weights[:, self.order].astype(np.float64)
        positive = ranked * self.positive
        negative = ranked - positive
        if len(self.starts) == len(self.order):
            return Counts(positive, negative)
        return Counts(np.add.reduceat(positive, self.starts, axis=1), np.add.reduceat(negative, self.starts, axis=1))

    def counted_once(self) -> Counts:
        """Positives and negatives when each image counts once; B is 1."""
        return self.counts(np.ones((1, self.order.max() + 1)))


def rankings(scores: np.ndarray, labels: np.ndarray) -> list[Ranking | None]:
    """One a column; shapes (N, K)."""
    return [Ranking.of(scores[:, k], labels[:, k]) for k in range(scores.shape[1])]


def auroc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUC of each column; shapes (N, K) and (N, K), labels NaN where unknown; NaN where only one class occurs."""
    ranked = rankings(scores, labels)
    return np.array([np.nan if each is None else each.counted_once().auroc()[0] for each in ranked])


def mean_over_findings(values: np.ndarray) -> float:
    """Mean over the findings that could be scored; NaN if none could."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def roc_curve(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False positive rate, true positive rate and threshold, from the strictest threshold to the laxest.

    Parameters
    ----------
    scores, labels
        shape (N,); labels 0 or 1, both present.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, positive = scores[order], labels[order]
    ends = np.r_[np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1]
    true, false = np.cumsum(positive)[ends], np.cumsum(1 - positive)[ends]
    rates = np.r_[0, false] / max(false[-1], 1), np.r_[0, true] / max(true[-1], 1)
    return rates[0], rates[1], np.r_[np.inf, ranked[ends]]


def precision_recall_curve(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at each distinct score, from the strictest threshold to the laxest.

    Parameters
    ----------
    scores, labels
        Shape (N,); labels 0 or 1, with a positive one.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, positive = scores[order], labels[order]
    ends = np.r_[np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1]
    true = np.cumsum(positive)[ends]
    return true / true[-1], true / (ends + 1)
