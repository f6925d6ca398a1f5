"""What the campaign sends: studies of small phantoms, drawn from a seed, each with a course of its own.

A course says in which associations the images travel, how often, and what about them goes wrong. The version of an image, by
which other bytes under the same UID are told apart, is its Instance Number.
"""

import hashlib
import random
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from ingest.phantom import PhantomVisit, simulate_patients
from ingest.phantom_drawing import draw
from ingest.phantom_release import phantom_dicom

PATIENT = "CHAOSPATIENT"
_EDGE = 256
_FILMS = 24
_YOUNGEST, _OLDEST = 20, 95


class Course(Enum):
    """How a study comes."""

    SINGLE = "one image"
    PAIR = "two images, one association"
    LATE = "two images, two associations"
    AGAIN = "sent again, the same bytes"
    UNANSWERABLE = "with a lateral image"
    CONFLICT = "other bytes under its UID"
    CUT = "association cut in mid-PDU"
    UNREAD = "sent whole, answer not awaited"


class Client(Enum):
    """Who sends a study."""

    STORESCU = "DCMTK storescu"
    PYNETDICOM = "pynetdicom"
    ORTHANC = "Orthanc"


_SHARES = {
    Course.SINGLE: 0.58,
    Course.PAIR: 0.08,
    Course.LATE: 0.08,
    Course.AGAIN: 0.06,
    Course.UNANSWERABLE: 0.06,
    Course.CONFLICT: 0.04,
    Course.CUT: 0.06,
    Course.UNREAD: 0.04,
}
# A C-STORE that is cut is written by hand; what is sent twice goes by the clients that can leave an association half-way.
_CLIENTS = {Course.CUT: (Client.PYNETDICOM,), Course.UNREAD: (Client.PYNETDICOM,)}
_PERSISTENT_SHARE = 0.85
_PAUSE_SECONDS = (0.3, 8.0)


@dataclass(frozen=True)
class Image:
    """One image, as it will be made: `version` 2 has other bytes than 1 under the same UID."""

    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    patient: str
    film: int
    lateral: bool = False
    version: int = 1

    def write(self, folder: Path) -> Path:
        """Write it as a DICOM file; returns its path."""
        visit, pixels = _films()[self.film]
        dataset: Dataset = phantom_dicom(visit, pixels)
        dataset.SOPInstanceUID, dataset.SeriesInstanceUID = self.sop_instance_uid, self.series_instance_uid
        dataset.StudyInstanceUID, dataset.PatientID = self.study_instance_uid, self.patient
        dataset.InstanceNumber = self.version
        if self.lateral:
            dataset.ViewPosition = "LL"
        path = folder / f"{self.sop_instance_uid}-{self.version}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        return path


@dataclass(frozen=True)
class Study:
    """A study and its course.

    Attributes
    ----------
    persistent
        Whether its sender tries again until it is answered 0x0000, as archives do; else each image is tried once.
    pause
        Seconds between its associations where it has several.
    cut
        Where an association is cut: fraction of the bytes of the C-STORE that were sent.
    """

    number: int
    course: Course
    client: Client
    persistent: bool
    images: tuple[Image, ...]
    pause: float
    cut: float


def studies(count: int, seed: int) -> list[Study]:
    """The studies of a campaign, in the order in which they are sent.

    Every course is among them, and the first of each is brought to its end.
    """
    chance = random.Random(f"studies {seed}")
    courses = [course for course, share in _SHARES.items() for _ in range(max(1, int(count * share)))][:count]
    courses += [Course.SINGLE] * (count - len(courses))
    chance.shuffle(courses)
    made = [_study(number, course, seed, chance) for number, course in enumerate(courses)]
    return [replace(study, persistent=True) if study.course not in courses[: study.number] else study for study in made]


def _study(number: int, course: Course, seed: int, chance: random.Random) -> Study:
    def image(place: int, *, lateral: bool = False, version: int = 1) -> Image:
        return Image(
            sop_instance_uid=_uid("instance", seed, number, place),
            study_instance_uid=_uid("study", seed, number),
            series_instance_uid=_uid("series", seed, number),
            patient=f"{PATIENT}{number:06d}",
            film=(number + place + version) % _FILMS,
            lateral=lateral,
            version=version,
        )

    images = (image(0),)
    if course in {Course.PAIR, Course.LATE}:
        images = (image(0), image(1))
    elif course is Course.UNANSWERABLE:
        images = (image(0, lateral=True),) if chance.random() < 0.5 else (image(0), image(1, lateral=True))
    elif course is Course.CONFLICT:
        images = (image(0), image(0, version=2))
    return Study(
        number=number,
        course=course,
        client=chance.choice(_CLIENTS.get(course, tuple(Client))),
        persistent=chance.random() < _PERSISTENT_SHARE,
        images=images,
        pause=chance.uniform(*_PAUSE_SECONDS),
        cut=1.0 if course is Course.UNREAD else chance.uniform(0.02, 0.98),
    )


@cache
def _films() -> tuple[tuple[PhantomVisit, np.ndarray], ...]:
    visits = [visit for visit in simulate_patients(4 * _FILMS, 3) if _YOUNGEST <= visit.age_years < _OLDEST][:_FILMS]
    return tuple((visit, draw(visit, _EDGE)) for visit in visits)


def _uid(*parts: object) -> str:
    # A UUID written as a decimal number (PS3.5 annex B.2).
    return f"2.25.{int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:16])}"
