"""PyTorch as an engine: it computes every network, and what the others compute is held against it.

On a CPU it runs the network as it is. On a GPU launching the hundreds of small kernels of a DenseNet takes longer than
computing them, so that the batch sizes that are warmed up are captured as CUDA graphs, which are launched as one.
"""

import threading
from collections.abc import Callable

import numpy as np
import torch

from cxr_ray import clinical
from cxr_ray.bundle import Bundle
from cxr_ray.train_settings import Views
from cxr_ray.training import probabilities

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Passes before a capture: cuDNN chooses its kernels, and allocations settle.
_PASSES_BEFORE_CAPTURE = 3


class TorchEngine:
    """PyTorch on a GPU where there is one, else on the CPU.

    Parameters
    ----------
    threads
        CPU threads of this process; None leaves torch's own choice.
    tta
        Views of each image that are averaged.
    precision
        "float32", or "bf16" for autocast.
    """

    name = "torch"

    def __init__(self, bundle: Bundle, *, threads: int | None = None, tta: Views = "none", precision: str = "float32") -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.precision = precision
        self.warnings: tuple[str, ...] = ()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._bundle = bundle
        self._model = bundle.model.to(self._device)
        self._tta: Views = tta
        self._captured: dict[int, _CapturedPass] = {}

    @property
    def device(self) -> str:
        """What computes, and in which arithmetic."""
        if self._device.type == "cuda":
            return f"{torch.cuda.get_device_name(self._device)} ({self.precision})"
        return f"CPU, threads: {torch.get_num_threads()} ({self.precision})"

    def predict(self, pixels: np.ndarray, inputs: clinical.ClinicalInputs) -> np.ndarray:
        """See `cxr_ray.engines.Engine.predict`."""
        encoded = torch.from_numpy(clinical.encode(inputs, self._bundle.statistics, self._bundle.layout))
        squares = torch.from_numpy(np.array(pixels))
        fitting = min((size for size in self._captured if size >= len(squares)), default=None)
        if fitting is not None:
            return self._captured[fitting](squares, encoded)
        return self._forward(squares.to(self._device), encoded.to(self._device)).cpu().numpy()

    def warm_up(self, batch_size: int) -> None:
        """Pay for what the first batches would: kernels chosen, memory taken, and on a GPU graphs of all powers of two."""
        largest = 1 << (batch_size - 1).bit_length()
        size, width = self._bundle.description.size or 0, self._bundle.layout.width
        for images in (1 << power for power in range(largest.bit_length())):
            given = torch.zeros((images, size, size), dtype=torch.uint8), torch.zeros((images, width))
            if self._device.type == "cuda":
                self._captured[images] = _CapturedPass(self._forward, *(tensor.to(self._device) for tensor in given))
            elif images in (1, largest):
                self._forward(*given)

    def _forward(self, squares: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        return probabilities(self._model, squares, encoded, self.precision, size=self._bundle.input_size, tta=self._tta)


class _CapturedPass:
    """One forward pass as a CUDA graph: it reads and writes the same memory each time, so one at a time.

    Parameters
    ----------
    forward
        Stored squares and encoded clinical numbers to probabilities, on the device.
    squares, encoded
        On the device, of the batch size that is captured; kept as the graph's inputs.
    """

    def __init__(self, forward: Forward, squares: torch.Tensor, encoded: torch.Tensor) -> None:
        self._squares, self._encoded = squares, encoded
        self._lock = threading.Lock()
        # As torch.cuda.graphs asks for: not on the default stream, and waited for on both sides.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_PASSES_BEFORE_CAPTURE):
                forward(squares, encoded)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # A heatmap may be computed in another thread meanwhile, which is none of this graph's business.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._answer = forward(squares, encoded)

    def __call__(self, squares: torch.Tensor, encoded: torch.Tensor) -> np.ndarray:
        """Probabilities of a batch of at most the captured size; what is left over of an earlier batch is cut off."""
        number = len(squares)
        with self._lock:
            self._squares[:number].copy_(squares)
            self._encoded[:number].copy_(encoded)
            self._graph.replay()
            return self._answer[:number].cpu().numpy()
