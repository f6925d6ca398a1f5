"""UIDs of results, computed from what a result says: made again, it is the same object, and no PACS keeps it twice.

A UID is ``2.25.`` and the first 128 bits of a SHA-256 (PS3.5 annex B.2). Into that of an object go the images with the
digests of their content, the model's bundle and its thresholds, the type of result and the revision.
"""

import hashlib
import json
from dataclasses import dataclass

from pydicom.uid import (
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    SecondaryCaptureImageStorage,
)

from serve.node.results.study_answer import ResultType, StudyAnswer

SOP_CLASSES: dict[ResultType, str] = {
    "comprehensive-3d": str(Comprehensive3DSRStorage),
    "comprehensive": str(ComprehensiveSRStorage),
    "enhanced": str(EnhancedSRStorage),
    "secondary-capture": str(SecondaryCaptureImageStorage),
}


@dataclass(frozen=True)
class ResultUids:
    """The names of one result object."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str


def result_uids(answer: StudyAnswer, result_type: ResultType) -> ResultUids:
    """The names that the result of this type has; known before it is made.

    Revisions of a result by one model share a series.
    """
    study = answer.study_instance_uid
    models = sorted({image.model.digest for image in answer.images})
    sources = sorted(
        [
            image.sop_instance_uid,
            image.content_digest,
            image.model.digest,
            [repr(finding.threshold) for finding in image.findings],
        ]
        for image in answer.images
    )
    return ResultUids(
        sop_class_uid=SOP_CLASSES[result_type],
        sop_instance_uid=_uid("instance", study, sources, result_type, answer.revision),
        series_instance_uid=_uid("series", study, models, result_type),
        study_instance_uid=study,
    )


def tracking_uid(answer: StudyAnswer, finding: str) -> str:
    """What a finding of the study is tracked by through all revisions, models and types of result."""
    return _uid("tracking", answer.study_instance_uid, finding)


def device_uid(*names: str) -> str:
    """A fixed UID of the device that goes by these names."""
    return _uid("device", *names)


def _uid(*parts: object) -> str:
    digest = hashlib.sha256(json.dumps(["cxr-ray", *parts]).encode()).digest()[:16]
    return f"2.25.{int.from_bytes(digest)}"
