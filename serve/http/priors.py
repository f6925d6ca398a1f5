"""What a node asks and tells of a patient's earlier studies before it brings a new one.

Both are POST: a patient's identifier belongs in no address.
"""

from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from cxr_ray.errors import CxrRayError
from serve.http.access import Writer
from serve.http.moments import Day
from serve.http.problems import READING, ApiProblem, problems
from serve.http.services import Serving, audited
from serve.store import ArchivedResult, HistorySource

router = APIRouter(tags=["patients"])
# PS3.5 section 6.2, LO: no backslash and no control characters.
_PatientId = Annotated[
    str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f\\]+$", description="As the images have it, (0010,0020).")
]
_StudyUid = Annotated[str, Field(max_length=64, pattern=r"^[0-9.]+$", examples=["1.2.840.99.1"])]


class _Json(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PriorsQuestion(_Json):
    """Which of a patient's earlier studies are known here."""

    patient_id: _PatientId
    before: Day = Field(description="The day of the new study; what lies on strictly earlier days counts.")


class KnownPriors(_Json):
    """What is known already, and whether more of it would be used."""

    history_source: HistorySource = Field(
        description="Whose earlier findings this service uses; with none and confirmed, earlier answers make no difference."
    )
    studies: list[str] = Field(description="UIDs of the earlier studies that a model answered.")


class ArchivedFindings(_Json):
    """What this software said of an earlier study, as an archive keeps it."""

    study_instance_uid: _StudyUid
    study_date: Day
    findings: list[str] = Field(max_length=14, description="Those that were called positive.", examples=[["Mass"]])
    view: Literal["PA", "AP"] | None = None


class ArchivedResults(_Json):
    """Earlier answers to a patient's studies."""

    patient_id: _PatientId
    results: list[ArchivedFindings] = Field(min_length=1, max_length=100)


class Kept(_Json):
    """How many were kept."""

    kept: int


@router.post(
    "/v1/priors/known", responses=READING | problems(413, 422), summary="Which earlier studies of a patient are known here"
)
async def known_priors(request: Request, serving: Serving, actor: Writer, question: PriorsQuestion) -> KnownPriors:
    """What a node asks before it asks an archive."""
    patient = _named(question.patient_id)
    await audited(serving, request, actor, "read history", patient_id=patient)
    found = await serving.from_store(lambda store: store.predicted_studies(patient, question.before))
    return KnownPriors(history_source=serving.settings.history_source, studies=sorted(found))


@router.post("/v1/priors/results", responses=READING | problems(413, 422), summary="Tell earlier answers that an archive keeps")
async def archived_results(request: Request, serving: Serving, actor: Writer, told: ArchivedResults) -> Kept:
    """Predicted history of the patient, where the study was not answered here; telling it again changes nothing."""
    patient = _named(told.patient_id)
    try:
        results = [
            ArchivedResult(each.study_instance_uid, each.study_date, tuple(each.findings), each.view) for each in told.results
        ]
    except CxrRayError as error:
        raise ApiProblem(400, f"results: {error}") from None
    await audited(serving, request, actor, "state archived results", patient_id=patient)
    await serving.from_store(lambda store: store.put_archived_results(patient, results))
    return Kept(kept=len(results))


def _named(patient_id: str) -> str:
    if not patient_id.strip():
        raise ApiProblem(400, "patient_id is empty; name the patient")
    return patient_id.strip()
