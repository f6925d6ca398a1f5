"""What Prometheus reads of the service; docs/watching.md has the table of names.

Ray gathers what its processes count and shows it on each node's metrics port, every name with ``ray_`` before it; Serve adds
which deployment and replica counted. Labels are names of routes, stages, findings and models: never anything that a client
sent. A gauge that is not set again is forgotten, so a thread of each replica sets them every few seconds.
"""

import logging
import operator
import threading
from collections import deque
from collections.abc import Callable
from functools import reduce

import numpy as np
from ray.serve.metrics import Counter, Gauge, Histogram

from cxr_ray.clinical import ClinicalInputs
from cxr_ray.findings import FINDINGS
from cxr_ray.input_profile import InputProfile, drift, profile
from serve.trace import FinishedRequest

# Seconds: a cached answer takes milliseconds, an overloaded service a minute.
_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_IMAGES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
_GAUGE_SECONDS = 5.0
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_log = logging.getLogger(__name__)


class GaugeThread:
    """Calls `set_gauges` every few seconds until the process ends or `stop` is called."""

    def __init__(self, set_gauges: Callable[[], None]) -> None:
        self._set, self._stopped = set_gauges, threading.Event()
        threading.Thread(target=self._run, name="gauges", daemon=True).start()

    def stop(self) -> None:
        """Set nothing more."""
        self._stopped.set()

    def _run(self) -> None:
        while True:
            try:
                self._set()
            except Exception:  # noqa: BLE001 - the next time may go better
                _log.exception("the gauges cannot be set")
            if self._stopped.wait(_GAUGE_SECONDS):
                return


class RequestMetrics:
    """Counts the requests of one ingress replica.

    Parameters
    ----------
    waiting
        How many images wait for a decoder.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._waiting, self._under_way = waiting, 0
        self._requests = Counter("cxr_requests_total", "Requests answered.", ("route", "method", "status"))
        self._seconds = Histogram("cxr_request_seconds", "From a request's first byte to its answer.", _SECONDS, ("route",))
        self._stages = stage_seconds()
        self._refused = Counter("cxr_refused_images_total", "Images refused, by HTTP status.", ("status",))
        self._decoder_queue = Gauge("cxr_decoder_queue_images", "Images that wait for a decoder.")
        self._at_once = Gauge("cxr_requests_under_way", "Requests that are being received or answered.")
        self._gauges = GaugeThread(self._set_gauges)

    def close(self) -> None:
        """Set no gauge any more."""
        self._gauges.stop()

    def started(self) -> None:
        """See `RequestWatch`."""
        self._under_way += 1

    def finished(self, request: FinishedRequest) -> None:
        """See `RequestWatch`."""
        self._under_way -= 1
        method = request.method if request.method in _METHODS else "other"
        self._requests.inc(1, {"route": request.route, "method": method, "status": str(request.status)})
        self._seconds.observe(request.seconds, {"route": request.route})
        for stage, seconds in request.trace.stages:
            self._stages.observe(seconds, {"stage": stage})
        for status in request.trace.refusals:
            self._refused.inc(1, {"status": str(status)})

    def _set_gauges(self) -> None:
        self._decoder_queue.set(self._waiting())
        self._at_once.set(self._under_way)


def stage_seconds() -> Histogram:
    """The time that stages take: those of requests, and inference alone."""
    return Histogram("cxr_stage_seconds", "From the beginning to the end of a stage.", _SECONDS, ("stage",))


class DriftWindow:
    """What the network was shown of late, and how far it lies from what it was shown in training.

    Parameters
    ----------
    reference
        The profile of the training split; nothing is told where it is empty.
    images
        So many are looked at, and at least half of them before anything is told: of fewer, the index means nothing.
    """

    def __init__(self, reference: InputProfile, images: int) -> None:
        self._reference, self._most = reference, images
        self._known = any(any(counts) for counts in vars(reference).values())
        self._profiles: deque[tuple[int, InputProfile]] = deque()
        self._images = 0

    def add(self, pixels: np.ndarray, inputs: ClinicalInputs) -> None:
        """Take a batch (uint8, shape (N, size, size)) in, and as many of the oldest out."""
        if not self._known:
            return
        self._profiles.append((len(inputs), profile(pixels, inputs)))
        self._images += len(inputs)
        while self._images - self._profiles[0][0] >= self._most:
            self._images -= self._profiles.popleft()[0]

    def drift(self) -> dict[str, float]:
        """The population stability index of each quantity; empty while there is nothing to tell."""
        if not self._known or 2 * self._images < self._most:
            return {}
        # A copy is taken in one step: another thread adds to it.
        seen = reduce(operator.add, [profiled for _, profiled in list(self._profiles)])
        return drift(self._reference, seen)


class NetworkMetrics:
    """Counts the answers of one replica of a network.

    Parameters
    ----------
    model
        Name, version, digest and engine of the bundle that answers.
    window
        What is known of the inputs.
    """

    def __init__(self, model: dict[str, str], window: DriftWindow) -> None:
        self._model, self._window = model, window
        self._stages = stage_seconds()
        self._batches = Counter("cxr_batches_total", "Batches computed.")
        self._images = Counter("cxr_images_total", "Images computed.")
        self._batch = Histogram("cxr_batch_images", "Images of a batch.", _IMAGES)
        self._answers = Counter("cxr_answers_total", "Answers to a finding.", ("finding", "positive"))
        self._info = Gauge("cxr_model_info", "Always 1: the bundle that answers.", tuple(model))
        self._drift = Gauge(
            "cxr_input_drift_psi", "Population stability index of the last inputs against the training split.", ("quantity",)
        )
        self._gauges = GaugeThread(self._set_gauges)

    def close(self) -> None:
        """Set no gauge any more."""
        self._gauges.stop()

    def answered(
        self,
        pixels: np.ndarray,
        inputs: ClinicalInputs,
        probabilities: np.ndarray,
        thresholds: dict[str, float],
        seconds: float,
    ) -> None:
        """Count a batch: pixels uint8 (N, size, size), probabilities (N, 14)."""
        images = len(probabilities)
        self._batches.inc(1)
        self._images.inc(images)
        self._batch.observe(images)
        self._stages.observe(seconds, {"stage": "inference"})
        limits = np.array([thresholds[name] for name in FINDINGS])
        for name, positive in zip(FINDINGS, (probabilities >= limits).sum(axis=0).tolist(), strict=True):
            for answer, count in (("true", positive), ("false", images - positive)):
                if count:
                    self._answers.inc(count, {"finding": name, "positive": answer})
        self._window.add(pixels, inputs)

    def _set_gauges(self) -> None:
        self._info.set(1, self._model)
        for quantity, index in self._window.drift().items():
            self._drift.set(index, {"quantity": quantity})
