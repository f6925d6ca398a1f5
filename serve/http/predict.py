"""Images in, probabilities out; nothing is kept."""

import asyncio
from typing import Annotated

import cv2
import numpy as np
from fastapi import APIRouter, Depends, File, Path, Query, Request, Response, UploadFile

from cxr_ray.clinical import ClinicalInputs
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS, canonical
from serve.answering import Answering, Model
from serve.graph_settings import DEFAULT_MODEL
from serve.http.access import READ, Actor, Reader
from serve.http.answers import ImageResult, ModelAnswer, ModelIdentity, ModelList, Prediction, PredictionList
from serve.http.disclosure import knows_patients
from serve.http.forms import Patient, multipart_only, uploaded
from serve.http.problems import READING, UPLOADING, ApiProblem, problems
from serve.http.services import Services, Serving, audited

router = APIRouter(tags=["predict"])
# A heatmap's picture has so many pixels an edge, however small the network's input.
PICTURE_EDGE = 512
Images = Annotated[list[UploadFile], File(description="PNG, JPEG or DICOM; several for one answer each")]
ImageFile = Annotated[UploadFile, File(description="PNG, JPEG or DICOM")]
FindingName = Annotated[str, Path(max_length=32, json_schema_extra={"enum": list(FINDINGS)})]
ModelName = Annotated[str, Query(alias="model", max_length=32, description="One of GET /v1/models.")]


@router.post(
    "/v1/predict",
    responses=UPLOADING,
    dependencies=[READ, Depends(multipart_only)],
    summary="Fourteen probabilities of one radiograph, or of several",
)
async def predict(
    request: Request,
    serving: Serving,
    actor: Reader,
    image: Images,
    patient: Patient,
    model: ModelName = DEFAULT_MODEL,
) -> Prediction | PredictionList:
    """Decode the image, run the network, say what was used and what was missing.

    Of several images each is answered for itself, in their order, and a bad one fails alone; what is stated of the patient
    counts for all of them.
    """
    asked = serving.answering.model(model)
    answering = await _answering(request, serving, actor, patient)
    most = serving.settings.max_images
    if len(image) > most:
        raise ApiProblem(
            400, f"image: {len(image)} images were sent; send {most} at most, or use 'cxr-ray predict' for a folder"
        )
    if len(image) == 1:
        return await _prediction(answering, image[0], patient, asked)
    found = await asyncio.gather(
        *(_prediction(answering, one, patient, asked) for one in image),
        return_exceptions=True,
    )
    return PredictionList(results=[_result(index, one) for index, one in enumerate(found)])


async def _answering(request: Request, serving: Services, actor: Actor, patient: Patient) -> Answering:
    """What answers this actor: stored histories count for who knows patients, on record where a patient is named.

    A DICOM header can name anybody: for others it names nobody.

    Raises
    ------
    ApiProblem
        403 where somebody else names a patient.
    """
    if not knows_patients(actor):
        if patient.patient_id is not None:
            raise ApiProblem(403, f"patient_id: the token's role is {actor.role}; using a patient's history needs role write")
        return serving.answering.without_stored_history()
    if patient.patient_id is not None:
        await audited(serving, request, actor, "use history", patient_id=patient.patient_id)
    return serving.answering


async def _prediction(answering: Answering, image: UploadFile, patient: Patient, model: Model) -> Prediction:
    name = image.filename or "image"
    data = await uploaded(image, name)
    return (await answering.answer(data, name, patient, model)).prediction


def _result(index: int, found: Prediction | BaseException) -> ImageResult:
    if isinstance(found, Prediction):
        return ImageResult(index=index, prediction=found)
    if isinstance(found, ApiProblem):
        return ImageResult(index=index, problem=found.details)
    raise found


@router.post(
    "/v1/heatmap/{finding}",
    responses=UPLOADING | problems(404) | {200: {"content": {"image/png": {}}}},
    response_class=Response,
    dependencies=[READ, Depends(multipart_only)],
    summary="Where in a radiograph a finding's probability comes from",
)
async def heatmap(
    request: Request,
    serving: Serving,
    actor: Reader,
    finding: FindingName,
    image: ImageFile,
    patient: Patient,
    model: ModelName = DEFAULT_MODEL,
) -> Response:
    """The radiograph with what speaks for the finding in warm colours, as the report of an evaluation shows it."""
    asked, name = serving.answering.model(model), known_finding(finding)
    answering = await _answering(request, serving, actor, patient)
    file = image.filename or "image"
    answered = await answering.answer(await uploaded(image, file), file, patient, asked)
    picture = await drawn(asked, answered.square, answered.inputs, name)
    return Response(picture, media_type="image/png")


async def drawn(model: Model, square: np.ndarray, inputs: ClinicalInputs, finding: str) -> bytes:
    """The heatmap of a stored square, at a size that people look at; PNG."""
    shown = cv2.resize(square, (PICTURE_EDGE, PICTURE_EDGE), interpolation=cv2.INTER_CUBIC)
    return await model.heatmap(square, inputs, finding, shown)


def known_finding(name: str) -> str:
    """The finding of this name.

    Raises
    ------
    ApiProblem
        404, naming those that there are.
    """
    try:
        return canonical(name)
    except CxrRayError as error:
        raise ApiProblem(404, str(error)) from None


@router.get("/v1/models", responses=READING, summary="The models that answer here")
async def models(serving: Serving, _actor: Reader) -> ModelList:
    """Which models there are, by the name to ask them by, with their thresholds."""
    described = [(name, await model.describe()) for name, model in serving.answering.models.items()]
    return ModelList(
        models=[
            ModelAnswer(
                model=name,
                default=name == DEFAULT_MODEL,
                identity=ModelIdentity(name=model.name, version=model.version, digest=model.digest),
                thresholds=model.thresholds,
                engine=model.engine,
            )
            for name, model in described
        ]
    )
