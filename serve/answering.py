"""From an upload to its answer: decode, find out about the patient, ask the network."""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import date
from typing import Literal, TypeVar

import numpy as np
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from cxr_ray.clinical import ClinicalInputs, from_request
from cxr_ray.earlier_visits import EarlierVisit, with_history
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.pixels import ImageError
from serve.decoder_pool import DecodedUpload, DecoderPool, PoolFullError
from serve.http.answers import ClinicalUsed, EarlierVisitAnswer, ModelIdentity, Prediction, finding_answers
from serve.http.problems import ApiProblem, image_problem, overloaded
from serve.network import ModelDescription, OtherSize, Scored
from serve.store import HistorySource, Store
from serve.trace import current, current_request_id, refused, stage
from serve.upload_words import age_conflict
from serve.uploads import Stated

Found = TypeVar("Found")


@dataclass(frozen=True)
class Answered:
    """An answer, and what it was made of."""

    prediction: Prediction
    upload: DecodedUpload
    square: np.ndarray
    inputs: ClinicalInputs


class Model:
    """One bundle's network behind a Serve handle."""

    def __init__(self, handle: DeploymentHandle, seconds: float) -> None:
        self._handle, self._seconds = handle, seconds
        self._known: ModelDescription | None = None

    async def describe(self) -> ModelDescription:
        """Which model answers now."""
        described: ModelDescription = await self._asked(self._handle.describe.remote())
        self._known = described
        return described

    async def size(self) -> int:
        """The edge of the squares that it reads, as far as was heard."""
        return (self._known or await self.describe()).size

    async def predict(self, pixels: np.ndarray, inputs: ClinicalInputs) -> Scored | OtherSize:
        """See `Network.predict`."""
        with stage("network"):
            answer = await self._asked(self._handle.predict.remote(pixels, inputs, current_request_id()))
        if isinstance(answer, OtherSize):
            self._known = None
        return answer

    async def heatmap(self, pixels: np.ndarray, inputs: ClinicalInputs, finding: str, shown: np.ndarray) -> bytes:
        """See `Network.heatmap`."""
        return await self._asked(self._handle.heatmap.remote(pixels, inputs, finding, shown))

    async def heat(self, pixels: np.ndarray, inputs: ClinicalInputs, finding: str, shape: tuple[int, int]) -> bytes:
        """See `Network.heat`."""
        return await self._asked(self._handle.heat.remote(pixels, inputs, finding, shape))

    async def _asked(self, question: Awaitable[Found]) -> Found:
        try:
            return await asyncio.wait_for(question, self._seconds)
        except BackPressureError:
            raise overloaded() from None
        except TimeoutError:
            raise overloaded(f"the network took more than {self._seconds:g} s; ask again later") from None


class Answering:
    """Answers uploads.

    Parameters
    ----------
    models
        By the name that a request asks for.
    history_source
        Whose earlier findings count where a request states none.
    """

    def __init__(self, models: dict[str, Model], decoders: DecoderPool, store: Store, history_source: HistorySource) -> None:
        self.models = models
        self._decoders, self._store, self._history_source = decoders, store, history_source

    def without_stored_history(self) -> "Answering":
        """The same for who must not learn what is known of a patient."""
        return Answering(self.models, self._decoders, self._store, "none")

    def model(self, name: str) -> Model:
        """The model of this name.

        Raises
        ------
        ApiProblem
            400, naming those that there are.
        """
        if name not in self.models:
            raise ApiProblem(400, f"model {name[:32]!r} is not known; use one of: {', '.join(self.models)}")
        return self.models[name]

    async def decoded(self, data: bytes, name: str, size: int, *, with_film: bool = False) -> DecodedUpload:
        """Decode an upload to a square of this size.

        Raises
        ------
        ApiProblem
            400, 413, 415, 422: what is wrong with the image; 503 if too many wait.
        """
        try:
            return await self._decoders.decode(data, name, [size], with_film=with_film)
        except ImageError as error:
            raise image_problem(error) from None
        except PoolFullError:
            raise overloaded() from None

    async def answer(self, data: bytes, name: str, stated: Stated, model: Model, *, with_film: bool = False) -> Answered:
        """Answer one upload; errors as `decoded`."""
        try:
            return await self._answer(data, name, stated, model, with_film=with_film)
        except ApiProblem as problem:
            refused(problem.status_code)
            raise

    async def _answer(self, data: bytes, name: str, stated: Stated, model: Model, *, with_film: bool) -> Answered:
        size = await model.size()
        # A second look is only needed where a bundle of another size has just replaced the one that was asked for its size.
        for _ in range(3):
            with stage("decode"):
                upload = await self.decoded(data, name, size, with_film=with_film)
            with stage("history"):
                inputs, used, warnings = await self._inputs(upload, stated)
            scored = await model.predict(upload.squares[size], inputs)
            if isinstance(scored, Scored):
                _note(scored)
                return Answered(_prediction(scored, used, warnings), upload, upload.squares[size], inputs)
            size = scored.size
        raise overloaded("the model is being replaced; ask again later")

    async def _inputs(self, upload: DecodedUpload, stated: Stated) -> tuple[ClinicalInputs, ClinicalUsed, list[str]]:
        header = upload.header
        warnings = [*header.warnings, *age_conflict(stated.age, header.age_years)]
        age, sex, view = stated.filled(header)[:3]
        inputs, missing = from_request(age, sex, view, stated.history)
        history, visits, on = stated.history, None, None
        if history is None:
            visits, on = await self._earlier(upload, stated)
            if visits is not None and on is not None:
                inputs = with_history(inputs, visits, on)
                history = [name for name in FINDINGS if any(name in visit.findings for visit in visits)]
                missing = [name for name in missing if name != "history"]
        source: Literal["stated", "stored"] = "stored" if visits is not None else "stated"
        used = ClinicalUsed(
            age=age,
            sex=sex,
            view=view,
            history=history,
            history_source=None if history is None else source,
            earlier_visits=[
                EarlierVisitAnswer(
                    visit_date=visit.visit_date, findings=list(visit.findings), view=visit.view, source=visit.source
                )
                for visit in visits or ()
            ],
            study_date=None if visits is None else on,
            missing=missing,
        )
        return inputs, used, warnings

    async def _earlier(self, upload: DecodedUpload, stated: Stated) -> tuple[tuple[EarlierVisit, ...] | None, date | None]:
        """What the store knows of the patient before the day of the study, and that day."""
        identity = upload.header.identity
        patient = stated.patient_id or (identity.patient_id if identity else "")
        on = stated.study_date or (identity.study_date if identity else None)
        if self._history_source == "none" or not patient or on is None:
            return None, None
        try:
            return await asyncio.to_thread(self._store.earlier_visits, patient, on, self._history_source), on
        except CxrRayError:
            raise overloaded("the results store does not answer; ask again later") from None


def _note(scored: Scored) -> None:
    trace = current.get()
    if trace is not None:
        trace.batches.append(scored.batch)
        trace.models.add(scored.model.digest)


def _prediction(scored: Scored, used: ClinicalUsed, warnings: list[str]) -> Prediction:
    model = scored.model
    return Prediction(
        model=ModelIdentity(name=model.name, version=model.version, digest=model.digest),
        findings=finding_answers(scored.probabilities, model.thresholds),
        clinical=used,
        warnings=warnings,
    )
