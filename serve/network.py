"""The network behind the service: one process a replica, batches that fill while it computes, an engine warm before it answers.

An answer carries the identity and the thresholds of the model that gave it: while one bundle replaces another, both answer.
"""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from ray import serve

from cxr_ray.bundle import load_bundle
from cxr_ray.clinical import ClinicalInputs
from cxr_ray.cpus import available_cpus
from cxr_ray.engines import EngineName, open_engine
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.heatmap import explain, overlay, warm_layer
from serve.batches import Batches
from serve.log_files import log_as_replica
from serve.logs import LogLevel, fields, raised_at
from serve.metrics import DriftWindow, NetworkMetrics
from serve.thresholds import checked_thresholds

_log = logging.getLogger(__name__)
# Pixels, clinical values, and the id of the request that they belong to.
_Asked = tuple[np.ndarray, ClinicalInputs, str]
_Given = tuple[list[float], int] | Exception


@dataclass(frozen=True)
class NetworkOptions:
    """How a bundle is run.

    Attributes
    ----------
    bundle
        Folder or URI.
    digest
        That of the bundle, so that another bundle at the same place is another deployment to Serve.
    engine
        What computes.
    threads
        CPU threads of a replica; None for the machine's CPUs, shared by `replicas`.
    drift_window
        Images whose inputs are compared with those of training.
    log_folder
        Of its log file; None for that of Ray's session.
    """

    bundle: str
    digest: str
    engine: EngineName
    threads: int | None
    replicas: int
    batch_size: int
    batch_wait: float
    gpu: bool
    drift_window: int
    log_folder: str | None
    log_level: LogLevel


@dataclass(frozen=True)
class ModelDescription:
    """Which model answers: its identity, its thresholds by finding, and the edge of the stored squares that it reads."""

    name: str
    version: str
    digest: str
    thresholds: dict[str, float]
    size: int
    engine: str


@dataclass(frozen=True)
class Scored:
    """Fourteen probabilities in NIH order, of one image, and the model they come from."""

    probabilities: list[float]
    model: ModelDescription
    batch: int


@dataclass(frozen=True)
class OtherSize:
    """The pixels were not of the size that this model reads, as happens while a bundle replaces another."""

    size: int


@serve.deployment
class Network:
    """Runs one bundle's network."""

    def __init__(self, options: NetworkOptions) -> None:
        log_as_replica(options.log_folder, options.log_level)
        threads = options.threads or (None if options.gpu else max(1, available_cpus() // options.replicas))
        self._bundle = bundle = load_bundle(options.bundle)
        described = bundle.description
        # What opens is warm: no client pays for a compilation.
        self._engine = open_engine(bundle, options.engine, threads=threads, batch_size=options.batch_size)
        self._model = ModelDescription(
            name=described.name,
            version=described.version,
            digest=described.digest,
            thresholds=dict(described.thresholds),
            size=bundle.require_images(),
            engine=self._engine.device,
        )
        window = DriftWindow(bundle.training_inputs, options.drift_window)
        shown = {name: str(getattr(self._model, name)) for name in ("name", "version", "digest", "engine")}
        self._metrics = NetworkMetrics(shown, window)
        self._counting = ThreadPoolExecutor(1, thread_name_prefix="counting")
        self._batches = Batches(self._answers, most=options.batch_size, wait=options.batch_wait)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take thresholds by finding, ``{"thresholds": {"Mass": 0.4}}``, in place of the bundle's; nothing is loaded again.

        Raises
        ------
        CxrRayError
            If a finding is not known, or a threshold not between 0 and 1.
        """
        thresholds = checked_thresholds(user_config.get("thresholds", {}))
        merged = {**self._bundle.description.thresholds, **thresholds}
        self._model = ModelDescription(**{**vars(self._model), "thresholds": merged})

    async def describe(self) -> ModelDescription:
        """Which model answers."""
        return self._model

    async def predict(self, pixels: np.ndarray, inputs: ClinicalInputs, request_id: str) -> Scored | OtherSize:
        """The probabilities of one image.

        Raises
        ------
        CxrRayError
            If the network fails; where, stands in the log under the request's id.
        """
        if pixels.shape != (self._model.size, self._model.size):
            return OtherSize(self._model.size)
        answer = await self._batches.ask((pixels, inputs, request_id))
        if isinstance(answer, Exception):
            # Not the exception itself: Serve logs what it says.
            raise CxrRayError(f"the network failed ({type(answer).__name__}) for request {request_id}")
        probabilities, batch = answer
        return Scored(probabilities, self._model, batch)

    async def heatmap(self, pixels: np.ndarray, inputs: ClinicalInputs, finding: str, shown: np.ndarray) -> bytes:
        """What speaks for a finding, over `shown` (uint8, of any shape); PNG."""
        heat = await asyncio.to_thread(explain, self._bundle, pixels, inputs, FINDINGS.index(finding))
        _, picture = cv2.imencode(".png", cv2.cvtColor(overlay(shown, heat), cv2.COLOR_RGB2BGR))
        return picture.tobytes()

    async def heat(self, pixels: np.ndarray, inputs: ClinicalInputs, finding: str, shape: tuple[int, int]) -> bytes:
        """What `heatmap` lays over a picture of this shape (height, width); PNG with transparency."""
        found = await asyncio.to_thread(explain, self._bundle, pixels, inputs, FINDINGS.index(finding))
        _, picture = cv2.imencode(".png", cv2.cvtColor(warm_layer(found, shape), cv2.COLOR_RGBA2BGRA))
        return picture.tobytes()

    def _answers(self, items: list[_Asked]) -> list[_Given]:
        request_ids = [request_id for *_, request_id in items]
        started = time.perf_counter()
        try:
            pixels = np.stack([pixels for pixels, *_ in items])
            inputs = ClinicalInputs.concatenate([inputs for _, inputs, _ in items])
            predicted = self._engine.predict(pixels, inputs)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others of the batch have nothing to do with it
            if len(items) > 1:
                return [answer for item in items for answer in self._answers([item])]
            said = fields(request_ids=request_ids, error=type(error).__name__, at=raised_at(error))
            _log.error("the network failed", extra=said)
            return [error]
        seconds = time.perf_counter() - started
        # Nobody's answer waits for the counting.
        self._counting.submit(self._count, request_ids, pixels, inputs, predicted, seconds)
        return [([float(value) for value in row], len(items)) for row in predicted]

    def _count(
        self, request_ids: list[str], pixels: np.ndarray, inputs: ClinicalInputs, predicted: np.ndarray, seconds: float
    ) -> None:
        said = fields(
            request_ids=request_ids, batch=len(request_ids), ms=round(1000 * seconds, 1), model=self._model.digest[:12]
        )
        _log.info("inference", extra=said)
        try:
            self._metrics.answered(pixels, inputs, predicted, self._model.thresholds, seconds)
        except Exception:  # noqa: BLE001 - what cannot be counted was answered all the same
            _log.exception("a batch cannot be counted")
