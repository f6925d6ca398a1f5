"""Engines: what runs a bundle's network on a batch, and which of them is opened.

PyTorch computes everything, on GPUs too. On a CPU OpenVINO computes the networks that read images faster, and in bfloat16
where the processor has it. None is believed: each is first asked the bundle's probe, whose answers were written when the bundle
was. `open_engine` takes the fastest that gives them, and hands it over warm.
"""

import logging
from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np
import torch

from cxr_ray import clinical, openvino_engine
from cxr_ray.bundle import Bundle
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.openvino_engine import OpenVinoEngine
from cxr_ray.probe import TOLERANCE
from cxr_ray.torch_engine import TorchEngine
from cxr_ray.train_settings import Views

EngineName = Literal["auto", "torch", "openvino"]
_log = logging.getLogger(__name__)


class Engine(Protocol):
    """Runs the network of one bundle.

    Attributes
    ----------
    warnings
        Why faster engines or arithmetic were not taken; empty where nothing went wrong.
    """

    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        """The engine, "torch" or "openvino"."""

    @property
    def precision(self) -> str:
        """The arithmetic, "float32" or "bf16"."""

    @property
    def device(self) -> str:
        """What computes, and in which arithmetic."""

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

    def warm_up(self, batch_size: int) -> None:
        """Pay now for what the first batches of up to so many images would have to wait for."""


# An engine and its arithmetic.
Candidate = tuple[type[OpenVinoEngine] | type[TorchEngine], str]


def open_engine(
    bundle: Bundle, name: EngineName = "auto", *, threads: int | None = None, tta: Views = "none", batch_size: int = 16
) -> Engine:
    """The engine for a bundle: the fastest that answers its probe within `TOLERANCE`, warm.

    Parameters
    ----------
    name
        "auto" chooses among all; an engine that is named is opened or refused.
    threads
        CPU threads of this process; None for as many as there are CPUs.
    tta
        Views of each image that are averaged; only torch computes more than one.
    batch_size
        Images that will be asked for at once, at most: no such batch has to wait for a compilation.

    Returns
    -------
    Engine
        What was refused on the way is in its `warnings`, and logged.

    Raises
    ------
    UsageError
        If the engine that is named does not compute this network, or these views.
    CxrRayError
        If no engine, or not the one that is named, gives the answers of the probe.
    """
    if threads is not None:
        # Whichever engine is taken: heatmaps are torch's.
        torch.set_num_threads(threads)
    reason = _openvino_cannot(bundle, tta)
    if name == "openvino" and reason:
        raise UsageError(f"engine 'openvino' does not compute bundle {bundle.description.name}: {reason}; use engine torch")
    refused: list[str] = []
    for kind, precision in _candidates(name, with_openvino=reason is None):
        try:
            engine: Engine = kind(bundle, threads=threads, precision=precision)
            check(engine, bundle)
        except CxrRayError as error:
            _log.warning("%s", error)
            refused.append(str(error))
            continue
        if tta != "none":
            engine = TorchEngine(bundle, threads=threads, tta=tta, precision=engine.precision)
        engine.warnings = tuple(refused)
        engine.warm_up(batch_size)
        return engine
    raise CxrRayError(refused[-1])


def check(engine: Engine, bundle: Bundle) -> float:
    """The largest difference between an engine's answers to the bundle's probe and those that the bundle holds.

    Raises
    ------
    CxrRayError
        If it is above `TOLERANCE`.
    """
    probe = bundle.probe
    difference = probe.largest_difference(engine.predict(probe.pixels, probe.inputs))
    if difference > TOLERANCE:
        raise CxrRayError(
            f"bundle {bundle.description.name} {bundle.description.version}: {engine.name} in {engine.precision} answers its "
            f"probe with a difference of up to {difference:.3f}, and {TOLERANCE} is allowed; use another engine, or train again"
        )
    return difference


def _openvino_cannot(bundle: Bundle, tta: Views) -> str | None:
    """Why a bundle is torch's alone; None where it is not."""
    if bundle.description.size is None:
        return "it reads no image"
    if bundle.model.trees() is not None:
        return "it has boosted trees"
    return None if tta == "none" else f"views {tta!r} are to be averaged"


def _candidates(name: EngineName, *, with_openvino: bool) -> Iterator[Candidate]:
    """What may be taken, the fastest first."""
    on_gpu = torch.cuda.is_available()
    if name == "openvino" or (name == "auto" and with_openvino and not on_gpu):
        yield from ((OpenVinoEngine, precision) for precision in openvino_engine.precisions())
    if name != "openvino":
        if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False):
            yield TorchEngine, "bf16"
        yield TorchEngine, "float32"
