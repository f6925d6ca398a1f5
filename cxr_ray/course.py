"""The course of patients, visit by visit: what a network is told of grows with what each visit is said to have shown.

Ingest computes the same numbers from a whole table at once. Here they grow, so that what a visit showed may be the network's
own answer, or be missing.
"""

from dataclasses import dataclass

import numpy as np

from cxr_ray.clinical import VISITS, ClinicalInputs, PastVisits
from cxr_ray.findings import FINDINGS

_DECAYS = (0.8, 0.5)


@dataclass
class Courses:
    """What is known of the earlier visits of C courses, each at first without any.

    Attributes
    ----------
    count, without_finding, ap, known_views
        Visits; those without any finding; those taken AP; those whose view is known; float64, shape (C,).
    sums
        How often each finding was seen, plainly and with weights that decay by 0.8 and 0.5 a visit; float64, shape (3, C, 14).
    last, last_ap
        The latest visits, as `PastVisits` has them.
    age
        At the latest visit, years, NaN where unknown; shape (C,).
    """

    count: np.ndarray
    without_finding: np.ndarray
    ap: np.ndarray
    known_views: np.ndarray
    sums: np.ndarray
    last: np.ndarray
    last_ap: np.ndarray
    age: np.ndarray

    @classmethod
    def begin(cls, courses: int) -> "Courses":
        """So many courses before their first visit."""

        def zeros(*shape: int) -> np.ndarray:
            return np.zeros((*shape,))

        return cls(
            count=zeros(courses),
            without_finding=zeros(courses),
            ap=zeros(courses),
            known_views=zeros(courses),
            sums=zeros(1 + len(_DECAYS), courses, len(FINDINGS)),
            last=zeros(courses, VISITS, len(FINDINGS)),
            last_ap=np.full((courses, VISITS), np.nan),
            age=np.full(courses, np.nan),
        )

    def told(self, rows: np.ndarray, age_years: np.ndarray, male: np.ndarray, ap: np.ndarray) -> ClinicalInputs:
        """The clinical inputs of films of these courses, of strictly earlier visits.

        Parameters
        ----------
        rows
            The course of each film, int64, shape (N,).
        age_years, male, ap
            Of the films, as `ClinicalInputs` has them.
        """
        count, sums = self.count[rows], self.sums[:, rows]
        weights = [count, *((1 - decay**count) / (1 - decay) for decay in _DECAYS)]
        fraction, decayed_80, decayed_50 = (
            each / np.maximum(weight, 1e-9)[:, None] for each, weight in zip(sums, weights, strict=True)
        )
        known = self.known_views[rows]
        share_ap = np.divide(self.ap[rows], known, out=np.full(len(rows), np.nan), where=known > 0)
        past = PastVisits(
            count=count,
            age_gap=np.where(count > 0, age_years - self.age[rows], np.nan),
            fraction=fraction,
            decayed_80=decayed_80,
            decayed_50=decayed_50,
            no_finding=self.without_finding[rows] / np.maximum(count, 1),
            ap=share_ap,
            last=self.last[rows],
            last_ap=self.last_ap[rows],
        )
        narrow = PastVisits(**{name: values.astype(np.float32) for name, values in vars(past).items()})
        return ClinicalInputs(age_years, male, ap, (sums[0] > 0).astype(np.float32), narrow)

    def add(self, rows: np.ndarray, shown: np.ndarray, ap: np.ndarray, age_years: np.ndarray) -> None:
        """One more visit of these courses, each at most once.

        Parameters
        ----------
        shown
            What the visit is said to have shown, 0 or 1, shape (N, 14).
        ap, age_years
            Its view and age, NaN where unknown; shape (N,).
        """
        self.count[rows] += 1
        self.without_finding[rows] += (shown == 0).all(axis=1)
        self.ap[rows] += np.nan_to_num(ap)
        self.known_views[rows] += np.isfinite(ap)
        for number, decay in enumerate((1.0, *_DECAYS)):
            self.sums[number, rows] = self.sums[number, rows] * decay + shown
        self.last[rows] = np.concatenate([shown[:, None], self.last[rows, :-1]], axis=1)
        self.last_ap[rows] = np.concatenate([ap[:, None], self.last_ap[rows, :-1]], axis=1)
        self.age[rows] = age_years


def common_of_visit(values: np.ndarray, visit: np.ndarray, visits: int) -> np.ndarray:
    """What all images of each visit agree on, NaN where they do not.

    Parameters
    ----------
    values
        Float, shape (N,), NaN where unknown.
    visit
        The visit of each image, int64, shape (N,), below `visits`.

    Returns
    -------
    numpy.ndarray
        float64, shape (visits,).
    """
    low, high = np.full(visits, np.inf), np.full(visits, -np.inf)
    with np.errstate(invalid="ignore"):
        np.minimum.at(low, visit, values)
        np.maximum.at(high, visit, values)
    return np.where(low == high, low, np.nan)
