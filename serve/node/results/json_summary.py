"""A study's answer as JSON, for programs that do not read DICOM.

Its images are named by their UIDs and nobody else is: the receiver finds the patient by the study.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from serve.node.results.result_uids import ResultUids
from serve.node.results.source import source_class, source_text
from serve.node.results.study_answer import ImageAnswer, ResultType, StudyAnswer

SCHEMA = "cxr-ray/study-result/1"


def json_summary(answer: StudyAnswer, made: Mapping[ResultType, ResultUids]) -> dict[str, Any]:
    """What the webhook sends: of JSON's types alone.

    Parameters
    ----------
    made
        The DICOM results that were made of this answer, by type.
    """
    return {
        "schema": SCHEMA,
        "status": "unverified",
        "study_instance_uid": answer.study_instance_uid,
        "revision": answer.revision,
        "answered_at": answer.answered_at.isoformat(),
        "findings": [{**asdict(found.answer), "sop_instance_uid": found.image.sop_instance_uid} for found in answer.findings],
        "images": [_image(image) for image in answer.ordered],
        "results": {kind: asdict(uids) for kind, uids in made.items()},
        "predecessors": {kind: asdict(uids) for kind, uids in answer.predecessors.items() if uids is not None},
    }


def _image(image: ImageAnswer) -> dict[str, Any]:
    return {
        "sop_class_uid": source_class(image.header),
        "sop_instance_uid": image.sop_instance_uid,
        "series_instance_uid": source_text(image.header, "SeriesInstanceUID"),
        "model": asdict(image.model),
        "findings": [asdict(finding) for finding in image.findings],
        "inputs": dict(image.inputs),
        "warnings": list(image.warnings),
        "answered_at": image.answered_at.isoformat(),
    }
