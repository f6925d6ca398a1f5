"""Settings of `cxr-ray evaluate`; its own module, because who lists them need not wait for torch."""

from typing import Literal

from pydantic import Field

from cxr_ray.settings import Settings
from cxr_ray.train_settings import Views

Withhold = Literal["nothing", "clinical"]


class EvaluateSettings(Settings):
    """Settings of `cxr-ray evaluate`."""

    bundle: str = Field(description="Folder or URI of the bundle.")
    data: str = Field(description="Folder or URI of the dataset.")
    split: Literal["train", "val", "test"] = Field("test", description="Split to score.")
    out: str | None = Field(None, description="Folder or URI for evaluation.json and roc.png; none are written without it.")
    withhold: Withhold = Field("nothing", description="'clinical' treats age, sex, view and history as unknown: an ablation.")
    tta: Views = Field("none", description="Test-time augmentation: the mean over views of each image (mirrored, ten crops).")
    resamples: int = Field(1000, ge=100, le=100_000, description="Bootstrap resamples of patients.")
    batch_size: int = Field(64, ge=1, description="Images a forward pass.")
    workers: int = Field(1, ge=1, description="Processes that run the network.")
    cpus_per_worker: float = Field(1.0, gt=0, description="Logical CPUs reserved for a process.")
    gpu: bool = Field(default=False, description="Give each process a GPU.")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap.")
