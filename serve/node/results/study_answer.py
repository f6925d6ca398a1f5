"""What is said of a study: the answers to its images, and what follows from them for the study.

A study has one result, however many frontal films it has. Of each finding it says the highest probability over the images,
and which image that was; so does `GET /v1/studies/{uid}`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Literal

from pydicom.dataset import Dataset

from cxr_ray.findings import FINDINGS
from serve.node.results.source import source_text

SrClass = Literal["comprehensive-3d", "comprehensive", "enhanced"]
ResultType = Literal["comprehensive-3d", "comprehensive", "enhanced", "secondary-capture"]
# Beyond this a probability is no more certain, it was rounded.
_CLOSEST = 1e-6


@dataclass(frozen=True)
class FindingAnswer:
    """One finding of one image: what the model gives it, and whether that reaches the operating threshold."""

    name: str
    probability: float
    threshold: float
    positive: bool

    def __post_init__(self) -> None:
        for field_name in ("probability", "threshold"):
            value = getattr(self, field_name)
            # Written so that NaN is refused too.
            if not 0 <= value <= 1:
                raise ValueError(f"{field_name} of {self.name} is {value}; give a number from 0 to 1")


@dataclass(frozen=True)
class Model:
    """Which model answered.

    Attributes
    ----------
    digest
        SHA-256 of the bundle, in hexadecimal digits.
    calibrated
        Whether its outputs were shown to be probabilities. If not, results call them certainties of the device.
    """

    name: str
    version: str
    digest: str
    calibrated: bool = False


@dataclass(frozen=True)
class ImageAnswer:
    """The answer to one image.

    Attributes
    ----------
    header
        The source instance without its pixels, with `file_meta`, as it was received.
    content_digest
        What tells its bytes from others under the same UID, as the spool has it.
    findings
        All fourteen, in the order of `cxr_ray.findings.FINDINGS`.
    inputs
        What was known besides the image, in words for people: ("age", "62 years"), ("history", "not known").
    warnings
        What was odd or unknown, one sentence each.
    answered_at
        Aware; results show it in the time zone that it carries.
    """

    header: Dataset = field(repr=False)
    content_digest: str
    findings: tuple[FindingAnswer, ...]
    model: Model
    inputs: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    answered_at: datetime

    def __post_init__(self) -> None:
        names = tuple(finding.name for finding in self.findings)
        if names != FINDINGS:
            raise ValueError(f"findings are {', '.join(names) or 'none'}; give all fourteen in the order of FINDINGS")
        if self.answered_at.tzinfo is None:
            raise ValueError("answered_at has no time zone; give an aware datetime")

    @property
    def sop_instance_uid(self) -> str:
        """As the source has it, valid or not."""
        return source_text(self.header, "SOPInstanceUID")


@dataclass(frozen=True)
class Predecessor:
    """An earlier result that a revised one replaces."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str


@dataclass(frozen=True)
class StudyFinding:
    """A finding of a study, and the image from which it was taken."""

    answer: FindingAnswer
    image: ImageAnswer

    @property
    def margin(self) -> float:
        """How far the probability lies above its threshold, on the log-odds; negative below it."""
        return _log_odds(self.answer.probability) - _log_odds(self.answer.threshold)


@dataclass(frozen=True)
class StudyAnswer:
    """All that results say of a study.

    Attributes
    ----------
    images
        Of one study; their order makes no difference.
    revision
        1 for the first result of the study, one more for each that replaces it.
    predecessors
        By type of result, what this revision replaces; a type that was never sent is absent or None.
    """

    images: tuple[ImageAnswer, ...]
    revision: int = 1
    predecessors: Mapping[ResultType, Predecessor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("images are none; a study is answered once one of its images is")
        if self.revision < 1:
            raise ValueError(f"revision is {self.revision}; the first is 1")

    @cached_property
    def ordered(self) -> tuple[ImageAnswer, ...]:
        """The images in the order in which they were taken."""
        return tuple(sorted(self.images, key=_moment))

    @cached_property
    def findings(self) -> tuple[StudyFinding, ...]:
        """The fourteen findings of the study; where models differ, a positive one counts before a higher one."""
        return tuple(
            max(
                (StudyFinding(image.findings[place], image) for image in self.ordered),
                key=lambda found: (found.answer.positive, found.answer.probability),
            )
            for place in range(len(FINDINGS))
        )

    @property
    def leading(self) -> StudyFinding:
        """The finding farthest above its threshold, or least below: whose image is shown, with its heatmap.

        Not the highest probability: common findings have high thresholds.
        """
        return max(self.findings, key=lambda found: found.margin)

    @property
    def answered_at(self) -> datetime:
        """When the last of the images was answered."""
        return max(image.answered_at for image in self.images)

    @property
    def study_instance_uid(self) -> str:
        """As the source has it, valid or not."""
        return source_text(self.ordered[0].header, "StudyInstanceUID")


def _moment(image: ImageAnswer) -> tuple[str, ...]:
    keywords = ("AcquisitionDate", "AcquisitionTime", "ContentDate", "ContentTime")
    return (*(source_text(image.header, keyword) for keyword in keywords), image.sop_instance_uid, image.content_digest)


def _log_odds(probability: float) -> float:
    held = min(max(probability, _CLOSEST), 1 - _CLOSEST)
    return math.log(held / (1 - held))
