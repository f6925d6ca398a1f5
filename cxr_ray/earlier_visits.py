"""Earlier visits of one patient, as dates with findings, and the clinical inputs that they make.

Ingest tells the history of a whole table, by the patients' ages. Where one radiograph is answered, what is known of the
patient is a list of dates, and this turns it into the same numbers. Only what is strictly earlier than the radiograph counts;
that there was nothing before is not the same as that nothing is known.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Literal

import numpy as np

from cxr_ray import findings
from cxr_ray.clinical import ClinicalInputs
from cxr_ray.course import Courses

_DAYS_PER_YEAR = 365.25
_AP = {"AP": 1.0, "PA": 0.0, None: np.nan}

View = Literal["PA", "AP"]


@dataclass(frozen=True)
class EarlierVisit:
    """A visit and what it showed: `findings` by name in NIH order, empty for none; `view` None where it is unknown.

    `source` says who has it: a person, or this service's own answer.
    """

    visit_date: date
    findings: tuple[str, ...]
    view: View | None = None
    source: Literal["confirmed", "predicted"] = "confirmed"


def united(visits: Iterable[EarlierVisit]) -> tuple[EarlierVisit, ...]:
    """One visit a date, in the order of dates: all findings of the day, and the view that all of its records agree on."""
    days: dict[date, list[EarlierVisit]] = defaultdict(list)
    for visit in visits:
        days[visit.visit_date].append(visit)
    return tuple(_of_one_day(days[day]) for day in sorted(days))


def _of_one_day(visits: Sequence[EarlierVisit]) -> EarlierVisit:
    shown = findings.names(findings.encode(name for visit in visits for name in visit.findings))
    views = {visit.view for visit in visits}
    return replace(visits[0], findings=tuple(shown), view=views.pop() if len(views) == 1 else None)


def with_history(inputs: ClinicalInputs, visits: Sequence[EarlierVisit] | None, on: date) -> ClinicalInputs:
    """The same radiographs with this history, for both encodings.

    Parameters
    ----------
    inputs
        Radiographs of one patient and day.
    visits
        What is known of the patient, in any order; visits on the day `on` and later ones do not count. Without any that
        does, this is known to be the first visit; None if nothing is known.
    on
        The day of the radiographs.

    Raises
    ------
    CxrRayError
        If a finding is unknown.
    """
    if visits is None:
        return inputs.without_history()
    course = Courses.begin(1)
    only = np.zeros(1, dtype=np.int64)
    for visit in united(visit for visit in visits if visit.visit_date < on):
        shown = findings.encode(visit.findings).astype(np.float64)[None]
        course.add(only, shown, np.array([_AP[visit.view]]), _years(visit.visit_date))
    # Ages are not needed, only what lies between them.
    unknown = np.full(1, np.nan, dtype=np.float32)
    told = course.told(only, _years(on), unknown, unknown).repeated(len(inputs))
    return replace(inputs, ever=told.ever, past=told.past)


def _years(day: date) -> np.ndarray:
    return np.array([day.toordinal() / _DAYS_PER_YEAR])
