"""The state of a run that a checkpoint holds: how far it is, the weights, and all that the next step depends on."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from ray.train import Checkpoint
from torch import nn

from cxr_ray.ema import AveragedWeights
from cxr_ray.epoch_order import Segment
from cxr_ray.errors import CxrRayError
from cxr_ray.train_events import EpochResult

STATE = "state.pt"
VALIDATION = "validation.json"


@dataclass(frozen=True)
class RunPosition:
    """How far a run is.

    Order and random draws follow from seed and position, so that nothing else of them has to be kept.

    Attributes
    ----------
    epoch
        Epochs that are done.
    done
        What is done of the next one: nothing, but for a checkpoint that was taken in its middle.
    losses
        Mean training loss of each part that is done of it.
    val_losses, val_aucs
        Of each epoch that is done; learning rate schedule and patience follow from them.
    last
        Figures of the last epoch that is done.
    """

    epoch: int = 0
    done: tuple[Segment, ...] = ()
    losses: tuple[float, ...] = ()
    val_losses: tuple[float, ...] = ()
    val_aucs: tuple[float, ...] = ()
    last: EpochResult | None = None

    @property
    def images(self) -> int:
        """Images of the unfinished epoch that are done."""
        return sum(part.images for part in self.done)

    def within(self, part: Segment, loss: float) -> "RunPosition":
        """The position when `part` of the next epoch is done as well, with this mean loss."""
        return replace(self, done=(*self.done, part), losses=(*self.losses, loss))

    def epoch_loss(self, loss: float, images: int) -> float:
        """Mean loss of the next epoch when the rest of it, so many images, had this one."""
        parts = [*zip(self.losses, (part.images for part in self.done), strict=True), (loss, images)]
        return sum(mean * count for mean, count in parts if count) / sum(count for _, count in parts)

    def after_epoch(self, result: EpochResult) -> "RunPosition":
        """The position at the next epoch's beginning."""
        # Without a positive the validation split cannot rank epochs: all are then worth the same.
        auc = result.val_auc if math.isfinite(result.val_auc) else 0.0
        return RunPosition(
            self.epoch + 1,
            val_losses=(*self.val_losses, result.val_loss),
            val_aucs=(*self.val_aucs, auc),
            last=result,
        )


@dataclass(frozen=True)
class Trained:
    """What training changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    averaged: AveragedWeights | None

    def save(self, folder: Path, position: RunPosition, validation: Mapping[str, object] | None) -> None:
        """Write a checkpoint's files; `validation` is None in the middle of an epoch."""
        state = {
            "position": asdict(position),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else None,
        }
        torch.save(state, folder / STATE)
        if validation is not None:
            (folder / VALIDATION).write_text(json.dumps(validation))

    def restore(self, checkpoint: Checkpoint) -> RunPosition:
        """Take everything from a checkpoint.

        Raises
        ------
        CxrRayError
            If it is of another network or other settings.
        """
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if (self.averaged is None) != (state["averaged"] is None):
                raise ValueError("averaged weights")
            if self.averaged is not None:
                self.averaged.load_state_dict(state["averaged"])
        except (KeyError, ValueError, RuntimeError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise CxrRayError(
                f"checkpoint {checkpoint.path}: is of another network or other settings ({first}); resume with those of the run"
            ) from None
        held = state["position"]
        done = tuple(Segment(**part) for part in held["done"])
        last = EpochResult(**held["last"]) if held["last"] is not None else None
        return RunPosition(held["epoch"], done, tuple(held["losses"]), tuple(held["val_losses"]), tuple(held["val_aucs"]), last)


@contextlib.contextmanager
def judged(model: nn.Module, folder: Path, ema: float) -> Iterator[nn.Module]:
    """The model with the weights of a checkpoint that were validated: the averaged ones where there are any."""
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    if state["averaged"] is None:
        yield model
        return
    averaged = AveragedWeights(model, ema)
    averaged.load_state_dict(state["averaged"])
    with averaged.applied():
        yield model
