"""What is known of the patients of many files: a CSV with a row a file.

The columns are those of `POST /v1/predict`: ``file`` (relative to the input, as the result names it), and any of ``age``,
``sex``, ``view`` and ``history``. An empty cell says nothing. Names of files may be names of patients: errors tell lines.
"""

from collections.abc import Callable, Container
from typing import Any

from cxr_ray import findings, storage
from cxr_ray.clinical import MAX_AGE_YEARS
from cxr_ray.errors import CxrRayError
from ingest.csv_cells import csv_cells
from serve.uploads import NOTHING_STATED, Stated

_FILE = "file"


def read_clinical_table(uri: str, files: Container[str]) -> dict[str, Stated]:
    """File to what the table states of its patient, for the files that it names.

    Parameters
    ----------
    files
        Those that there are, relative to the input.

    Raises
    ------
    CxrRayError
        Naming table, line, value and remedy: a column is unknown or absent, a value is not allowed, a file is not there or
        comes twice.
    """
    filesystem, path = storage.resolve(uri)
    rows = csv_cells(storage.read_bytes(filesystem, path), path)
    _, header = next(rows, (1, []))
    _check_columns(header, path)
    table: dict[str, Stated] = {}
    for line, row in rows:
        cells = dict(zip(header, row, strict=True))
        name = cells.pop(_FILE)
        if name not in files:
            raise CxrRayError(f"{path} line {line}: names a file that --input does not hold; correct or remove the row")
        if name in table:
            raise CxrRayError(f"{path} line {line}: names a file for the second time; leave one of the rows")
        try:
            table[name] = NOTHING_STATED._replace(**{column: _VALUES[column](cell) for column, cell in cells.items() if cell})
        except CxrRayError as error:
            raise CxrRayError(f"{path} line {line}: {error}") from None
    return table


def _check_columns(header: list[str], path: str) -> None:
    known = (_FILE, *_VALUES)
    wrong = [name for name in header if name not in known]
    twice = [name for name in header if header.count(name) > 1]
    if wrong or twice or _FILE not in header:
        said = (
            f"column {wrong[0]!r} is not known"
            if wrong
            else f"column {twice[0]!r} comes twice"
            if twice
            else "no column 'file'"
        )
        raise CxrRayError(f"{path} line 1: {said}; write the columns {', '.join(known)}")


def _age(cell: str) -> float:
    try:
        age = float(cell)
    except ValueError:
        age = float("nan")
    if not 0 <= age <= MAX_AGE_YEARS:
        raise CxrRayError(f"age is {cell!r}; write years from 0 to {MAX_AGE_YEARS}, or nothing where it is not known")
    return age


def _one_of(column: str, *allowed: str) -> Callable[[str], str]:
    def value(cell: str) -> str:
        if cell not in allowed:
            raise CxrRayError(f"{column} is {cell!r}; write {' or '.join(allowed)}, or nothing where it is not known")
        return cell

    return value


def _history(cell: str) -> list[str]:
    try:
        return findings.names(findings.parse(cell))
    except CxrRayError as error:
        raise CxrRayError(f"history: {error}") from None


_VALUES: dict[str, Callable[[str], Any]] = {
    "age": _age,
    "sex": _one_of("sex", "M", "F"),
    "view": _one_of("view", "PA", "AP"),
    "history": _history,
}
