"""The Ray Serve graph: HTTP ingress, decoding, batched inference.

The ingress does no heavy work. Decoding scales alone, because a compressed radiograph can take longer to decode than the
network takes to read it. What goes wrong with one image is a value, not an exception: it travels between replicas and fails
only its own request.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import numpy as np
from fastapi import File, Form, Path, Query, UploadFile
from pydantic import Field
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from cxr_ray import storage
from cxr_ray.bundle import load_bundle
from cxr_ray.clinical import ClinicalInputs, from_request
from cxr_ray.cpus import available_cpus
from cxr_ray.dicom_header import looks_like_dicom, radiograph_header, read_dicom
from cxr_ray.dicom_pixels import decode_dicom
from cxr_ray.engines import TorchEngine
from cxr_ray.errors import CxrRayError
from cxr_ray.pixels import ImageError, decode_picture, stored_square
from cxr_ray.settings import Settings
from serve.api import (
    PROBLEMS,
    ApiProblem,
    ClinicalUsed,
    Credentials,
    ModelIdentity,
    Prediction,
    StudyAnswer,
    StudyPage,
    authorise,
    create_api,
    finding_answers,
    image_problem,
    parse_history,
    study_answer,
)
from serve.store import Store

APPLICATION = "cxr-ray"
_RETRY_SECONDS = "2"
Found = TypeVar("Found")


class GraphSettings(Settings):
    """What the Serve graph is made of."""

    bundle: str = Field(description="Folder or URI of the bundle that answers.")
    store: str = Field("sqlite:///cxr-ray-results.sqlite", description="SQLAlchemy URL of the results store.")
    replicas: int = Field(1, ge=1, description="Processes that run the network.")
    decoders: int = Field(1, ge=1, description="Processes that decode images.")
    batch_size: int = Field(16, ge=1, le=256, description="Images a forward pass at most.")
    batch_wait: float = Field(0.005, ge=0, le=1, description="Seconds to wait for a batch to fill; 0 takes what is there.")
    max_queued: int = Field(64, ge=1, description="Requests that may wait; beyond, the answer is 503.")
    max_upload_mb: int = Field(128, ge=1, description="Largest file, in MB.")
    gpu: bool = Field(default=False, description="Give each network a GPU.")


@dataclass(frozen=True)
class DecodedImage:
    """An upload as the network reads it: pixels uint8 (size, size), and what a DICOM header says of the patient."""

    pixels: np.ndarray
    age_years: float | None = None
    sex: Literal["M", "F"] | None = None
    view: Literal["PA", "AP"] | None = None
    warnings: tuple[str, ...] = ()


def decode_upload(data: bytes, name: str, size: int) -> DecodedImage:
    """Decode a PNG, JPEG or DICOM file.

    Raises
    ------
    ImageError
        If it is none of these, damaged, too large, or no frontal chest radiograph.
    """
    if not looks_like_dicom(data):
        return DecodedImage(stored_square(decode_picture(data, name), size, name))
    dataset = read_dicom(data, name)
    header = radiograph_header(dataset, name)
    pixels = stored_square(decode_dicom(dataset, name), size, name)
    return DecodedImage(pixels, header.age_years, header.sex, header.view, header.warnings)  # type: ignore[arg-type]


@serve.deployment
class Decoder:
    """Turns uploads into stored squares."""

    def __init__(self, size: int) -> None:
        self._size = size

    async def decode(self, data: bytes, name: str) -> DecodedImage | ApiProblem:
        """One image, or the problem with it."""
        try:
            return await asyncio.to_thread(decode_upload, data, name, self._size)
        except ImageError as error:
            return image_problem(error)


@serve.deployment
class Network:
    """Runs the network on batches that Serve collects."""

    def __init__(self, settings: GraphSettings) -> None:
        threads = None if settings.gpu else max(1, available_cpus() // settings.replicas)
        bundle = load_bundle(settings.bundle)
        self._description = bundle.description
        self._engine = TorchEngine(bundle, threads=threads)
        self._infer.set_max_batch_size(settings.batch_size)
        self._infer.set_batch_wait_timeout_s(settings.batch_wait)
        # The first pass through a network is slow; no client shall pay for it.
        size = bundle.require_images()
        self._engine.predict(np.zeros((1, size, size), dtype=np.uint8), from_request(None, None, None, None)[0])

    async def describe(self) -> tuple[ModelIdentity, dict[str, float]]:
        """The model's identity and its thresholds by finding."""
        described = self._description
        identity = ModelIdentity(name=described.name, version=described.version, digest=described.digest)
        return identity, dict(described.thresholds)

    async def predict(self, pixels: np.ndarray, inputs: ClinicalInputs) -> list[float]:
        """Fourteen probabilities of one image."""
        return await self._infer((pixels, inputs))

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def _infer(self, items: list[tuple[np.ndarray, ClinicalInputs]]) -> list[list[float]]:
        pixels = np.stack([pixels for pixels, _ in items])
        inputs = ClinicalInputs.concatenate([inputs for _, inputs in items])
        predicted = await asyncio.to_thread(self._engine.predict, pixels, inputs)
        return [[float(value) for value in row] for row in predicted]


api = create_api()


@serve.deployment
@serve.ingress(api)
class Ingress:
    """HTTP in front of decoder and network, and the results store for reading."""

    def __init__(
        self, decoder: DeploymentHandle, network: DeploymentHandle, settings: GraphSettings, token: str | None
    ) -> None:
        self._decoder, self._network, self._settings, self._token = decoder, network, settings, token
        self._store = Store(settings.store)
        self._described: tuple[ModelIdentity, dict[str, float]] | None = None

    @api.post("/v1/predict", responses=PROBLEMS, summary="Fourteen probabilities of one radiograph")
    async def predict(
        self,
        credentials: Credentials,
        image: Annotated[UploadFile, File(description="PNG, JPEG or DICOM")],
        age: Annotated[float | None, Form(ge=0, le=120, description="Years; overrides the DICOM header")] = None,
        sex: Annotated[Literal["M", "F"] | None, Form()] = None,
        view: Annotated[Literal["PA", "AP"] | None, Form()] = None,
        history: Annotated[
            str | None,
            Form(description="Findings of earlier visits, 'Mass|Nodule', or 'No Finding' if none; leave out if unknown"),
        ] = None,
    ) -> Prediction:
        """Decode the image, run the network, say what was used and what was missing."""
        authorise(self._token, credentials)
        known_history = parse_history(history)
        name = image.filename or "image"
        data = await self._read(image, name)
        try:
            identity, thresholds = await self._describe()
            decoded = await self._decoder.decode.remote(data, name)
            if isinstance(decoded, ApiProblem):
                raise decoded
            values = (
                decoded.age_years if age is None else age,
                sex or decoded.sex,
                view or decoded.view,
                known_history,
            )
            inputs, missing = from_request(*values)
            probabilities = await self._network.predict.remote(decoded.pixels, inputs)
        except BackPressureError:
            raise ApiProblem(503, "too many requests are waiting; ask again later", {"Retry-After": _RETRY_SECONDS}) from None
        return Prediction(
            model=identity,
            findings=finding_answers(probabilities, thresholds),
            clinical=ClinicalUsed(age=values[0], sex=values[1], view=values[2], history=known_history, missing=missing),
            warnings=list(decoded.warnings),
        )

    async def _read(self, image: UploadFile, name: str) -> bytes:
        limit = self._settings.max_upload_mb * 1_000_000
        data = await image.read(limit + 1)
        if not data:
            raise ApiProblem(400, f"image: {name} is empty (0 bytes); send a PNG, JPEG or DICOM file")
        if len(data) > limit:
            raise ApiProblem(413, f"image: {name} has more than {self._settings.max_upload_mb} MB; send a smaller file")
        return data

    async def _describe(self) -> tuple[ModelIdentity, dict[str, float]]:
        if self._described is None:
            self._described = await self._network.describe.remote()
        return self._described

    @api.get("/v1/studies", responses=PROBLEMS, summary="Studies received over DICOM, the last first")
    async def studies(
        self,
        credentials: Credentials,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
    ) -> StudyPage:
        """One page of the results store."""
        authorise(self._token, credentials)
        views = await self._from_store(lambda store: store.studies(limit, offset))
        return StudyPage(studies=[study_answer(view) for view in views], limit=limit, offset=offset)

    @api.get("/v1/studies/{study_uid}", responses=PROBLEMS | {404: PROBLEMS[400]}, summary="One study")
    async def study(self, credentials: Credentials, study_uid: Annotated[str, Path(max_length=64)]) -> StudyAnswer:
        """A study with the answer to each of its instances."""
        authorise(self._token, credentials)
        view = await self._from_store(lambda store: store.study(study_uid))
        if view is None:
            raise ApiProblem(404, f"study {study_uid[:64]!r} is not known here; it may not have been received or answered yet")
        return study_answer(view)

    async def _from_store(self, question: Callable[[Store], Found]) -> Found:
        try:
            return await asyncio.to_thread(question, self._store)
        except CxrRayError as error:
            raise ApiProblem(503, str(error), {"Retry-After": _RETRY_SECONDS}) from None

    @api.get("/healthz", summary="Whether the service runs")
    async def healthz(self) -> dict[str, str]:
        """Answers as long as the ingress runs."""
        return {"status": "ok"}

    @api.get("/readyz", responses={503: PROBLEMS[503]}, summary="Whether the service can answer")
    async def readyz(self) -> dict[str, str]:
        """Answers once the network is loaded and warm and the store can be read."""
        identity, _ = await self._describe()
        await self._from_store(lambda store: store.studies(limit=1))
        return {"status": "ready", "model": identity.digest}


def build_graph(settings: GraphSettings, token: str | None) -> Application:
    """Bind the deployments; `token` is what clients have to bring, None where only this machine can reach the service."""
    settings = settings.model_copy(update={"bundle": storage.absolute(settings.bundle)})
    size = load_bundle(settings.bundle).require_images()
    queue = {"max_queued_requests": settings.max_queued}
    decoder = Decoder.options(  # type: ignore[attr-defined]
        num_replicas=settings.decoders,
        max_ongoing_requests=2,
        ray_actor_options={"num_cpus": 0.25},
        **queue,
    ).bind(size)
    network = Network.options(  # type: ignore[attr-defined]
        num_replicas=settings.replicas,
        # Batches fill only if as many requests may be under way.
        max_ongoing_requests=2 * settings.batch_size,
        ray_actor_options={"num_cpus": 0.5, "num_gpus": 1 if settings.gpu else 0},
        **queue,
    ).bind(settings)
    ingress = Ingress.options(  # type: ignore[attr-defined]
        max_ongoing_requests=4 * settings.max_queued, ray_actor_options={"num_cpus": 0.1}
    )
    return ingress.bind(decoder, network, settings, token)
