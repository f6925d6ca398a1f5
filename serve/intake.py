"""Instances that are kept: answered once a model, and recorded with their picture.

The service is the one place that writes results. Whoever brings an instance again, over any road, gets the answer that was
given; the same UID with other bytes is refused, as nobody can tell which of the two is right.
"""

import asyncio
import logging
from dataclasses import dataclass
from datetime import UTC, datetime

import cv2
import numpy as np

from cxr_ray.dicom_header import looks_like_dicom
from cxr_ray.errors import CxrRayError
from serve.answering import Answered, Answering, Model
from serve.http.answers import KeptPrediction, Prediction
from serve.http.problems import ApiProblem, overloaded
from serve.instance_names import InstanceNames, content_digest, instance_names
from serve.priors_outcome import PriorsOutcome
from serve.store import Answer, Finding, OtherContentError, Picture, ReceivedInstance, Store
from serve.trace import refused, stage
from serve.uploads import Stated

_log = logging.getLogger(__name__)
# Nothing that is wrong with the image, but with the moment.
_TRANSIENT = {408, 503}


@dataclass(frozen=True)
class Arrival:
    """How an instance came here.

    `priors` is what came of asking an archive for earlier studies, None if nobody asked; `fetched` if it is itself such a
    study's.
    """

    calling_ae: str | None = None
    received_at: datetime | None = None
    study_instance_uid: str | None = None
    priors: PriorsOutcome | None = None
    fetched: bool = False


class Intake:
    """Answers instances and keeps the answers.

    Parameters
    ----------
    model
        The one whose answers are shown.
    shadow
        One that is asked about every instance, and whose answers are kept and never shown.
    """

    def __init__(self, answering: Answering, store: Store, model: Model, shadow: Model | None) -> None:
        self._answering, self._store, self._model, self._shadow = answering, store, model, shadow
        self._asides: set[asyncio.Task[None]] = set()

    async def keep(self, data: bytes, arrival: Arrival) -> tuple[InstanceNames, KeptPrediction]:
        """Answer a DICOM instance and keep the answer; an answer that this model gave before is given again.

        Raises
        ------
        ApiProblem
            400, 413, 415, 422: what is wrong with the instance, which is recorded as refused where it can be named;
            409 for another content under the same UID; 503 where something here does not answer.
        """
        try:
            names = await _named(data, arrival)
            received = _received(names, data, arrival)
            known = await self._known(received)
        except ApiProblem as problem:
            refused(problem.status_code)
            raise
        if known is not None:
            return names, known
        try:
            answered = await self._answering.answer(data, names.sop_instance_uid, Stated(), self._model, with_film=True)
        except ApiProblem as problem:
            if problem.status_code not in _TRANSIENT:
                await self._recorded(self._store.record_refusal, received, problem.detail)
            raise
        picture = await asyncio.to_thread(_picture, answered)
        prediction = _kept(answered.prediction, arrival.priors)
        await self._recorded(self._store.record_result, received, _answer(prediction), picture)
        if self._shadow is not None and not arrival.fetched:
            aside = asyncio.create_task(self._ask_shadow(self._shadow, names.sop_instance_uid, data))
            self._asides.add(aside)
            aside.add_done_callback(self._asides.discard)
        return names, prediction

    async def _known(self, received: ReceivedInstance) -> KeptPrediction | None:
        digest = await self._recorded(self._store.content_digest, received.sop_instance_uid)
        if digest is None:
            return None
        # What an archive hands out may be written in other bytes, and was looked at for its findings only.
        if not received.fetched and await self._recorded(self._store.is_fetched, received.sop_instance_uid):
            return None
        if digest != received.content_digest and not received.fetched:
            raise ApiProblem(409, f"instance {received.sop_instance_uid} was received before with other bytes")
        model = await self._model.describe()
        answer = await self._recorded(self._store.answer, received.sop_instance_uid, model.digest)
        return None if answer is None else prediction_of(answer)

    async def _recorded(self, work, *arguments):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN202 - as `work` has it
        try:
            with stage("store"):
                return await asyncio.to_thread(work, *arguments)
        except OtherContentError as error:
            raise ApiProblem(409, str(error)) from None
        except CxrRayError:
            raise overloaded("the results store does not answer; send the instance again later") from None

    async def _ask_shadow(self, shadow: Model, sop_instance_uid: str, data: bytes) -> None:
        try:
            answered = await self._answering.answer(data, sop_instance_uid, Stated(), shadow)
            await asyncio.to_thread(self._store.record_shadow, sop_instance_uid, _answer(_kept(answered.prediction, None)))
        except (ApiProblem, CxrRayError) as error:
            # Nobody waits for it, and what is shown does not depend on it.
            _log.warning("the shadow model gave no answer (%s)", type(error).__name__)


async def _named(data: bytes, arrival: Arrival) -> InstanceNames:
    if not looks_like_dicom(data):
        raise ApiProblem(415, "the instance is no DICOM file (PS3.10); a picture has no study, send it to /v1/predict")
    try:
        names = await asyncio.to_thread(instance_names, data)
    except CxrRayError as error:
        raise ApiProblem(400, str(error)) from None
    if arrival.study_instance_uid not in {None, names.study_instance_uid}:
        raise ApiProblem(409, f"instance {names.sop_instance_uid} is of another study than the one it was sent to")
    return names


def _received(names: InstanceNames, data: bytes, arrival: Arrival) -> ReceivedInstance:
    return ReceivedInstance(
        sop_instance_uid=names.sop_instance_uid,
        study_instance_uid=names.study_instance_uid,
        series_instance_uid=names.series_instance_uid,
        content_digest=content_digest(data),
        received_at=arrival.received_at or datetime.now(UTC),
        calling_ae=arrival.calling_ae,
        patient_id=names.patient_id,
        accession_number=names.accession_number,
        study_date=names.study_date,
        fetched=arrival.fetched,
    )


def _kept(prediction: Prediction, priors: PriorsOutcome | None) -> KeptPrediction:
    warnings = [*prediction.warnings, *(priors.warnings() if priors else ())]
    return KeptPrediction(**{**dict(prediction), "warnings": warnings}, priors=priors)


def _answer(prediction: KeptPrediction) -> Answer:
    model = prediction.model
    return Answer(
        model.name,
        model.version,
        model.digest,
        tuple(Finding(**finding.model_dump()) for finding in prediction.findings),
        prediction.clinical.model_dump(mode="json"),
        warnings=tuple(prediction.warnings),
        priors=prediction.priors.model_dump(mode="json") if prediction.priors else None,
    )


def prediction_of(answer: Answer) -> KeptPrediction:
    """A stored answer as it was given."""
    return KeptPrediction.model_validate(
        {
            "model": {"name": answer.model_name, "version": answer.model_version, "digest": answer.model_digest},
            "findings": [vars(finding) for finding in answer.findings],
            "clinical": answer.clinical,
            "warnings": list(answer.warnings),
            "priors": answer.priors,
        }
    )


def _picture(answered: Answered) -> Picture:
    shown = answered.upload.film
    return Picture(square=_png(answered.square), view=_png(answered.square if shown is None else shown))


def _png(grey: np.ndarray) -> bytes:
    # The least effort: twice the speed of the default, and a tenth more bytes.
    _, encoded = cv2.imencode(".png", grey, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return encoded.tobytes()
