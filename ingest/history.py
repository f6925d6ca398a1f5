"""History: what strictly earlier visits of the same patient showed.

Computed on the full table, before any row is dropped: a visit whose image is absent still belongs to the past. The property
that must hold: labels, ages and views of visit t and later change no feature of visit t, but for its own age in the gap.

Everything is computed on visits, sorted by patient and time, and then handed to the images of each visit. Age and view of a
visit are what all of its images state; if they differ or one is silent, they are unknown.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa

from cxr_ray.course import common_of_visit
from cxr_ray.findings import FINDINGS
from cxr_ray.records import fixed_lists, record_schema

_PREFIX = "history_"
# Known without a single label, as long as the order of the visits is known.
_UNLABELLED = frozenset({"count", "age_gap", "ap", "last_view", "last_2_view", "last_3_view"})


@dataclass(frozen=True)
class History:
    """History of N images from strictly earlier visits; each field but the first two is the column ``history_<field>``.

    Attributes
    ----------
    visit
        Chronological rank of the image's visit within the patient, from 0; int32, shape (N,).
    known
        False where an earlier visit has no labels, so that what is computed from labels means nothing; bool, shape (N,).
    count
        Earlier visits; int32, shape (N,).
    age_gap
        Age now minus age at the previous visit, in years, NaN where either is unknown or there is none; float32, shape (N,).
    ever, last, last_2, last_3
        1 where any, or the latest, second latest, third latest earlier visit showed the finding, 0 without such a visit; uint8,
        shape (N, 14).
    fraction
        Share of the earlier visits that showed it, 0 on a first visit; float32, shape (N, 14).
    decayed_80, decayed_50
        The same share, the visit k back weighing 0.8 and 0.5 to the power of k - 1; float32, shape (N, 14).
    no_finding
        Share of the earlier visits without any finding, 0 on a first visit; float32, shape (N,).
    ap
        Share taken AP of the earlier visits whose view is known, NaN where there is none; float32, shape (N,).
    last_view, last_2_view, last_3_view
        View of the latest, second and third latest earlier visit, None where it is unknown; object, shape (N,).
    """

    visit: np.ndarray
    known: np.ndarray
    count: np.ndarray
    age_gap: np.ndarray
    ever: np.ndarray
    last: np.ndarray
    last_2: np.ndarray
    last_3: np.ndarray
    fraction: np.ndarray
    decayed_80: np.ndarray
    decayed_50: np.ndarray
    no_finding: np.ndarray
    ap: np.ndarray
    last_view: np.ndarray
    last_2_view: np.ndarray
    last_3_view: np.ndarray


@dataclass(frozen=True)
class _Visits:
    """V visits, those of a patient one after another in the order of time.

    `of_image` says which one each image belongs to, `rank` counts within the patient from 0, `start` is the patient's first.
    """

    of_image: np.ndarray
    rank: np.ndarray
    start: np.ndarray

    def __len__(self) -> int:
        return len(self.rank)

    def sum_before(self, values: np.ndarray) -> np.ndarray:
        """Sum of `values` (shape (V, ...)) over the earlier visits of the same patient."""
        before = np.cumsum(values, axis=0, dtype=np.float64) - values
        return before - before[self.start]

    def back(self, values: np.ndarray, steps: int, absent: object) -> np.ndarray:
        """`values` (shape (V, ...)) of the visit that many steps back, `absent` where there is none."""
        shifted = np.full_like(values, absent)
        there = np.flatnonzero(self.rank >= steps)
        shifted[there] = values[there - steps]
        return shifted

    def decayed_mean(self, values: np.ndarray, decay: float) -> np.ndarray:
        """Weighted mean of `values` (shape (V, K)) over the earlier visits; each weighs `decay` times the one after it."""
        sums = np.zeros(values.shape, dtype=np.float64)
        by_rank = np.argsort(self.rank, kind="stable")
        bounds = np.searchsorted(self.rank[by_rank], np.arange(1, self.rank.max(initial=0) + 2))
        for first, end in pairwise(bounds):
            at = by_rank[first:end]
            sums[at] = decay * sums[at - 1] + values[at - 1]
        weights = (1 - decay**self.rank) / (1 - decay)
        return sums / np.where(self.rank > 0, weights, 1)[:, None]

    def common(self, values: np.ndarray) -> np.ndarray:
        """What all images of the visit agree on (`values` float64, shape (N,), NaN unknown), NaN where they do not."""
        return common_of_visit(values, self.of_image, len(self))


def earlier_history(
    patients: np.ndarray, order: np.ndarray, labels: np.ndarray, age_years: np.ndarray, view: np.ndarray
) -> History:
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
    age_years
        float32, shape (N,); NaN where unknown.
    view
        ``PA``, ``AP`` or None, shape (N,).
    """
    visits = _visits(patients, order)
    at, rank = visits.of_image, visits.rank
    shown, unlabelled = _findings_of_visits(visits, labels)
    sums = visits.sum_before(shown)
    earlier = np.maximum(rank, 1)
    codes, names = pd.factorize(np.asarray(view, dtype=object))
    seen = visits.common(np.where(codes < 0, np.nan, codes))
    known_view = np.isfinite(seen)
    ap = np.isin(seen, np.flatnonzero(names == "AP"))
    ages = visits.common(age_years.astype(np.float64))
    with np.errstate(invalid="ignore"):
        ap_share = visits.sum_before(ap) / visits.sum_before(known_view)
    return History(
        visit=rank[at].astype(np.int32),
        known=visits.sum_before(unlabelled)[at] == 0,
        count=rank[at].astype(np.int32),
        age_gap=(age_years - visits.back(ages, 1, np.nan)[at]).astype(np.float32),
        ever=(sums > 0).astype(np.uint8)[at],
        last=visits.back(shown, 1, 0)[at],
        last_2=visits.back(shown, 2, 0)[at],
        last_3=visits.back(shown, 3, 0)[at],
        fraction=(sums / earlier[:, None]).astype(np.float32)[at],
        decayed_80=visits.decayed_mean(shown, 0.8).astype(np.float32)[at],
        decayed_50=visits.decayed_mean(shown, 0.5).astype(np.float32)[at],
        no_finding=(visits.sum_before(np.all(shown == 0, axis=1)) / earlier).astype(np.float32)[at],
        ap=ap_share.astype(np.float32)[at],
        last_view=_names(visits.back(seen, 1, np.nan), names)[at],
        last_2_view=_names(visits.back(seen, 2, np.nan), names)[at],
        last_3_view=_names(visits.back(seen, 3, np.nan), names)[at],
    )


def history_columns(
    history: History, *, known: np.ndarray | None = None, counted: np.ndarray | None = None
) -> dict[str, pa.Array]:
    """The ``history_*`` columns of the record schema, each in its type.

    Parameters
    ----------
    known
        Rows whose earlier labels are known, bool, shape (N,), besides `History.known`; elsewhere all that comes from labels is
        null.
    counted
        Rows whose order of visits is known, bool, shape (N,), None for all; elsewhere every column is null.
    """
    ordered = np.ones(len(history.visit), dtype=bool) if counted is None else counted
    labelled = ordered & history.known & (True if known is None else known)
    columns = {}
    for field in record_schema(None):
        if field.name.startswith(_PREFIX):
            name = field.name.removeprefix(_PREFIX)
            valid = ordered if name in _UNLABELLED else labelled
            columns[field.name] = _column(getattr(history, name), valid, field.type)
    return columns


def _column(values: np.ndarray, valid: np.ndarray, kind: pa.DataType) -> pa.Array:
    if values.ndim == 2:
        return fixed_lists(values, valid)
    return pa.array(values, type=kind, mask=~valid | pd.isna(values))


def _visits(patients: np.ndarray, order: np.ndarray) -> _Visits:
    frame = pd.DataFrame({"patient": pd.factorize(patients)[0], "order": order})
    of_image = frame.groupby(["patient", "order"], sort=True).ngroup().to_numpy()
    count = int(of_image.max(initial=-1)) + 1
    patient = np.zeros(count, dtype=np.int64)
    patient[of_image] = frame["patient"]
    numbers = np.arange(count)
    first = np.diff(patient, prepend=-1) != 0
    start = np.maximum.accumulate(np.where(first, numbers, 0))
    return _Visits(of_image, numbers - start, start)


def _findings_of_visits(visits: _Visits, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The findings of each visit's labelled images together (uint8, shape (V, 14)), and how many images are unlabelled."""
    labelled = np.isfinite(labels).all(axis=1)
    shown = np.zeros((len(visits), len(FINDINGS)), dtype=np.uint8)
    np.maximum.at(shown, visits.of_image[labelled], labels[labelled].astype(np.uint8))
    return shown, np.bincount(visits.of_image[~labelled], minlength=len(visits))


def _names(codes: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Codes (float64, NaN unknown) as text, None where unknown; object, shape (V,)."""
    known = np.isfinite(codes)
    text = np.full(len(codes), None, dtype=object)
    text[known] = np.asarray(names, dtype=object)[codes[known].astype(np.int64)]
    return text
