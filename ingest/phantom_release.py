"""A release of phantoms on disk: PNG files and tables laid out as NIH's, and the same films as DICOM.

``phantom_truth.csv`` tells what the release does not: which of the labelled findings are drawn at all.
"""

import hashlib
import io
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import Field
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
)

from cxr_ray import findings, storage
from cxr_ray.errors import CxrRayError
from cxr_ray.progress import ProgressReport
from cxr_ray.settings import Settings
from ingest.nih import TEST_LIST, TRAIN_VAL_LIST
from ingest.phantom import DAYS_PER_YEAR, PhantomVisit, simulate_patients
from ingest.phantom_drawing import draw

TABLE = "Data_Entry_2017_v2020.csv"
TRUTH = "phantom_truth.csv"
IMAGES = "images_001/images"
DICOM = "dicom"
# Every fourth patient; whole patients, as in the official lists.
TEST_PATIENT = 4
# UIDs under 2.25 are UUIDs written as a decimal number (PS3.5 annex B.2).
_UUID_ROOT = "2.25."
_EPOCH = date(2010, 1, 1)
_FILMS_PER_TASK = 64


class PhantomSettings(Settings):
    """Settings of `cxr-ray ingest phantom`."""

    out: str = Field(description="Folder of the release; must not exist or be empty.")
    patients: int = Field(300, ge=2, le=100_000, description="Patients, each with one to eight visits.")
    size: int = Field(256, ge=32, le=4096, description="Edge of the images, in pixels.")
    seed: int = Field(0, ge=0, description="Seed of patients and films.")


def make_release(settings: PhantomSettings) -> int:
    """Simulate the patients, draw their films on Ray Data, and write the release; returns the number of images.

    Raises
    ------
    CxrRayError
        If the folder is not empty or cannot be written.
    """
    import ray.data  # noqa: PLC0415 - takes a second that other commands need not pay

    root = Path(settings.out).resolve()
    _claim(root)
    visits = simulate_patients(settings.patients, settings.seed)
    pieces = [visits[start : start + _FILMS_PER_TASK] for start in range(0, len(visits), _FILMS_PER_TASK)]
    drawn = ray.data.from_items([{"piece": number} for number in range(len(pieces))], override_num_blocks=len(pieces))
    results = drawn.map(_write_films, fn_kwargs={"pieces": pieces, "root": root, "size": settings.size})
    with ProgressReport("draw", len(visits), "films") as progress:
        for row in results.iter_rows():
            progress.advance(int(row["films"]))
    write_tables(root, visits, settings.size)
    return len(visits)


def _claim(root: Path) -> None:
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise CxrRayError(f"--out {root}: is not an empty folder; choose another place or remove it")
    try:
        (root / IMAGES).mkdir(parents=True)
        (root / DICOM).mkdir()
    except OSError as error:
        raise CxrRayError(f"--out {root}: cannot be written ({error.strerror}); choose another place") from None


def _write_films(row: dict[str, int], pieces: list[list[PhantomVisit]], root: Path, size: int) -> dict[str, int]:
    visits = pieces[row["piece"]]
    for visit in visits:
        film = draw(visit, size)
        Image.fromarray(film).save(root / IMAGES / f"{visit.image_id}.png")
        phantom_dicom(visit, film).save_as(root / DICOM / f"{visit.image_id}.dcm", enforce_file_format=True)
    return {"films": len(visits)}


def _uid(*parts: object) -> str:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:16]
    return _UUID_ROOT + str(int.from_bytes(digest))


def phantom_dicom(visit: PhantomVisit, film: np.ndarray) -> Dataset:
    """A film as a DX image for presentation; every second one is MONOCHROME1, as half of the detectors deliver.

    Parameters
    ----------
    film
        uint8, shape (size, size), air dark.
    """
    studied = _EPOCH + timedelta(days=visit.days)
    inverted = visit.visit % 2 == 1
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = _uid("instance", visit.image_id, visit.seed)
    dataset.StudyInstanceUID = _uid("study", visit.image_id, visit.seed)
    dataset.SeriesInstanceUID = _uid("series", visit.image_id, visit.seed)
    dataset.PatientID = f"PHANTOM{visit.patient_id:06d}"
    dataset.PatientName = f"Phantom^{visit.patient_id}"
    dataset.PatientSex = visit.sex
    dataset.PatientAge = f"{visit.age_years:03d}Y"
    dataset.PatientBirthDate = f"{studied - timedelta(days=(visit.age_years + 0.5) * DAYS_PER_YEAR):%Y%m%d}"
    for stem in ("Study", "Series", "Acquisition", "Content"):
        setattr(dataset, f"{stem}Date", f"{studied:%Y%m%d}")
        setattr(dataset, f"{stem}Time", "120000")
    dataset.AccessionNumber = ""
    dataset.StudyID = str(visit.visit + 1)
    dataset.SeriesNumber = dataset.InstanceNumber = 1
    dataset.Modality = "DX"
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.BodyPartExamined = "CHEST"
    dataset.ViewPosition = visit.view
    dataset.StudyDescription = "Synthetic chest radiograph"
    dataset.ImageType = ["DERIVED", "PRIMARY"]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    dataset.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"
    dataset.Rows, dataset.Columns = film.shape
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PixelRepresentation = 0
    dataset.PixelData = np.ascontiguousarray(255 - film if inverted else film).tobytes()
    return dataset


def write_tables(root: Path, visits: list[PhantomVisit], size: int) -> None:
    """The table in NIH's columns (its broken header included), the official lists, and the labels by SOP instance."""
    lines = [
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    ]
    for visit in visits:
        identity = f"{visit.image_id}.png,{_label_text(visit.labels)},{visit.visit},{visit.patient_id}"
        lines.append(f"{identity},{visit.age_years},{visit.sex},{visit.view},{size},{size},0.168,0.168")
    test = [f"{visit.image_id}.png" for visit in visits if visit.patient_id % TEST_PATIENT == 0]
    train_val = [f"{visit.image_id}.png" for visit in visits if visit.patient_id % TEST_PATIENT]
    truth = pd.DataFrame(
        {
            "Image Index": [f"{visit.image_id}.png" for visit in visits],
            "SOPInstanceUID": [_uid("instance", visit.image_id, visit.seed) for visit in visits],
            "Finding Labels": [_label_text(visit.labels) for visit in visits],
            "Visible Findings": [_label_text(visit.visible) for visit in visits],
        }
    )
    content = io.StringIO()
    truth.to_csv(content, index=False)
    filesystem, path = storage.resolve(str(root))
    for name, text in (
        (TRAIN_VAL_LIST, "\n".join(train_val)),
        (TEST_LIST, "\n".join(test)),
        (TRUTH, content.getvalue()),
        (TABLE, "\n".join(lines) + "\n"),
    ):
        storage.write_atomically(filesystem, f"{path}/{name}", text.encode())


def _label_text(labels: tuple[int, ...]) -> str:
    return findings.SEPARATOR.join(findings.names(labels)) or findings.NO_FINDING
