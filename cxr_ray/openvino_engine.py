"""OpenVINO as an engine: two to four times as fast as PyTorch on a CPU, for networks that read images.

The network is converted from PyTorch's in memory, so that a bundle needs no second file of weights. This is also the one place
that imports OpenVINO, whose Python package reports its use to its makers over the network unless its telemetry is absent.
"""

import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cxr_ray import clinical
from cxr_ray.answer_graph import AnswerGraph, answer_graph
from cxr_ray.bundle import Bundle
from cxr_ray.cpus import available_cpus
from cxr_ray.errors import CxrRayError

if TYPE_CHECKING:
    import openvino

# On a CPU larger batches are no faster an image. All smaller ones are compiled at the start, each once.
IMAGES_AT_ONCE = 8
_PRECISIONS = {"bf16": "bf16", "float32": "f32"}


def runtime() -> Any:
    """The module `openvino`, imported without its telemetry.

    Raises
    ------
    CxrRayError
        If it is not installed.
    """
    # A module that is None counts as absent, and OpenVINO then uses its own stub.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino  # noqa: PLC0415 - takes a while, and not every command needs it
    except ImportError as error:
        raise CxrRayError(f"openvino cannot be imported ({error}); install it with 'pip install openvino'") from None
    return openvino


def precisions() -> tuple[str, ...]:
    """Arithmetics to try, the fastest first: bf16 only where the processor multiplies it natively."""
    try:
        capabilities = runtime().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except CxrRayError:
        # Who then opens an engine is told.
        return ("float32",)
    return ("bf16", "float32") if "BF16" in capabilities else ("float32",)


def convert(bundle: Bundle) -> "openvino.Model":
    """The `AnswerGraph` of a bundle as a model of OpenVINO, for batches of any size.

    Raises
    ------
    CxrRayError
        If OpenVINO has no counterpart for a part of the network.
    """
    openvino = runtime()
    graph = answer_graph(bundle)
    examples = graph.examples()
    shapes = [openvino.PartialShape([-1, *shape]) for shape in graph.shapes.values()]
    threads = torch.get_num_threads()
    try:
        # One pass over two images; what a second thread would bring is lost in waking it up.
        torch.set_num_threads(1)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(graph, examples, check_trace=False)
            model = openvino.convert_model(traced, example_input=examples, input=shapes)
    except Exception as error:  # noqa: BLE001 - the converter raises kinds of its own, and of torch
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CxrRayError(f"openvino cannot convert {bundle.description.name} ({reason}); use engine torch") from None
    finally:
        torch.set_num_threads(threads)
    for port, name in zip(model.inputs, graph.shapes, strict=True):
        port.get_tensor().set_names({name})
    model.output(0).get_tensor().set_names({"probabilities"})
    return model


class OpenVinoEngine:
    """OpenVINO on the CPU.

    Parameters
    ----------
    precision
        "bf16" or "float32".
    threads
        Of this engine; None for as many as there are CPUs.

    Raises
    ------
    CxrRayError
        If OpenVINO is not installed, or cannot convert the network.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, *, precision: str, threads: int | None = None) -> None:
        self.precision = precision
        self.warnings: tuple[str, ...] = ()
        self._threads = threads or available_cpus()
        self._bundle = bundle
        self._graph: AnswerGraph = answer_graph(bundle)
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
            "INFERENCE_NUM_THREADS": self._threads,
            # Each replica would take the first cores of the machine, and leave the others idle.
            "ENABLE_CPU_PINNING": False,
        }
        self._request = runtime().Core().compile_model(convert(bundle), "CPU", options).create_infer_request()
        # A request holds one batch; predictions may be asked for in several threads.
        self._lock = threading.Lock()

    @property
    def device(self) -> str:
        """What computes, and in which arithmetic."""
        return f"CPU by OpenVINO, threads: {self._threads} ({self.precision})"

    def predict(self, pixels: np.ndarray, inputs: clinical.ClinicalInputs) -> np.ndarray:
        """See `cxr_ray.engines.Engine.predict`."""
        encoded = clinical.encode(inputs, self._bundle.statistics, self._bundle.layout)
        parts = [
            self._answered(pixels[first : first + IMAGES_AT_ONCE], encoded[first : first + IMAGES_AT_ONCE])
            for first in range(0, len(encoded), IMAGES_AT_ONCE)
        ]
        return np.concatenate([np.empty((0, len(self._bundle.description.findings)), dtype=np.float32), *parts])

    def _answered(self, pixels: np.ndarray, encoded: np.ndarray) -> np.ndarray:
        with self._lock:
            answer = self._request.infer(list(self._graph.given(pixels, encoded).values()))
            return np.array(answer[0], dtype=np.float32)

    def warm_up(self, batch_size: int) -> None:
        """Compute a batch of every size once: kernels are generated for each size when it first comes."""
        size, width = self._bundle.require_images(), self._bundle.layout.width
        for images in range(1, min(batch_size, IMAGES_AT_ONCE) + 1):
            self._answered(np.zeros((images, size, size), dtype=np.uint8), np.zeros((images, width), dtype=np.float32))
