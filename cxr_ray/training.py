"""The training step: settings, schedule, augmentation, one optimiser step, and scoring a batch.

Nothing here knows of Ray: the step runs, and can be measured, wherever torch is.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from cxr_ray import vision
from cxr_ray.losses import ClassWeights, weighted_bce
from cxr_ray.presets import Encoding
from cxr_ray.settings import Settings


class TrainSettings(Settings):
    """Settings of `cxr-ray train`."""

    data: str = Field(description="Dataset to train on: the folder or URI that 'cxr-ray ingest' wrote.")
    out: str = Field(description="Folder or URI of the run; the bundle is written to OUT/bundle.")
    preset: str = Field("multi-input", description="Network.")
    encoding: Encoding = Field("paper", description="Clinical inputs: 'paper' for the 17 numbers, 'none' for the image alone.")
    init: str = Field("random", description="Initial weights: 'random', 'imagenet', or a bundle or weights file.")
    workers: int = Field(1, ge=1, description="Training processes (DDP), one a GPU where there are GPUs.")
    gpu: bool = Field(default=False, description="Give each worker a GPU.")
    cpus_per_worker: float = Field(
        0.5, gt=0, description="Logical CPUs reserved for a worker; leave some of the cluster's to the data readers."
    )
    epochs: int = Field(10, ge=1, description="Passes over the training split.")
    batch_size: int = Field(32, ge=1, description="Images an optimiser step, over all workers.")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's peak learning rate.")
    head_rate: float = Field(
        10.0, gt=0, description="Learning rate of clinical branch and last layer, as a multiple of the backbone's."
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay; 0 turns it off.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the run in which the learning rate rises; 0 turns it off.")
    augment: float = Field(1.0, ge=0, description="Strength of flips, shifts, turns and contrast; 0 turns augmentation off.")
    precision: Literal["bf16", "float32"] = Field("bf16", description="Arithmetic of forward and backward pass.")
    select: Literal["best", "last"] = Field(
        "best", description="Checkpoint that becomes the bundle: best validation AUC, or the last (few validation images)."
    )
    seed: int = Field(0, ge=0, description="Seed of weights, order and augmentation.")
    shuffle_buffer: int = Field(
        2048, ge=0, description="Images among which the next is drawn; 0 keeps the order of the shards."
    )
    max_failures: int = Field(
        3, ge=0, description="Lost workers to survive by going on from the last checkpoint; 0 fails at once."
    )
    resume: bool = Field(default=False, description="Go on with the run that OUT holds.")


@dataclass(frozen=True)
class Batch:
    """What one step reads: pixels uint8 (N, H, W), clinical float32 (N, K), labels float32 (N, 14) with NaN for unknown."""

    pixels: torch.Tensor
    clinical: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in (self.pixels, self.clinical, self.labels)))


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up to 1, then a cosine to 0; `progress` runs from 0 to 1 over the whole run, whatever the world size."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW that leaves biases and normalisation out of the weight decay and lets what is not backbone learn faster."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate_factor = 1.0 if name.startswith("features.") else settings.head_rate
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate_factor, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "rate_factor": rate_factor}
            for (rate_factor, decay), parameters in groups.items()
        ],
        lr=settings.learning_rate,
    )


def augment(images: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Random mirror, turn (5 degrees), shift (4 %), scale (5 %) and contrast (10 %) of each image, times `strength`.

    Parameters
    ----------
    images
        float32, shape (N, 3, H, W).
    generator
        A CPU generator: the draws do not depend on the device.
    """
    if strength == 0:
        return images

    def drawn(limit: float) -> torch.Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit * strength

    angle, scale = drawn(math.radians(5)), 1 + drawn(0.05)
    mirror = 1 - 2 * (torch.rand(len(images), generator=generator) < 0.5).float()
    shift_x, shift_y = drawn(0.08), drawn(0.08)
    rows = torch.stack(
        [
            torch.stack([mirror * scale * angle.cos(), -scale * angle.sin(), shift_x], dim=1),
            torch.stack([mirror * scale * angle.sin(), scale * angle.cos(), shift_y], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(rows.to(images.device), list(images.shape), align_corners=False)
    moved = F.grid_sample(images[:, :1], grid, padding_mode="border", align_corners=False)
    contrast = (1 + drawn(0.10)).to(images.device)
    moved = moved * contrast[:, None, None, None]
    return moved.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


@dataclass
class TrainingStep:
    """One optimiser step on one worker; the model may be wrapped by DDP."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    weights: ClassWeights
    settings: TrainSettings
    generator: torch.Generator

    def __call__(self, batch: Batch, progress: float) -> torch.Tensor:
        """Run the step at `progress` (0 to 1 over the run); return the loss as a detached scalar."""
        for group in self.optimizer.param_groups:
            rate = self.settings.learning_rate * group["rate_factor"]
            group["lr"] = rate * learning_rate_factor(progress, self.settings.warmup)
        images = augment(vision.as_input(batch.pixels), self.settings.augment, self.generator)
        with autocast(images.device, self.settings.precision):
            logits = self.model(images, batch.clinical)
        loss = weighted_bce(logits, batch.labels, self.weights)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bfloat16, or an inactive one for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@torch.inference_mode()
def probabilities(model: nn.Module, pixels: torch.Tensor, clinical: torch.Tensor, precision: str) -> torch.Tensor:
    """Probabilities (float32, shape (N, 14)) of a batch of stored squares (uint8, shape (N, H, W)), in evaluation mode."""
    model.eval()
    images = vision.as_input(pixels)
    with autocast(images.device, precision):
        logits = model(images, clinical)
    return logits.float().sigmoid()
