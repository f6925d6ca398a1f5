"""The training step: schedule, optimiser, one step, and scoring a batch.

Nothing here knows of Ray: the step runs, and can be measured, wherever torch is.
"""

import contextlib
import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cxr_ray import vision
from cxr_ray.augmentation import augment, views
from cxr_ray.ema import AveragedWeights
from cxr_ray.losses import Loss
from cxr_ray.presets.preset import Network
from cxr_ray.train_settings import Schedule, TrainSettings, Views

# A plateau is an epoch without a better validation loss after one that was already no better (CheXNet's patience of 1).
_PLATEAU_PATIENCE = 1
_PLATEAU_FACTOR = 0.1
_MOMENTUM = 0.9


@dataclass(frozen=True)
class Batch:
    """What one step reads.

    Attributes
    ----------
    pixels
        Stored squares, uint8, shape (N, H, W); (N, 0, 0) where the network reads none.
    clinical
        float32, shape (N, K).
    labels
        float32, shape (N, 14), NaN for unknown.
    rows
        Positions of the images in their split, int64, shape (N,).
    """

    pixels: torch.Tensor
    clinical: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; `rows` stay where they are."""
        pixels, clinical, labels = (
            tensor.to(device, non_blocking=True) for tensor in (self.pixels, self.clinical, self.labels)
        )
        return Batch(pixels, clinical, labels, self.rows)

    def parts(self, number: int) -> "list[Batch]":
        """The batch cut into `number` parts of nearly equal size."""
        cut = zip(*(torch.tensor_split(tensor, number) for tensor in vars(self).values()), strict=True)
        return [Batch(*tensors) for tensors in cut if len(tensors[0])]


@dataclass(frozen=True)
class Moment:
    """Where in a run a step is.

    Attributes
    ----------
    progress
        Share of the run that is done, 0 to 1, whatever the number of workers.
    seed
        Seed of everything that is drawn in this step on this worker.
    plateaus
        How often the schedule has divided the learning rate.
    """

    progress: float
    seed: int
    plateaus: int = 0


def step_seed(seed: int, epoch: int, images: int, rank: int) -> int:
    """Seed of a worker's step: the same in every run with this seed, so that a resumed run draws what it would have drawn.

    Parameters
    ----------
    images
        Images of the epoch that came before, over all workers.
    """
    key = struct.pack("<4q", seed, epoch, images, rank)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def learning_rate_factor(progress: float, warmup: float, schedule: Schedule = "cosine", plateaus: int = 0) -> float:
    """Linear warm-up to 1, then what the schedule says; `progress` runs from 0 to 1 over the whole run."""
    if progress < warmup:
        return progress / warmup
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return _PLATEAU_FACTOR**plateaus if schedule == "plateau" else 1.0


def count_plateaus(val_losses: Sequence[float]) -> int:
    """How often the plateau schedule has divided the rate after epochs with these validation losses."""
    plateaus, waited, best = 0, 0, math.inf
    for loss in val_losses:
        if loss < best:
            best, waited = loss, 0
            continue
        waited += 1
        if waited > _PLATEAU_PATIENCE:
            plateaus, waited = plateaus + 1, 0
    return plateaus


def out_of_patience(val_aucs: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` epochs brought no better validation AUC than one before them; never where patience is 0."""
    if not patience or len(val_aucs) <= patience:
        return False
    return max(val_aucs[-patience:]) <= max(val_aucs[:-patience])


def make_optimizer(model: Network, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimiser: biases, normalisation and scales without decay; `head_rate` times the rate outside the backbone."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_backbone = bool(model.backbone) and name.startswith(model.backbone)
        # A number a channel, in whatever shape: a bias, a normalisation, ConvNeXt's scale of a layer.
        is_vector = parameter.numel() == max(parameter.shape, default=1)
        decay = 0.0 if is_vector else settings.weight_decay
        groups.setdefault((1.0 if in_backbone else settings.head_rate, decay), []).append(parameter)
    described = [
        {"params": parameters, "weight_decay": decay, "rate_factor": rate_factor}
        for (rate_factor, decay), parameters in groups.items()
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(described, lr=settings.learning_rate, momentum=_MOMENTUM)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(described, lr=settings.learning_rate)


@dataclass
class TrainingStep:
    """One optimiser step on one worker.

    Attributes
    ----------
    model
        The network, which may be wrapped by DDP.
    precision
        "bf16" or "float32".
    size
        Pixels an edge that the network sees; None for the stored ones.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    settings: TrainSettings
    precision: str
    size: int | None = None
    averaged: AveragedWeights | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __call__(self, batch: Batch, moment: Moment) -> torch.Tensor:
        """Run the step; return the loss, a detached scalar on the device."""
        settings = self.settings
        self._set_rates(moment)
        torch.manual_seed(moment.seed)
        self.generator.manual_seed(moment.seed)
        self.optimizer.zero_grad(set_to_none=True)
        parts = batch.parts(settings.accumulate)
        losses = []
        for number, part in enumerate(parts, start=1):
            # DDP sums the gradients of all workers once a step, with the last part.
            with self._without_exchange() if number < len(parts) else contextlib.nullcontext():
                losses.append(self._backward(part, len(part) / len(batch)))
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update()
        return torch.stack(losses).sum()

    def _backward(self, batch: Batch, share: float) -> torch.Tensor:
        images = vision.as_input(batch.pixels, self.size)
        images = augment(images, self.settings.augmentation, self.settings.augment, self.generator)
        with autocast(images.device, self.precision):
            logits = self.model(images, batch.clinical, batch.labels)
        labels = batch.labels
        if logits.dim() == 3:
            # Members of an ensemble learn side by side, each from all labels.
            labels, logits = labels.repeat_interleave(logits.shape[1], dim=0), logits.flatten(0, 1)
        loss = self.loss(logits, labels) * share
        loss.backward()
        return loss.detach()

    def _without_exchange(self) -> contextlib.AbstractContextManager[None]:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else contextlib.nullcontext()

    def _set_rates(self, moment: Moment) -> None:
        settings = self.settings
        factor = learning_rate_factor(moment.progress, settings.warmup, settings.schedule, moment.plateaus)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * group["rate_factor"] * factor


def choose_precision(wanted: str, device: torch.device) -> str:
    """The arithmetic for "auto": bf16 where the processor multiplies it natively, else float32, which is faster there."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bfloat16, or an inactive one for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@torch.inference_mode()
def logits_of(model: nn.Module, pixels: torch.Tensor, clinical: torch.Tensor, precision: str, size: int | None) -> torch.Tensor:
    """Logits (float32, shape (N, 14)) of a batch of stored squares, the model in evaluation mode."""
    images = vision.as_input(pixels, size)
    with autocast(images.device, precision):
        return model(images, clinical).float()


@torch.inference_mode()
def probabilities(
    model: nn.Module,
    pixels: torch.Tensor,
    clinical: torch.Tensor,
    precision: str,
    *,
    size: int | None = None,
    tta: Views = "none",
) -> torch.Tensor:
    """Probabilities of a batch of stored squares, in evaluation mode.

    Parameters
    ----------
    pixels
        uint8, shape (N, H, W).
    clinical
        float32, shape (N, K).
    size
        Pixels an edge that the network sees; None for the stored ones.
    tta
        Test-time augmentation: the mean over so many views of each image.

    Returns
    -------
    torch.Tensor
        float32, shape (N, 14).
    """
    model.eval()
    images = vision.as_input(pixels, size)
    with autocast(images.device, precision):
        seen = [model(view, clinical).float().sigmoid() for view in views(images, tta)]
    return torch.stack(seen).mean(dim=0)
