"""The table of the NIH release, in the forms in which people have it.

The file of 2020, the one of 2017 with an empty last column and ages up to 414, an early form that writes ages as 058Y, 013M or
001D, and copies with renamed columns. Columns are matched by meaning. What is converted or impossible is counted, even where it
is 0, which says that it was looked for:

- ``ages_converted``: ages in months, weeks or days, which become fractions of a year;
- ``ages_impossible``: negative or above 120 years, which become unknown and never another number;
- ``age_unknown``: all without an age, the impossible ones included;
- ``patients_reordered``: patients whose age falls from one `Follow-up #` to the next, so that it is no order of time.

Visits are ordered by age, then by `Follow-up #`; one without an age stands where its `Follow-up #` puts it, right after the
visit before it. In the table of 2020, where no age falls, that is the order of `Follow-up #`.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cxr_ray import findings
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS

MAX_AGE_YEARS = 120
RELEASE_TABLE = "Data_Entry_2017_v2020.csv"

# The release's column -> the spellings that are taken for it, without case, spaces and signs. The release's header breaks into
# eleven columns because two of its names hold commas; those used here come before them.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "Image Index": ("imageindex", "image", "imageid", "imagename", "filename"),
    "Finding Labels": ("findinglabels", "findinglabel", "findings", "labels"),
    "Follow-up #": ("followup", "followupnumber", "followupnum", "followupno"),
    "Patient ID": ("patientid", "patient"),
    "Patient Age": ("patientage", "age"),
    "Patient Gender": ("patientgender", "patientsex", "gender", "sex"),
    "View Position": ("viewposition", "view"),
}
_SEXES = {"": None, "M": "M", "MALE": "M", "F": "F", "FEMALE": "F"}
_VIEWS = {"": None, "PA": "PA", "AP": "AP"}
_YEARS_PER_UNIT = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
# Beyond it, integers become floats and neighbours the same number.
_MAX_WHOLE_NUMBER = 2**53
# ChestX-ray8 lacks these; in a table of this many rows they cannot all be absent by chance.
_BEYOND_EIGHT = ("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia")
_ROWS_TO_TELL = 1000
_FOREIGN_LABELS_SHOWN = 20


@dataclass(frozen=True)
class NihTable:
    """N images, in the order of the file.

    Attributes
    ----------
    image, sex, view
        Name of the file; M or F; PA or AP, each None where unknown; object, shape (N,).
    patient, order
        Number of the patient; place in time among the patient's visits, comparable within a patient only; int64, shape (N,).
    age_years
        float32, shape (N,), NaN where unknown.
    labels
        uint8, shape (N, 14).
    counts, warnings
        What the manifest says of the table.
    """

    image: np.ndarray
    patient: np.ndarray
    order: np.ndarray
    age_years: np.ndarray
    sex: np.ndarray
    view: np.ndarray
    labels: np.ndarray
    counts: dict[str, int]
    warnings: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class _Column:
    """One column: its name in the file, its values without surrounding spaces, and the line of the file of each."""

    path: str
    name: str
    values: np.ndarray
    lines: np.ndarray

    def refuse(self, wrong: np.ndarray, needed: str) -> None:
        """Raise CxrRayError for the first row that is `wrong` (bool, shape (N,))."""
        if wrong.any():
            row = int(wrong.argmax())
            raise CxrRayError(f"{self.path} line {self.lines[row]}: {self.name} is {self.values[row]!r}; {needed}")


def read_table(content: bytes, path: str) -> NihTable:
    """Read and check the table.

    Parameters
    ----------
    path
        What errors call the file.

    Raises
    ------
    CxrRayError
        Naming the file, the line where there is one, what is wrong and the remedy.
    """
    columns = _columns(content, path)
    image, follow_up_column = columns["Image Index"], columns["Follow-up #"]
    patient, follow_up = _whole_numbers(columns["Patient ID"]), _whole_numbers(follow_up_column)
    _refuse_repeats(image, image.values)
    both = f"{columns['Patient ID'].name} and {follow_up_column.name}"
    pairs = np.array([f"{one}, {other}" for one, other in zip(patient, follow_up, strict=True)], dtype=object)
    _refuse_repeats(_Column(path, both, pairs, image.lines), pairs)
    age_years, age_counts = _ages(columns["Patient Age"])
    order, reordered = _chronological(patient, follow_up, age_years)
    file, name = path.rpartition("/")[2], follow_up_column.name
    warning = (
        f"{file}: {name} is no order of time ({reordered} patients grow younger); visits are ordered by age, and within a year "
        f"by {name}, which may be wrong; {RELEASE_TABLE} has the order"
    )
    return NihTable(
        image=image.values,
        patient=patient,
        order=order,
        age_years=age_years,
        sex=_one_of(columns["Patient Gender"], _SEXES, "M, F, Male or Female is needed"),
        view=_one_of(columns["View Position"], _VIEWS, "PA or AP is needed"),
        labels=_labels(columns["Finding Labels"]),
        counts={**age_counts, "patients_reordered": reordered},
        warnings=(warning,) if reordered else (),
    )


def _columns(content: bytes, path: str) -> dict[str, _Column]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CxrRayError(f"{path}: is no text in UTF-8; download it again") from None
    records = _records(text, path)
    header = next(records, (0, [""]))[1]
    places = _places(header, path)
    lines: list[int] = []
    values: dict[str, list[str]] = {name: [] for name in places}
    needed = max(places.values()) + 1
    for line, fields in records:
        if len(fields) < needed:
            raise CxrRayError(f"{path} line {line}: has {len(fields)} fields, needs {needed}; download the table again")
        lines.append(line)
        for name, place in places.items():
            values[name].append(fields[place].strip())
    if not lines:
        raise CxrRayError(f"{path}: has no rows; download it again")
    where = np.array(lines)
    return {name: _Column(path, header[places[name]].strip(), _objects(values[name]), where) for name in places}


def _records(text: str, path: str) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not blank, with the line of the file that it begins in."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise CxrRayError(f"{path} line {line}: is no readable CSV ({error}); download it again") from None


def _objects(values: list[str] | list[str | None]) -> np.ndarray:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def _places(header: list[str], path: str) -> dict[str, int]:
    """Where each column of the release stands."""
    plain = ["".join(character for character in name.casefold() if character.isalnum()) for name in header]
    found = {name: [place for place, text in enumerate(plain) if text in known] for name, known in _SPELLINGS.items()}
    absent = [repr(name) for name, places in found.items() if not places]
    if absent:
        held = ", ".join(repr(name.strip()) for name in header if name.strip())
        raise CxrRayError(f"{path}: has no column {', '.join(absent)} (found: {held}); rename it, or download the table again")
    for name, places in found.items():
        if len(places) > 1:
            same = " and ".join(repr(header[place].strip()) for place in places)
            raise CxrRayError(f"{path}: columns {same} both mean {name!r}; remove all but one")
    return {name: places[0] for name, places in found.items()}


def _whole_numbers(column: _Column) -> np.ndarray:
    numbers = np.asarray(pd.to_numeric(pd.Series(column.values), errors="coerce"), dtype=np.float64)
    with np.errstate(invalid="ignore"):
        wrong = ~(np.isfinite(numbers) & (numbers == np.rint(numbers)) & (np.abs(numbers) < _MAX_WHOLE_NUMBER))
    column.refuse(wrong, "a whole number is needed")
    return numbers.astype(np.int64)


def _one_of(column: _Column, meanings: Mapping[str, str | None], needed: str) -> np.ndarray:
    upper = [value.upper() for value in column.values]
    column.refuse(np.array([value not in meanings for value in upper]), needed)
    return _objects([meanings[value] for value in upper])


def _refuse_repeats(column: _Column, values: np.ndarray) -> None:
    repeated = pd.Series(values).duplicated().to_numpy()
    if repeated.any():
        row = int(repeated.argmax())
        raise CxrRayError(
            f"{column.path} line {column.lines[row]}: {column.name} {values[row]} stands there a second time; "
            "remove one of the rows"
        )


def _ages(column: _Column) -> tuple[np.ndarray, dict[str, int]]:
    """Ages in years, float32, NaN where unknown, and what the manifest counts of them."""
    parts = pd.Series(column.values, dtype=object).str.upper().str.extract(r"^([+-]?\d+)(?:\.0*)?\s*([YMWD]?)$")
    given = column.values != ""
    column.refuse(given & parts[0].isna().to_numpy(), "whole years, or a whole number with Y, M, W or D, is needed")
    units = parts[1].fillna("").to_numpy(dtype=object)
    years = parts[0].to_numpy(dtype=np.float64) * np.array([_YEARS_PER_UNIT[unit] for unit in units])
    impossible = (years < 0) | (years > MAX_AGE_YEARS)
    years[impossible] = np.nan
    counts = {
        "age_unknown": int(np.isnan(years).sum()),
        "ages_impossible": int(impossible.sum()),
        "ages_converted": int(np.isin(units, ["M", "W", "D"]).sum()),
    }
    return years.astype(np.float32), counts


def _chronological(patient: np.ndarray, follow_up: np.ndarray, age_years: np.ndarray) -> tuple[np.ndarray, int]:
    """The place of each image in the order of patient, age and follow-up, and how many patients have an age that falls."""
    rows = np.lexsort((follow_up, patient))
    frame = pd.DataFrame({"patient": patient[rows], "age": age_years[rows]})
    ages = frame.groupby("patient")["age"].ffill()
    falls = ages.groupby(frame["patient"]).diff() < 0
    filled = ages.groupby(frame["patient"]).bfill().fillna(0).to_numpy()
    order = np.empty(len(rows), dtype=np.int64)
    order[rows[np.lexsort((follow_up[rows], filled, patient[rows]))]] = np.arange(len(rows))
    return order, int(frame["patient"][falls].nunique())


def _labels(column: _Column) -> np.ndarray:
    codes, texts = pd.factorize(column.values)
    _refuse_unknown(column, codes, texts)
    encoded = np.zeros((len(texts), len(FINDINGS)), dtype=np.uint8)
    for number, text in enumerate(texts):
        try:
            encoded[number] = findings.parse(text)
        except CxrRayError as error:
            raise CxrRayError(f"{column.path} line {column.lines[(codes == number).argmax()]}: {error}") from None
    labels = encoded[codes]
    beyond_eight = labels[:, findings.positions(_BEYOND_EIGHT, FINDINGS)]
    if len(labels) >= _ROWS_TO_TELL and labels.any() and not beyond_eight.any():
        raise CxrRayError(
            f"{column.path}: none of its {len(labels)} rows has {', '.join(_BEYOND_EIGHT)}: it holds the eight findings of "
            f"ChestX-ray8; use the table of the fourteen, {RELEASE_TABLE}"
        )
    return labels


def _refuse_unknown(column: _Column, codes: np.ndarray, texts: np.ndarray) -> None:
    """Name every label that is unknown, at once; a set without a single known finding is another one."""
    rows: Counter[str] = Counter()
    first: dict[str, int] = {}
    any_known = False
    for text, images, line in zip(texts, np.bincount(codes), column.lines[_first_rows(codes)], strict=True):
        for name in {name.strip() for name in text.split(findings.SEPARATOR)} - {""}:
            try:
                any_known |= bool(findings.encode([name]).any())
            except CxrRayError:
                rows[name] += int(images)
                first[name] = min(first.get(name, line), line)
    if not rows:
        return
    named = [f"{name!r} ({count} rows, first in line {first[name]})" for name, count in rows.most_common()]
    known = f"the known ones are {', '.join(FINDINGS)} and {findings.NO_FINDING}"
    if any_known:
        raise CxrRayError(f"{column.path}: {len(rows)} unknown labels: {', '.join(named)}; correct them, {known}")
    more = f" and {len(named) - _FOREIGN_LABELS_SHOWN} more" if len(named) > _FOREIGN_LABELS_SHOWN else ""
    raise CxrRayError(
        f"{column.path}: {column.name} holds no finding of ChestX-ray14, but another set of labels: "
        f"{', '.join(named[:_FOREIGN_LABELS_SHOWN])}{more}; use the release's table, {known}"
    )


def _first_rows(codes: np.ndarray) -> np.ndarray:
    """The row in which each code from 0 appears first."""
    return np.unique(codes, return_index=True)[1]
