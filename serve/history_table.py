"""A CSV of confirmed earlier visits: columns patient_id, date, findings and, if it is known, view.

Findings are written as NIH writes them, ``Mass|Nodule`` or ``No Finding``. The whole file counts or nothing of it does: all
that is wrong is told at once, by line. Patients' identifiers do not appear in errors, which end in logs.
"""

import re
from datetime import date
from pathlib import Path

from cxr_ray import findings
from cxr_ray.errors import CxrRayError
from ingest.csv_cells import csv_cells
from serve.store.records import ConfirmedVisit

_NEEDED = ("patient_id", "date", "findings")
_COLUMNS = (*_NEEDED, "view")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}|\d{8}")
_TOLD = 5


def read_history_table(path: Path) -> dict[str, list[ConfirmedVisit]]:
    """Confirmed visits by patient.

    Raises
    ------
    CxrRayError
        If the file cannot be read, a column is absent or unknown, or lines cannot be used: the first few of them.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CxrRayError(f"{path}: cannot be read ({error.strerror}); give a CSV of earlier visits") from None
    (_, header), *rows = list(csv_cells(content, str(path))) or [(1, [])]
    names = [name.casefold() for name in header]
    _check_columns(path, names)
    visits: dict[str, list[ConfirmedVisit]] = {}
    wrong: list[str] = []
    for line, cells in rows:
        row = dict(zip(names, cells, strict=True))
        try:
            visits.setdefault(_patient(row["patient_id"]), []).append(_visit(row))
        except CxrRayError as error:
            wrong.append(f"line {line}: {error}")
    if wrong:
        more = f"; and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        raise CxrRayError(f"{path}: nothing was imported; {'; '.join(wrong[:_TOLD])}{more}")
    return visits


def _check_columns(path: Path, names: list[str]) -> None:
    if not set(_NEEDED) <= set(names) <= set(_COLUMNS) or len(set(names)) < len(names):
        found = ", ".join(names) or "none"
        raise CxrRayError(f"{path}: its columns are {found}; name them {', '.join(_NEEDED)} and, if there is one, view")


def _patient(text: str) -> str:
    if not text:
        raise CxrRayError("patient_id is empty; give the PatientID that the patient's images have")
    return text


def _visit(row: dict[str, str]) -> ConfirmedVisit:
    day = _day(row["date"])
    shown = findings.names(findings.parse(row["findings"]))
    view = row.get("view", "").upper() or None
    return ConfirmedVisit(day, tuple(shown), view)  # type: ignore[arg-type] # which refuses another view


def _day(text: str) -> date:
    try:
        day = date.fromisoformat(text) if _DATE.fullmatch(text) else None
    except ValueError:
        day = None
    if day is None:
        raise CxrRayError(f"date {text[:40]!r} is no day; write it as 2025-12-31")
    # To the day here, where it is known what day it is; the store allows for other time zones.
    if day > date.today():
        raise CxrRayError(f"date {day} is in the future; give the day of a visit that took place")
    return day
