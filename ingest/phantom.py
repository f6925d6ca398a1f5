"""Phantoms: a made-up release of chest radiographs, whose truth is known, for the demonstration and the tests.

This file makes the patients and their visits; `ingest.phantom_drawing` draws the film of a visit. Findings come and
stay as diseases do: a few at the first visit, new ones seldom, most of them still there the next time, more of them in
patients who are older or sicker, and sicker patients are radiographed in bed (AP). Some findings known from an
earlier visit are not drawn (`HIDDEN_SHARE`), as a reader who knows the patient reports what the film alone would not
show, so that a model that is told the patient's earlier findings has something to gain.
"""

from dataclasses import dataclass

import numpy as np

from cxr_ray.findings import FINDINGS

# Of the findings present now and at an earlier visit, the share that is not drawn.
HIDDEN_SHARE = 0.35
MAX_VISITS = 8
DAYS_PER_YEAR = 365.25
# The low bits of a visit's seed that count the visit; the others are the patient's.
VISIT_BITS = 8


@dataclass(frozen=True)
class PhantomVisit:
    """One radiograph of one made-up patient.

    Attributes
    ----------
    image_id
        ``patient_visit`` without an extension, such as ``00000012_003``.
    patient_id
        From 1.
    visit
        From 0, in the order of time.
    age_years
        Completed years at the visit, 20 to 90.
    sex
        ``M`` or ``F``.
    view
        ``PA`` or ``AP``.
    days
        Day of the visit since an arbitrary epoch; later visits have later days.
    labels
        The truth, 14 zeros or ones in NIH order.
    visible
        What is drawn, 14 zeros or ones. A finding that is labelled and not visible was labelled at an earlier visit.
    seed
        All that is random in the film. The low `VISIT_BITS` bits count the visit, the rest is the patient's own.
    """

    image_id: str
    patient_id: int
    visit: int
    age_years: int
    sex: str
    view: str
    days: int
    labels: tuple[int, ...]
    visible: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class _Course:
    """How a finding comes and stays: chances at the first visit, at a later visit, and of staying until the next.

    `by_age` multiplies the first two, from ``1 - by_age`` at 20 years to ``1 + by_age`` at 90; `in_women` in women.
    """

    first: float
    onset: float
    stay: float
    by_age: float = 0.0
    in_women: float = 1.0


_COURSES: dict[str, _Course] = {
    "Atelectasis": _Course(0.09, 0.045, 0.76),
    "Cardiomegaly": _Course(0.10, 0.040, 0.85, by_age=0.7),
    "Effusion": _Course(0.10, 0.050, 0.78, by_age=0.3),
    "Infiltration": _Course(0.10, 0.050, 0.76),
    "Mass": _Course(0.08, 0.040, 0.82, by_age=0.3),
    "Nodule": _Course(0.09, 0.040, 0.82),
    "Pneumonia": _Course(0.08, 0.045, 0.75, by_age=-0.2),
    "Pneumothorax": _Course(0.08, 0.040, 0.75, by_age=-0.5, in_women=0.7),
    "Consolidation": _Course(0.08, 0.045, 0.76),
    "Edema": _Course(0.07, 0.040, 0.75, by_age=0.5),
    "Emphysema": _Course(0.08, 0.040, 0.85, by_age=0.7, in_women=0.7),
    "Fibrosis": _Course(0.08, 0.040, 0.85, by_age=0.7),
    "Pleural_Thickening": _Course(0.08, 0.040, 0.84, by_age=0.3),
    "Hernia": _Course(0.08, 0.040, 0.85, by_age=0.8, in_women=1.5),
}


def simulate_patients(patients: int, seed: int) -> list[PhantomVisit]:
    """The visits of `patients` made-up patients, ordered by patient and time.

    Equal arguments give equal visits, and a patient's visits do not depend on how many patients there are.

    Parameters
    ----------
    patients
        How many patients, at least 1; each has 1 to 8 visits, about 4 in the mean.
    seed
        Chooses the release, 0 or more.

    Raises
    ------
    ValueError
        If an argument is too small.
    """
    if patients < 1:
        raise ValueError(f"patients must be at least 1, is {patients}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, is {seed}")
    return [visit for patient_id in range(1, patients + 1) for visit in _simulate_patient(patient_id, seed)]


def _simulate_patient(patient_id: int, seed: int) -> list[PhantomVisit]:
    rng = np.random.default_rng([seed, patient_id])
    sex = "F" if rng.random() < 0.45 else "M"
    frailty = rng.gamma(4.0, 0.25)
    first_age = 20 + 64 * rng.beta(2.2, 1.7)
    patient_seed = int(rng.integers(1 << 40))
    visits = min(MAX_VISITS, int(rng.geometric(0.23)))
    # Gaps of at most 300 days keep eight visits within six years, so that nobody passes 90.
    gaps = 1 + np.minimum(rng.exponential(120.0, visits), 299.0).astype(int)
    days = int(rng.integers(3650)) + np.cumsum(gaps)
    born = days[0] - first_age * DAYS_PER_YEAR

    series: list[PhantomVisit] = []
    present = np.zeros(len(FINDINGS), dtype=bool)
    earlier = np.zeros(len(FINDINGS), dtype=bool)
    for visit in range(visits):
        age = int((days[visit] - born) / DAYS_PER_YEAR)
        present = rng.random(len(FINDINGS)) < _chances(present, visit, age, sex, frailty)
        hidden = present & earlier & (rng.random(len(FINDINGS)) < HIDDEN_SHARE)
        sick = 1 / (1 + np.exp(1.9 - 0.45 * present.sum() - 0.7 * frailty))
        series.append(
            PhantomVisit(
                image_id=f"{patient_id:08d}_{visit:03d}",
                patient_id=patient_id,
                visit=visit,
                age_years=age,
                sex=sex,
                view="AP" if rng.random() < sick else "PA",
                days=int(days[visit]),
                labels=tuple(int(here) for here in present),
                visible=tuple(int(here) for here in present & ~hidden),
                seed=patient_seed << VISIT_BITS | visit,
            )
        )
        earlier |= present
    return series


def _chances(present: np.ndarray, visit: int, age: int, sex: str, frailty: float) -> np.ndarray:
    chances = np.empty(len(FINDINGS))
    for index, name in enumerate(FINDINGS):
        course = _COURSES[name]
        risk = frailty * (1 + course.by_age * (age - 55) / 35) * (course.in_women if sex == "F" else 1.0)
        chances[index] = course.stay if present[index] else min(0.5, risk * (course.onset if visit else course.first))
    return chances
