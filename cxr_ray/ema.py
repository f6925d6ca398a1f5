"""Averaged weights: an exponential moving average of a network over its optimiser steps.

The average of the last thousand steps or so is validated and kept instead of the last step's weights, whose validation AUC
goes up and down between epochs. Batch-norm statistics are averaged with the weights: those of the network itself would not
fit its averaged weights. torch's own `AveragedModel` copies the whole module; here it is a list of tensors, and validation
borrows the module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import torch
from torch import nn

from cxr_ray.errors import CxrRayError


class AveragedState(TypedDict):
    """What a checkpoint holds: updates made, and the average by the names of the module's parameters and buffers."""

    step: int
    average: dict[str, torch.Tensor]


class AveragedWeights:
    """Exponential moving average of the parameters and buffers of a module, on their devices and in their types.

    The first average is the module as it is. Floating-point tensors are averaged; others (a batch norm's count of batches)
    are copied. Under DDP every worker has the same weights, but batch-norm statistics of its own: before several workers
    validate the average, its buffers have to be made the same on all of them, within `applied`.

    Parameters
    ----------
    module
        Not wrapped by DDP or torch.compile, and already on its device.
    decay
        Weight of the old average in [0, 1). The first updates weigh less, ``(1 + step) / (10 + step)`` where `step` counts the
        updates before, so that the initial weights are soon forgotten.

    Attributes
    ----------
    step
        Updates made.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay of the averaged weights is {decay}; give a number of at least 0 and below 1")
        self.step = 0
        self._decay = decay
        self._module = module
        self._current = _tensors(module)
        self._average = {name: tensor.clone() for name, tensor in self._current.items()}
        averaged = [name for name, tensor in self._current.items() if tensor.is_floating_point()]
        copied = [name for name in self._current if name not in averaged]
        # Looked up once: walking a DenseNet's modules takes longer than the update itself.
        self._averaged = [self._average[name] for name in averaged], [self._current[name] for name in averaged]
        self._copied = [self._average[name] for name in copied], [self._current[name] for name in copied]
        self._is_applied = False

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's present weights; to be called after each optimiser step."""
        self._require_not_applied()
        decay = min(self._decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(*self._averaged, 1 - decay)
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)
        self.step += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the module for the time of a ``with``; afterwards, also on an exception, its own weights again.

        Values are exchanged and tensors stay where they are, so that optimisers, DDP and compiled graphs notice nothing. What
        is done to the module's tensors meanwhile is done to the average.

        Raises
        ------
        RuntimeError
            If the module was moved to another device since, or the average is applied already.
        """
        self._require_not_applied()
        self._require_same_tensors()
        self._exchange()
        self._is_applied = True
        try:
            yield
        finally:
            self._is_applied = False
            self._exchange()

    def state_dict(self) -> AveragedState:
        """What `load_state_dict` needs to go on; the tensors are the average's own, as with a module's `state_dict`."""
        self._require_not_applied()
        return {"step": self.step, "average": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: AveragedState) -> None:
        """Go on from a `state_dict`, whichever device its tensors are on.

        Raises
        ------
        CxrRayError
            If it is of another network; nothing is changed then.
        """
        self._require_not_applied()
        average = state["average"]
        for name in self._average.keys() | average.keys():
            own, given = (tuple(tensors[name].shape) if name in tensors else None for tensors in (self._average, average))
            if own != given:
                raise CxrRayError(
                    f"averaged weights: {name!r} has shape {given} in the checkpoint and {own} in the network; "
                    "resume with the preset and settings that the run began with"
                )
        for name, tensor in self._average.items():
            tensor.copy_(average[name])
        self.step = state["step"]

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, current in self._current.items():
            average = self._average[name]
            own = current.clone()
            current.copy_(average)
            average.copy_(own)

    def _require_not_applied(self) -> None:
        if self._is_applied:
            raise RuntimeError("the averaged weights are in the module; leave 'applied' first")

    def _require_same_tensors(self) -> None:
        for name, tensor in _tensors(self._module).items():
            if tensor.data_ptr() != self._current[name].data_ptr():
                raise RuntimeError(
                    f"{name!r} is another tensor than when its average began; move the module before averaging it"
                )


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, each once, without their gradients; they share memory with the module's."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}
