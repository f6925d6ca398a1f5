"""How common each finding is expected to be, as a user states it: a CSV with the columns finding and prevalence."""

import csv
import io

from cxr_ray import storage
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS, canonical

_COLUMNS = ("finding", "prevalence")


def read_prevalence(uri: str) -> dict[str, float]:
    """Finding to share of positives, for the findings that the file names.

    Raises
    ------
    CxrRayError
        Naming file, line, value and remedy: the file or a column is absent, a finding is unknown or comes twice, a number is
        not between 0 and 1.
    """
    filesystem, path = storage.resolve(uri)
    try:
        text = storage.read_bytes(filesystem, path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CxrRayError(f"{path}: is no text in UTF-8; write it as CSV") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    absent = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
    if absent:
        raise CxrRayError(f"{path} line 1: column {absent[0]!r} is missing; write the columns {' and '.join(_COLUMNS)}")
    expected: dict[str, float] = {}
    for row in reader:
        where = f"{path} line {reader.line_num}"
        name = _finding(row["finding"] or "", where)
        if name in expected:
            raise CxrRayError(f"{where}: finding {name} comes twice; leave one")
        expected[name] = _share(row["prevalence"] or "", where)
    if not expected:
        raise CxrRayError(f"{path}: names no finding; write lines such as {FINDINGS[0]},0.08")
    return expected


def _finding(text: str, where: str) -> str:
    try:
        return canonical(text.strip())
    except CxrRayError as error:
        raise CxrRayError(f"{where}: {error}") from None


def _share(text: str, where: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = float("nan")
    if not 0 < share < 1:
        raise CxrRayError(f"{where}: prevalence {text!r} is no number between 0 and 1; write a share such as 0.08")
    return share
