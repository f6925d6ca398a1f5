"""Settings of training; its own module, because who lists or checks them need not wait for torch."""

from typing import Literal

from pydantic import Field, field_validator

from cxr_ray.clinical import Encoding
from cxr_ray.placement import reserved
from cxr_ray.settings import Settings

Loss = Literal["bce", "weighted-bce", "balanced-bce", "asymmetric"]
Optimizer = Literal["adamw", "adam", "sgd"]
Schedule = Literal["cosine", "plateau", "constant"]
Augmentation = Literal["flip", "mild", "crop", "strong"]
# Test-time augmentation: how many views of an image are averaged.
Views = Literal["none", "flip", "ten-crop"]


class TrainSettings(Settings):
    """Settings of `cxr-ray train`; what a preset's recipe names replaces the defaults here, and a user's choice both."""

    data: str = Field(description="Dataset to train on: the folder or URI that 'cxr-ray ingest' wrote.")
    out: str = Field(description="Folder or URI of the run; the bundle is written to OUT/bundle.")
    preset: str = Field("multi-input", description="Network; 'cxr-ray presets' lists them.")
    variant: str | None = Field(None, description="Which of the preset's networks; its first if not given.")
    meta: bool | None = Field(None, description="Whether the network reads age, sex and view; as published if not given.")
    history: bool | None = Field(
        None, description="Whether the network reads the findings of earlier visits; as published if not given."
    )
    encoding: Encoding | None = Field(
        None, description="Reading of the clinical inputs: 'paper' (17 numbers) or 'rich' (all that the history offers)."
    )
    init: str = Field("random", description="Initial weights: 'random', 'imagenet', or a bundle or weights file.")
    input_size: int | None = Field(None, ge=1, description="Pixels an edge that the network sees; the dataset's if not given.")

    workers: str = Field(
        "1", description="Training processes (DDP), one a GPU where there are GPUs: a number, or a range such as 2..8."
    )
    resize_seconds: float = Field(
        60.0, ge=0, description="Seconds between two looks whether a range of workers can have more of them."
    )
    gpu: bool = Field(default=False, description="Give each worker a GPU.")
    cpus_per_worker: float = Field(
        0.5, gt=0, description="Logical CPUs reserved for a worker; leave some of the cluster's to the data readers."
    )
    threads: int = Field(
        0, ge=0, description="CPU threads that a worker computes with; 0 shares its node's cores equally. Not with gpu."
    )

    epochs: int = Field(10, ge=1, description="Passes over the training split.")
    batch_size: int = Field(32, ge=1, description="Images an optimiser step, over all workers.")
    accumulate: int = Field(1, ge=1, description="Forward and backward passes that an optimiser step is divided into.")
    optimizer: Optimizer = Field("adamw", description="Optimiser.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    head_rate: float = Field(10.0, gt=0, description="Learning rate of what is not backbone, as a multiple of the backbone's.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay; 0 turns it off.")
    schedule: Schedule = Field(
        "cosine", description="Learning rate after warm-up: cosine to 0, a tenth at each plateau of validation loss, constant."
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the run in which the learning rate rises; 0 turns it off.")
    clip: float = Field(0.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    ema: float = Field(0.0, ge=0, lt=1, description="Decay a step of the averaged weights that are validated; 0 for none.")
    loss: Loss = Field("weighted-bce", description="Loss over the fourteen findings.")
    weight_cap: float = Field(
        0.0, ge=0, description="Largest ratio of a finding's positive to its negative weight; 0 for no limit."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Distance of the targets from 0 and 1.")
    prior_bias: bool = Field(default=False, description="Start the last layer's biases at the prevalence of each finding.")
    augmentation: Augmentation = Field("mild", description="Kind of random changes to the training images.")
    augment: float = Field(1.0, ge=0, description="Strength of the augmentation; 0 turns it off.")
    withhold: float = Field(
        0.0, ge=0, lt=1, description="Share of training images whose age, sex, view or history is hidden; 0 hides nothing."
    )
    window: int = Field(
        64, ge=1, description="MiB of images that a worker shuffles together, besides the order of their groups."
    )
    seed: int = Field(0, ge=0, description="Seed of weights, order and augmentation.")

    precision: Literal["auto", "bf16", "float32"] = Field(
        "auto", description="Arithmetic of forward and backward pass; auto is bf16 where the processor has it."
    )
    compile: bool = Field(default=False, description="Compile the network with torch.compile; costs minutes at the start.")

    select: Literal["best", "last"] = Field(
        "best", description="Checkpoint that becomes the bundle: best validation AUC, or the last (few validation images)."
    )
    patience: int = Field(0, ge=0, description="Epochs without a better validation AUC before the run ends; 0 for all epochs.")
    keep: int = Field(2, ge=1, description="Checkpoints that are kept, the best by validation AUC.")
    max_failures: int = Field(
        3, ge=0, description="Lost workers to survive by going on from the last checkpoint; 0 fails at once."
    )
    mlflow: str | None = Field(None, description="Tracking URI of an MLflow server that the run is reported to.")
    resume: bool = Field(default=False, description="Go on with the run that OUT holds.")

    @field_validator("workers", mode="before")
    @classmethod
    def _workers(cls, value: object) -> str:
        text = str(value)
        low, dots, high = text.partition("..")
        if not low.isdecimal() or (dots and not high.isdecimal()):
            raise ValueError("give a number of at least 1, or a range such as 2..8")
        if int(low) < 1 or (dots and int(high) < int(low)):
            raise ValueError("give a number of at least 1, or a range such as 2..8 that does not fall")
        return text

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        low, _, high = self.workers.partition("..")
        return int(low), int(high or low)

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for one worker."""
        return reserved(self.cpus_per_worker, gpu=self.gpu)
