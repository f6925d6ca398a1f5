"""Reads this software's own earlier results out of an archive: structured reports with root TID 1500 (PS3.16).

A report is one's own by its manufacturer. What it says of each finding is a measurement group (TID 1501): the finding's code,
its probability, and whether that was called present at the threshold of its day. Only that last statement becomes history,
as it does for answers that the service keeps: a later model's thresholds say nothing of an older model's probabilities.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pydicom.dataset import Dataset

from cxr_ray.bounded_header import Bounds, read_bounded_header
from cxr_ray.dicom_values import text, whole_number
from cxr_ray.findings import CODES, FINDINGS
from serve.node.prior_query import EarlierStudy, Question, is_of

_REPORT = ("126000", "DCM")
_DEVICE_MANUFACTURER = ("121014", "DCM")
_GROUP, _FINDING = ("125007", "DCM"), ("121071", "DCM")
# "Probability" of 0 to 1, and "Certainty of Finding" in percent for a model that is not calibrated; unit by unit.
_SCALES = {(("122157", "DCM"), ("1", "UCUM")): 1.0, (("111012", "DCM"), ("%", "UCUM")): 0.01}
# As SNOMED CT has them, and as SNOMED RT had them in older reports.
_PRESENT = {("52101004", "SCT"), ("G-A203", "SRT")}
_ABSENT = {("272519000", "SCT"), ("2667000", "SCT"), ("G-A206", "SRT")}
_FINDING_OF = {(code.value, code.scheme): name for name, code in CODES.items()}
# A report of ours has some hundreds of items in 60 kB; what has more is not read to its end.
_MOST_ITEMS = 20_000
_REPORT_BOUNDS = Bounds(most_bytes=2 * 1024**2, most_steps=100_000, longest_value=1024**2)


@dataclass(frozen=True)
class ReadFinding:
    """What a report says of one finding: `probability` in 0 to 1, None where it gives none."""

    name: str
    probability: float | None
    present: bool


@dataclass(frozen=True)
class ReadResult:
    """An earlier result of this software.

    `findings` are in NIH order; `made` is the moment, as DICOM writes it, and the revision.
    """

    findings: tuple[ReadFinding, ...]
    made: tuple[str, int]

    @property
    def positive(self) -> tuple[str, ...]:
        """The names of what it called present."""
        return tuple(finding.name for finding in self.findings if finding.present)


def read_result(file: bytes, study: EarlierStudy, question: Question, manufacturer: str) -> ReadResult | None:
    """Read a report of this study; None where it is somebody else's, of another patient or study, or says too little.

    Parameters
    ----------
    file
        A DICOM file (PS3.10).
    manufacturer
        By which a report is known as one's own; case does not matter.
    """
    try:
        report = read_bounded_header(file, "report", _REPORT_BOUNDS)
        if not _is_ours(report, study, question, manufacturer):
            return None
        findings = _findings(report)
        revision = whole_number(report, "InstanceNumber")
    # An archive chose these bytes, and a parser has no closed list of ways to fail on them.
    except Exception:  # noqa: BLE001
        return None
    made = (f"{text(report, 'ContentDate')}{text(report, 'ContentTime'):0<6.6}", revision)
    return ReadResult(tuple(findings[name] for name in FINDINGS), made) if len(findings) == len(FINDINGS) else None


def newest(results: Iterable[ReadResult | None]) -> ReadResult | None:
    """The result that was made last: a revised one takes the place of its predecessor."""
    return max((result for result in results if result is not None), key=lambda result: result.made, default=None)


def _is_ours(report: Dataset, study: EarlierStudy, question: Question, manufacturer: str) -> bool:
    if not is_of(report, question) or text(report, "StudyInstanceUID") != study.study_uid or _concept(report) != _REPORT:
        return False
    # Rejected or incomplete documents are no results (PS3.3 section C.17.2).
    if text(report, "CompletionFlag") not in {"", "COMPLETE"}:
        return False
    makers = {text(report, "Manufacturer")}
    makers |= {text(item, "TextValue") for item in report.ContentSequence if _concept(item) == _DEVICE_MANUFACTURER}
    return manufacturer.casefold() in {maker.casefold() for maker in makers}


def _findings(report: Dataset) -> dict[str, ReadFinding]:
    """By name. Where several groups are of one finding, as of several images, the study has what any of them has."""
    found: dict[str, ReadFinding] = {}
    for item in _items(report):
        if text(item, "ValueType") == "CONTAINER" and _concept(item) == _GROUP:
            read = _of_group(item)
            known = found.get(read.name) if read else None
            if read and known:
                probabilities = [each.probability for each in (read, known) if each.probability is not None]
                present = read.present or known.present
                read = ReadFinding(read.name, max(probabilities, default=None), present)
            if read:
                found[read.name] = read
    return found


def _of_group(group: Dataset) -> ReadFinding | None:
    name, probability, said = None, None, set()
    for item in group.get("ContentSequence", []):
        kind, concept = text(item, "ValueType"), _concept(item)
        if kind == "CODE":
            value = _code(item.ConceptCodeSequence[0])
            if concept == _FINDING and value in _FINDING_OF:
                name = _FINDING_OF[value]
            elif value in _PRESENT | _ABSENT:
                said.add(value in _PRESENT)
        elif kind == "NUM":
            measured = item.MeasuredValueSequence[0]
            scale = _SCALES.get((concept, _code(measured.MeasurementUnitsCodeSequence[0])))
            probability = probability if scale is None else scale * float(measured.NumericValue)
    # A group that says both, or nothing, says nothing.
    return ReadFinding(name, probability, said.pop()) if name and len(said) == 1 else None


def _items(report: Dataset) -> Iterator[Dataset]:
    """All content items of the tree, without recursion: how deep it goes is up to whoever wrote it."""
    waiting, seen = [report], 0
    while waiting and seen < _MOST_ITEMS:
        item = waiting.pop()
        seen += 1
        yield item
        waiting.extend(item.get("ContentSequence", []))


def _concept(item: Dataset) -> tuple[str, str]:
    names = item.get("ConceptNameCodeSequence")
    return _code(names[0]) if names else ("", "")


def _code(code: Dataset) -> tuple[str, str]:
    return text(code, "CodeValue"), text(code, "CodingSchemeDesignator")
