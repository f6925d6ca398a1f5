"""The probe of a bundle: a few made-up radiographs, and what PyTorch answers to them in float32 on a CPU.

Whatever else computes a bundle's network, another engine, another arithmetic, an exported file, another processor, is first
asked the same, and has to give the same probabilities within `TOLERANCE`. The images are smooth random fields with the mean and
the spread of a film, not patients' pixels: a bundle may be passed on.
"""

from dataclasses import dataclass, fields, replace

import cv2
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import nn

from cxr_ray.bundle_description import BundleDescription
from cxr_ray.clinical import ClinicalInputs, ClinicalStatistics, PastVisits, encode, from_request
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.training import probabilities

# Largest difference between probabilities that counts as the same answer.
TOLERANCE = 0.01
_SEED = 14
# Cells an edge of the fields that are added up, and their weights: the body, its parts, and something like ribs.
_FIELDS = ((3, 1.0), (9, 0.5), (27, 0.2))
# Of the grey of a film (0..255), about that of ImageNet, which networks are scaled by.
_MEAN_GREY, _GREY_SPREAD = 115.0, 57.0


@dataclass(frozen=True)
class Probe:
    """Made-up radiographs and their probabilities.

    Attributes
    ----------
    pixels
        Stored squares, uint8, shape (N, size, size); (N, 0, 0) for a network that reads no images.
    inputs
        Clinical values: nothing known, a first visit, findings of earlier visits, two visits known in full.
    probabilities
        float32, shape (N, 14), NIH order.
    """

    pixels: np.ndarray
    inputs: ClinicalInputs
    probabilities: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def largest_difference(self, answered: np.ndarray) -> float:
        """Between these probabilities and others (float32, shape (N, 14)); infinite where one is no number."""
        difference = float(np.abs(answered - self.probabilities).max())
        return difference if np.isfinite(difference) else np.inf

    def to_bytes(self) -> bytes:
        """The content of a safetensors file."""
        return save({**_tensors(self.pixels, self.inputs), "probabilities": self.probabilities})


def make_probe(model: nn.Module, description: BundleDescription) -> Probe:
    """The probe of a network that was just trained.

    Parameters
    ----------
    model
        On the CPU; in evaluation mode afterwards.

    Raises
    ------
    CxrRayError
        If the statistics of the description are not usable.
    """
    inputs = _patients()
    pixels = _films(len(inputs), description.size or 0)
    encoded = encode(inputs, ClinicalStatistics.from_json(description.statistics), description.layout)
    given = torch.from_numpy(pixels), torch.from_numpy(encoded)
    answered = probabilities(model, *given, "float32", size=description.input_size)
    return Probe(pixels, inputs, answered.numpy())


def read_probe(data: bytes, description: BundleDescription, name: str) -> Probe:
    """Read what `Probe.to_bytes` gave.

    Raises
    ------
    CxrRayError
        If it is of another network or format.
    """
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CxrRayError(f"{name}: cannot be read ({str(error)[:200]!r}); copy the bundle again") from None
    count, size = len(_patients()), description.size or 0
    expected = _tensors(np.empty((count, size, size), dtype=np.uint8), _patients())
    expected["probabilities"] = np.empty((count, len(FINDINGS)), dtype=np.float32)
    for tensor in sorted(expected.keys() | tensors.keys()):
        held = tensors.get(tensor)
        wanted = expected.get(tensor)
        if held is None or wanted is None or held.shape != wanted.shape or held.dtype != wanted.dtype:
            raise CxrRayError(f"{name}: {tensor} does not fit a network of this description; train again")
    past = PastVisits(*(tensors[f"past.{field.name}"] for field in fields(PastVisits)))
    known = {field.name: tensors[f"inputs.{field.name}"] for field in fields(ClinicalInputs) if field.name != "past"}
    return Probe(tensors["pixels"], ClinicalInputs(**known, past=past), tensors["probabilities"])


def _tensors(pixels: np.ndarray, inputs: ClinicalInputs) -> dict[str, np.ndarray]:
    past = inputs.past or PastVisits.unknown(len(inputs))
    return {
        "pixels": pixels,
        **{f"inputs.{name}": np.ascontiguousarray(values) for name, values in vars(inputs).items() if name != "past"},
        **{f"past.{name}": np.ascontiguousarray(values) for name, values in vars(past).items()},
    }


def _patients() -> ClinicalInputs:
    nothing, _ = from_request(None, None, None, None)
    first, _ = from_request(63, "F", "PA", [])
    some, _ = from_request(31, "M", "AP", ["Mass", "Hernia"])
    many, _ = from_request(78, "M", "PA", ["Effusion", "Infiltration", "Pneumothorax"])
    shares = many.ever / 2
    latest = np.stack([many.ever, np.zeros_like(many.ever), np.zeros_like(many.ever)], axis=1)
    past = replace(
        PastVisits.none_before(1),
        count=np.array([2], dtype=np.float32),
        age_gap=np.array([1], dtype=np.float32),
        fraction=shares,
        decayed_80=shares,
        decayed_50=shares,
        no_finding=np.array([0.5], dtype=np.float32),
        ap=np.array([0.5], dtype=np.float32),
        last=latest,
        last_ap=np.array([[1, 0, np.nan]], dtype=np.float32),
    )
    return ClinicalInputs.concatenate([nothing, first, some, replace(many, past=past)])


def _films(count: int, size: int) -> np.ndarray:
    """Smooth fields of different kinds; uint8, shape (count, size, size)."""
    if not size:
        return np.empty((count, 0, 0), dtype=np.uint8)
    random = np.random.Generator(np.random.PCG64(_SEED))
    films = np.empty((count, size, size), dtype=np.uint8)
    for film in films:
        field = np.zeros((size, size))
        for cells, weight in _FIELDS:
            field += weight * cv2.resize(random.standard_normal((cells, cells)), (size, size), interpolation=cv2.INTER_CUBIC)
        field = (field - field.mean()) / field.std()
        film[:] = np.clip(np.rint(_MEAN_GREY + _GREY_SPREAD * field), 0, 255)
    return films
