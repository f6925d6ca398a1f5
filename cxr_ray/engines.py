"""Engines: what runs a bundle's network on a batch."""

from typing import Protocol

import numpy as np
import torch

from cxr_ray import clinical
from cxr_ray.bundle import Bundle
from cxr_ray.train_settings import Views
from cxr_ray.training import probabilities


class Engine(Protocol):
    """Runs the network of one bundle."""

    def predict(self, pixels: np.ndarray, inputs: clinical.ClinicalInputs) -> np.ndarray:
        """Probabilities of radiographs.

        Parameters
        ----------
        pixels
            Stored squares, uint8, shape (N, size, size); of shape (N, 0, 0) for a network that reads no images.
        inputs
            Their clinical values.

        Returns
        -------
        numpy.ndarray
            float32, shape (N, 14), NIH order.
        """


class TorchEngine:
    """PyTorch on a GPU in bfloat16 where there is one, else on the CPU in float32.

    Parameters
    ----------
    threads
        CPU threads of this process; None leaves torch's own choice.
    tta
        Views of each image that are averaged.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, tta: Views = "none") -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._precision = "bf16" if self._device.type == "cuda" else "float32"
        self._model = bundle.model.to(self._device)
        self._statistics = bundle.statistics
        self._layout = bundle.layout
        self._input_size = bundle.input_size
        self._tta: Views = tta

    def predict(self, pixels: np.ndarray, inputs: clinical.ClinicalInputs) -> np.ndarray:
        """See `Engine.predict`."""
        encoded = torch.from_numpy(clinical.encode(inputs, self._statistics, self._layout)).to(self._device)
        squares = torch.from_numpy(np.array(pixels)).to(self._device)
        predicted = probabilities(self._model, squares, encoded, self._precision, size=self._input_size, tta=self._tta)
        return predicted.cpu().numpy()
