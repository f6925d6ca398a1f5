"""Labels of a DICOM archive: a CSV whose rows name an image, a study or a request.

The key is a column SOPInstanceUID, StudyInstanceUID or AccessionNumber, in any of the usual spellings. Where a table has
several of them, the finest one that a row fills in counts for that row. The labels of a study or of an accession number are
those of each of its images; an image that a finer row names keeps that row's labels.

The labels stand in one column ``Finding Labels``, as NIH writes them, or in fourteen columns, one a finding, with 0 and 1. A
row with an empty cell among the fourteen labels nothing: labels are known as a whole or not at all. Other columns are passed
over.

Identifiers do not appear in errors, which end in logs; lines of the file do.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cxr_ray import findings, storage
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS, NO_FINDING, SEPARATOR
from ingest.csv_cells import csv_cells

# From the finest to the coarsest; the spellings are compared without case, spaces and signs.
KEYS = {
    "SOPInstanceUID": ("sopinstanceuid", "sopuid", "instanceuid"),
    "StudyInstanceUID": ("studyinstanceuid", "studyuid"),
    "AccessionNumber": ("accessionnumber", "accessionno", "accession"),
}
LABEL_COLUMN = "Finding Labels"
_CELLS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}


@dataclass(frozen=True)
class LabelTable:
    """The labels that a CSV gives.

    Attributes
    ----------
    labels
        For each of `KEYS`, identifier to labels (uint8, shape (14,), NIH order).
    unlabelled_rows
        Rows that leave a finding open, and so label nothing.
    sha256
        Digest of the file.
    """

    labels: dict[str, dict[str, np.ndarray]]
    unlabelled_rows: int
    sha256: str

    def of_images(self, identifiers: Mapping[str, Sequence[str]]) -> np.ndarray:
        """Labels of each image by its finest identifier that the table knows.

        Parameters
        ----------
        identifiers
            For each of `KEYS`, the identifier of each image; "" where it has none.

        Returns
        -------
        numpy.ndarray
            float32, shape (N, 14); a row of NaN where the table says nothing.
        """
        images = len(next(iter(identifiers.values())))
        labels = np.full((images, len(FINDINGS)), np.nan, dtype=np.float32)
        for key in reversed(KEYS):
            given = self.labels[key]
            for image, identifier in enumerate(identifiers[key]):
                if identifier in given:
                    labels[image] = given[identifier]
        return labels

    def without_image(self, identifiers: Mapping[str, Sequence[str]]) -> int:
        """How many labelled instances, studies and accession numbers have no image; arguments as `of_images`."""
        return sum(len(set(self.labels[key]) - set(identifiers[key])) for key in KEYS)


def read_label_table(uri: str) -> LabelTable:
    """Read the CSV of labels: UTF-8, separated by commas, semicolons or tabulators.

    Raises
    ------
    CxrRayError
        Naming the file, the line, what is wrong in it and the remedy; of labels that are unknown, all of them.
    """
    filesystem, path = storage.resolve(uri)
    content = storage.read_bytes(filesystem, path)
    labels: dict[str, dict[str, np.ndarray]] = {key: {} for key in KEYS}
    lines: dict[tuple[str, str], int] = {}
    unlabelled = 0
    for row in _rows(content, path):
        if row.labels is None:
            unlabelled += 1
            continue
        first = lines.setdefault((row.key, row.identifier), row.line)
        if not np.array_equal(labels[row.key].setdefault(row.identifier, row.labels), row.labels):
            raise CxrRayError(
                f"{path} lines {first} and {row.line}: give the same {row.key} different labels; correct or remove one of them"
            )
    return LabelTable(labels, unlabelled, hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class _Row:
    line: int
    key: str
    identifier: str
    labels: np.ndarray | None


def _rows(content: bytes, path: str) -> Iterator[_Row]:
    (_, header), *cells = list(csv_cells(content, path)) or [(1, [])]
    plain = [_plain(name) for name in header]
    keys = _key_columns(plain, header, path)
    labels_of = _label_reader(plain, header, path, cells)
    for line, row in cells:
        key = next((key for key, column in keys.items() if row[column]), None)
        if key is None:
            verb = "is" if len(keys) == 1 else "are"
            raise CxrRayError(f"{path} line {line}: {', '.join(keys)} {verb} empty; correct or remove the row")
        try:
            yield _Row(line, key, row[keys[key]], labels_of(row))
        except CxrRayError as error:
            raise CxrRayError(f"{path} line {line}: {error}") from None


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _key_columns(plain: list[str], header: list[str], path: str) -> dict[str, int]:
    """The columns of `KEYS` that the table has, from the finest to the coarsest."""
    columns: dict[str, int] = {}
    for key, spellings in KEYS.items():
        found = [column for column, name in enumerate(plain) if name in spellings]
        if len(found) > 1:
            named = ", ".join(header[column] for column in found)
            raise CxrRayError(f"{path}: has {len(found)} columns for {key} ({named}); remove all but one")
        if found:
            columns[key] = found[0]
    if not columns:
        raise CxrRayError(
            f"{path}: has no column {', '.join(KEYS)} (found: {', '.join(header)}); give one of them, which tells the images"
        )
    return columns


def _label_reader(
    plain: list[str], header: list[str], path: str, cells: list[tuple[int, list[str]]]
) -> Callable[[list[str]], np.ndarray | None]:
    """How the table writes labels; unknown ones are all told at once."""
    texts = [column for column, name in enumerate(plain) if name == _plain(LABEL_COLUMN)]
    names = [_finding(name) for name in header]
    present = [name for name in FINDINGS if name in names]
    if len(texts) > 1 or (texts and present) or any(names.count(name) > 1 for name in present):
        raise CxrRayError(f"{path}: has several columns for the same labels ({', '.join(header)}); remove all but one")
    if texts:
        column = texts[0]
        _refuse_unknown(Counter(row[column] for _, row in cells), path)
        return lambda row: findings.parse(row[column])
    if not present:
        raise CxrRayError(
            f"{path}: has no column '{LABEL_COLUMN}' and none a finding (found: {', '.join(header)}); give one or the other"
        )
    if len(present) < len(FINDINGS):
        absent = ", ".join(name for name in FINDINGS if name not in present)
        raise CxrRayError(f"{path}: has no column {absent}; give all {len(FINDINGS)} findings, or '{LABEL_COLUMN}'")
    columns = [names.index(name) for name in FINDINGS]
    return lambda row: _from_cells([row[column] for column in columns])


def _finding(name: str) -> str | None:
    try:
        return findings.canonical(name)
    except CxrRayError:
        return None


def _refuse_unknown(texts: Counter[str], path: str) -> None:
    unknown: Counter[str] = Counter()
    for text, rows in texts.items():
        for name in {name.strip() for name in text.split(SEPARATOR)} - {""}:
            if _finding(name) is None and _plain(name) != _plain(NO_FINDING):
                unknown[name] += rows
    if unknown:
        counted = ", ".join(f"{name!r} ({rows} rows)" for name, rows in sorted(unknown.items()))
        raise CxrRayError(
            f"{path}: labels are not known: {counted}; use {', '.join(FINDINGS)} or {NO_FINDING}, with '{SEPARATOR}' in between"
        )


def _from_cells(cells: list[str]) -> np.ndarray | None:
    if "" in cells:
        return None
    for name, cell in zip(FINDINGS, cells, strict=True):
        if cell not in _CELLS:
            raise CxrRayError(f"{name} is {cell!r}; write 0 or 1, or nothing where it is not known")
    return np.array([_CELLS[cell] for cell in cells], dtype=np.uint8)
