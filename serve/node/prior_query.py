"""What is asked of an archive before a new film is answered, and which of its matches count.

An archive is trusted no further than its answers can be checked: what does not repeat the PatientID that was asked for, lies
on the same day or later, or is of another person by birth date or issuer, is dropped. Days, because the network's history
is one of days (`cxr_ray.earlier_visits`).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Protocol, Self

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from cxr_ray.bounded_header import read_bounded_header
from cxr_ray.dicom_values import code_strings, text
from cxr_ray.errors import CxrRayError
from cxr_ray.frontal_chest import RADIOGRAPH_MODALITIES, check_frontal_chest
from cxr_ray.radiograph_words import CHEST, CHEST_STEMS, NO_BODY_PART, NOT_FRONTAL, OTHER_REGIONS, words

_LONGEST_PATIENT_ID = 64
_UID = re.compile(r"[0-9.]{1,64}")
# PS3.4 section C.2.2.2.4 has * and ?; the backslash separates values.
_MATCHING_CHARACTERS = frozenset("*?\\")


class NotAskedError(Exception):
    """A film for which no archive is asked; the text says why and names nobody."""


class ArchiveError(Exception):
    """The archive did not answer as it should; the text names nobody."""


class FetchedTooMuchError(Exception):
    """The archive sends more than was to be fetched."""


@dataclass(frozen=True)
class Question:
    """Whose earlier studies are wanted, and before which day."""

    patient_id: str
    issuer: str
    birth_date: str
    study_uid: str
    before: date


@dataclass(frozen=True)
class EarlierStudy:
    """A study that may have been a chest radiograph of the same patient."""

    study_uid: str
    day: date
    time: str


@dataclass(frozen=True)
class EarlierSeries:
    """A series of such a study."""

    series_uid: str
    modality: str


class Archive(Protocol):
    """An archive that is being asked; a context that ends the connection.

    Its methods raise `ArchiveError`, `DeadlineError` and `FetchedTooMuchError`.
    """

    def studies(self, question: Question) -> list[Dataset]:
        """Matches at the level of studies."""

    def series(self, study_uid: str) -> list[Dataset]:
        """Matches at the level of series."""

    def instances(self, study_uid: str, series_uid: str) -> Iterator[bytes]:
        """The instances of a series as DICOM files (PS3.10)."""

    def __enter__(self) -> Self:
        """Connect."""

    def __exit__(self, *exception: object) -> None:
        """Part."""


def question_of(path: Path) -> Question:
    """What to ask before this film is answered.

    Raises
    ------
    NotAskedError
        Without a PatientID or study date, or with a PatientID by which an archive could find somebody else.
    CxrRayError
        When it is no frontal chest film: then it is not answered either.
    """
    try:
        header = read_bounded_header(path, "film")
    except (CxrRayError, OSError):
        raise NotAskedError("the film's header cannot be read") from None
    try:
        check_frontal_chest(header, "film")
        patient = patient_id(header)
        issuer, birth = text(header, "IssuerOfPatientID"), text(header, "PatientBirthDate")
        study, day = text(header, "StudyInstanceUID"), _day(text(header, "StudyDate"))
    except CxrRayError:
        raise
    # A peer chose these bytes, and a parser has no closed list of ways to fail on them.
    except Exception:  # noqa: BLE001
        raise NotAskedError("the film's header cannot be read") from None
    if not patient:
        raise NotAskedError("the film has no PatientID")
    if len(patient) > _LONGEST_PATIENT_ID or not patient.isprintable() or _MATCHING_CHARACTERS & set(patient):
        raise NotAskedError("the film's PatientID has characters by which an archive would find other patients too")
    if day is None:
        raise NotAskedError("the film has no study date")
    return Question(patient, issuer, birth, study, day)


def earlier_studies(matches: Iterable[Dataset], question: Question, most: int) -> list[EarlierStudy]:
    """The matches that count, the newest first, `most` of them."""
    found: dict[str, EarlierStudy] = {}
    for match in matches:
        study = _earlier(match, question)
        if study is not None:
            found[study.study_uid] = study
    newest = sorted(found.values(), key=lambda study: (study.day, study.time, study.study_uid), reverse=True)
    return newest[:most]


def is_of(match: Dataset, question: Question) -> bool:
    """Whether an answer is of the patient who was asked for; what it leaves out beside the PatientID contradicts nothing."""
    issuer, birth = text(match, "IssuerOfPatientID"), text(match, "PatientBirthDate")
    return (
        patient_id(match) == question.patient_id
        and (not issuer or not question.issuer or issuer == question.issuer)
        and (not birth or not question.birth_date or birth == question.birth_date)
    )


def patient_id(header: Dataset) -> str:
    """The PatientID as it is on the wire, but for padding: with a character replaced it could be somebody else's."""
    value = header.get("PatientID")
    return ("\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "")).strip(" \0")


def usable_series(matches: Iterable[Dataset], study_uid: str) -> list[EarlierSeries]:
    """Structured reports, and radiographs that are not described as something other than a frontal chest film."""
    found: dict[str, EarlierSeries] = {}
    for match in matches:
        uid, modality = text(match, "SeriesInstanceUID"), text(match, "Modality").upper()
        said_study = text(match, "StudyInstanceUID")
        if not _UID.fullmatch(uid) or said_study not in {"", study_uid}:
            continue
        if modality == "SR" or (modality in RADIOGRAPH_MODALITIES and _may_be_frontal_chest(match)):
            found[uid] = EarlierSeries(uid, modality)
    return list(found.values())


def _earlier(match: Dataset, question: Question) -> EarlierStudy | None:
    uid, day = text(match, "StudyInstanceUID"), _day(text(match, "StudyDate"))
    if not _UID.fullmatch(uid) or uid == question.study_uid or day is None or day >= question.before:
        return None
    modalities = set(code_strings(match, "ModalitiesInStudy")) - {""}
    if modalities and not modalities & {*RADIOGRAPH_MODALITIES, "SR"}:
        return None
    if not is_of(match, question) or _names_other_region(match, "StudyDescription"):
        return None
    return EarlierStudy(uid, day, text(match, "StudyTime"))


def _may_be_frontal_chest(match: Dataset) -> bool:
    part = text(match, "BodyPartExamined").upper()
    if part and part not in NO_BODY_PART and not any(stem in part for stem in CHEST_STEMS):
        return False
    # PA AND LATERAL in one series: the frontal film is told by its own header.
    said = words(text(match, "SeriesDescription"))
    return not _names_other_region(match, "SeriesDescription") and (not said & NOT_FRONTAL or bool(said & {"PA", "AP"}))


def _names_other_region(match: Dataset, keyword: str) -> bool:
    said = words(text(match, keyword))
    return bool(said & OTHER_REGIONS) and not said & CHEST


def _day(value: str) -> date | None:
    if not re.fullmatch(r"\d{8}", value):
        return None
    try:
        return datetime.strptime(value, "%Y%m%d").date()
    except ValueError:
        return None
