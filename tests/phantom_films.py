"""Phantoms as a client sends them, and how an error looks that it gets back."""

import io

import httpx
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset

from ingest.phantom import PhantomVisit, simulate_patients
from ingest.phantom_drawing import draw
from ingest.phantom_release import phantom_dicom

VISITS = [visit for visit in simulate_patients(20, 1) if 20 <= visit.age_years < 100]


def film(visit: PhantomVisit) -> np.ndarray:
    return draw(visit, 256)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def dicom(visit: PhantomVisit, **elements: object) -> bytes:
    dataset: Dataset = phantom_dicom(visit, film(visit))
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    content = io.BytesIO()
    dataset.save_as(content, enforce_file_format=True)
    return content.getvalue()


def assert_problem(answer: httpx.Response, status: int, *said: str) -> None:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    problem = answer.json()
    assert set(problem) == {"type", "title", "status", "detail"}
    assert problem["status"] == status
    assert problem["title"]
    assert "\n" not in problem["detail"]
    for words in said:
        assert words in problem["detail"]
