"""Scores: how well probabilities rank, and how sure that figure is.

Images of one patient are alike, so the bootstrap draws patients, not images. An AUC from resampled patients is an AUC from
images that count several times or not at all; that makes it a weighted rank statistic, computed here for many resamples
at once from a single sort.
"""

from dataclasses import dataclass

import numpy as np

_RESAMPLES_AT_ONCE = 50


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AurocScores:
    """Area under the ROC curve of each finding and their mean, with patient-clustered intervals.

    Attributes
    ----------
    findings
        One interval a finding, NIH order; NaN where only one class occurs.
    mean
        Of the findings that could be scored.
    positives
        Positive images of each finding.
    """

    findings: tuple[Interval, ...]
    mean: Interval
    positives: tuple[int, ...]
    images: int
    patients: int
    resamples: int


@dataclass(frozen=True)
class _Ranking:
    """Images of one finding sorted by score, and where each run of equal scores begins."""

    order: np.ndarray
    positive: np.ndarray
    starts: np.ndarray

    def auroc(self, weights: np.ndarray) -> np.ndarray:
        """AUC under each row of `weights` (shape (B, N)): P(score of a positive > that of a negative) + half the ties."""
        sorted_weights = weights[:, self.order]
        positive = np.add.reduceat(sorted_weights * self.positive, self.starts, axis=1)
        negative = np.add.reduceat(sorted_weights * (1 - self.positive), self.starts, axis=1)
        below = np.cumsum(negative, axis=1) - negative
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(pairs > 0, (positive * (below + negative / 2)).sum(axis=1) / pairs, np.nan)


def _ranking(scores: np.ndarray, labels: np.ndarray) -> _Ranking | None:
    known = np.flatnonzero(np.isfinite(labels))
    if known.size == 0:
        return None
    order = known[np.argsort(scores[known], kind="stable")]
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    return _Ranking(order, labels[order].astype(np.float64), starts)


def auroc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUC of each column; shapes (N, K) and (N, K), labels NaN where unknown; NaN where only one class occurs."""
    ones = np.ones((1, len(scores)))
    rankings = [_ranking(scores[:, k], labels[:, k]) for k in range(scores.shape[1])]
    return np.array([np.nan if ranking is None else ranking.auroc(ones)[0] for ranking in rankings])


def mean_auroc(aucs: np.ndarray) -> float:
    """Mean over the findings that could be scored; NaN if none could."""
    return float(np.nanmean(aucs)) if np.isfinite(aucs).any() else float("nan")


def _patient_weights(patients: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    drawn = generator.integers(0, patients.max() + 1, size=(resamples, patients.max() + 1))
    counts = np.zeros((resamples, patients.max() + 1))
    np.add.at(counts, (np.arange(resamples)[:, None], drawn), 1.0)
    return counts[:, patients]


def score_auroc(
    scores: np.ndarray, labels: np.ndarray, patient_keys: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> AurocScores:
    """AUCs with intervals from resampled patients.

    Parameters
    ----------
    scores
        Probabilities, float, shape (N, 14).
    labels
        float, shape (N, 14); NaN where unknown.
    patient_keys
        shape (N,); images with the same key are drawn together.
    """
    _, patients = np.unique(patient_keys, return_inverse=True)
    rankings = [_ranking(scores[:, k], labels[:, k]) for k in range(scores.shape[1])]
    generator = np.random.default_rng(seed)
    drawn = np.full((resamples, scores.shape[1]), np.nan)
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        stop = min(start + _RESAMPLES_AT_ONCE, resamples)
        weights = _patient_weights(patients, stop - start, generator)
        for k, ranking in enumerate(rankings):
            if ranking is not None:
                drawn[start:stop, k] = ranking.auroc(weights)
    point = auroc(scores, labels)
    scored = np.isfinite(point)
    drawn_means = np.array([mean_auroc(row[scored]) for row in drawn])
    return AurocScores(
        findings=tuple(_interval(value, drawn[:, k]) for k, value in enumerate(point)),
        mean=_interval(mean_auroc(point), drawn_means),
        positives=tuple(int(count) for count in np.nansum(labels, axis=0)),
        images=len(scores),
        patients=int(patients.max()) + 1,
        resamples=resamples,
    )


def _interval(value: float, drawn: np.ndarray) -> Interval:
    kept = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or kept.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.percentile(kept, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))


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


def youden_thresholds(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each finding the threshold with the largest sensitivity + specificity; 0.5 where only one class occurs."""
    thresholds = np.full(scores.shape[1], 0.5)
    for k in range(scores.shape[1]):
        known = np.isfinite(labels[:, k])
        truth = labels[known, k]
        if 0 < truth.sum() < truth.size:
            false, true, cuts = roc_curve(scores[known, k], truth)
            best = int(np.argmax(true - false))
            thresholds[k] = cuts[best] if np.isfinite(cuts[best]) else 0.5
    return thresholds
