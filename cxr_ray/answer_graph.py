"""The whole way from stored squares and clinical numbers to probabilities as one module, for what compiles or exports it.

Scaling to the network's size and to its range is inside, so that no one who runs the module elsewhere has to do it again, and
does it otherwise. A network gets only the inputs that it reads.
"""

import numpy as np
import torch
from torch import nn

from cxr_ray import vision
from cxr_ray.bundle import Bundle
from cxr_ray.presets.preset import Network

# Not 1, which tracers take for a constant.
_EXAMPLES = 2


class AnswerGraph(nn.Module):
    """Inputs to probabilities (float32, shape (N, 14), NIH order), whatever N.

    Attributes
    ----------
    shapes
        The inputs that it reads, in this order, and their shapes without N: "pixels", uint8, and "clinical", float32.
    """

    shapes: dict[str, tuple[int, ...]]

    def __init__(self, network: Network, input_size: int | None) -> None:
        super().__init__()
        self.network = network.eval()
        self.input_size = input_size

    def examples(self) -> tuple[torch.Tensor, ...]:
        """Inputs to trace it with."""
        dtypes = {"pixels": torch.uint8, "clinical": torch.float32}
        return tuple(torch.zeros((_EXAMPLES, *shape), dtype=dtypes[name]) for name, shape in self.shapes.items())

    def given(self, pixels: np.ndarray, encoded: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs that it reads, by name and in order, of stored squares and encoded clinical numbers."""
        both = {"pixels": pixels, "clinical": encoded}
        return {name: np.ascontiguousarray(both[name]) for name in self.shapes}

    def _answer(self, images: torch.Tensor, clinical: torch.Tensor) -> torch.Tensor:
        return self.network(images, clinical).float().sigmoid()


class _OfBoth(AnswerGraph):
    def forward(self, pixels: torch.Tensor, clinical: torch.Tensor) -> torch.Tensor:
        return self._answer(vision.as_input(pixels, self.input_size), clinical)


class _OfFilms(AnswerGraph):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        images = vision.as_input(pixels, self.input_size)
        return self._answer(images, images.new_zeros((images.shape[0], 0)))


class _OfNumbers(AnswerGraph):
    def forward(self, clinical: torch.Tensor) -> torch.Tensor:
        return self._answer(clinical.new_zeros((clinical.shape[0], 3, 0, 0)), clinical)


def answer_graph(bundle: Bundle) -> AnswerGraph:
    """The graph of a bundle's network, which it shares."""
    size, width = bundle.description.size, bundle.layout.width
    kind = _OfNumbers if size is None else _OfBoth if width else _OfFilms
    graph = kind(bundle.model, bundle.input_size)
    shapes = {"pixels": None if size is None else (size, size), "clinical": (width,) if width else None}
    graph.shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    return graph
