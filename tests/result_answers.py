"""Answers to phantoms, as the node hands them to the makers of results."""

from datetime import UTC, datetime
from io import BytesIO

from phantom_films import VISITS, dicom
from pydicom import Dataset, dcmread

from cxr_ray.findings import FINDINGS
from serve.node.results.study_answer import FindingAnswer, ImageAnswer, Model, StudyAnswer

MODEL = Model("multi-input", "3", "4f" * 32)
ANSWERED = datetime(2026, 2, 3, 14, 5, 6, tzinfo=UTC)
INPUTS = (("age", "62 years"), ("sex", "female"), ("view", "PA"), ("history", "not known"))
PROBABILITIES = tuple(0.031 + 0.067 * place for place in range(len(FINDINGS)))


def header(**elements: object) -> Dataset:
    """The header of a phantom's film, without its pixels."""
    return dcmread(BytesIO(dicom(VISITS[0], **elements)), stop_before_pixels=True)


def findings(probabilities: tuple[float, ...] = PROBABILITIES, threshold: float = 0.5) -> tuple[FindingAnswer, ...]:
    return tuple(
        FindingAnswer(name, value, threshold, value >= threshold) for name, value in zip(FINDINGS, probabilities, strict=True)
    )


def image(source: Dataset | None = None, **changes: object) -> ImageAnswer:
    given = {
        "header": source if source is not None else header(),
        "content_digest": "00112233aabbccdd",
        "findings": findings(),
        "model": MODEL,
        "inputs": INPUTS,
        "warnings": ("ViewPosition is empty: view unknown",),
        "answered_at": ANSWERED,
    }
    return ImageAnswer(**{**given, **changes})


def study(*images: ImageAnswer, **changes: object) -> StudyAnswer:
    return StudyAnswer(images=images or (image(),), **changes)


def service_answer() -> dict:
    """What `POST /v1/instances` says of an image."""
    return {
        "model": {"name": "multi-input", "version": "3", "digest": "4f" * 32},
        "findings": [vars(finding) for finding in reversed(findings())],
        "clinical": {"age": 62.0, "sex": "F", "view": "PA", "history": None, "history_source": None, "missing": ["history"]},
        "warnings": [],
    }
