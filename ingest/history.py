"""History: what strictly earlier visits of the same patient showed.

Computed on the full table, before any row is dropped: a visit whose image is absent still belongs to the past. The property
that must hold: the labels of visit t and later change no feature of visit t.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class History:
    """History of N images from strictly earlier visits.

    Attributes
    ----------
    visit
        Chronological rank of the image's visit within the patient, from 0; int32, shape (N,).
    known
        False where an earlier visit has no labels, so that the rest means nothing; bool, shape (N,).
    count
        Earlier visits; int32, shape (N,).
    ever, last
        1 where any, or the latest, earlier visit showed the finding; uint8, shape (N, 14).
    fraction
        Share of the earlier visits that showed it, 0 on a first visit; float32, shape (N, 14).
    """

    visit: np.ndarray
    known: np.ndarray
    count: np.ndarray
    ever: np.ndarray
    last: np.ndarray
    fraction: np.ndarray


def earlier_history(patients: np.ndarray, order: np.ndarray, labels: np.ndarray) -> History:
    """History of each image.

    Parameters
    ----------
    patients
        Patient of each image, shape (N,).
    order
        Sortable moment of the visit, shape (N,); images of a patient with the same moment are one visit and do not see
        each other.
    labels
        float32, shape (N, 14); a row of NaN where the image is not labelled.
    """
    frame = pd.DataFrame({"patient": pd.factorize(patients)[0], "order": order})
    visit_of_image = frame.groupby(["patient", "order"], sort=True).ngroup().to_numpy()
    visits = int(visit_of_image.max()) + 1 if len(frame) else 0

    shown = np.zeros((visits, labels.shape[1]), dtype=np.float32)
    labelled = np.isfinite(labels).all(axis=1)
    np.maximum.at(shown, visit_of_image[labelled], labels[labelled])
    unlabelled = np.zeros(visits, dtype=np.int64)
    np.add.at(unlabelled, visit_of_image[~labelled], 1)
    patient_of_visit = np.zeros(visits, dtype=np.int64)
    patient_of_visit[visit_of_image] = frame["patient"].to_numpy()

    first = np.r_[True, patient_of_visit[1:] != patient_of_visit[:-1]][:visits]
    start = np.maximum.accumulate(np.where(first, np.arange(visits), 0))
    rank = np.arange(visits) - start
    sums = _sum_before(shown, start)
    last = np.where(first[:, None], 0, np.roll(shown, 1, axis=0))
    known = _sum_before(unlabelled[:, None].astype(np.float64), start)[:, 0] == 0

    at = visit_of_image
    return History(
        visit=rank[at].astype(np.int32),
        known=known[at],
        count=rank[at].astype(np.int32),
        ever=(sums[at] > 0).astype(np.uint8),
        last=last[at].astype(np.uint8),
        fraction=(sums[at] / np.maximum(rank[at], 1)[:, None]).astype(np.float32),
    )


def _sum_before(values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Sum of each patient's rows before the row; rows are sorted by patient, `start` is each patient's first row."""
    before = np.cumsum(values, axis=0, dtype=np.float64) - values
    return before - before[start]
