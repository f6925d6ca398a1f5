"""Answers as JSON."""

from dataclasses import dataclass
from datetime import date, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from cxr_ray.findings import FINDINGS
from serve.http.problems import ProblemDetails
from serve.priors_outcome import PriorsOutcome
from serve.store import InstanceView, StudyView, Verdict


class _Json(BaseModel):
    model_config = ConfigDict(frozen=True)


class ModelIdentity(_Json):
    """Which model answered; `digest` names the bundle's exact content."""

    name: str
    version: str
    digest: str


class FindingAnswer(_Json):
    """One finding: probability, and whether it reaches the operating threshold chosen on validation."""

    name: str
    probability: float = Field(ge=0, le=1)
    threshold: float
    positive: bool


class EarlierVisitAnswer(_Json):
    """An earlier visit that was used: its date, its findings, and who says so."""

    visit_date: date
    findings: list[str]
    view: Literal["PA", "AP"] | None
    source: Literal["confirmed", "predicted"]


class ClinicalUsed(_Json):
    """The clinical values that were used, and the names of those that were unknown."""

    age: float | None
    sex: Literal["M", "F"] | None
    view: Literal["PA", "AP"] | None
    history: list[str] | None = Field(description="Findings of earlier visits; null if nothing is known of them.")
    history_source: Literal["stated", "stored"] | None = Field(
        description="Whether the client stated the history or the service knew it; null if nothing is known."
    )
    earlier_visits: list[EarlierVisitAnswer] = Field(description="The visits that the service knew and used.")
    study_date: date | None = Field(description="The day before which these visits lie.")
    missing: list[str]


class Prediction(_Json):
    """Answer to one image."""

    model: ModelIdentity
    findings: list[FindingAnswer]
    clinical: ClinicalUsed
    warnings: list[str]


class KeptPrediction(Prediction):
    """Answer to an instance that is kept."""

    priors: PriorsOutcome | None = Field(
        description="What came of asking an archive for earlier studies; null where nobody asked."
    )


class ImageResult(_Json):
    """Answer to one of several images: a prediction, or the problem with this image."""

    index: int = Field(description="Position of the image in the request, from 0.")
    prediction: Prediction | None = None
    problem: ProblemDetails | None = None


class PredictionList(_Json):
    """Answers to several images, in their order; a bad image fails alone."""

    results: list[ImageResult]


class ModelAnswer(_Json):
    """A model that answers here: the name to ask it by, what it is, and what computes it."""

    model: str
    default: bool
    identity: ModelIdentity
    thresholds: dict[str, float]
    engine: str


class ModelList(_Json):
    """The models of this service."""

    models: list[ModelAnswer]


class InstanceAnswer(_Json):
    """What became of one instance of a study: `answered` with fourteen findings, or `refused` with the reason."""

    sop_instance_uid: str
    series_instance_uid: str
    status: str
    reason: str | None
    received_at: datetime
    answered_at: datetime
    model: ModelIdentity | None
    findings: list[FindingAnswer]
    clinical: dict[str, JsonValue] | None
    warnings: list[str]
    priors: PriorsOutcome | None


class StudyFindingAnswer(_Json):
    """A finding of a study: the highest probability over its images, and each image's own."""

    name: str
    probability: float
    positive: bool
    by_instance: dict[str, float]


class ReviewAnswer(_Json):
    """What a reader said of a finding."""

    finding: str
    verdict: Verdict
    reviewer: str
    reviewed_at: datetime


class StudyAnswer(_Json):
    """A study and its instances; `findings` is empty while no instance was answered."""

    study_instance_uid: str
    patient_id: str | None = Field(description="As the images have it; for the role read a pseudonym.")
    accession_number: str | None = Field(description="As the images have it; for the role read nothing.")
    study_date: str | None
    received_at: datetime
    findings: list[StudyFindingAnswer]
    reviews: list[ReviewAnswer]
    instances: list[InstanceAnswer]


@dataclass(frozen=True)
class PatientNames:
    """What a study's patient is called in an answer."""

    patient: str | None
    accession_number: str | None


class StudyPage(_Json):
    """Studies, the last received first."""

    studies: list[StudyAnswer]
    limit: int
    offset: int


def study_answer(view: StudyView, names: PatientNames) -> StudyAnswer:
    """A study of the store as JSON."""
    return StudyAnswer(
        study_instance_uid=view.study_instance_uid,
        patient_id=names.patient,
        accession_number=names.accession_number,
        study_date=view.study_date,
        received_at=view.received_at,
        findings=[
            StudyFindingAnswer(
                name=finding.name,
                probability=finding.probability,
                positive=finding.positive,
                by_instance=finding.by_instance,
            )
            for finding in view.findings
        ],
        reviews=[
            ReviewAnswer(finding=one.finding, verdict=one.verdict, reviewer=one.actor, reviewed_at=one.reviewed_at)
            for one in view.reviews
        ],
        instances=[_instance_answer(instance) for instance in view.instances],
    )


def _instance_answer(view: InstanceView) -> InstanceAnswer:
    answer = view.answer
    model = None
    if answer is not None:
        model = ModelIdentity(name=answer.model_name, version=answer.model_version, digest=answer.model_digest)
    return InstanceAnswer(
        sop_instance_uid=view.sop_instance_uid,
        series_instance_uid=view.series_instance_uid,
        status=view.status,
        reason=view.reason,
        received_at=view.received_at,
        answered_at=view.answered_at,
        model=model,
        findings=[FindingAnswer(**vars(finding)) for finding in answer.findings] if answer else [],
        clinical=answer.clinical if answer else None,
        warnings=list(answer.warnings) if answer else [],
        priors=PriorsOutcome.model_validate(answer.priors) if answer and answer.priors else None,
    )


def finding_answers(probabilities: list[float], thresholds: dict[str, float]) -> list[FindingAnswer]:
    """Probabilities in NIH order beside their thresholds."""
    return [
        FindingAnswer(name=name, probability=value, threshold=thresholds[name], positive=value >= thresholds[name])
        for name, value in zip(FINDINGS, probabilities, strict=True)
    ]
