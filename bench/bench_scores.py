"""How long the scores of a whole official test split take: figures of fourteen findings with patient-clustered intervals.

    python bench/bench_scores.py [--resamples N] [--smoke]

25,596 images of 2,797 patients, as many as the official test split has; goal: 1,000 resamples within 60 s on two cores. Beside
it the AUCs alone with scikit-learn, one resample after the other, for as many resamples as fit into a minute.
"""

import argparse
import time
import warnings

import numpy as np
from measuring import origin, say
from sklearn.metrics import roc_auc_score

from cxr_ray.split_scores import mean_auroc, score

_IMAGES, _PATIENTS, _FINDINGS = 25_596, 2_797, 14


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true", help="few images: shows that it works, and nothing else")
    given = parser.parse_args()
    images, resamples = (1000, 100) if given.smoke else (_IMAGES, given.resamples)
    generator = np.random.default_rng(0)
    patients = generator.integers(0, _PATIENTS, images)
    labels = (generator.random((images, _FINDINGS)) < np.geomspace(0.003, 0.24, _FINDINGS)).astype(np.float32)
    probabilities = generator.random((images, _FINDINGS), dtype=np.float32) + labels / 5
    say(f"\n**Scores** of {images:,} images x {_FINDINGS} findings. {origin(f'bench_scores.py --resamples {resamples}')}\n")
    say("| | seconds | resamples | a resample |\n|---|---|---|---|")
    for title, work in (
        ("AUC, average precision, two sensitivities, each finding and mean", score),
        ("the mean AUC alone, as for a subgroup", mean_auroc),
    ):
        started = time.perf_counter()
        work(probabilities, labels, patients, resamples=resamples)
        _row(title, time.perf_counter() - started, resamples)
    seconds, done = _with_scikit_learn(probabilities, labels, patients, 1 if given.smoke else 60)
    _row("AUC of each finding with scikit-learn, one resample after the other", seconds, done)


def _row(title: str, seconds: float, resamples: int) -> None:
    say(f"| {title} | {seconds:.1f} | {resamples:,} | {1000 * seconds / resamples:.1f} ms |")


def _with_scikit_learn(probabilities: np.ndarray, labels: np.ndarray, patients: np.ndarray, most: float) -> tuple[float, int]:
    # A resample may be without a case of a rare finding.
    warnings.simplefilter("ignore")
    generator = np.random.default_rng(0)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < most:
        drawn = np.bincount(generator.integers(0, _PATIENTS, _PATIENTS), minlength=_PATIENTS)
        weights = drawn[patients]
        for k in range(_FINDINGS):
            roc_auc_score(labels[:, k], probabilities[:, k], sample_weight=weights)
        done += 1
    return time.perf_counter() - started, done


if __name__ == "__main__":
    main()
