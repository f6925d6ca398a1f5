"""All figures of a split: how well each finding is ranked, with patient-clustered intervals, and how well it is calibrated."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cxr_ray.calibration import brier, reliability
from cxr_ray.cpus import available_cpus
from cxr_ray.resampling import Interval, PatientResamples
from cxr_ray.scoring import Counts, Ranking, mean_over_findings, rankings

SPECIFICITIES = (0.90, 0.95)
_FIGURES = 2 + len(SPECIFICITIES)


@dataclass(frozen=True)
class FindingScores:
    """Figures of one finding; NaN where only one class occurs.

    Attributes
    ----------
    images, positives
        With a known label, and with a positive one.
    average_precision
        Area under the precision-recall curve; a ranking by chance has the prevalence.
    sensitivity
        At a specificity of at least 0.90 and 0.95.
    brier, calibration_error
        Mean squared error of the probability, and expected calibration error in ten bins of equally many images.
    """

    images: int
    positives: int
    auroc: Interval
    average_precision: Interval
    sensitivity: tuple[Interval, Interval]
    brier: float
    calibration_error: float

    @property
    def prevalence(self) -> float:
        """Share of positives; NaN if no label is known."""
        return self.positives / self.images if self.images else float("nan")


@dataclass(frozen=True)
class SplitScores:
    """Figures of each finding, NIH order, and means over those that could be scored."""

    findings: tuple[FindingScores, ...]
    auroc: Interval
    average_precision: Interval
    images: int
    patients: int
    resamples: int


def score(
    probabilities: np.ndarray, labels: np.ndarray, patient_keys: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> SplitScores:
    """Score a split.

    Parameters
    ----------
    probabilities
        Float, shape (N, K).
    labels
        Float, shape (N, K); NaN where unknown.
    patient_keys
        Shape (N,); images with the same key are drawn together.
    """
    drawing = PatientResamples(patient_keys, resamples, seed)
    ranked = rankings(probabilities, labels)
    point = np.stack([_point(ranking) for ranking in ranked])
    drawn = _drawn(ranked, drawing, _figures, _FIGURES)
    means = _means(drawn[np.isfinite(point[:, 0])])
    return SplitScores(
        findings=tuple(_finding(probabilities[:, k], labels[:, k], point[k], drawn[k]) for k in range(probabilities.shape[1])),
        auroc=Interval.of_draws(mean_over_findings(point[:, 0]), means[:, 0]),
        average_precision=Interval.of_draws(mean_over_findings(point[:, 1]), means[:, 1]),
        images=len(probabilities),
        patients=drawing.patients,
        resamples=resamples,
    )


@dataclass(frozen=True)
class AurocDraws:
    """AUC of each finding, NaN where one class is absent, shape (K,), and in each resample, shape (K, resamples)."""

    point: np.ndarray
    drawn: np.ndarray

    def mean(self) -> Interval:
        """The mean over the findings that could be scored."""
        return Interval.of_draws(mean_over_findings(self.point), _means(self.drawn[np.isfinite(self.point)]))

    def less(self, other: "AurocDraws") -> "AurocDraws":
        """What it is above the other's, drawn from the same resamples of the same images."""
        return AurocDraws(self.point - other.point, self.drawn - other.drawn)

    def p_value(self) -> float:
        """Two-sided p of a mean difference, from how many resamples have it on the other side of 0; NaN without a mean.

        It goes with the percentile interval, and is never below 2 / (resamples + 1).
        """
        means = _means(self.drawn[np.isfinite(self.point)])
        kept = means[np.isfinite(means)]
        if kept.size == 0:
            return float("nan")
        beyond = min(int((kept <= 0).sum()), int((kept >= 0).sum()))
        return min(1.0, 2 * (beyond + 1) / (kept.size + 1))


def draw_aurocs(
    probabilities: np.ndarray, labels: np.ndarray, patient_keys: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> AurocDraws:
    """The AUCs alone, as `score` has them, in a share of its time; arguments as there."""
    ranked = rankings(probabilities, labels)
    point = np.array([_point(ranking)[0] for ranking in ranked])
    return AurocDraws(point, _drawn(ranked, PatientResamples(patient_keys, resamples, seed), _auroc, 1)[:, :, 0])


def mean_auroc(
    probabilities: np.ndarray, labels: np.ndarray, patient_keys: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """The mean AUC alone; arguments as of `score`."""
    return draw_aurocs(probabilities, labels, patient_keys, resamples=resamples, seed=seed).mean()


def difference(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, patient_keys: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> tuple[tuple[Interval, ...], Interval]:
    """AUC of the first scores less that of the second, on the same resamples: of each finding, and of the mean.

    Parameters
    ----------
    first, second
        Probabilities of the same images; shape (N, K).
    """
    one, other = (draw_aurocs(each, labels, patient_keys, resamples=resamples, seed=seed) for each in (first, second))
    apart = one.less(other)
    return tuple(map(Interval.of_draws, apart.point, apart.drawn)), apart.mean()


def _means(drawn: np.ndarray) -> np.ndarray:
    """Means over the findings, the first axis; a resample may hold only one class of a rare one, which is then left out."""
    scored = np.isfinite(drawn).sum(axis=0)
    return np.divide(np.nansum(drawn, axis=0), scored, out=np.full(drawn.shape[1:], np.nan), where=scored > 0)


def _figures(counts: Counts) -> np.ndarray:
    """AUC, average precision and sensitivities; shape (B, 4)."""
    sensitivities = [counts.sensitivity_at(specificity) for specificity in SPECIFICITIES]
    return np.stack([counts.auroc(), counts.average_precision(), *sensitivities], axis=1)


def _auroc(counts: Counts) -> np.ndarray:
    """AUC alone; shape (B, 1)."""
    return counts.auroc()[:, None]


def _point(ranking: Ranking | None) -> np.ndarray:
    """Figures of one finding, all NaN where one class is absent; shape (4,)."""
    figures = np.full(_FIGURES, np.nan) if ranking is None else _figures(ranking.counted_once())[0]
    return figures if np.isfinite(figures[0]) else np.full(_FIGURES, np.nan)


def _drawn(
    ranked: list[Ranking | None], drawing: PatientResamples, figures: Callable[[Counts], np.ndarray], width: int
) -> np.ndarray:
    """Figures of each finding in each resample; shape (K, resamples, width), NaN where nothing could be ranked."""
    if not ranked:
        return np.empty((0, drawing.resamples, width))
    blocks = []
    # numpy lets go of the interpreter's lock while it sums.
    with ThreadPoolExecutor(available_cpus()) as threads:
        for weights in drawing.weights():

            def of(ranking: Ranking | None, weights: np.ndarray = weights) -> np.ndarray:
                return np.full((len(weights), width), np.nan) if ranking is None else figures(ranking.counts(weights))

            blocks.append(np.stack(list(threads.map(of, ranked))))
    return np.concatenate(blocks, axis=1)


def _finding(probabilities: np.ndarray, labels: np.ndarray, point: np.ndarray, drawn: np.ndarray) -> FindingScores:
    low, high = (Interval.of_draws(point[2 + number], drawn[:, 2 + number]) for number in range(len(SPECIFICITIES)))
    return FindingScores(
        images=int(np.isfinite(labels).sum()),
        positives=int(np.nansum(labels)),
        auroc=Interval.of_draws(point[0], drawn[:, 0]),
        average_precision=Interval.of_draws(point[1], drawn[:, 1]),
        sensitivity=(low, high),
        brier=brier(probabilities, labels),
        calibration_error=reliability(probabilities, labels).expected_error,
    )
