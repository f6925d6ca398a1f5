"""What was received and answered: studies, their pictures and heatmaps. Each look at a study is recorded."""

from typing import Annotated, Literal

import cv2
import numpy as np
from fastapi import APIRouter, Depends, File, Form, Path, Query, Request, Response, UploadFile

from cxr_ray.clinical import ClinicalInputs, from_request
from cxr_ray.earlier_visits import EarlierVisit, with_history
from cxr_ray.findings import FINDINGS
from serve.graph_settings import DEFAULT_MODEL
from serve.http.access import WRITE, Actor, Reader, Writer
from serve.http.answers import KeptPrediction, StudyAnswer, StudyPage, study_answer
from serve.http.disclosure import check_filter, patient_names
from serve.http.forms import multipart_only, parse_priors, uploaded
from serve.http.moments import Day, Moment
from serve.http.predict import FindingName, known_finding
from serve.http.problems import READING, UPLOADING, ApiProblem, problems
from serve.http.services import Services, Serving, audited
from serve.intake import Arrival, prediction_of
from serve.store import Answer, Picture, Status, StudyFilter, StudyView, Verdict

router = APIRouter(tags=["studies"])
Uid = Annotated[str, Path(max_length=64, description="A DICOM UID.")]
PNG: dict[int | str, dict[str, object]] = {200: {"content": {"image/png": {}}}}


@router.post(
    "/v1/instances",
    responses=UPLOADING | problems(409),
    dependencies=[WRITE, Depends(multipart_only)],
    summary="Answer a DICOM instance and keep the answer",
)
async def instances(
    serving: Serving,
    _actor: Writer,
    image: Annotated[UploadFile, File(description="A DICOM file (PS3.10)")],
    calling_ae: Annotated[str | None, Form(max_length=16, description="AE title of the sender.")] = None,
    received_at: Annotated[Moment | None, Form(description="When it was accepted; now, if left out.")] = None,
    origin: Annotated[
        Literal["sent", "archive"],
        Form(
            description="archive: fetched as an earlier film of somebody whose new one is to be answered. It counts as that "
            "patient's history and stands in no list."
        ),
    ] = "sent",
    priors: Annotated[
        str | None, Form(max_length=1000, description="JSON: what came of asking an archive for priors (PriorsOutcome).")
    ] = None,
) -> KeptPrediction:
    """What the DICOM node sends; sending an instance again gives the same answer and keeps nothing twice."""
    name = image.filename or "image"
    outcome = parse_priors(priors)
    data = await uploaded(image, name)
    arrival = Arrival(calling_ae, received_at, priors=outcome, fetched=origin == "archive")
    _, prediction = await serving.intake.keep(data, arrival)
    return prediction


def study_filter(
    patient_id: Annotated[str | None, Query(max_length=64)] = None,
    accession_number: Annotated[str | None, Query(max_length=64)] = None,
    study_date_from: Annotated[Day | None, Query()] = None,
    study_date_to: Annotated[Day | None, Query()] = None,
    finding: Annotated[
        str | None,
        Query(max_length=32, description="Positive in any image of the study.", json_schema_extra={"enum": list(FINDINGS)}),
    ] = None,
    status: Annotated[Status | None, Query()] = None,
    received_from: Annotated[Moment | None, Query(description="Received then or later.")] = None,
    origin: Annotated[
        Literal["sent", "archive"], Query(description="archive: those that were only fetched, as priors of others.")
    ] = "sent",
) -> StudyFilter:
    """Which studies are asked for."""
    try:
        named = None if finding is None else known_finding(finding)
    except ApiProblem as problem:
        raise ApiProblem(400, problem.detail) from None
    dates = (study_date_from, study_date_to)
    return StudyFilter(patient_id, accession_number, *dates, named, status, received_from, fetched=origin == "archive")


Wanted = Annotated[StudyFilter, Depends(study_filter)]


@router.get("/v1/studies", responses=READING, summary="Studies received over DICOM, the last first")
async def studies(
    request: Request,
    serving: Serving,
    actor: Reader,
    wanted: Wanted,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> StudyPage:
    """One page of the results store. The role read sees pseudonyms and cannot search for identifiers."""
    check_filter(wanted, actor)
    await audited(serving, request, actor, "list studies", patient_id=wanted.patient_id)
    views = await serving.from_store(lambda store: store.studies(limit, offset, wanted))
    return StudyPage(studies=await _answers(serving, actor, views), limit=limit, offset=offset)


@router.get("/v1/studies/{study_uid}", responses=READING | problems(404), summary="One study")
async def study(request: Request, serving: Serving, actor: Reader, study_uid: Uid) -> StudyAnswer:
    """A study with the answer to each of its instances."""
    view = await looked_at(serving, request, actor, study_uid, "read study")
    return (await _answers(serving, actor, [view]))[0]


@router.get(
    "/v1/studies/{study_uid}/instances/{sop_uid}/film.png",
    responses=READING | problems(404) | PNG,
    response_class=Response,
    summary="The radiograph",
)
async def film(request: Request, serving: Serving, actor: Reader, study_uid: Uid, sop_uid: Uid) -> Response:
    """The film as it was drawn for people when it came, 1,024 pixels an edge at most."""
    view = await looked_at(serving, request, actor, study_uid, "read film")
    _, picture = await _kept(serving, view, sop_uid)
    return Response(picture.view, media_type="image/png")


@router.get(
    "/v1/studies/{study_uid}/instances/{sop_uid}/heatmap/{finding}.png",
    responses=READING | problems(404) | PNG,
    response_class=Response,
    summary="Where a stored answer comes from",
)
async def stored_heatmap(
    request: Request,
    serving: Serving,
    actor: Reader,
    study_uid: Uid,
    sop_uid: Uid,
    finding: FindingName,
) -> Response:
    """The film with what speaks for the finding in warm colours.

    Drawn by the model that answers now, with the clinical values that the stored answer used.
    """
    name = known_finding(finding)
    view = await looked_at(serving, request, actor, study_uid, "read heatmap")
    answer, picture = await _kept(serving, view, sop_uid)
    square, shown = _pixels(picture.square), _pixels(picture.view)
    model = serving.answering.model(DEFAULT_MODEL)
    return Response(await model.heatmap(square, _inputs(answer), name, shown), media_type="image/png")


@router.get(
    "/v1/studies/{study_uid}/instances/{sop_uid}/heat/{finding}.png",
    responses=READING | problems(404) | PNG,
    response_class=Response,
    summary="The heatmap alone, transparent, to lay over the radiograph",
)
async def stored_heat(
    request: Request,
    serving: Serving,
    actor: Reader,
    study_uid: Uid,
    sop_uid: Uid,
    finding: FindingName,
) -> Response:
    """What the heatmap lays over the film, of the film's size, so that a viewer can window the film below it."""
    name = known_finding(finding)
    view = await looked_at(serving, request, actor, study_uid, "read heatmap")
    answer, picture = await _kept(serving, view, sop_uid)
    height, width = _pixels(picture.view).shape
    model = serving.answering.model(DEFAULT_MODEL)
    return Response(await model.heat(_pixels(picture.square), _inputs(answer), name, (height, width)), media_type="image/png")


@router.put(
    "/v1/studies/{study_uid}/findings/{finding}/review",
    responses=READING | problems(404),
    summary="Confirm or reject a finding of a study",
)
async def review(
    request: Request,
    serving: Serving,
    actor: Writer,
    study_uid: Uid,
    finding: FindingName,
    verdict: Annotated[Verdict | None, Query(description="Left out, an earlier verdict is taken back.")] = None,
) -> StudyAnswer:
    """What a reader found; it counts as history of the patient's later studies."""
    name = known_finding(finding)
    await looked_at(serving, request, actor, study_uid, f"review {name}: {verdict or 'taken back'}")
    await serving.from_store(lambda store: store.review(study_uid, name, verdict, actor.name))
    view = await serving.from_store(lambda store: store.study(study_uid))
    return (await _answers(serving, actor, [_found(view, study_uid)]))[0]


async def _answers(serving: Services, actor: Actor, views: list[StudyView]) -> list[StudyAnswer]:
    return await serving.from_store(lambda store: [study_answer(view, patient_names(view, actor, store)) for view in views])


async def looked_at(serving: Services, request: Request, actor: Actor, study_uid: str, action: str) -> StudyView:
    """A study that somebody is about to see, once this is on record.

    Raises
    ------
    ApiProblem
        404 if it is not known; 503 if the store does not take the record.
    """
    view = _found(await serving.from_store(lambda store: store.study(study_uid)), study_uid)
    await audited(serving, request, actor, action, study_uid, view.patient_id)
    return view


def _found(view: StudyView | None, study_uid: str) -> StudyView:
    if view is None:
        raise ApiProblem(404, f"study {study_uid[:64]!r} is not known here; it may not have been received or answered yet")
    return view


async def _kept(serving: Services, view: StudyView, sop_uid: str) -> tuple[Answer, Picture]:
    instance = next((instance for instance in view.instances if instance.sop_instance_uid == sop_uid), None)
    picture = await serving.from_store(lambda store: store.picture(sop_uid)) if instance and instance.answer else None
    if instance is None or instance.answer is None or picture is None:
        raise ApiProblem(404, f"instance {sop_uid[:64]!r} of this study was not answered with a picture kept")
    return instance.answer, picture


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE))


def _inputs(answer: Answer) -> ClinicalInputs:
    """The clinical values that an answer used."""
    used = prediction_of(answer).clinical
    inputs, _ = from_request(used.age, used.sex, used.view, used.history)
    if used.study_date is None:
        return inputs
    visits = [EarlierVisit(visit.visit_date, tuple(visit.findings), visit.view) for visit in used.earlier_visits]
    return with_history(inputs, visits, used.study_date)
