"""What is known of patients' earlier visits."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field

from cxr_ray.errors import CxrRayError
from serve.http.access import Writer
from serve.http.moments import Day
from serve.http.problems import READING, ApiProblem, problems
from serve.http.services import Serving, audited
from serve.store import ConfirmedVisit

router = APIRouter(tags=["patients"])
PatientId = Annotated[str, Path(min_length=1, max_length=64, description="As the images have it, (0010,0020).")]


class VisitEntry(BaseModel):
    """A visit and what a person found on it; no findings for a visit without any."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    visit_date: Day
    findings: list[str] = Field(default_factory=list, max_length=14, examples=[["Mass", "Effusion"]])
    view: Literal["PA", "AP"] | None = None


class PatientHistory(BaseModel):
    """Every confirmed visit of a patient; an empty list says that there was none before the first that comes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    visits: list[VisitEntry] = Field(max_length=1000)


@router.put(
    "/v1/patients/{patient_id}/history",
    responses=READING | problems(413, 422),
    summary="State a patient's earlier visits",
)
async def put_history(
    request: Request, serving: Serving, actor: Writer, patient_id: PatientId, history: PatientHistory
) -> PatientHistory:
    """Replace what was stated of this patient before; stating it again changes nothing."""
    try:
        visits = [ConfirmedVisit(visit.visit_date, tuple(visit.findings), visit.view) for visit in history.visits]
    except CxrRayError as error:
        raise ApiProblem(400, f"visits: {error}") from None
    if not patient_id.strip():
        raise ApiProblem(400, "patient_id is empty; name the patient")
    await audited(serving, request, actor, "state history", patient_id=patient_id)
    await serving.from_store(lambda store: store.put_history(patient_id, visits))
    return await _stated(serving, patient_id)


@router.get("/v1/patients/{patient_id}/history", responses=READING | problems(404), summary="What was stated of a patient")
async def get_history(request: Request, serving: Serving, actor: Writer, patient_id: PatientId) -> PatientHistory:
    """Confirmed visits as they were stated or imported, by date. Whoever sees pseudonyms does not ask for a patient by name."""
    await audited(serving, request, actor, "read history", patient_id=patient_id)
    return await _stated(serving, patient_id)


async def _stated(serving: Serving, patient_id: str) -> PatientHistory:
    visits = await serving.from_store(lambda store: store.history(patient_id))
    if visits is None:
        raise ApiProblem(404, "nothing was stated of this patient's earlier visits; PUT them here")
    return PatientHistory(
        visits=[VisitEntry(visit_date=visit.visit_date, findings=list(visit.findings), view=visit.view) for visit in visits]
    )
